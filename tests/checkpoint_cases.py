"""Small models, and checkpoints of them in every layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

import hlip
from conftest import tiny_vision
from hlip.processes import Processes
from hlip.train.checkpoints import Checkpoints
from hlip.train.config import TrainConfig
from hostile_models import put


def trained(model: hlip.HLIPModel, out: Path) -> Path:
    """A checkpoint as a run leaves it."""
    checkpoints = Checkpoints(TrainConfig(Path("store"), out), Processes())
    checkpoints.save(model, torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu"), 3)
    checkpoints.wait()
    return checkpoints.all()[-1]


def small_bert(bert_folder: str, folder: Path, **changes: Any) -> str:
    """A BERT's folder, without weights, of another size and another vocabulary."""
    shutil.copytree(bert_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer.json"))
    words = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([*words[:104], "mass", "a", "##s", "no"]) + "\n")
    sizes = {"vocab_size": 108, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4}
    put(folder, {"config.json": {**sizes, "intermediate_size": 24, "layer_norm_eps": 1e-5, **changes}})
    return str(folder)


VISION = tiny_vision()
