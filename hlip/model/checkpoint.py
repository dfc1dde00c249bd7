"""Models in folders: `config.json`, `model.safetensors`, and the text tower's configuration and tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .clip import HLIPModel
from .config import ModelConfig

FILES = {"config.json", "model.safetensors", "text"}


def save_pretrained(model: HLIPModel, folder: Path) -> None:
    """Write `folder` whole: it is complete or, if anything fails, as it was.

    Raises:
        ValueError: `folder` exists and holds something else than a saved model.
    """
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - FILES):
        raise ValueError(f"{folder} exists and is not a saved model: choose a new folder, or remove it")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    partial.mkdir(parents=True)
    try:
        (partial / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1))
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(state, partial / "model.safetensors")
        model.text.transformer.config.save_pretrained(partial / "text")
        model.text.tokenizer.save_pretrained(partial / "text")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)


def from_pretrained(name: str) -> HLIPModel:
    folder = Path(name) if Path(name).is_dir() else _download(name)
    path = folder / "config.json"
    if not (folder / "text").is_dir():
        raise ValueError(f"{folder}: not a saved model: it has no folder 'text'")
    try:
        config = ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable model configuration ({error})") from error
    model = HLIPModel(config, text_source=folder / "text", pretrained_text=False)
    path = folder / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not readable weights ({error})") from error
    expected = model.state_dict()
    wrong = [
        *(f"missing {key}" for key in expected.keys() - state.keys()),
        *(f"unexpected {key}" for key in state.keys() - expected.keys()),
        *(
            f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
            for key in expected.keys() & state.keys()
            if state[key].shape != expected[key].shape
        ),
    ]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} weights do not fit: {'; '.join(sorted(wrong)[:8])}")
    model.load_state_dict(state)
    return model.eval()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors", "text/*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: unknown model: no such folder, and not to be had from the hub ({reason})") from error
