"""Encoders to measure ours against, on the same studies and, where they are the same model, on the same weights.

`published` is the released HLIP encoder's way of computing, written with PyTorch's own layers: all studies have as
many scans, patch tokens lie in a dense (groups, 1 + n, C) tensor, and a change of level splits the cls rows off,
reshapes the patches, averages or repeats the cls rows, and concatenates: a copy of all tokens. Attention is PyTorch's
`scaled_dot_product_attention`, or without flash a product, a softmax and a product. It runs in its own fastest
settings: contiguous inputs, inference mode, weights in the type of the products.

`vit` is the same without levels: every layer attends over the whole study. MONAI's `swin` and `navit` have weights
of their own.

Shapes: B studies, M scans of each, d slices of a scan, n tokens of a group, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hlip.model.encoder import StudyEncoder
from hlip.model.plan import TokenBatch
from hlip_kernels import Level

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Pass = Callable[[Tensor], Tensor]  # from (B * M, 1, D, H, W) to (B * M, C)
flash: Attend = F.scaled_dot_product_attention  # attention in one op


def unfused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention that writes every weight to memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def plain_block(block: Any, x: Tensor, mask: Tensor | None = None, attend: Attend = flash) -> Tensor:
    """A pre-norm block of our encoder on (B, L, C), in PyTorch's own layers."""
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    x = x + block.attn.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def positions(encoder: StudyEncoder, tokens: TokenBatch) -> Tensor:
    """(T, C): of a patch in its scan, and of the scan in its study."""
    tables = encoder.spatial_posemb.flatten(0, 3)
    if encoder.config.max_scans:
        tables = torch.cat([tables, encoder.sequential_posemb[0]])
    return F.embedding_bag(tokens.places, tables, mode="sum", per_sample_weights=tokens.weights.to(tables.dtype))


def published(
    encoder: StudyEncoder, tokens: TokenBatch, attend: Attend = flash, present: Tensor | None = None
) -> Tensor:
    """(B, C) embeddings of studies that all have as many scans of one grid, in the released encoder's way.

    Args:
        present: (B, M) bool - False for scans that are padding, which no study attends to. Levels are scan and study.

    Source: HLIP (arXiv 2505.21862), section 3.1.
    """
    layout = tokens.layout
    groups = {level: layout.num_groups(level) for level in ("slice", "scan", "study")}
    x = encoder.patch_embed(tokens.patches) + positions(encoder, tokens)
    level = encoder.config.levels[0]
    x = x.unflatten(0, (groups[level], -1))
    x = torch.cat([encoder.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
    masks: dict[Level, Tensor] = {}
    if present is not None:
        rows = present.repeat_interleave(x.shape[1] - 1, 1)
        masks["study"] = torch.cat([present[:, :1], rows], 1)[:, None, None]
    for block, target in zip(encoder.blocks, encoder.config.levels, strict=True):
        x = regroup(x, groups[target], present) if target != level else x
        level = target
        x = plain_block(block, x, masks.get(level), attend)
    cls = x[:, 0].unflatten(0, (groups["study"], -1)).mean(1)
    return encoder.norm(cls)


def regroup(x: Tensor, groups: int, present: Tensor | None = None) -> Tensor:
    """(G, 1 + n, C) to as many groups as wanted: cls rows are averaged, over those that are present, or repeated;
    patches are reshaped."""
    cls, patches = x[:, :1], x[:, 1:]
    if groups > len(x):
        cls = cls.repeat_interleave(groups // len(x), 0)
    elif present is None:
        cls = cls.unflatten(0, (groups, -1)).mean(1)
    else:
        weights = (present / present.sum(1, keepdim=True)).to(x.dtype)
        cls = (cls.unflatten(0, present.shape) * weights[..., None, None]).sum(1)
    return torch.cat([cls, patches.reshape(groups, -1, x.shape[-1])], dim=1)


def swin(fused: bool) -> tuple[nn.Module, Pass]:
    """MONAI's 3D Swin transformer with the widths and depths of Swin-B, windows of 7 and patches of 4 voxels."""
    from monai.networks.nets.swin_unetr import SwinTransformer

    model = SwinTransformer(
        in_chans=1, embed_dim=128, window_size=(7, 7, 7), patch_size=(4, 4, 4), depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32), spatial_dims=3, use_flash_attention=fused,
    )  # fmt: skip
    return model, lambda volumes: model(volumes)[-1].mean((2, 3, 4))


def navit(shape: tuple[int, ...], patch: int, width: int, depth: int) -> tuple[nn.Module, Pass]:
    """MONAI's 3D NaViT: volumes of any size in one sequence, kept apart by a mask. Its attention is not fused."""
    from monai.networks.nets import NaViT

    model = NaViT(
        image_size=shape, patch_size=patch, num_classes=width, hidden_size=width, mlp_dim=4 * width,
        num_layers=depth, num_heads=width // 64, in_channels=1, spatial_dims=3, qkv_bias=True,
    )  # fmt: skip
    return model, lambda volumes: model([list(volumes)])
