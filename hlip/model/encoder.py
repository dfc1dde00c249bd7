"""The study encoder: a plain vision transformer over a packed batch.

Shapes: T patch tokens, G groups of the current level, P prefix rows a group, B studies, C width, V voxels a patch,
H heads, D head dim.
The token stream is (R, C), R = G * P + T: group after group, in each its prefix rows and then its patches. Parameter
names are those of the published weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hlip_kernels import (
    HierarchicalAttention,
    Level,
    StudyLayout,
    add_regroup_norm,
    is_fusible,
    is_plain,
    linear_of_norm,
    linear_of_pixels,
    mlp_of_norm,
)

from ..study import PackedBatch
from .config import VisionConfig
from .plan import TokenBatch, plan
from .positions import POSITIONS, Rope, sincos

# Scaling of the input: [0, 255] to [0, 1], then the means of ImageNet's channel means and deviations.
PIXEL_MEAN = (0.485 + 0.456 + 0.406) / 3
PIXEL_STD = (0.229 + 0.224 + 0.225) / 3
PIXEL_ZERO = 115  # the whole number next to the mean: subtracted from the pixels first, it is exact in bfloat16
PIXEL_UNIT = 64  # next to 255 times the deviation, and exact: what is left for the weights keeps them normal in float16


class PatchEmbed(nn.Module):
    """Projection of uint8 patches: (T, V) to (T, C). Scaling and normalisation are folded into the weights."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        # Holds the weights in the shape in which they are published; run as a convolution for hooks alone.
        self.proj = nn.Conv3d(1, config.width, config.patch_size, config.patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        if not is_plain(self.proj, nn.Conv3d):
            pixels = patches.to(next(self.proj.parameters()).dtype).unflatten(1, (1, *self.patch_size))
            projected: Tensor = self.proj((pixels / 255 - PIXEL_MEAN) / PIXEL_STD)
            return projected.flatten(1)
        weight = self.proj.weight.flatten(1)
        assert self.proj.bias is not None
        bias = self.proj.bias + weight.sum(1) * ((PIXEL_ZERO / 255 - PIXEL_MEAN) / PIXEL_STD)
        return linear_of_pixels(patches, PIXEL_ZERO, PIXEL_UNIT, weight * (PIXEL_UNIT / (255 * PIXEL_STD)), bias)


# The norm's backend by that of attention; libraries of attention alone leave the choice open.
NORM_BACKEND = {"native": "native", "triton": "triton", "cpu": "torch", "reference": "torch"}


class Stream(NamedTuple):
    """The token stream between two blocks, at the level of the block before.

    x: (R, C) - the residual.
    update: (R, C) - what the block before adds to it; None before the first block.
    path_scale: (G) - the factor of each group's update; None for 1.
    """

    x: Tensor
    update: Tensor | None
    path_scale: Tensor | None


def add_norm(
    stream: Stream, layout: StudyLayout, src: Level, dst: Level, norm: nn.LayerNorm, backend: str
) -> tuple[Tensor, Tensor]:
    """Add the pending update and go to level `dst`: the residual, and its normalised rows in the update's dtype."""
    x, update, path_scale = stream
    if update is None:
        return x, norm(x)
    if is_fusible(norm):
        return add_regroup_norm(
            x, update, layout, src, dst, norm.weight, norm.bias, norm.eps, path_scale, backend=backend
        )
    unused = x.new_ones(x.shape[1])
    x, _ = add_regroup_norm(x, update, layout, src, dst, unused, unused, path_scale=path_scale, backend=backend)
    return x, norm(x).to(update.dtype)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block that attends within the groups of one level.

    Its last update is left for the next block to add, because adding, changing the level and normalising are one
    pass over the stream.
    """

    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = HierarchicalAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))

    def forward(
        self, stream: Stream, layout: StudyLayout, previous: Level, level: Level, rotary: Tensor | None = None
    ) -> Stream:
        """rotary: of the rows of `level`; see `hlip_kernels.rotate`."""
        attn, mlp = self.attn, self.mlp
        x, y = add_norm(stream, layout, previous, level, self.norm1, self.norm_backend)
        if is_plain(attn, HierarchicalAttention):
            update = attn.attend(linear_of_norm(attn.qkv, self.norm1, x, y), layout, level, rotary)
        else:
            update = attn(y, layout, level) if rotary is None else attn(y, layout, level, rotary)
        stream = Stream(x, update, self._path_scale(x, layout, level))
        x, y = add_norm(stream, layout, level, level, self.norm2, self.norm_backend)
        update = mlp_of_norm(mlp.fc1, mlp.fc2, self.norm2, x, y) if is_plain(mlp, Mlp) else mlp(y)
        return Stream(x, update, self._path_scale(x, layout, level))

    @property
    def norm_backend(self) -> str:
        return NORM_BACKEND.get(self.attn.backend, "auto")

    def _path_scale(self, x: Tensor, layout: StudyLayout, level: Level) -> Tensor | None:
        """Stochastic depth: a group's rows keep their update, scaled, or lose it, together."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        return (torch.rand(layout.num_groups(level), device=x.device) < keep).float() / keep


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


class StudyEncoder(nn.Module):
    """Encode every study of a packed batch."""

    spatial_posemb: Tensor
    sequential_posemb: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if config.num_prefix > 0:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.num_prefix > 1:
            self.reg_token = nn.Parameter(torch.zeros(1, config.num_prefix - 1, width))
        self.patch_embed = PatchEmbed(config)
        self.register_buffer("spatial_posemb", POSITIONS[config.positions].table(config.grid, width)[None])
        if config.max_scans:
            self.register_buffer("sequential_posemb", sincos(np.arange(config.max_scans), width)[None])
        rates = np.linspace(0, config.drop_path, len(config.levels))
        self.blocks = nn.ModuleList(Block(config, float(rate)) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if config.head == "attention_pool":
            self.attn_pool = AttentionPool(config)
        if config.head == "weighted_average":
            self.weighted_average = WeightedAverage(width)
        self.grad_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in self.parameters(recurse=False):  # cls and register tokens, as timm has them
            nn.init.normal_(token, std=1e-6)
        if self.config.head == "attention_pool":
            nn.init.trunc_normal_(self.attn_pool.latent, std=self.config.width**-0.5)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the stream between blocks for backward, and run each block again there."""
        self.grad_checkpointing = enable

    def plan(self, batch: PackedBatch) -> TokenBatch:
        """The host's part of forward: dropout (in training) and positions. See `hlip.model.plan.plan`."""
        return plan(batch, self.config, self.training)

    def forward(self, batch: PackedBatch | TokenBatch) -> Tensor:
        """Returns (B, num_outputs, num_features) of the configuration: what its head gives of every study.

        Given what `plan` returns, it touches tensors only: `torch.compile(encoder, fullgraph=True, dynamic=True)`.

        Raises:
            ValueError: patches of another size.
        """
        tokens = self.plan(batch) if isinstance(batch, PackedBatch) else batch
        layout, level = tokens.layout, self.config.levels[0]
        stream, rotary = self.embed(tokens), self.rotary(tokens)
        for block, next_level in zip(self.blocks, self.config.levels, strict=True):
            given = (stream, layout, level, next_level, rotary.get(next_level))
            if self.grad_checkpointing and torch.is_grad_enabled():
                stream = checkpoint(block, *given, use_reentrant=False)
            else:
                stream = block(*given)
            level = next_level
        return self.outputs(stream, layout)

    def embed(self, tokens: TokenBatch) -> Stream:
        """The first block's stream, at its own level: cls and register rows, and the patches with their positions."""
        patches = self.patch_embed(tokens.patches) + self._positions(tokens)  # fp32 under autocast
        if not self.config.num_prefix:
            return Stream(patches, None, None)
        layout, level = tokens.layout, self.config.levels[0]
        own = [getattr(self, name)[0] for name in ("cls_token", "reg_token")[: self.config.num_prefix]]
        prefix = torch.cat(own).to(patches.dtype).repeat(layout.num_groups(level), 1)
        rows = layout.prefix_rows(level)
        x = patches.new_empty(layout.num_rows(level), patches.shape[1]).index_fill_(0, rows, 0)
        # In this order, backward makes no copy of the stream's gradient but that of the patches.
        return Stream(x.index_copy_(0, layout.patch_rows(level), patches).index_add_(0, rows, prefix), None, None)

    def rotary(self, tokens: TokenBatch) -> dict[Level, Tensor]:
        """(R, 2, N) cosines and sines that turn queries and keys of the rows of a level, by level; see
        `hlip_kernels.rotate`. Prefix rows are not turned. None where positions are only added."""
        positions, layout = POSITIONS[self.config.positions], tokens.layout
        if not isinstance(positions, Rope):
            return {}
        assert tokens.coordinates is not None
        places = tokens.coordinates.to(torch.promote_types(self.norm.weight.dtype, torch.float32))
        angles = positions.angles(places, self.config.width // self.config.heads)
        turns = torch.stack([angles.cos(), angles.sin()], dim=1)
        still = torch.stack([torch.ones_like(angles[:1]), torch.zeros_like(angles[:1])], dim=1)
        return {
            level: still.repeat(layout.num_rows(level), 1, 1).index_copy_(0, layout.patch_rows(level), turns)
            for level in dict.fromkeys(self.config.levels)
        }

    def outputs(self, stream: Stream, layout: StudyLayout) -> Tensor:
        """The head's output on the last block's stream, as `forward` returns it."""
        level = self.config.levels[-1]
        return self._prefix(stream, layout, level) if self.config.head == "token" else self._pool(stream, layout, level)

    def _prefix(self, stream: Stream, layout: StudyLayout, level: Level) -> Tensor:
        """(B, P, C): the prefix rows of every study, normalised. Patch rows are left as they are."""
        x, update, path_scale = stream
        assert update is not None
        rows = layout.prefix_rows(level)
        prefix = take(update, rows)
        if path_scale is not None:
            prefix = prefix * path_scale.repeat_interleave(layout.num_prefix)[:, None]
        prefix = (take(x, rows) + prefix).to(x.dtype)
        prefix = prefix_mean(prefix, layout, level)
        return self.norm(prefix).unflatten(0, (layout.num_studies, layout.num_prefix))

    def _pool(self, stream: Stream, layout: StudyLayout, level: Level) -> Tensor:
        """The output of heads that look at patch rows."""
        x, update, path_scale = stream
        assert update is not None
        norm, last = self.norm, self.blocks[-1]
        assert isinstance(last, Block)
        # In the residual's dtype: these rows are not for a product in 16 bits.
        stream = Stream(x, update.to(x.dtype), path_scale)
        _, y = add_norm(stream, layout, level, "study", norm, last.norm_backend)
        if self.config.head == "attention_pool":
            return self.attn_pool(y, layout)
        if self.config.head == "weighted_average":
            return self.weighted_average(y, layout)
        mean = _reduce("mean", y, _runs(layout))[:, None]
        if self.config.head == "average":
            return mean
        prefix = take(y, layout.prefix_rows("study")).unflatten(0, (layout.num_studies, layout.num_prefix))
        return torch.cat([prefix, mean.expand(-1, layout.num_prefix, -1)], dim=-1)

    def _positions(self, tokens: TokenBatch) -> Tensor:
        """(T, C): where a patch lies in its scan, plus which scan of the study it belongs to."""
        tables = self.spatial_posemb.flatten(0, 3)
        if self.config.max_scans:
            tables = torch.cat([tables, self.sequential_posemb[0]])
        weights = tokens.weights.to(tables.dtype)
        return F.embedding_bag(tokens.places, tables, mode="sum", per_sample_weights=weights)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of x (R, C). Their gradient is written to zeros in one pass, which indexing takes three for."""
    return F.embedding(rows, x)


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
