"""Inputs of attention, outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hlip_kernels import Grid, Level, StudyLayout

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = 2
RAGGED: list[list[Grid]] = [[(2, 2, 3), (3, 1, 1)], [(1, 4, 2)], [(1, 1, 1), (5, 1, 1)]]


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """`torch.empty` is filled with NaN: a row that nobody writes shows up in every comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_qkv(layout: StudyLayout, level: Level, head_dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    rows = layout.num_groups(level) * layout.num_prefix + layout.num_tokens
    return torch.randn(rows, 3, HEADS, head_dim, dtype=torch.float64).to(dtype)
