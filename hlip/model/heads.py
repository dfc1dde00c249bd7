"""Heads that pool the patch rows of a study with learned weights.

Shapes: B studies, R rows at the level of studies, C width, H heads, D head dim. A study's prefix rows, in front of its
patches, are not among what is pooled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hlip_kernels import Level, StudyLayout

from .config import VisionConfig
from .layers import Mlp


class AttentionPool(nn.Module):
    """A learned query that attends to a study's patch rows. Parameter names are those of timm's AttentionPoolLatent;
    timm 1.0.31's ViTs leave prefix rows out by default, too."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def forward(self, rows: Tensor, layout: StudyLayout) -> Tensor:
        """rows (R, C). Returns (B, 1, C)."""
        query = self.q(self.latent[0, 0]).unflatten(0, (self.heads, -1))
        k, v = self.kv(rows).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        scores = (k * query).sum(-1) * query.shape[-1] ** -0.5
        x = self.proj(softmax_mean(scores, v, layout).flatten(1).to(rows.dtype))
        return (x + self.mlp(self.norm(x)))[:, None]


class WeightedAverage(nn.Module):
    """The mean of a study's patch rows, weighted by the softmax of a learned score."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, rows: Tensor, layout: StudyLayout) -> Tensor:
        """rows (R, C). Returns (B, 1, C)."""
        return softmax_mean(self.score(rows), rows[:, None], layout).to(rows.dtype)


def patch_mean(rows: Tensor, layout: StudyLayout) -> Tensor:
    """The mean of each study's patch rows: (R, C) to (B, C)."""
    return _reduce("mean", rows, _runs(layout))


def prefix_mean(prefix: Tensor, layout: StudyLayout, level: Level) -> Tensor:
    """Prefix rows of the groups of `level`, (G * P, C), to their means over each study, (B * P, C)."""
    if level == "study":
        return prefix
    sets = prefix.to(torch.promote_types(prefix.dtype, torch.float32)).view(layout.num_groups(level), -1)
    means: Tensor = torch.segment_reduce(sets, "mean", offsets=layout.children(level, "study").long(), axis=0)
    return means.to(prefix.dtype).view(-1, prefix.shape[1])


def softmax_mean(scores: Tensor, values: Tensor, layout: StudyLayout) -> Tensor:
    """For each study and head, the mean of its patches' values (R, H, D), weighted by the softmax of their scores
    (R, H).

    Returns (B, H, D), in float32 for 16-bit values.
    """
    scores = scores.to(torch.promote_types(values.dtype, torch.float32))
    runs = _runs(layout)
    highest: Tensor = torch.segment_reduce(scores.detach(), "max", offsets=runs, axis=0)
    p = (scores - highest.repeat_interleave(runs.diff(), dim=0, output_size=len(scores))).exp()
    return _reduce("sum", p[..., None] * values, runs) / _reduce("sum", p, runs)[..., None]


def _runs(layout: StudyLayout) -> Tensor:
    """Bounds of each study's prefix rows and of its patches, in turns: (2 B + 1) int64."""
    bounds = layout.cu_seqlens("study").long()
    starts = torch.stack([bounds[:-1], bounds[:-1] + layout.num_prefix], dim=1)
    return torch.cat([starts.flatten(), bounds[-1:]])


def _reduce(reduce: str, rows: Tensor, runs: Tensor) -> Tensor:
    reduced: Tensor = torch.segment_reduce(rows, reduce, offsets=runs, axis=0)
    return reduced[1::2]  # of the patches
