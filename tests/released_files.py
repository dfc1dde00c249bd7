"""Files in the released layouts, with seeded weights, for tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import hlip
from hlip.model.config import ALIASES, MODELS, preset
from published import FACTS

NAMES = [name for name in (*MODELS, *ALIASES) if name != "demo"]
State = dict[str, Tensor]
# timm_model_name of the released JSON files.
TRUNKS = {
    "clip_vit_base_slice_scan_token2744": "vit_base_slice_scan_token2744",
    "vit_base_singlescan_h2_token2744": "vit_base_singlescan_h2_token2744",
    "clip_vit_base_scan_study_token1176": "vit_base_scan_study_token1176",
    "clip_vit_base_scan_study_dualdinotxt1568": "vit_base_scan_study_dualdinotxt1568",
    "clip_vit_base_slice_scan_study_dualdinotxt1568": "vit_base_slice_scan_study_dualdinotxt1568",
    "clip_vit_large_slice_scan_study_dualdinotxt1568": "vit_large_slice_scan_study_dualdinotxt1568",
    "clip_vit_base_slice_scan_dualdinotxt2744": "vit_base_slice_scan_dualdinotxt2744",
}
MULTISCAN = "vit_base_multiscan_h2_token588"


def seeded(name: str, seed: int = 0) -> State:
    """A released model's weights: its keys and shapes, and random values."""
    with torch.device("meta"):
        model = hlip.create_model(name)
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def released_json(name: str, **changes: Any) -> dict[str, Any]:
    text = {
        "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext",
        "hf_tokenizer_name": preset(name).text.name,
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "hf_proj_type": "linear",
        "context_length": preset(name).text.context_length,
    }
    vision = {"timm_model_name": TRUNKS[name], "timm_model_pretrained": True, "timm_drop_path": 0.2,
              "timm_pool": "token", "timm_proj": "linear"}  # fmt: skip
    return {
        "embed_dim": FACTS[name].embed_dim // 16,  # as `small_models`
        "vision_cfg": vision,
        "text_cfg": {**text, **changes},
    }


def hub_folder(folder: Path, state: State, *names: str, **text: Any) -> Path:
    configs = folder / "hlip" / "model_configs"
    configs.mkdir(parents=True)
    (folder / "hlip" / "__init__.py").write_text("raise RuntimeError('code of a checkpoint was run')")
    (folder / "config.json").write_text('{"date": "2025-10-08"}')
    for name in names:
        (configs / f"{name}.json").write_text(json.dumps(released_json(name, **text)))
    save_file(state, folder / "model.safetensors")
    return folder


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        assert torch.equal(value, other[key]), key


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def vit(width: int = 48, depth: int = 12, side: int = 14, **extra: Tensor) -> State:
    """A 2D ViT as timm and MAE publish it."""
    from test_model import BLOCK

    generator = torch.Generator().manual_seed(2)
    rows, columns = {"attn.qkv": 3, "mlp.fc1": 4}, {"attn.qkv": 1, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 4}
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, side * side + 1, width),
              "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
              "norm.weight": (width,), "norm.bias": (width,)}  # fmt: skip
    for i in range(depth):
        for key in BLOCK:
            part, kind = key.rsplit(".", 1)
            last = (columns[part] * width,) if kind == "weight" and part in columns else ()
            shapes[f"blocks.{i}.{key}"] = (rows.get(part, 1) * width, *last)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} | extra


class Evil:
    """A pickle that makes a file when it is read by pickle."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)
