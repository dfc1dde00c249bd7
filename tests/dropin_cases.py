"""Gradients and small vision transformers of other libraries."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from hlip_kernels import Grid, Level

SLICES: list[list[Grid]] = [[(2, 2, 2), (1, 2, 2)], [(3, 2, 2)]]  # six images of four patches
STUDIES: dict[Level, list[list[int]]] = {  # the images of each group
    "slice": [[0], [1], [2], [3], [4], [5]],
    "scan": [[0, 1], [2], [3, 4, 5]],
    "study": [[0, 1, 2], [3, 4, 5]],
}


def gradients(module: nn.Module, *outputs: Tensor) -> dict[str, Tensor]:
    """Of a sum over `outputs` in which every element counts differently."""
    module.zero_grad()
    sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outputs).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
