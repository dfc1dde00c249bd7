"""The text tower: a BERT of the `transformers` library and a projection.

What a folder says of its BERT and its tokenizer may come from anyone, and there are keys with which `transformers`
fetches and imports code (`_attn_implementation`, `auto_map`, ...). So no file is handed to that library: the
configuration is built of the values named in `BERT_FIELDS`, the tokenizer of `TOKENIZER_OPTIONS`, added tokens, and
`vocab.txt` or `tokenizer.json`. The library `tokenizers` parses the latter; it fetches and imports nothing.

Shapes: N texts, W width of the BERT, E embedding.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..read.safe import as_texts, parse_json, read_text
from .config import BERT_BASE, TextConfig
from .weights import check_fit, find_weights, load_strict, local_folder, read_weights

CONFIG_FILES = ("config.json",)
TOKENIZER_FILES = ("config.json", "tokenizer*.json", "vocab.txt", "special_tokens_map.json", "added_tokens.json")
# CXR-BERT's weights are a BERT's beside heads for its own training; its hub folder brings a class in code for them.
CXR_TYPE = "cxr-bert"
CXR_HEADS = ("cls.", "cls_projection_head.", "pooler.")
# Least and largest values; a number is an integer where its least value is one.
BERT_FIELDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2**24),
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
    "pad_token_id": (0, 2**24),
}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")  # there are some that import packages
# Another value makes another network of the same weights.
PLAIN = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
SPECIAL_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
UNBOUNDED = ("Replace", "Prepend", "Split")  # steps of a tokenizer
TOKENIZER_OPTIONS = {
    "do_lower_case": bool, "tokenize_chinese_chars": bool, "strip_accents": bool, "model_max_length": int,
    "split_special_tokens": bool, "padding_side": str, "truncation_side": str,
    **dict.fromkeys((*SPECIAL_TOKENS, "bos_token", "eos_token"), str),
}  # fmt: skip
# The classes whose tokens are those of a BERT, by a vocabulary and the options. Others are what tokenizer.json says.
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast", "CXRBertTokenizer")
ADDED_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class TextFiles:
    """The files of a text tower that a checkpoint holds in place of a folder.

    name: of the checkpoint, for messages.
    texts: content of the JSON files by name.
    """

    name: str
    texts: Mapping[str, str]

    def __str__(self) -> str:
        return self.name


Source = Path | str | TextFiles


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
        try:
            if pretrained:
                self.transformer = _pretrained(local_folder(str(self.source), *TOKENIZER_FILES, weights=True))
            else:
                there = here or source is not None
                bert = read_bert_config(self.source) if there else bert_config(BERT_BASE)
                self.transformer = BertModel(bert, add_pooling_layer=False)
        except ImportError:
            raise  # says what to install
        except Exception as error:  # sizes that do not go together may fail anywhere in transformers
            raise _unreadable(self.source, error) from error
        longest = self.transformer.config.max_position_embeddings
        if config.context_length > longest:
            raise ValueError(
                f"text tower {str(self.source)!r} reads {longest} tokens, context_length is {config.context_length}"
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
            raise ValueError(f"text tower {str(self.source)!r} has {len(layers)} layers, unlocked_layers is {count}")
        return layers[len(layers) - count :]

    @functools.cached_property
    def tokenizer(self) -> Any:
        source = self.tokenizer_source
        try:
            return read_tokenizer(source)
        except ImportError:
            raise
        except Exception as error:  # damaged files may fail anywhere in transformers and tokenizers
            raise _unreadable(source, error) from error

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
            raise _unreadable(self.tokenizer_source, error) from error
        return tokens

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(N, E), not normalised."""
        return self.proj(self.features(texts))


def has_tokenizer(source: Source) -> bool:
    """Whether a folder or checkpoint holds one."""
    names = ("tokenizer.json", "vocab.txt")
    if isinstance(source, TextFiles):
        return any(name in source.texts for name in names)
    return any((Path(source) / name).is_file() for name in names)


def bert_config(content: Mapping[str, Any]) -> Any:
    """A `BertConfig` of the values in `content` that make a BERT's network. All else stays out of it.

    Raises:
        ValueError: another kind of model, or a value that is out of bounds; names the key.
    """
    from transformers import BertConfig

    kind = content.get("model_type", "bert")
    if kind not in ("bert", CXR_TYPE):
        raise ValueError(f"model_type is {_short(kind)}, expected 'bert'")
    for key, plain in PLAIN.items():
        if content.get(key, plain) != plain:
            raise ValueError(f"{key} is {_short(content[key])}, expected {plain!r}")
    fields: dict[str, Any] = {}
    for key, (least, most) in BERT_FIELDS.items():
        value = content.get(key)
        if value is None:
            continue
        check_number(key, value, least, most)
        fields[key] = value
    if (activation := content.get("hidden_act", "gelu")) not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {_short(activation)}, expected one of {', '.join(ACTIVATIONS)}")
    return BertConfig(**fields, hidden_act=activation, attn_implementation="sdpa")


def check_number(key: str, value: object, least: float, most: float) -> None:
    """Raises ValueError for something else than a number within bounds; an integer where `least` is one."""
    numbers = (int,) if isinstance(least, int) else (int, float)
    if type(value) not in numbers or not least <= value <= most:  # type: ignore[operator]
        name = "an integer" if numbers == (int,) else "a number"
        raise ValueError(f"{key} is {_short(value)}, expected {name} from {least} to {most}")


def _short(value: object) -> str:
    return f"{value!r:.80}"


def _unreadable(source: Source, error: Exception) -> ValueError:
    reason = " ".join((str(error) or type(error).__name__).split())
    return ValueError(f"text tower {str(source)!r}: not a readable BERT folder or hub name ({reason})")


def _files(source: Source, *patterns: str) -> Path | TextFiles:
    return source if isinstance(source, TextFiles) else local_folder(str(source), *patterns)


def _text(files: Path | TextFiles, name: str) -> str | None:
    """The content of a file; None if there is none."""
    if isinstance(files, TextFiles):
        return files.texts.get(name)
    return read_text(files / name) if (files / name).exists() else None


def _json(files: Path | TextFiles, name: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, if there is none."""
    try:
        text = _text(files, name)
        content = None if text is None else parse_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{_path(files, name)}: not readable ({error})") from error
    if not isinstance(content, dict):
        reason = "no such file" if text is None else "not readable (not a JSON object)"
        raise ValueError(f"{_path(files, name)}: {reason}")
    return content


def _path(files: Path | TextFiles, name: str) -> str:
    return f"{files}, {name}" if isinstance(files, TextFiles) else str(files / name)


def _options(files: Path | TextFiles, contents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The `TOKENIZER_OPTIONS` that are said. Raises ValueError where one is of another type; names file and key."""
    options: dict[str, Any] = {}
    for name, content in contents.items():
        for key, kind in TOKENIZER_OPTIONS.items():
            value = content.get(key)
            if key.endswith("_token") and isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if type(value) is not kind:
                raise ValueError(f"{_path(files, name)}: {key} is {_short(value)}, expected {kind.__name__}")
            options[key] = value
    return options


def _added_tokens(
    files: Path | TextFiles, contents: Mapping[str, Mapping[str, Any]], special: Collection[str]
) -> tuple[dict[int, Any], list[str]]:
    """Tokens beside the vocabulary by id, and special ones that take the next free ids.

    Raises:
        ValueError: something else than texts, flags and ids; names file and key.
    """
    from tokenizers import AddedToken

    def refuse(name: str, key: str, value: object, expected: str) -> ValueError:
        return ValueError(f"{_path(files, name)}: {key} is {_short(value)}, expected {expected}")

    extra: list[str] = []
    for name, settings in contents.items():
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = settings.get(key) or []
            texts: list[Any] = [value.get("content") if isinstance(value, dict) else value for value in _values(values)]
            if not isinstance(values, (list, dict)) or not all(type(text) is str and text for text in texts):
                raise refuse(name, key, values, "a list of texts")
            extra += texts
    name, key = "tokenizer_config.json", "added_tokens_decoder"
    said = contents[name].get(key)
    if said is None:  # as it was written before there was that key
        name, key = "added_tokens.json", "a token"
        special = {*special, *extra}
        older = _json(files, name) if _text(files, name) is not None else {}
        said = {}
        for text, index in older.items():
            said[index if type(index) is int else text] = {"content": text, "special": text in special}
    added: dict[int, Any] = {}
    for index, token in said.items() if isinstance(said, dict) else [(key, said)]:
        flags = {flag: token[flag] for flag in ADDED_FLAGS if flag in token} if isinstance(token, dict) else {}
        content = token.get("content") if isinstance(token, dict) else None
        if not re.fullmatch(r"[0-9]{1,9}", str(index)) or not 0 <= int(index) < BERT_FIELDS["vocab_size"][1]:
            raise refuse(name, key, {index: token}, f"an id below {BERT_FIELDS['vocab_size'][1]}")
        if type(content) is not str or not content or not all(type(flag) is bool for flag in flags.values()):
            raise refuse(name, key, token, f"a text, and flags ({', '.join(ADDED_FLAGS)})")
        added[int(index)] = AddedToken(content, **flags)
    return dict(sorted(added.items())), extra


def _values(content: Any) -> list[Any]:
    return list(content.values()) if isinstance(content, dict) else content if isinstance(content, list) else []


def read_bert_config(source: Source) -> Any:
    """The `bert_config` of a folder or hub name. Raises ValueError where there is none."""
    return bert_config(_json(_files(source, *CONFIG_FILES), "config.json"))


def _check_steps(path: str, content: Any) -> None:
    """Raises ValueError for a step that makes a short text a long one, or runs a pattern that may take for ever."""
    left = [content.get("normalizer"), content.get("pre_tokenizer")] if isinstance(content, dict) else []
    while left:
        step = left.pop()
        if isinstance(step, dict):
            if step.get("type") in UNBOUNDED:
                raise ValueError(f"{path}: a step {step['type']} may take any time or memory, and no BERT has one")
            left += [*step.get("normalizers", ()), *step.get("pretokenizers", ())]


def read_tokenizer(source: Source) -> Any:
    """A tokenizer of `tokenizer.json`, or of `vocab.txt`, and of the options and added tokens beside it.

    Its tokens are those of `AutoTokenizer` in transformers 5. A class of `BERT_CLASSES`, or none, takes the vocabulary
    and does the rest as a BERT; with another one, `tokenizer.json` says everything.

    Raises:
        ValueError: neither file is there, an option of another type, or one that asks for other tokens than can be had
            from `vocab.txt`. Damaged files may raise anything.
    """
    from tokenizers import Tokenizer, models
    from transformers import BertTokenizerFast, PreTrainedTokenizerFast

    files = _files(source, *TOKENIZER_FILES)
    names = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    contents = {name: _json(files, name) if _text(files, name) is not None else {} for name in names}
    kind = contents[names[0]].get("tokenizer_class") or contents.pop("config.json").get("tokenizer_class")
    contents.pop("config.json", None)
    if contents[names[0]].get("added_tokens_decoder") is not None:
        contents.pop("special_tokens_map.json")  # it is older
    options = _options(files, contents)
    special = {key: options.get(key, f"[{key.removesuffix('_token').upper()}]") for key in SPECIAL_TOKENS}
    added, extra = _added_tokens(files, contents, special.values())
    if (text := _text(files, "tokenizer.json")) is not None:
        _check_steps(_path(files, "tokenizer.json"), parse_json(text))
        backend = Tokenizer.from_str(text)
    elif (text := _text(files, "vocab.txt")) is not None:
        _check_plain(_path(files, names[0]), {**contents[names[0]], "tokenizer_class": kind})
        vocabulary = {line: i for i, line in enumerate(text.removesuffix("\n").split("\n"))}
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"]))
    else:
        raise ValueError(f"{files}: no tokenizer: neither tokenizer.json nor vocab.txt")
    for side, settings in (("truncation_side", backend.truncation), ("padding_side", backend.padding)):
        if settings:
            options.setdefault(side, settings["direction"])
    if backend.token_to_id(pad := (backend.padding or special)["pad_token"]) is not None:
        options.setdefault("pad_token", pad)
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.model, models.WordPiece) and (kind is None or kind in BERT_CLASSES):
        options = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True, **special, **options}
        _make_bert(backend, options)
        tokenizer = BertTokenizerFast(tokenizer_object=backend, added_tokens_decoder=added, **options)
    else:
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, model_input_names=inputs, added_tokens_decoder=added, **options
        )
    tokenizer.add_tokens(extra, special_tokens=True)
    for index, token in added.items():
        if (given := tokenizer.backend_tokenizer.token_to_id(token.content)) != index:
            raise ValueError(f"{files}: the added token {_short(token.content)} has id {given}, expected {index}")
    return tokenizer


def _check_plain(path: str, content: Mapping[str, Any]) -> None:
    """Raises ValueError where a vocabulary alone does not give the tokens that are asked for; names file and key."""
    kinds = (None, *BERT_CLASSES)
    usual: dict[str, tuple[Any, ...]]
    usual = {"tokenizer_class": kinds, "never_split": (None, []), "do_basic_tokenize": (None, True)}
    for key, plain in usual.items():
        if content.get(key) not in plain:
            expected = " or ".join(map(repr, plain[1:]))
            raise ValueError(f"{path}: {key} is {_short(content[key])}, expected {expected} beside vocab.txt")


def _make_bert(backend: Any, options: Mapping[str, Any]) -> None:
    """Give a tokenizer of a vocabulary all else that a BERT's has."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    backend.model = models.WordPiece(backend.get_vocab(with_added_tokens=False), unk_token=options["unk_token"])
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=options["do_lower_case"],
        strip_accents=options["strip_accents"],
        handle_chinese_chars=options["tokenize_chinese_chars"],
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens([options[key] for key in SPECIAL_TOKENS])
    ends: list[Any] = [(options[key], backend.token_to_id(options[key])) for key in ("sep_token", "cls_token")]
    backend.post_processor = processors.BertProcessing(*ends)


def _pretrained(folder: Path) -> Any:
    """A BERT with the weights of a folder. Heads for other tasks are left aside.

    Raises:
        ValueError: weights that cannot be read, are missing, or are not finite; of CXR-BERT also any left over.
    """
    from transformers import BertModel

    content = _json(folder, "config.json")
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
