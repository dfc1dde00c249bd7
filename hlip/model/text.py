"""The text tower: a BERT of the `transformers` library and a projection.

What a folder says of its BERT and its tokenizer may come from anyone, and there are keys with which `transformers`
fetches and imports code (`_attn_implementation`, `auto_map`, ...). So no file is handed to that library: the
configuration is built of the values named in `BERT_FIELDS`, the tokenizer of `TOKENIZER_OPTIONS`, added tokens, and
`vocab.txt` or `tokenizer.json`. The library `tokenizers` parses the latter; it fetches and imports nothing.

Shapes: N texts, W width of the BERT, E embedding.
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..read.safe import as_texts, short
from .config import BERT_BASE, TextConfig
from .tokenizer import (
    MOST_TOKENS,
    TOKENIZER_FILES,
    TOKENIZER_OPTIONS,
    Source,
    TextFiles,
    files_of,
    has_tokenizer,
    json_of,
    read_tokenizer,
)
from .weights import check_fit, find_weights, load_strict, local_folder, read_weights

CONFIG_FILES = ("config.json",)
# CXR-BERT's weights are a BERT's beside heads for its own training; its hub folder brings a class in code for them.
CXR_TYPE = "cxr-bert"
CXR_HEADS = ("cls.", "cls_projection_head.", "pooler.")
# Least and largest values; a number is an integer where its least value is one.
BERT_FIELDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, MOST_TOKENS),
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 2**10),
    "intermediate_size": (1, 2**18),
    "hidden_dropout_prob": (0.0, 1.0),
    "attention_probs_dropout_prob": (0.0, 1.0),
    "max_position_embeddings": (1, 2**20),
    "type_vocab_size": (1, 2**10),
    "initializer_range": (0.0, 1e3),
    "layer_norm_eps": (0.0, 1.0),
    "pad_token_id": (0, MOST_TOKENS),
}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")  # there are some that import packages
# Another value makes another network of the same weights.
PLAIN = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


class TextTower(nn.Module):
    """Embed texts.

    Args:
        source: folder or hub name of configuration and tokenizer, or a checkpoint's own; that of `config` if None.
        pretrained: read the weights there too. Else they are random, of BERT's base size if nothing of `source` is at
            hand; the tokenizer is then asked for when the first text comes.

    The tokenizer is that of `config` where `source` is a folder or checkpoint without one. Code that lies beside
    weights or tokenizer is never run: CXR-BERT's weights are read into transformers' BERT.

    Raises:
        ValueError: nothing usable at `source`; names it and says why.
    """

    def __init__(self, config: TextConfig, embed_dim: int, source: Source | None = None, pretrained: bool = False):
        super().__init__()
        try:
            from transformers import BertModel
        except ImportError as error:
            raise ImportError("the text tower needs transformers: pip install 'hlip-kernels[text]'") from error

        self.config = config
        self.source: Source = config.name if source is None else source
        here = isinstance(self.source, TextFiles) or Path(self.source).is_dir()
        bare = source is not None and here and not has_tokenizer(source)
        self.tokenizer_source: Source = config.name if bare else self.source
        with _reading(self.source):
            if pretrained:
                self.transformer = _pretrained(local_folder(str(self.source), *TOKENIZER_FILES, weights=True))
            else:
                there = here or source is not None
                bert = read_bert_config(self.source) if there else bert_config(BERT_BASE)
                self.transformer = BertModel(bert, add_pooling_layer=False)
        longest = self.transformer.config.max_position_embeddings
        if config.context_length > longest:
            raise ValueError(
                f"text tower {str(self.source)!r} reads {longest} tokens, context_length is {config.context_length}"
            )
        self.proj = nn.Linear(self.transformer.config.hidden_size, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        if config.locked:
            self.transformer.requires_grad_(False)
            norms = [module for module in self.transformer.modules() if isinstance(module, nn.LayerNorm)]
            for module in [*self._unlocked(), *(norms if config.train_norms else ())]:
                module.requires_grad_(True)

    def _unlocked(self) -> list[nn.Module]:
        """The parts of a locked tower that are trained, the last of its embeddings and layers."""
        parts = [self.transformer.embeddings, *self.transformer.encoder.layer]
        count = self.config.unlocked_layers
        if count > len(parts):
            have = f"has embeddings and {len(parts) - 1} layers"
            raise ValueError(f"text tower {str(self.source)!r} {have}, unlocked_layers is {count}")
        return parts[len(parts) - count :]

    @functools.cached_property
    def tokenizer(self) -> Any:
        with _reading(self.tokenizer_source):
            return read_tokenizer(self.tokenizer_source)

    def files(self) -> dict[str, str]:
        """The content of `TextFiles`: plain values from which the tower is built again, without its weights. No
        tokenizer is among them where none is to be had."""
        bert = {key: getattr(self.transformer.config, key) for key in (*BERT_FIELDS, "hidden_act")}
        texts = {"config.json": json.dumps(bert)}
        try:
            tokenizer = self.tokenizer
        except ValueError:
            return texts
        options = {key: tokenizer.init_kwargs.get(key) for key in TOKENIZER_OPTIONS}
        options |= {key: str(value) for key, value in options.items() if key.endswith("_token") and value is not None}
        options["tokenizer_class"] = type(tokenizer).__name__
        backend = tokenizer.backend_tokenizer.to_str()
        return {**texts, "tokenizer.json": backend, "tokenizer_config.json": json.dumps(options)}

    def train(self, mode: bool = True) -> TextTower:
        super().train(mode)
        if self.config.locked and not self.config.locked_dropout:
            self.transformer.eval()
            for layer in self._unlocked():
                layer.train(mode)
        return self

    @property
    def fixed(self) -> bool:
        """True if nothing of the transformer is trained or drawn, so that the features of a text never change."""
        config = self.config
        return config.locked and not (config.unlocked_layers or config.train_norms or config.locked_dropout)

    def features(self, texts: Sequence[str]) -> Tensor:
        """Pooled states of the BERT, before the projection: (N, W)."""
        tokens = self._tokens(texts).to(self.proj.weight.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.fixed):
            hidden = self.transformer(**tokens).last_hidden_state
        if self.config.pooling == "cls":
            return hidden[:, 0]
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def cleaned(self, texts: Sequence[str]) -> list[str]:
        """The texts as the tokenizer takes them."""
        texts = as_texts(texts)
        return [clean_text(text) for text in texts] if self.config.clean else texts

    def _tokens(self, texts: Sequence[str]) -> Any:
        texts = self.cleaned(texts)
        tokenizer = self.tokenizer
        with _reading(self.tokenizer_source):
            tokens = tokenizer(
                texts, padding=True, truncation=True, max_length=self.config.context_length, return_tensors="pt"
            )
            last, most = int(tokens["input_ids"].max()), self.transformer.config.vocab_size
            if last >= most:
                raise ValueError(f"its tokenizer gives token {last}, the tower has {most}")
        return tokens

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(N, E), not normalised."""
        return self.proj(self.features(texts))


def clean_text(text: str) -> str:
    """The text with wrongly decoded characters mended, HTML's decoded (twice, as some are encoded twice), and white
    space made single. Case stays.

    >>> clean_text("T2 &amp;amp; FLAIR  x")
    'T2 & FLAIR x'

    Source: open_clip's tokenizers, which released models were trained with.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ImportError("the model's texts are cleaned by ftfy: pip install 'hlip-kernels[text]'") from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def bert_config(content: Mapping[str, Any]) -> Any:
    """A `BertConfig` of the values in `content` that make a BERT's network. All else stays out of it.

    Raises:
        ValueError: another kind of model, or a value that is out of bounds; names the key.
    """
    from transformers import BertConfig

    kind = content.get("model_type", "bert")
    if kind not in ("bert", CXR_TYPE):
        raise ValueError(f"model_type is {short(kind)}, expected 'bert'")
    for key, plain in PLAIN.items():
        if content.get(key, plain) != plain:
            raise ValueError(f"{key} is {short(content[key])}, expected {plain!r}")
    fields = {key: content[key] for key in BERT_FIELDS if content.get(key) is not None}
    for key, value in fields.items():
        check_number(key, value, *BERT_FIELDS[key])
    if (activation := content.get("hidden_act", "gelu")) not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {short(activation)}, expected one of {', '.join(ACTIVATIONS)}")
    return BertConfig(**fields, hidden_act=activation, attn_implementation="sdpa")


def check_number(key: str, value: object, least: float, most: float) -> None:
    """Raises ValueError for something else than a number within bounds; an integer where `least` is one."""
    numbers = (int,) if isinstance(least, int) else (int, float)
    if type(value) not in numbers or not least <= value <= most:  # type: ignore[operator]
        name = "an integer" if numbers == (int,) else "a number"
        raise ValueError(f"{key} is {short(value)}, expected {name} from {least} to {most}")


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Raise ValueError, which names `source`, for any error within: damaged files, and sizes that do not go together,
    may fail anywhere in transformers and tokenizers."""
    try:
        yield
    except ImportError:
        raise  # says what to install
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(f"text tower {str(source)!r}: not a readable BERT folder or hub name ({reason})") from error


def read_bert_config(source: Source) -> Any:
    """The `bert_config` of a folder or hub name. Raises ValueError where there is none."""
    return bert_config(json_of(files_of(source, *CONFIG_FILES), "config.json"))


def _pretrained(folder: Path) -> Any:
    """A BERT with the weights of a folder. Heads for other tasks are left aside.

    Raises:
        ValueError: weights that cannot be read, are missing, or are not finite; of CXR-BERT also any left over.
    """
    from transformers import BertModel

    content = json_of(folder, "config.json")
    config, path = bert_config(content), find_weights(folder)
    state = {_bert_key(key): value for key, value in read_weights(path).state.items()}
    with torch.device("meta"):  # a configuration larger than its weights takes no memory
        planned = BertModel(config, add_pooling_layer=False)
    if content.get("model_type") == CXR_TYPE:
        state = {key: value for key, value in state.items() if not key.startswith(CXR_HEADS)}
    else:
        state = {key: value for key, value in state.items() if key in planned.state_dict()}
    check_fit(planned, state, path)
    with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced: the caller's generator stays as it is
        model = BertModel(config, add_pooling_layer=False)
    load_strict(model, state, path)
    return model.eval()


def _bert_key(key: str) -> str:
    """As transformers calls it now: a BERT within another model, and the spelling of TensorFlow's BERT."""
    key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key.removeprefix("bert."))
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
