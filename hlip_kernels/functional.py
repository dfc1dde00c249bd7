"""The public functions: check the arguments once, choose the backend, call the op.

Shapes: T patch tokens, G groups of a level, P prefix rows a group, H heads, D head dim, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers torch.ops.hlip_kernels)
from .backends import BACKENDS, choose_backend
from .layout import LEVELS, Level, StudyLayout, check_level


def hier_attention(
    qkv: Tensor,
    layout: StudyLayout,
    level: Level,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention within every group of `level`: its P prefix rows and its interval of the patch stream.

    Bidirectional, without dropout. A study's result does not depend on what else is in the batch.

    Args:
        qkv: (G * P + T, 3, H, D) - rows 0 to G * P - 1 are the prefix rows, group after group; the patch
            stream follows.
        layout: the batch's groups, on the device of `qkv`.
        level: "slice", "scan" or "study".
        softmax_scale: factor on q k^T; D ** -0.5 if None.
        backend: "auto", or a name from `available_backends()`; a name never falls back.

    Returns:
        (G * P + T, H, D), in the dtype of `qkv`.

    Raises:
        ValueError: shapes that do not belong together, mixed devices, or a backend that cannot run, with
            the reasons.

    Source: HLIP (arXiv 2505.21862), section 3.1.
    """
    check_level(level)
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(
            f"qkv: expected a floating-point tensor (rows, 3, heads, head_dim), got {tuple(qkv.shape)} {qkv.dtype}"
        )
    rows = layout.num_groups(level) * layout.num_prefix + layout.num_tokens
    if qkv.shape[0] != rows:
        raise ValueError(
            f"qkv: expected {rows} rows at level {level!r} ({layout.num_groups(level)} groups x {layout.num_prefix} "
            f"prefix + {layout.num_tokens} patches), got {qkv.shape[0]}"
        )
    if qkv.device != layout.device:
        raise ValueError(f"qkv is on {qkv.device}, the layout on {layout.device}; move one with .to(device)")
    head_dim, max_seqlen = qkv.shape[3], layout.max_seqlen(level)
    name = choose_backend(backend, qkv.device.type, qkv.dtype, head_dim)
    q_rows, k_rows = BACKENDS[name].tile_rows(qkv.device, qkv.dtype, head_dim, max_seqlen)
    out, _ = torch.ops.hlip_kernels.hier_attention(
        qkv,
        layout.cu_seqlens(level),
        layout.tiles(level, q_rows),
        layout.tiles(level, k_rows),
        layout.num_prefix,
        max_seqlen,
        head_dim**-0.5 if softmax_scale is None else softmax_scale,
        name,
    )
    return out


def regroup_prefix(prefix: Tensor, layout: StudyLayout, src: Level, dst: Level) -> Tensor:
    """Carry prefix rows from the groups of `src` to those of `dst`.

    Going to a coarser level they are averaged, every fine group counting the same; going to a finer one
    they are cloned. Patch rows need nothing.

    Args:
        prefix: (G_src * P, C)
        layout: the batch's groups, on the device of `prefix`.

    Returns:
        (G_dst * P, C)

    Raises:
        ValueError: the number of rows does not fit `src`.

    Source: HLIP (arXiv 2505.21862), section 3.1.
    """
    groups = layout.num_groups(check_level(src))
    if prefix.dim() != 2 or prefix.shape[0] != groups * layout.num_prefix:
        raise ValueError(
            f"prefix: expected ({groups * layout.num_prefix}, width) at level {src!r}, got {tuple(prefix.shape)}"
        )
    if prefix.device != layout.device:
        raise ValueError(f"prefix is on {prefix.device}, the layout on {layout.device}; move one with .to(device)")
    if src == check_level(dst):
        return prefix
    sets = prefix.reshape(groups, layout.num_prefix * prefix.shape[1])
    if LEVELS.index(src) < LEVELS.index(dst):
        # segment_reduce sums each group by itself: no atomics, the same bits on every run. It sums in the dtype
        # it is given, and a study's mean may run over thousands of slices.
        wide = sets if sets.dtype == torch.float64 else sets.float()
        means = torch.segment_reduce(wide, "mean", offsets=layout.children(src, dst).long(), axis=0)
        moved = means.to(sets.dtype)
    else:
        counts = layout.children(dst, src).diff()
        moved = sets.repeat_interleave(counts, dim=0, output_size=layout.num_groups(dst))
    return moved.reshape(-1, prefix.shape[1])
