"""Models in files and folders.

Ours is a folder: `config.json`, `model.safetensors`, and in `text` the text tower's configuration and tokenizer. The
released layouts are a file of weights, or a hub folder of one with JSON files of open_clip; both are read, the latter
is written too.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file

from ..output import replacing_folder
from ..read.paths import usual_permissions
from ..read.safe import MOST_SETTINGS, parse_json, read_text
from .clip import HLIPModel
from .config import BERT_BASE, ModelConfig
from .released import (
    CONFIGS,
    OPEN_CLIP_CONFIG,
    Identity,
    describe,
    identify,
    names,
    open_clip_json,
    published_name,
)
from .text import TOKENIZER_FILES, Source, TextFiles, has_tokenizer
from .weights import WEIGHT_FILES, Weights, check_fit, find_weights, load_strict, local_folder, read_json, read_weights

log = logging.getLogger(__name__)

Layout = Literal["hlip", "open_clip"]
OURS = ("text/*.json", "text/vocab.txt")


class Loaded(NamedTuple):
    """A model in evaluation mode, and how its configuration is known. See `Identity`."""

    model: HLIPModel
    how: str
    guessed: bool


def save_pretrained(model: HLIPModel, folder: Path) -> None:
    """Write `folder` whole: it is complete or, if anything fails, as it was.

    Where the tokenizer is not to be had, the folder is written without it, and a line of the log says so.

    Raises:
        ValueError: `folder` exists and holds something else than a saved model.
    """

    def fill(partial: Path) -> None:
        _save_weights(model, partial / "model.safetensors")
        model.text.transformer.config.save_pretrained(partial / "text")
        whole = _save_tokenizer(model, partial / "text")
        content = model.config.to_dict()
        if whole and Path(content["text"]["name"]).is_dir():  # of where the text tower came from, nobody need know more
            content["text"]["name"] = Path(content["text"]["name"]).resolve().name
        (partial / "config.json").write_text(json.dumps(content, indent=1))

    own = ("config.json", "model.safetensors", "text/config.json", *(f"text/{name}" for name in TOKENIZER_FILES))

    def is_older(path: Path) -> bool:
        try:
            return _only(path, own) and "vision" in read_json(path / "config.json")
        except ValueError:
            return False

    _write(folder, fill, is_older)


def save_open_clip(model: HLIPModel, folder: Path, name: str | None = None) -> str:
    """Write `folder` whole, in the layout of the released models: flat weights, and JSON files with which open_clip
    builds the model where HLIP's released code is installed. Returns the name of the model in there.

    Args:
        name: of the released model that this is; found by its architecture if None.

    Raises:
        ValueError: the model has no released one's architecture, or `folder` exists and is not of this layout.
    """
    name, content = open_clip_json(model.config, published_name(model.config, name))
    bert = model.text.transformer.config
    wrong = [f"{key} {getattr(bert, key, None)}, not {v}" for key, v in BERT_BASE.items() if getattr(bert, key, 0) != v]
    if wrong:
        raise ValueError(f"the layout holds a text tower of BERT's base size; this one has {', '.join(wrong)}")

    def fill(partial: Path) -> None:
        _save_weights(model, partial / "model.safetensors")
        (partial / CONFIGS).mkdir(parents=True)
        (partial / CONFIGS / f"{name}.json").write_text(json.dumps(content, indent=4) + "\n")
        whole = {"model_cfg": content, "preprocess_cfg": {"mean": [0.449] * 3, "std": [0.226] * 3}}
        (partial / OPEN_CLIP_CONFIG).write_text(json.dumps(whole, indent=4) + "\n")
        _save_tokenizer(model, partial)

    own = ("model.safetensors", OPEN_CLIP_CONFIG, f"{CONFIGS}/*.json", *TOKENIZER_FILES)

    def is_older(path: Path) -> bool:
        return (path / OPEN_CLIP_CONFIG).is_file() and _only(path, own)

    _write(folder, fill, is_older)
    return name


def push_to_hub(model: HLIPModel, repo_id: str, layout: Layout = "hlip", private: bool = False) -> None:
    """Upload what a save writes. Raises ValueError if the hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        if layout == "hlip":
            save_pretrained(model, folder)
        else:
            save_open_clip(model, folder)
        api = HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a model of hlip-kernels")
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ValueError(f"{repo_id}: could not be uploaded ({str(error).splitlines()[0]})") from error


def from_pretrained(name: str, model: str | None = None, text: Path | str | None = None) -> HLIPModel:
    """See `HLIPModel.from_pretrained`. A configuration that had to be guessed is told on the log."""
    loaded = load(name, model, text)
    if loaded.guessed:
        lines = describe(loaded.model.config)
        log.warning("%s: %s" + "\n%s" * len(lines), name, loaded.how, *lines)
    return loaded.model


def load(name: str, model: str | None = None, text: Path | str | None = None) -> Loaded:
    """Read a model in any layout. See `HLIPModel.from_pretrained`."""
    try:
        path = Path(name)
        if not path.is_file():
            path = local_folder(name, *TOKENIZER_FILES, *OURS, OPEN_CLIP_CONFIG, f"{CONFIGS}/*.json", weights=True)
    except ValueError as error:
        hint = f"; it is a name of an architecture: give its weights, with model={name!r}" if name in names() else ""
        raise ValueError(f"{name}: unknown model: {error}{hint}") from error
    if path.is_file() and path.name in WEIGHT_FILES and _is_described(path.parent):
        path = path.parent if find_weights(path.parent) == path else path
    folder = path if path.is_dir() and _is_ours(path) else None
    own: Source | None = folder / "text" if folder else None
    if folder:
        found = _own_config(str(folder / "config.json"), _read_config(folder / "config.json"), model)
        weights = read_weights(folder / "model.safetensors")
    else:
        weights = read_weights(path if path.is_file() else find_weights(path))
        if weights.files:
            found = _own_config(f"{weights.path}, config.json", weights.files.get("config.json", ""), model)
            own = TextFiles(f"{weights.path}, text", _below(weights.files, "text/"))
        else:
            found = identify(weights, path if path.is_dir() else None, model)
    config, how, guessed = found
    if text is not None:
        config = replace(config, text=replace(config.text, name=str(text)))
    source, optional = own if text is None else text, () if own else ("logit_bias",)
    _check_size(config, source, weights, optional)
    try:
        built = HLIPModel(config, source)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{weights.path}: no memory for its model ({str(error).splitlines()[0]})") from error
    if source is None and path.is_dir() and has_tokenizer(path):
        built.text.tokenizer_source = str(path)
    if "logit_bias" not in weights.state and not own and config.objective != "clip":
        how += "; no logit_bias, so it begins anew"
    load_strict(built, weights.state, weights.path, optional)
    return Loaded(built.eval(), how, guessed)


def _check_size(config: ModelConfig, text: Source | None, weights: Weights, optional: tuple[str, ...]) -> None:
    """Raises ValueError where a configuration asks for more, or other, than there are weights: a model of any size is
    quickly written down. Nothing is allocated but the tables of positions, whose size is looked at before."""
    vision, held = config.vision, sum(value.numel() for value in weights.state.values())
    tables = (math.prod(vision.grid) + vision.max_scans) * vision.width
    if tables > held or len(vision.levels) > len(weights.state):
        raise ValueError(
            f"{weights.path}: its configuration asks for {len(vision.levels)} layers and {tables} positions; "
            f"there are {len(weights.state)} weights of {held} numbers"
        )
    try:
        with torch.device("meta"):
            planned = HLIPModel(config, text)
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{weights.path}: no model can be built for it ({error})") from error
    check_fit(planned, weights.state, weights.path, optional)


def _is_ours(folder: Path) -> bool:
    """Not a released layout: those have no folder `text`, and say nothing of vision in config.json."""
    if (folder / "text").is_dir():
        return True
    path = folder / "config.json"
    if path.is_file() and "vision" in read_json(path):
        raise ValueError(f"{folder}: not a saved model: it has no folder 'text'")
    return False


def _is_described(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("text", OPEN_CLIP_CONFIG, CONFIGS))


def _own_config(where: str, text: str, model: str | None) -> Identity:
    """The configuration in `text`. Raises ValueError, naming `where`, if it is none, or not that of `model`."""
    try:
        config = ModelConfig.from_dict(parse_json(text, finite=True))
    except ValueError as error:
        raise ValueError(f"{where}: not a readable model configuration ({error})") from error
    if model is not None:
        try:
            published_name(config, model)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return Identity(config, f"as {where} says")


def _read_config(path: Path) -> str:
    try:
        return read_text(path, MOST_SETTINGS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable model configuration ({error})") from error


def _below(files: Mapping[str, str], folder: str) -> dict[str, str]:
    return {name.removeprefix(folder): text for name, text in files.items() if name.startswith(folder)}


def model_files(model: HLIPModel) -> dict[str, str]:
    """What a checkpoint keeps beside the weights, to be read without flags: the texts of a saved model's folder."""
    text = {f"text/{name}": content for name, content in model.text.files().items()}
    return {"config.json": json.dumps(model.config.to_dict()), **text}


def _save_weights(model: HLIPModel, path: Path) -> None:
    with usual_permissions(path):
        save_file({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}, path)


def _save_tokenizer(model: HLIPModel, folder: Path) -> bool:
    """Whether there was one to write."""
    try:
        model.text.tokenizer.save_pretrained(folder)
    except ValueError as error:
        log.warning(
            "saved without a tokenizer, so texts will be read with that of %s: %s", model.config.text.name, error
        )
        return False
    return True


def _only(folder: Path, own: tuple[str, ...]) -> bool:
    """Whether every file in `folder` is one of those."""
    files = [str(each.relative_to(folder)) for each in folder.rglob("*") if not each.is_dir()]
    return all(any(fnmatch.fnmatch(file, one) for one in own) for file in files)


def _write(folder: Path, fill: Callable[[Path], Any], is_older: Callable[[Path], bool]) -> None:
    """Replace `folder` by what `fill` writes, whole or not at all, if it is new, empty, or `is_older` says so."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not is_older(folder))):
        raise ValueError(f"{folder} exists and is not a saved model: choose a new folder, or remove it")
    with replacing_folder(folder) as partial:
        fill(partial)
