"""Heads that pool the patch rows of a study with learned weights.

Shapes: B studies, T patch tokens, C width, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hlip_kernels import StudyLayout

from .config import VisionConfig
from .layers import Mlp


class AttentionPool(nn.Module):
    """A learned query that attends to a study's patch rows. Parameter names are those of timm's AttentionPoolLatent;
    as in timm 1.0.31's ViTs by default, prefix rows are not among what is pooled."""

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

    def forward(self, patches: Tensor, layout: StudyLayout) -> Tensor:
        """patches (T, C), ordered by study. Returns (B, 1, C)."""
        query = self.q(self.latent[0, 0]).unflatten(0, (self.heads, -1))
        k, v = self.kv(patches).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        scores = (k * query).sum(-1) * query.shape[-1] ** -0.5
        x = self.proj(softmax_mean(scores, v, layout).flatten(1).to(patches.dtype))
        return (x + self.mlp(self.norm(x)))[:, None]


class WeightedAverage(nn.Module):
    """The mean of a study's patch rows, weighted by the softmax of a learned score."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, patches: Tensor, layout: StudyLayout) -> Tensor:
        """patches (T, C), ordered by study. Returns (B, 1, C)."""
        return softmax_mean(self.score(patches), patches[:, None], layout).to(patches.dtype)


def softmax_mean(scores: Tensor, values: Tensor, layout: StudyLayout) -> Tensor:
    """For each study and head, the mean of its rows' values (T, H, D), weighted by the softmax of their scores (T, H).

    Returns (B, H, D), in float32 for 16-bit values.
    """
    scores = scores.to(torch.promote_types(values.dtype, torch.float32))
    bounds = layout.cu_seqlens("study")
    offsets = bounds.long()

    def each_study(reduce: str, rows: Tensor) -> Tensor:
        return torch.segment_reduce(rows, reduce, offsets=offsets, axis=0)

    highest = each_study("max", scores.detach())
    p = (scores - highest.repeat_interleave(bounds.diff(), dim=0, output_size=layout.num_tokens)).exp()
    return each_study("sum", p[..., None] * values) / each_study("sum", p)[..., None]
