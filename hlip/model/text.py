"""The text tower: a BERT of the `transformers` library and a projection.

Shapes: N texts, W width of the BERT, E embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.plain import as_texts
from .config import BERT_BASE, TextConfig
from .weights import find_weights, load_strict, local_folder, read_json, read_weights, shorten

CONFIG_FILES = ("config.json",)
TOKENIZER_FILES = ("config.json", "tokenizer*.json", "vocab.*", "merges.txt", "special_tokens_map.json")
# CXR-BERT's weights are a BERT's beside heads for its own training; its hub folder brings a class in code for them.
CXR_TYPE = "cxr-bert"
CXR_HEADS = ("cls.", "cls_projection_head.", "bert.pooler.")
MOST_LAYERS = 1000
BERT_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "layer_norm_eps", "pad_token_id",
)  # fmt: skip


class TextTower(nn.Module):
    """Embed texts.

    Args:
        source: folder or hub name of configuration and tokenizer; that of `config` if None.
        pretrained: read the weights there too. Else they are random, of BERT's base size if nothing of `source` is at
            hand; the tokenizer is then asked for when the first text comes.

    The tokenizer is that of `config` where `source` is a folder without one. Code that lies beside weights
    or tokenizer is never run: CXR-BERT's weights are read into transformers' BERT.

    Raises:
        ValueError: nothing usable at `source`; names it and says why.
    """

    def __init__(self, config: TextConfig, embed_dim: int, source: Path | str | None = None, pretrained: bool = False):
        super().__init__()
        try:
            from transformers import AutoModel, BertConfig
        except ImportError as error:
            raise ImportError("the text tower needs transformers: pip install 'hlip-kernels[text]'") from error

        self.config = config
        self.source = str(source or config.name)
        bare = source is not None and Path(source).is_dir() and not has_tokenizer(Path(source))
        self.tokenizer_source = config.name if bare else self.source
        try:
            if pretrained:
                self.transformer = _pretrained(local_folder(self.source, *TOKENIZER_FILES, weights=True))
            else:
                there = source is not None or Path(self.source).is_dir()
                bert = _bert_config(local_folder(self.source, *CONFIG_FILES)) if there else BertConfig(**BERT_BASE)
                _check_sizes(bert)
                self.transformer = AutoModel.from_config(bert, add_pooling_layer=False, trust_remote_code=False)
            _check_is_bert(self.transformer)
        except ImportError:
            raise  # says what to install
        except Exception as error:  # a damaged configuration may fail anywhere in transformers
            raise self._unreadable(self.source, error) from error
        longest = self.transformer.config.max_position_embeddings
        if config.context_length > longest:
            raise ValueError(
                f"text tower {self.source!r} reads {longest} tokens, context_length is {config.context_length}"
            )
        self.proj = nn.Linear(self.transformer.config.hidden_size, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        if config.locked:
            self.transformer.requires_grad_(False)
            for layer in self._unlocked():
                layer.requires_grad_(True)

    def _unlocked(self) -> list[nn.Module]:
        """The layers of a locked tower that are trained."""
        layers, count = list(self.transformer.encoder.layer), self.config.unlocked_layers
        if count > len(layers):
            raise ValueError(f"text tower {self.source!r} has {len(layers)} layers, unlocked_layers is {count}")
        return layers[len(layers) - count :]

    @staticmethod
    def _unreadable(source: str, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())
        return ValueError(f"text tower {source!r}: not a readable BERT folder or hub name ({reason})")

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer, BertTokenizerFast

        source = self.tokenizer_source
        try:
            folder = local_folder(source, *TOKENIZER_FILES)
            if _is_cxr(folder):
                return BertTokenizerFast.from_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ImportError:
            raise
        except Exception as error:  # damaged files may fail anywhere in transformers and tokenizers
            raise self._unreadable(source, error) from error

    def train(self, mode: bool = True) -> TextTower:
        super().train(mode)
        if self.config.locked:
            self.transformer.eval()
            for layer in self._unlocked():
                layer.train(mode)
        return self

    @property
    def fixed(self) -> bool:
        """Whether no part of the transformer is trained, so that the features of a text never change."""
        return self.config.locked and self.config.unlocked_layers == 0

    def features(self, texts: Sequence[str]) -> Tensor:
        """Pooled states of the BERT, before the projection: (N, W)."""
        tokens = self._tokens(texts).to(self.proj.weight.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.fixed):
            hidden = self.transformer(**tokens).last_hidden_state
        if self.config.pooling == "cls":
            return hidden[:, 0]
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def _tokens(self, texts: Sequence[str]) -> Any:
        texts = as_texts(texts)
        try:
            tokens = self.tokenizer(
                texts, padding=True, truncation=True, max_length=self.config.context_length, return_tensors="pt"
            )
            last, known = int(tokens["input_ids"].max()), self.transformer.config.vocab_size
            if last >= known:
                raise ValueError(f"its tokenizer gives token {last}, the tower has {known}")
        except ImportError:
            raise
        except Exception as error:  # damaged files may fail anywhere in tokenizers
            raise self._unreadable(self.tokenizer_source, error) from error
        return tokens

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(N, E), not normalised."""
        return self.proj(self.features(texts))


def has_tokenizer(folder: Path) -> bool:
    return any(each for pattern in ("tokenizer*.json", "vocab.*") for each in folder.glob(pattern))


def _is_cxr(folder: Path) -> bool:
    said = [read_json(path) for name in ("config.json", "tokenizer_config.json") if (path := folder / name).is_file()]
    return any(
        each.get("model_type") == CXR_TYPE or str(each.get("tokenizer_class")).startswith("CXRBert") for each in said
    )


def _bert_config(folder: Path) -> Any:
    from transformers import AutoConfig, BertConfig

    content = read_json(folder / "config.json")
    if content.get("model_type") == CXR_TYPE:
        return BertConfig(**{key: content[key] for key in BERT_FIELDS if key in content})
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _check_sizes(config: Any) -> None:
    """Raises ValueError where there are too many layers to be tried; what else is too large, weights will not fit."""
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers!r}, expected 1 to {MOST_LAYERS}")


def _check_is_bert(model: Any) -> None:
    if not hasattr(getattr(model, "encoder", None), "layer") or not hasattr(model.config, "max_position_embeddings"):
        raise ValueError(f"{type(model).__name__} is not built as BERT is")


def _pretrained(folder: Path) -> Any:
    """A BERT with the weights of a folder.

    Raises:
        ValueError: weights that cannot be read, are missing, or are not finite; of CXR-BERT also any left over.
    """
    from transformers import AutoModel, BertModel

    if read_json(folder / "config.json").get("model_type") != CXR_TYPE:
        options = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
        try:
            with _quiet():  # the pooler, which checkpoints hold and nobody uses, is reported at length
                model, found = AutoModel.from_pretrained(folder, add_pooling_layer=False, **options)
        except Exception as error:  # damaged weights can raise anything
            raise ValueError(str(error) or type(error).__name__) from error
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing: {shorten(missing)}")
        if broken := [key for key, value in model.state_dict().items() if not value.isfinite().all()]:
            raise ValueError(f"{len(broken)} weights are not finite numbers: {shorten(broken)}")
        return model
    path = find_weights(folder)
    state = {key: value for key, value in read_weights(path).state.items() if not key.startswith(CXR_HEADS)}
    model = BertModel(_bert_config(folder), add_pooling_layer=False)
    load_strict(model, {key.removeprefix("bert."): value for key, value in state.items()}, path)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
