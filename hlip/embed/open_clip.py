"""Models in open_clip's hub format, made safe to read: known settings alone, and weights of a size that suits them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..model.text import TOKENIZER_FILES, check_number, read_bert_config, read_tokenizer
from ..model.weights import local_folder
from ..read.paths import check_within
from ..read.safe import read_json
from ..read.tensors import check_safetensors, check_tensors

HUB = "hf-hub:"
CONFIG = "open_clip_config.json"
# The settings of that file that are read: a type, or the least and largest value of a number, which is an integer where
# the least value is one. What serves training alone, or makes a library fetch or import something, is not among them.
Setting = type | tuple[float, float]
MODEL_KEYS: dict[str, Setting] = {
    "embed_dim": (1, 2**16), "vision_cfg": dict, "text_cfg": dict, "quick_gelu": bool, "custom_text": bool,
    "init_logit_scale": (-1e3, 1e3), "init_logit_bias": (-1e3, 1e3),
}  # fmt: skip
_LAYERS: dict[str, Setting] = {
    "width": (1, 2**16), "layers": (1, 1000), "mlp_ratio": (0.0, 64.0), "ls_init_value": (-1e3, 1e3), "pool_type": str,
    "final_ln_after_pool": bool, "output_tokens": bool, "act_kwargs": dict, "norm_kwargs": dict, "block_type": str,
    "qk_norm": bool, "scaled_cosine_attn": bool, "scale_heads": bool, "scale_attn_inner": bool, "scale_attn": bool,
    "scale_fc": bool,
}  # fmt: skip
VISION_KEYS: dict[str, Setting] = {
    **_LAYERS, "head_width": (1, 2**16), "patch_size": (1, 2**12), "image_size": (1, 2**12),
    "patch_dropout": (0.0, 1.0), "attentional_pool": bool, "attn_pooler_queries": (1, 2**16),
    "attn_pooler_heads": (1, 2**10), "no_ln_pre": bool, "pos_embed_type": str, "timm_model_name": str,
    "timm_model_pretrained": bool, "timm_pool": str, "timm_proj": str, "timm_proj_bias": bool, "timm_drop": (0.0, 1.0),
    "timm_drop_path": (0.0, 1.0),
}  # fmt: skip
TEXT_KEYS: dict[str, Setting] = {
    **_LAYERS, "context_length": (1, 2**13), "vocab_size": (1, 2**24), "heads": (1, 2**10), "embed_cls": bool,
    "pad_id": (0, 2**24), "eos_id": (0, 2**24), "no_causal_mask": bool, "proj_bias": bool, "proj_type": str,
    "hf_model_name": str, "hf_model_pretrained": bool, "hf_proj_type": str, "hf_pooler_type": str,
    "hf_tokenizer_name": str, "tokenizer_mode": str, "tokenizer_kwargs": dict,
}  # fmt: skip
TOKENIZER_KEYS: dict[str, Setting] = {"clean": str, "strip_sep_token": bool}
IMAGE_KEYS: dict[str, Setting] = {
    "size": (1, 2**12), "mode": str, "mean": (-1e6, 1e6), "std": (-1e6, 1e6), "interpolation": str, "resize_mode": str,
    "fill_color": (0, 255),
}  # fmt: skip
LISTS = ("layers", "patch_size", "image_size", "size", "mean", "std")  # may have a number for each stage or axis
# open_clip takes the first of these; or else the first by name, of safetensors before others.
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip


def write_known(name: str, place: Path) -> None:
    """Write a folder of the known settings and of links to the weights. open_clip reads that one, since open_clip, timm
    and transformers fetch and import what a configuration or tokenizer names.

    Raises:
        ValueError: no configuration, a key or value that is not known, or a link that leads out; names it.
    """
    folder = Path(name)
    if name.startswith(HUB) or folder.is_dir():
        try:
            folder = local_folder(name.removeprefix(HUB), CONFIG, *TOKENIZER_FILES, weights=True)
        except ValueError as error:
            raise ValueError(f"{name}: has no {CONFIG} that can be had ({error})") from error
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{name}: has no {CONFIG}; expected open_clip's hub format, or {HUB}OWNER/NAME")
    try:
        content = read_json(path)
        model, preprocess = content["model_cfg"], content.get("preprocess_cfg") or {}
        _check_settings(model, MODEL_KEYS)
        vision, text = model["vision_cfg"], model["text_cfg"]
        for settings, allowed in ((vision, VISION_KEYS), (text, TEXT_KEYS), (preprocess, IMAGE_KEYS)):
            _check_settings(settings, allowed)
        _check_settings(text.get("tokenizer_kwargs") or {}, TOKENIZER_KEYS)
        if not re.fullmatch(r"[\w.]*", str(vision.get("timm_model_name") or "")):  # "hf-hub:" and the like fetch it
            raise ValueError(f"timm_model_name is {vision['timm_model_name']!r:.80}, expected a name of timm")
        if tokenizer := text.get("hf_tokenizer_name"):
            read_tokenizer(folder if not name.startswith(HUB) else str(tokenizer)).save_pretrained(place)
        if bert := text.get("hf_model_name"):
            read_bert_config(str(bert)).save_pretrained(place)
            text["hf_model_name"] = str(place)
        (place / CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    except Exception as error:  # damaged files can raise anything
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: {CONFIG} is not readable ({why})") from error
    _link_weights(folder, place, vision)


def _link_weights(folder: Path, place: Path, vision: Mapping[str, Any]) -> None:
    """Link the weights that open_clip would load, if there are any, in `place`.

    Raises:
        ValueError: weights that are not readable, lie elsewhere, or are fewer than the positions; names the file.
    """

    def rank(path: Path) -> tuple[int, bool, str]:
        order = OPEN_CLIP_WEIGHTS.index(path.name) if path.name in OPEN_CLIP_WEIGHTS else len(OPEN_CLIP_WEIGHTS)
        return order, path.suffix != ".safetensors", path.name

    paths = sorted((path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")), key=rank)
    for path in paths[:1]:
        try:
            check_within(path, folder)
            check_safetensors(path) if path.suffix == ".safetensors" else check_tensors(path)
            image, patch = (
                _largest(vision.get(key), usual) for key, usual in (("image_size", 224), ("patch_size", 16))
            )
            positions = 0 if vision.get("timm_model_name") else (image // patch) ** 2
            if (size := path.stat().st_size) < positions * (vision.get("width") or 1):  # NumPy would allocate some
                raise ValueError(f"{size} bytes, where the configuration asks for {positions} positions")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not readable weights ({error})") from error
        (place / path.name).symlink_to(path.resolve())


def _largest(value: Any, usual: int) -> int:
    return max(value) if isinstance(value, list) else value or usual


def check_size(place: Path) -> None:
    """Raises ValueError where a folder's configuration asks for more numbers than its weights have bytes: open_clip
    allocates a model before it looks at the weights. Here nothing is allocated."""
    from open_clip import create_model

    with torch.device("meta"):
        planned = create_model(f"local-dir:{place}", device="meta", load_weights=False, pretrained_hf=False)
    asked = sum(value.numel() for value in planned.state_dict().values())
    weights = [path for path in place.iterdir() if path.is_symlink()]
    if weights and asked > (size := weights[0].stat().st_size):
        raise ValueError(f"the configuration asks for {asked} numbers, the weights have {size} bytes")


def _check_settings(content: Any, allowed: Mapping[str, Setting]) -> None:
    """Raises ValueError for a key that is not known, or a value of another type or out of bounds; names the key."""
    if not isinstance(content, dict):
        raise ValueError(f"expected settings by name, got {content!r:.80}")
    for key, value in content.items():
        if key not in allowed:
            raise ValueError(f"{key:.80} is not a setting that is read; there are {', '.join(allowed)}")
        setting = allowed[key]
        if value is None:
            continue
        if isinstance(setting, tuple):
            values = value if key in LISTS and isinstance(value, list) and 0 < len(value) <= 4 else [value]
            for number in values:
                check_number(key, number, *setting)
        elif type(value) is not setting:
            raise ValueError(f"{key} is {value!r:.80}, expected {setting.__name__}")
        elif (
            isinstance(value, dict)
            and key in ("act_kwargs", "norm_kwargs")
            and any(isinstance(inner, (dict, list)) for inner in dict(value).values())
        ):
            raise ValueError(f"{key} is {value!r:.80}, expected plain values")
