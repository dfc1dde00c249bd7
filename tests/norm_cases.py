"""Inputs of norms between levels, and their formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hlip_kernels import Grid, Level, StudyLayout
from hlip_kernels.native import native

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native().reason), reason=native().reason))
RAGGED: list[list[Grid]] = [[(2, 3, 3), (3, 2, 7)], [(1, 2, 2)], [(2, 3, 4)] * 2]
WIDTH = 24


@pytest.fixture(autouse=True)
def _fill_new_memory_with_nan() -> object:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(layout: StudyLayout, src: Level, scales: str, seed: int = 0, width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    groups = layout.num_groups(src)
    rows = layout.num_rows(src)
    inputs = {"residual": draw(rows, width), "update": draw(rows, width), "weight": draw(width), "bias": draw(width)}
    if scales in ("path", "both"):
        inputs["path_scale"] = (torch.rand(groups, generator=generator) < 0.6).double() / 0.6
    if scales in ("layer", "both"):
        inputs["layer_scale"] = draw(width)
    return inputs


def cast(inputs: dict[str, Tensor], dtype: torch.dtype, update: torch.dtype | None = None) -> dict[str, Tensor]:
    kinds = {"update": update or dtype, "path_scale": torch.float32}
    return {name: x.to(kinds.get(name, dtype)) for name, x in inputs.items()}
