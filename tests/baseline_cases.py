"""2D models of open_clip, small and with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hlip
from conftest import random_study
from hlip.embed.open_clip import CONFIG
from hlip.store.format import write_shard
from hlip.store.store import Store
from hlip.store.tools import finish
from hlip.study import PreparedScan, StudyRecord
from open_clip_beside import open_clip_imported

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def open_clip() -> Iterator[ModuleType]:
    with open_clip_imported() as module:
        if module is None:
            pytest.skip("needs open_clip: make test")
        yield module


def save(module: ModuleType, kind: str, bert_folder: str, folder: Path) -> Path:
    """A small model with seeded weights in open_clip's hub format: CLIP's own towers, or those that BiomedCLIP has."""
    from safetensors.torch import save_file

    if kind == "clip":
        vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
        text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        build = module.CLIP
    else:
        vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
        text = {
            "hf_model_name": bert_folder,
            "hf_tokenizer_name": bert_folder,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 24,
        }
        build = module.CustomTextCLIP
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / CONFIG).write_text(json.dumps(content))
    torch.manual_seed(0)
    weights = build(**json.loads(json.dumps(config))).state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "open_clip_model.safetensors")
    if kind != "clip":
        for path in Path(bert_folder).glob("*"):
            if path.suffix in (".json", ".txt") and path.name != "config.json":
                (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def folders(open_clip: ModuleType, bert_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("open_clip")
    return {kind: save(open_clip, kind, bert_folder, root / kind) for kind in ("clip", "biomed")}


def study(uid: str = "s", seed: int = 0) -> hlip.Study:
    """Two scans, of 5 and of 3 slices, one of them wider than high."""
    return hlip.Study(uid, random_study([(5, 40, 40), (3, 48, 64)], seed), ["flair", "t1"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six studies of `study`, whose scans are no whole number of anyone's patches, with reports and labels."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("store")
    (folder / "shards").mkdir()
    studies = []
    for i in range(6):
        scans = [
            PreparedScan(name, image, (3.0, 1.0, 1.0), "axial", 5)
            for name, image in zip(study().names, study(seed=i).scans, strict=True)
        ]
        labels = {"lesion": float(i % 2), "blood": float(i < 2)}
        studies.append(StudyRecord(f"s{i}", scans, f"impression {i}", "findings", labels))
    write_shard(folder / "shards" / "00000.safetensors", studies, {}, "0", folder)
    finish(folder, folder)
    return Store(folder)


PAIRS = """kind: pairs
classes:
  lesion: {positive: [a lesion, a mass], negative: no lesion}
  blood: {positive: blood, negative: no blood}
metrics: [auc, recall]
"""
