"""The study encoder: a plain vision transformer over a packed batch.

Shapes: T patch tokens, G groups of the current level, P prefix rows a group, B studies, C width, V voxels a patch.
The token stream is (G * P + T, C), prefix rows first. Parameter names are those of the published weights.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hlip_kernels import Grid, HierarchicalAttention, Level, StudyLayout, regroup_prefix

from ..data.batch import PackedBatch, patch_dropout, scan_dropout
from .config import VisionConfig

# Scaling of the input: [0, 255] to [0, 1], then the means of ImageNet's channel means and deviations.
PIXEL_MEAN = (0.485 + 0.456 + 0.406) / 3
PIXEL_STD = (0.229 + 0.224 + 0.225) / 3
PIXEL_ZERO = 115  # the whole number next to the mean: subtracted from the pixels first, it is exact in bfloat16


class PatchEmbed(nn.Module):
    """Projection of uint8 patches: (T, V) to (T, C). Scaling and normalisation are folded into the weights."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        # Holds the weights in the shape in which they are published; never run as a convolution.
        self.proj = nn.Conv3d(1, config.width, config.patch_size, config.patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        assert self.proj.bias is not None
        bias = self.proj.bias + weight.sum(1) * ((PIXEL_ZERO / 255 - PIXEL_MEAN) / PIXEL_STD)
        return F.linear(patches.to(weight.dtype) - PIXEL_ZERO, weight / (255 * PIXEL_STD), bias)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block that attends within the groups of one level."""

    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = HierarchicalAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: Tensor, layout: StudyLayout, level: Level) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x), layout, level), layout, level)
        return x + self._drop(self.mlp(self.norm2(x)), layout, level)

    def _drop(self, update: Tensor, layout: StudyLayout, level: Level) -> Tensor:
        """Stochastic depth: a group's rows keep their update, scaled, or lose it, together."""
        if not self.training or self.drop_path == 0:
            return update
        keep = 1 - self.drop_path
        scale = torch.empty(layout.num_groups(level), device=update.device).bernoulli_(keep).div_(keep)
        prefix = scale.repeat_interleave(layout.num_prefix)
        patches = scale.repeat_interleave(layout.cu_seqlens(level).diff(), output_size=layout.num_tokens)
        return update * torch.cat([prefix, patches])[:, None].to(update.dtype)


class StudyEncoder(nn.Module):
    """Encode every study of a packed batch."""

    spatial_posemb: Tensor
    sequential_posemb: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.num_prefix > 1:
            self.reg_token = nn.Parameter(torch.zeros(1, config.num_prefix - 1, width))
        self.patch_embed = PatchEmbed(config)
        self.register_buffer("spatial_posemb", spatial_table(config.positions, config.grid, width)[None])
        if config.max_scans:
            self.register_buffer("sequential_posemb", sincos(np.arange(config.max_scans), width)[None])
        rates = np.linspace(0, config.drop_path, len(config.levels))
        self.blocks = nn.ModuleList(Block(config, float(rate)) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._init_weights()

    def _init_weights(self) -> None:
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, token in self.named_parameters(recurse=False):
            nn.init.trunc_normal_(token, std=1e-6 if name == "cls_token" else std)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Returns (B, P, C): the normalised prefix rows of every study.

        Raises:
            ValueError: patches of another size, or a study with more scans than there are positions.
        """
        config = self.config
        if tuple(batch.patch_size) != tuple(config.patch_size):
            raise ValueError(f"the model reads patches of {config.patch_size} voxels, the batch has {batch.patch_size}")
        if config.max_scans:
            for uid, scans in zip(batch.uids, batch.layout.grids, strict=True):
                if len(scans) > config.max_scans:
                    raise ValueError(f"{uid}: {len(scans)} scans, but the model has positions for {config.max_scans}")
        if self.training:
            batch = self._dropout(batch)
        layout = batch.layout.with_num_prefix(config.num_prefix)
        x = self.patch_embed(batch.patches) + self._positions(batch)  # fp32 under autocast, as the residual stays

        level = config.levels[0]
        tokens = self.cls_token if config.num_prefix == 1 else torch.cat([self.cls_token, self.reg_token], dim=1)
        prefix = tokens[0].repeat(layout.num_groups(level), 1)
        x = torch.cat([prefix.to(x.dtype), x])
        for block, next_level in zip(self.blocks, config.levels, strict=True):
            x = _change_level(x, layout, level, next_level)
            level = next_level
            x = block(x, layout, level)
        prefix = regroup_prefix(x[: layout.num_groups(level) * layout.num_prefix], layout, level, "study")
        return self.norm(prefix).unflatten(0, (layout.num_studies, layout.num_prefix))

    def _dropout(self, batch: PackedBatch) -> PackedBatch:
        if self.config.scan_dropout:
            batch = batch.select(scan_dropout(batch.layout, self.config.scan_dropout))
        if self.config.patch_dropout:
            batch = batch.select(patch_dropout(batch.layout, self.config.patch_dropout, self.config.levels[0]))
        return batch

    def _positions(self, batch: PackedBatch) -> Tensor:
        """(T, C): where a patch lies in its scan, plus which scan of the study it belongs to."""
        layout = batch.layout
        scan, place = batch.positions.long().unbind(1)
        scan_grids = [grid for study in layout.grids for grid in study]
        grids = sorted(set(scan_grids))
        tables = torch.cat([resample_spatial(self.spatial_posemb, grid).flatten(0, 2) for grid in grids])
        if len(grids) > 1:
            first = np.cumsum([0] + [d * h * w for d, h, w in grids[:-1]])
            offsets = torch.tensor([first[grids.index(grid)] for grid in scan_grids]).to(
                place.device, non_blocking=True
            )
            place = place + offsets.repeat_interleave(layout.cu_seqlens("scan").diff(), output_size=layout.num_tokens)
        positions = tables[place]
        if self.config.max_scans:
            if self.training:  # every study draws its scans' positions without replacement
                drawn = (
                    torch.rand(layout.num_studies, self.config.max_scans).argsort(1).to(scan.device, non_blocking=True)
                )
                study = torch.arange(layout.num_studies, device=scan.device).repeat_interleave(
                    layout.cu_seqlens("study").diff(), output_size=layout.num_tokens
                )
                scan = drawn[study, scan]
            positions = positions + self.sequential_posemb[0, scan]
        return positions


def _change_level(x: Tensor, layout: StudyLayout, src: Level, dst: Level) -> Tensor:
    if src == dst:
        return x
    prefix, patches = x.split([x.shape[0] - layout.num_tokens, layout.num_tokens])
    return torch.cat([regroup_prefix(prefix, layout, src, dst), patches])


def sincos(places: np.ndarray, width: int) -> Tensor:
    """(N) places to (N, width) float32: sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi."""
    frequencies = 10000.0 ** (-np.arange(width // 2) / (width / 2))
    angles = places[:, None] * frequencies
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()


def spatial_table(kind: str, grid: Grid, width: int) -> Tensor:
    """(d, h, w, width) positions of the patches of a scan. Source: HLIP (arXiv 2505.21862), section 3.2."""
    d, h, w = (np.arange(n) for n in grid)
    if kind == "sincos3d":
        third = width // 3
        parts = [sincos(w, third)[None, None], sincos(h, third)[None, :, None], sincos(d, third)[:, None, None]]
        return torch.cat([part.expand(*grid, third) for part in parts], dim=-1).contiguous()
    half = width // 2
    plane = [sincos(w, half)[None], sincos(h, half)[:, None]]
    in_plane = torch.cat([part.expand(*grid[1:], half) for part in plane], dim=-1)
    return in_plane + sincos(d, width)[:, None, None]


def resample_spatial(table: Tensor, grid: Grid) -> Tensor:
    """(1, d, h, w, C) to the (d, h, w, C) of another grid, trilinearly."""
    if tuple(table.shape[1:4]) == tuple(grid):
        return table[0]
    return F.interpolate(table.permute(0, 4, 1, 2, 3), grid, mode="trilinear", align_corners=False)[0].permute(
        1, 2, 3, 0
    )
