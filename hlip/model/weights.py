"""Files of weights, here or on the hub. Nothing that they hold is executed."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..read import safe
from ..read.files import near
from ..read.paths import check_memory, check_within
from ..read.safe import check_format
from ..read.schema import structure
from ..read.tensors import check_safetensors, load_tensors

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# What a folder's weights are called, in the order in which they are looked for.
WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
FORMAT = 1  # of checkpoints, under "hlip_format"; those without a number are of the first
FILES = "hlip_files"  # under this key a checkpoint of our trainer holds what makes a model of its weights
WRAPPERS = ("module", "_orig_mod")  # put into keys by DistributedDataParallel and torch.compile
UNUSED = re.compile(r"text\.transformer\.pooler\..*|(.*\.)?embeddings\.position_ids")


class Weights(NamedTuple):
    """The content of a file of weights.

    state: tensors by key.
    name: what the training run was called, if the file says.
    files: of a checkpoint of our trainer, the texts that lie beside the weights in a saved model's folder, by path.
    """

    path: Path
    state: dict[str, Tensor]
    name: str
    files: Mapping[str, str] = MappingProxyType({})


def read_weights(path: Path) -> Weights:
    """Read `.safetensors`, or `.bin`, `.pt`, `.pth` without unpickling anything but tensors and plain values.

    Unwraps training checkpoints ("state_dict" or "model"), takes the wrappers' parts out of the keys, gives
    `series_posemb` its later name, and drops the text tower's unused `pooler` and `position_ids`.

    Raises:
        ValueError: no such file, not weights, or keys that collide; names the file, and the key.
    """
    if not path.is_file():
        raise ValueError(f"{path}: not readable weights (no such file{near(path)})")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: not readable weights (weights end in {', '.join(SUFFIXES)})")
    name, files = "", dict[str, str]()
    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
            check_memory(path)
        content: Any = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
        if isinstance(content, Mapping):
            check_format(content.get("hlip_format", FORMAT), FORMAT)
            files = structure(dict[str, str], content.get(FILES, {}), FILES)
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:  # the last two: no room to map
        raise ValueError(f"{path}: not readable weights ({str(error).splitlines()[0]})") from error
    for _ in range(4):  # wrappings; a file may also refer to itself
        fields = content if isinstance(content, Mapping) else {}
        config = fields.get("config")
        run = config.get("model") if isinstance(config, Mapping) else fields.get("name")
        name = run if isinstance(run, str) and run else name
        inner = [fields[key] for key in ("state_dict", "model") if isinstance(fields.get(key), Mapping)]
        content = inner[0] if inner else content
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: not readable weights (it holds {type(content).__name__}, no tensors by name)")
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: not readable weights ({key!r} is {type(value).__name__}, not a tensor)")
        if value.dim() > 8 or (value.dtype.itemsize < 2 and value.is_floating_point()):
            raise ValueError(f"{path}: not readable weights ({key} is {value.dtype}, of {value.dim()} dimensions)")
        words = [word for word in key.split(".") if word not in WRAPPERS]
        plain = ".".join("sequential_posemb" if word == "series_posemb" else word for word in words)
        if plain in state:
            raise ValueError(f"{path}: two keys that both mean {plain}; one is {key}")
        if not UNUSED.fullmatch(plain):
            state[plain] = value
    return Weights(path, state, name, files)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], path: Path, optional: tuple[str, ...] = ()) -> set[str]:
    """The keys that are absent, of those that may be: they begin with one of `optional`.

    Raises:
        ValueError: keys missing or left over, or other shapes; names file and keys.
    """
    expected = module.state_dict()
    absent = {key for key in expected.keys() - state.keys() if key.startswith(optional)} if optional else set()
    wrong = [
        *(f"missing {key}" for key in expected.keys() - state.keys() - absent),
        *(f"unexpected {key}" for key in state.keys() - expected.keys()),
        *(
            f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
            for key in expected.keys() & state.keys()
            if state[key].shape != expected[key].shape
        ),
    ]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} weights do not fit: {shorten(sorted(wrong))}")
    return absent


def load_strict(module: nn.Module, state: Mapping[str, Tensor], path: Path, optional: tuple[str, ...] = ()) -> None:
    """Load `state`, all of it and nothing less; keys that begin with one of `optional` may be absent.

    Raises:
        ValueError: as `check_fit`, or values that are not finite numbers; names file and keys.
    """
    absent = check_fit(module, state, path, optional)
    broken = [key for key, value in state.items() if not (value.is_floating_point() and value.isfinite().all())]
    if broken:
        raise ValueError(f"{path}: {len(broken)} weights are not finite numbers: {shorten(sorted(broken))}")
    module.load_state_dict(state, strict=not absent)


def find_weights(folder: Path) -> Path:
    """The file of weights in a folder.

    Raises:
        ValueError: there is none.
    """
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        inside = folder / "model"  # as a run of the trainer leaves it
        hint = f"; did you mean {inside}?" if inside.is_dir() else ""
        raise ValueError(f"{folder}: no weights: none of {', '.join(WEIGHT_FILES)}{hint}")
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, unless it holds a JSON object."""
    try:
        content = safe.read_settings(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not readable (not a JSON object)")
    return content


def hub_library(name: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """The library of the Hugging Face hub, for a name there, and what it raises where that is not to be had.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ImportError(
            f"{name}: names on the Hugging Face hub need huggingface-hub: pip install 'hlip-kernels[hub]'"
        ) from error
    return hub, (HFValidationError, HfHubHTTPError, OSError)


def local_folder(name: str, *patterns: str, weights: bool = False) -> Path:
    """`name` if it is a folder; else the files that fit `patterns`, and weights if asked for, from the hub.

    Says on the log that the hub is asked. Code is never among what is fetched unless a pattern asks for it.

    Raises:
        ValueError: no such folder, and not to be had from the hub; or a link in it leads out; says why.
    """
    folder = Path(name)
    if folder.is_dir():
        wanted = (*patterns, *(WEIGHT_FILES if weights else ()))
        for path in chain.from_iterable(map(folder.glob, wanted)):
            check_within(path, folder)
        return folder
    if Path(name).is_absolute() or Path(name).suffix in SUFFIXES:
        raise ValueError(f"no such file or folder{near(Path(name))}")
    hub, errors = hub_library(name)
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if not HF_HUB_OFFLINE:
            log.warning("%s is no folder here: asking the Hugging Face hub for it", name)
        for file in WEIGHT_FILES if weights else ("",):
            folder = Path(hub.snapshot_download(name, allow_patterns=[*patterns, *([file] if file else [])]))
            if not file or (folder / file).is_file():
                break
        return folder
    except errors as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no such folder, and not to be had from the hub ({reason}){near(Path(name))}") from error


def shorten(items: list[str], most: int = 8) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def weights_digest(module: nn.Module, settings: Any) -> str:
    """A hash of a module's weights, and of plain values that go with them."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
