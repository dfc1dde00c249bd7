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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from ..objective import OBJECTIVES
from ..output import replacing_folder
from ..read.paths import usual_permissions
from ..read.safe import MOST_SETTINGS, parse_json, read_text
from .config import BERT_BASE, ModelConfig, hub_name
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
from .text import TextTower
from .tokenizer import TOKENIZER_FILES, Source, TextFiles, has_tokenizer
from .weights import (
    WEIGHT_FILES,
    Weights,
    check_fit,
    find_weights,
    hub_library,
    load_strict,
    local_folder,
    read_json,
    read_weights,
)

log = logging.getLogger(__name__)

Layout = Literal["hlip", "open_clip"]
OURS = ("text/*.json", "text/vocab.txt")


class Saved(nn.Module):
    """A model that is written to folders and read from them: the base of `HLIPModel`."""

    config: ModelConfig
    text: TextTower

    def files(self) -> dict[str, str]:
        """The texts of a saved model's folder: a checkpoint keeps them beside the weights, to be read without flags."""
        text = {f"text/{name}": content for name, content in self.text.files().items()}
        return {"config.json": json.dumps(self.config.to_dict()), **text}

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model, its configuration and its tokenizer to `folder`, whole or not at all.

        Where the tokenizer is not to be had, the folder is written without it, and a line of the log says so.

        Raises:
            ValueError: `folder` exists and holds something else than a saved model.
        """

        def fill(partial: Path) -> None:
            _save_weights(self, partial / "model.safetensors")
            self.text.transformer.config.save_pretrained(partial / "text")
            whole = _save_tokenizer(self, partial / "text")
            content = self.config.to_dict()
            name = Path(content["text"]["name"])
            if whole and name.is_dir():  # of where the text tower came from, nobody need know more
                content["text"]["name"] = name.resolve().name
            (partial / "config.json").write_text(json.dumps(content, indent=1))

        own = ("text/config.json", "config.json", "model.safetensors", *(f"text/{name}" for name in TOKENIZER_FILES))
        _write(Path(folder), fill, own)

    def save_open_clip(self, folder: Path | str, name: str | None = None) -> str:
        """Write the model to `folder`, whole or not at all, in the layout of the released models: flat weights, and
        JSON files with which open_clip builds the model where HLIP's released code is installed. Returns the name of
        the model in there.

        Args:
            name: of the released model that this is; found by its architecture if None.

        Raises:
            ValueError: it has the architecture of no released model, or `folder` holds something else.
        """
        name, content = open_clip_json(self.config, published_name(self.config, name))
        bert = self.text.transformer.config
        wrong = [
            f"{key} {getattr(bert, key, None)}, not {v}" for key, v in BERT_BASE.items() if getattr(bert, key, 0) != v
        ]
        if wrong:
            raise ValueError(f"the layout holds a text tower of BERT's base size; this one has {', '.join(wrong)}")

        def fill(partial: Path) -> None:
            _save_weights(self, partial / "model.safetensors")
            (partial / CONFIGS).mkdir(parents=True)
            (partial / CONFIGS / f"{name}.json").write_text(json.dumps(content, indent=4) + "\n")
            whole = {"model_cfg": content, "preprocess_cfg": {"mean": [0.449] * 3, "std": [0.226] * 3}}
            (partial / OPEN_CLIP_CONFIG).write_text(json.dumps(whole, indent=4) + "\n")
            _save_tokenizer(self, partial)

        own = (OPEN_CLIP_CONFIG, "model.safetensors", f"{CONFIGS}/*.json", *TOKENIZER_FILES)
        _write(Path(folder), fill, own)
        return name

    def push_to_hub(self, repo_id: str, layout: Layout = "hlip", private: bool = False) -> None:
        """Upload what `save_pretrained` or `save_open_clip` writes to the Hugging Face hub.

        Raises:
            ValueError: the hub refuses; says why.
        """
        hub, errors = hub_library(repo_id)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            save: Any = self.save_pretrained if layout == "hlip" else self.save_open_clip
            save(folder)
            api = hub.HfApi()
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a model of hlip-kernels")
            except errors as error:
                raise ValueError(f"{repo_id}: could not be uploaded ({str(error).splitlines()[0]})") from error

    @classmethod
    def from_pretrained(
        cls: type[Model], name: Path | str, model: str | None = None, text: Path | str | None = None
    ) -> Model:
        """Read a model, in evaluation mode: what `save_pretrained` wrote, a released one, or a training checkpoint.

        Every weight must be used and be finite; a released model's `logit_bias` may be absent. A configuration that had
        to be guessed is told on the log.

        Args:
            name: a file of weights, a folder, or a name on the Hugging Face hub.
            model: which of `hlip.list_models()` it is, where neither files beside the weights nor shapes can say.
            text: folder or hub name of the text tower's configuration and tokenizer, in place of the model's own.

        Raises:
            ValueError: nothing usable there; names the file and the reason.
        """
        loaded, (config, how, guessed) = cls.load(name, model, text)
        if guessed:
            lines = describe(config)
            log.warning("%s: %s" + "\n%s" * len(lines), name, how, *lines)
        return loaded

    @classmethod
    def load(
        cls: type[Model], name: Path | str, model: str | None = None, text: Path | str | None = None
    ) -> tuple[Model, Identity]:
        """Read a model as `from_pretrained` does. Returns it and how its configuration is known."""
        path = _find(str(name))
        weights, own, (config, how, guessed) = _identify(path, model)
        if text is not None:
            config = replace(config, text=replace(config.text, name=str(text)))
        source, optional = own if text is None else text, () if own else OBJECTIVES[config.objective].late
        _check_size(config, weights)
        try:
            with torch.device("meta"):
                planned = cls(config, source)
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(f"{weights.path}: no model can be built for it ({error})") from error
        check_fit(planned, weights.state, weights.path, optional)
        try:
            built = cls(config, source)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"{weights.path}: no memory for its model ({str(error).splitlines()[0]})") from error
        if source is None and path.is_dir() and has_tokenizer(path):
            built.text.tokenizer_source = str(path)
        how += "".join(f"; no {key}, so it begins anew" for key in optional if key not in weights.state)
        load_strict(built, weights.state, weights.path, optional)
        return built.eval(), Identity(config, how, guessed)


Model = TypeVar("Model", bound=Saved)


def _find(name: str) -> Path:
    """The file of weights, or the folder of a model, that is called so; from the hub if there is none here."""
    try:
        path = Path(name)
        if not path.is_file():
            path = local_folder(
                name if path.is_dir() else hub_name(name),
                *TOKENIZER_FILES,
                *OURS,
                OPEN_CLIP_CONFIG,
                f"{CONFIGS}/*.json",
                weights=True,
            )
    except ValueError as error:
        hint = f"; it is a name of an architecture: give its weights, with model={name!r}" if name in names() else ""
        raise ValueError(f"{name}: unknown model: {error}{hint}") from error
    described = any((path.parent / file).exists() for file in ("text", OPEN_CLIP_CONFIG, CONFIGS))
    is_model = described and path.is_file() and path.name in WEIGHT_FILES and find_weights(path.parent) == path
    return path.parent if is_model else path


def _identify(path: Path, model: str | None) -> tuple[Weights, Source | None, Identity]:
    """The weights of a file or folder, the text tower's files where it is ours, and its configuration.

    Raises:
        ValueError: not a configuration, or not that of `model`; names where it stands.
    """
    ours = path.is_dir() and _is_ours(path)
    weights = read_weights(path / "model.safetensors" if ours else path if path.is_file() else find_weights(path))
    if not ours and not weights.files:
        return weights, None, identify(weights, path if path.is_dir() else None, model)
    where = str(path / "config.json") if ours else f"{weights.path}, config.json"
    try:
        content = read_text(Path(where), MOST_SETTINGS) if ours else weights.files.get("config.json", "")
        config = ModelConfig.from_dict(parse_json(content, finite=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: not a readable model configuration ({error})") from error
    try:
        if model is not None:
            published_name(config, model)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    texts = {name.removeprefix("text/"): text for name, text in weights.files.items() if name.startswith("text/")}
    source = path / "text" if ours else TextFiles(f"{weights.path}, text", texts)
    return weights, source, Identity(config, f"as {where} says")


def _check_size(config: ModelConfig, weights: Weights) -> None:
    """Raises ValueError where a configuration asks for more than there are weights: a model of any size is quickly
    written down. The tables of positions are the only ones that are allocated before weights are compared."""
    vision, held = config.vision, sum(value.numel() for value in weights.state.values())
    tables = (math.prod(vision.grid) + vision.max_scans) * vision.width
    if tables > held or len(vision.levels) > len(weights.state):
        raise ValueError(
            f"{weights.path}: its configuration asks for {len(vision.levels)} layers and {tables} positions; "
            f"there are {len(weights.state)} weights of {held} numbers"
        )


def _is_ours(folder: Path) -> bool:
    """Not a released layout: those have no folder `text`, and say nothing of vision in config.json."""
    if (folder / "text").is_dir():
        return True
    path = folder / "config.json"
    if path.is_file() and "vision" in read_json(path):
        raise ValueError(f"{folder}: not a saved model: it has no folder 'text'")
    return False


def _save_weights(model: Saved, path: Path) -> None:
    with usual_permissions(path):
        save_file({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}, path)


def _save_tokenizer(model: Saved, folder: Path) -> bool:
    """Whether there was one to write."""
    try:
        model.text.tokenizer.save_pretrained(folder)
    except ValueError as error:
        log.warning(
            "saved without a tokenizer, so texts will be read with that of %s: %s", model.config.text.name, error
        )
        return False
    return True


def _write(folder: Path, fill: Callable[[Path], Any], own: tuple[str, ...]) -> None:
    """Replace `folder` by what `fill` writes, whole or not at all, if it is new, empty, or an older model: it holds the
    first of the files `own`, and no others than those."""
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()]
    older = own[0] in files and all(any(fnmatch.fnmatch(file, pattern) for pattern in own) for file in files)
    if folder.exists() and not older and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a saved model: choose a new folder, or remove it")
    with replacing_folder(folder) as partial:
        fill(partial)
