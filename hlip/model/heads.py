"""Heads that pool all rows of a study with learned weights.

Shapes: B studies, P prefix rows a study, T patch tokens, C width, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hlip_kernels import StudyLayout

from .config import VisionConfig
from .layers import Mlp


class AttentionPool(nn.Module):
    """A learned query that attends to all rows of a study. Parameter names are those of timm's AttentionPoolLatent."""

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

    def forward(self, prefix: Tensor, patches: Tensor, layout: StudyLayout) -> Tensor:
        """prefix (B, P, C), patches (T, C), ordered by study. Returns (B, 1, C)."""
        query = self.q(self.latent[0, 0]).unflatten(0, (self.heads, -1))
        rows = []
        for x in (prefix, patches):
            k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(-3)
            rows.append(((k * query).sum(-1) * query.shape[-1] ** -0.5, v))
        x = self.proj(softmax_mean(*rows[0], *rows[1], layout).flatten(1).to(patches.dtype))
        return (x + self.mlp(self.norm(x)))[:, None]


class WeightedAverage(nn.Module):
    """The mean of a study's patch rows, weighted by the softmax of a learned score."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, patches: Tensor, layout: StudyLayout) -> Tensor:
        """patches (T, C), ordered by study. Returns (B, 1, C)."""
        no_prefix = patches.new_empty(layout.num_studies, 0, 1, patches.shape[1])
        pooled = softmax_mean(no_prefix[..., 0], no_prefix, self.score(patches), patches[:, None], layout)
        return pooled.to(patches.dtype)


def softmax_mean(
    prefix_scores: Tensor, prefix_values: Tensor, patch_scores: Tensor, patch_values: Tensor, layout: StudyLayout
) -> Tensor:
    """For each study and head, the mean of its rows' values, weighted by the softmax of their scores.

    prefix: (B, P, H) scores and (B, P, H, D) values; patches: (T, H) and (T, H, D). Returns (B, H, D), in float32 for
    16-bit values.
    """
    wide = torch.promote_types(patch_values.dtype, torch.float32)
    bounds = layout.cu_seqlens("study")
    offsets = bounds.long()

    def each_study(reduce: str, rows: Tensor) -> Tensor:
        return torch.segment_reduce(rows, reduce, offsets=offsets, axis=0)

    prefix_scores, patch_scores = prefix_scores.to(wide), patch_scores.to(wide)
    highest = torch.cat([prefix_scores.detach(), each_study("max", patch_scores.detach())[:, None]], dim=1).amax(1)
    spread = highest.repeat_interleave(bounds.diff(), dim=0, output_size=layout.num_tokens)
    p_prefix, p_patches = (prefix_scores - highest[:, None]).exp(), (patch_scores - spread).exp()
    pooled = (p_prefix[..., None] * prefix_values).sum(1) + each_study("sum", p_patches[..., None] * patch_values)
    return pooled / (p_prefix.sum(1) + each_study("sum", p_patches))[..., None]
