"""Problems that ways of attention solve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchlib import problems
from hlip_kernels import Level, StudyLayout
from spans import HEADS

RAGGED = [[(2, 3, 3), (3, 2, 4)], [(1, 5, 2)]]
HERE = ["hlip-cpu", "hlip-reference", "hlip-triton", "sdpa", "padded", "block-mask", "nested"]


def problem(
    grids: Any, level: Level = "scan", num_prefix: int = 1, dtype: torch.dtype = torch.float32, head_dim: int = 16
) -> problems.Problem:
    before = problems.BEFORE[level]
    return problems.Problem(
        lambda: StudyLayout.from_grids(grids, num_prefix), level, before, HEADS, head_dim, dtype, "cpu"
    )


def tensors(case: problems.Problem) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    qkv = torch.randn(case.num_rows, 3, case.heads, case.head_dim, dtype=case.dtype)
    return qkv, torch.randn(case.num_rows, case.heads, case.head_dim, dtype=case.dtype)
