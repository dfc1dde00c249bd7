"""The public functions: check the arguments once, choose the backend, call the op.

Shapes: T patch tokens, G groups of a level, P prefix rows a group, H heads, D head dim, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .backends import choose_backend, choose_norm_backend
from .backends.groups import Regroup
from .backends.torch_norm import move_prefix
from .layout import LEVELS, Level, StudyLayout, check_level

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        softmax_scale: factor on q k^T, above 0; D ** -0.5 if None.
        backend: "auto", or a name from `available_backends()`; a name never falls back.

    Returns:
        (G * P + T, H, D), in the dtype of `qkv`.

    Raises:
        ValueError: shapes that do not belong together, mixed devices, or a backend that cannot run, with
            the reasons.

    Source: HLIP (arXiv 2505.21862), section 3.1.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or 0 in qkv.shape[2:] or qkv.dtype not in DTYPES:
        raise ValueError(
            f"qkv: expected a floating-point tensor (rows, 3, heads, head_dim), got {tuple(qkv.shape)} {qkv.dtype}"
        )
    _refuse_trace()
    if softmax_scale is not None and not 0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    _check_rows("qkv", qkv, layout, level)
    if not torch.compiler.is_compiling():  # a compiled model leaves the choice to the op
        backend = choose_backend(backend, qkv.device.type, qkv.dtype, qkv.shape[3])
    out: Tensor
    out, _ = ops.call(
        "hier_attention",
        qkv,
        layout.cu_seqlens(level),
        layout.tiles(level),
        layout.num_prefix,
        layout.max_seqlen(level),
        qkv.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
        backend,
    )
    return out


def add_regroup_norm(
    residual: Tensor,
    update: Tensor,
    layout: StudyLayout,
    src: Level,
    dst: Level,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    path_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`residual + path_scale * layer_scale * update`, carried from level `src` to `dst`, and its LayerNorm.

    Patch rows keep their order. Prefix rows are averaged going to a coarser level, every fine group counting the
    same, and cloned going to a finer one. With `src == dst` this is a plain residual add and LayerNorm.

    Args:
        residual: (G_src * P + T, C)
        update: the same shape; its dtype may differ.
        layout: the batch's groups, on the device of `residual`.
        weight, bias: (C) - of the LayerNorm.
        path_scale: (G_src) - stochastic depth: a constant factor for all rows of a group; 1 if None.
        layer_scale: (C) - a learned factor for each channel; 1 if None.
        backend: "auto", "native", "triton" or "torch"; a name never falls back.

    Returns:
        (G_dst * P + T, C) the new residual in the dtype of `residual`, and its normalised rows in that of `update`.

    Raises:
        ValueError: shapes that do not belong together, mixed devices, or a backend that cannot run, with the reasons.

    Source: HLIP (arXiv 2505.21862), section 3.1, for the carrying of prefix rows.
    """
    check_level(src)
    _refuse_trace()
    if residual.dim() != 2 or update.shape != residual.shape:
        raise ValueError(
            f"residual and update: expected two tensors (rows, width) of one shape, got {tuple(residual.shape)} and "
            f"{tuple(update.shape)}"
        )
    _check_rows("residual", residual, layout, src)
    width, groups = residual.shape[1], layout.num_groups(src)
    for name, x, shape in (
        ("residual", residual, residual.shape),
        ("weight", weight, (width,)),
        ("bias", bias, (width,)),
        ("layer_scale", layer_scale, (width,)),
        ("path_scale", path_scale, (groups,)),
        ("update", update, update.shape),
    ):
        if x is not None and (x.shape != shape or x.device != residual.device or x.dtype not in DTYPES):
            raise ValueError(
                f"{name}: expected floating-point {tuple(shape)} on {residual.device}, got {x.dtype} {tuple(x.shape)} "
                f"on {x.device}"
            )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be 0 or more and finite, got {eps}")
    if path_scale is not None and path_scale.requires_grad:
        raise ValueError("path_scale: expected a constant; there is no gradient for it")
    if not torch.compiler.is_compiling():
        backend = choose_norm_backend(backend, residual.device.type, residual.dtype, update.dtype)
    tensors = residual, update, path_scale, layer_scale, weight, bias
    new_residual, normalised, _, _ = ops.call("add_regroup_norm", *tensors, *_regroup(layout, src, dst), eps, backend)
    return new_residual, normalised


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
    groups = layout.num_groups(src)
    if prefix.dim() != 2 or prefix.shape[0] != groups * layout.num_prefix:
        raise ValueError(
            f"prefix: expected ({groups * layout.num_prefix}, width) at level {src!r}, got {tuple(prefix.shape)}"
        )
    if prefix.device != layout.device:
        raise ValueError(f"prefix is on {prefix.device}, the layout on {layout.device}; move one with .to(device)")
    if prefix.dtype not in DTYPES:
        raise ValueError(f"prefix: expected floating-point, got {prefix.dtype}")
    _refuse_trace()
    regroup = _regroup(layout, src, dst)
    if regroup.coarser:
        ops.refuse_tangents(prefix)
    return move_prefix(prefix, regroup)


def _regroup(layout: StudyLayout, src: Level, dst: Level) -> Regroup:
    children = None
    if src != check_level(dst):
        children = layout.children(*sorted((src, dst), key=LEVELS.index))
    return Regroup(layout.cu_seqlens(src), layout.tiles(src)[0], children, layout.num_prefix, layout.num_groups(dst))


def _refuse_trace() -> None:
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace would keep the groups of this batch for all others. Use torch.compile, or torch.export."
        )


def _check_rows(name: str, x: Tensor, layout: StudyLayout, level: Level) -> None:
    rows = layout.num_groups(check_level(level)) * layout.num_prefix + layout.num_tokens
    if x.shape[0] != rows:
        raise ValueError(
            f"{name}: expected {rows} rows at level {level!r} ({layout.num_groups(level)} groups x {layout.num_prefix} "
            f"prefix + {layout.num_tokens} patches), got {x.shape[0]}"
        )
    if x.device != layout.device:
        raise ValueError(f"{name} is on {x.device}, the layout on {layout.device}; move one with .to(device)")
