"""The files of a text tower, and its tokenizer. See `hlip.model.text` on why none of them is handed to a library."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..read.safe import parse_json, read_text, short
from .weights import local_folder

MOST_TOKENS = 2**24  # that a text tower may know
TOKENIZER_FILES = ("config.json", "tokenizer*.json", "vocab.txt", "special_tokens_map.json", "added_tokens.json")
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


def has_tokenizer(source: Source) -> bool:
    """Whether a folder or checkpoint holds one."""
    names = ("tokenizer.json", "vocab.txt")
    if isinstance(source, TextFiles):
        return any(name in source.texts for name in names)
    return any((Path(source) / name).is_file() for name in names)


def files_of(source: Source, *patterns: str) -> Path | TextFiles:
    return source if isinstance(source, TextFiles) else local_folder(str(source), *patterns)


def text_of(files: Path | TextFiles, name: str) -> str | None:
    """The content of a file; None if there is none."""
    if isinstance(files, TextFiles):
        return files.texts.get(name)
    return read_text(files / name) if (files / name).exists() else None


def json_of(files: Path | TextFiles, name: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, if there is none."""
    try:
        text = text_of(files, name)
        content = None if text is None else parse_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path_of(files, name)}: not readable ({error})") from error
    if not isinstance(content, dict):
        reason = "no such file" if text is None else "not readable (not a JSON object)"
        raise ValueError(f"{path_of(files, name)}: {reason}")
    return content


def path_of(files: Path | TextFiles, name: str) -> str:
    return f"{files}, {name}" if isinstance(files, TextFiles) else str(files / name)


def _options(files: Path | TextFiles, contents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The `TOKENIZER_OPTIONS` that are said. Raises ValueError where one is of another type; names file and key."""
    options: dict[str, Any] = {}
    for name, content in contents.items():
        for key, kind in TOKENIZER_OPTIONS.items():
            value = content.get(key)
            if key.endswith("_token") and isinstance(value, dict):
                value = value.get("content")
            if type(value) is kind:
                options[key] = value
            elif value is not None:
                raise ValueError(f"{path_of(files, name)}: {key} is {short(value)}, expected {kind.__name__}")
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
        return ValueError(f"{path_of(files, name)}: {key} is {short(value)}, expected {expected}")

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
        older = json_of(files, name) if text_of(files, name) is not None else {}
        said = {}
        for text, index in older.items():
            said[index if type(index) is int else text] = {"content": text, "special": text in special}
    added: dict[int, Any] = {}
    for index, token in said.items() if isinstance(said, dict) else [(key, said)]:
        flags = {flag: token[flag] for flag in ADDED_FLAGS if flag in token} if isinstance(token, dict) else {}
        content = token.get("content") if isinstance(token, dict) else None
        if not re.fullmatch(r"[0-9]{1,9}", str(index)) or not 0 <= int(index) < MOST_TOKENS:
            raise refuse(name, key, {index: token}, f"an id below {MOST_TOKENS}")
        if type(content) is not str or not content or not all(type(flag) is bool for flag in flags.values()):
            raise refuse(name, key, token, f"a text, and flags ({', '.join(ADDED_FLAGS)})")
        added[int(index)] = AddedToken(content, **flags)
    return dict(sorted(added.items())), extra


def _values(content: Any) -> list[Any]:
    return list(content.values()) if isinstance(content, dict) else content if isinstance(content, list) else []


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

    files = files_of(source, *TOKENIZER_FILES)
    names = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    contents = {name: json_of(files, name) if text_of(files, name) is not None else {} for name in names}
    kind = contents[names[0]].get("tokenizer_class") or contents.pop("config.json").get("tokenizer_class")
    contents.pop("config.json", None)
    if contents[names[0]].get("added_tokens_decoder") is not None:
        contents.pop("special_tokens_map.json")  # it is older
    options = _options(files, contents)
    special = {key: options.get(key, f"[{key.removesuffix('_token').upper()}]") for key in SPECIAL_TOKENS}
    added, extra = _added_tokens(files, contents, special.values())
    if (text := text_of(files, "tokenizer.json")) is not None:
        _check_steps(path_of(files, "tokenizer.json"), parse_json(text))
        backend = Tokenizer.from_str(text)
    elif (text := text_of(files, "vocab.txt")) is not None:
        _check_plain(path_of(files, names[0]), {**contents[names[0]], "tokenizer_class": kind})
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
            raise ValueError(f"{files}: the added token {short(token.content)} has id {given}, expected {index}")
    return tokenizer


def _check_plain(path: str, content: Mapping[str, Any]) -> None:
    """Raises ValueError where a vocabulary alone does not give the tokens that are asked for; names file and key."""
    kinds = (None, *BERT_CLASSES)
    usual: dict[str, tuple[Any, ...]]
    usual = {"tokenizer_class": kinds, "never_split": (None, []), "do_basic_tokenize": (None, True)}
    for key, plain in usual.items():
        if content.get(key) not in plain:
            expected = " or ".join(map(repr, plain[1:]))
            raise ValueError(f"{path}: {key} is {short(content[key])}, expected {expected} beside vocab.txt")


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
