"""The public functions: check the arguments once, choose the backend, call the op.

Shapes: T patch tokens, G groups of a level, P prefix rows a group, R = G * P + T rows, H heads, D head dim, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .backends import choose_backend, choose_norm_backend
from .backends.base import Regroup, Spans
from .backends.torch_norm import move
from .layout import LEVELS, Level, StudyLayout, check_level

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def hier_attention(
    qkv: Tensor,
    layout: StudyLayout,
    level: Level,
    softmax_scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """Attention within every group of `level`: its P prefix rows and its patches.

    Bidirectional, without dropout: plain attention over packed sequences. A study's result does not depend on what
    else is in the batch.

    Args:
        qkv: (R, 3, H, D) - R = G * P + T rows, group after group, in each its prefix rows and then its patches. At the
            level whose groups are the rows of a dense batch (B, L, 3, H, D), this is that batch, flattened.
        layout: the batch's groups, on the device of `qkv`.
        level: "slice", "scan" or "study".
        softmax_scale: factor on q k^T, above 0; D ** -0.5 if None.
        backend: "auto", or a name from `available_backends()`; a name never falls back.
        deterministic: whether gradients must be the same bits on every run; some libraries add them up faster in no
            fixed order. `torch.use_deterministic_algorithms(True)` asks for the same.

    Returns:
        (R, H, D), in the dtype of `qkv`.

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
    deterministic = deterministic or (  # a compiler cannot ask whether they would warn only
        torch.are_deterministic_algorithms_enabled()
        and (torch.compiler.is_compiling() or not torch.is_deterministic_algorithms_warn_only_enabled())
    )
    head_dim = qkv.shape[3]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if not torch.compiler.is_compiling():  # a compiled model leaves the choice to the op
        backend = choose_backend(backend, qkv.device.type, qkv.dtype, head_dim, deterministic, level)
    spans = Spans(layout.cu_seqlens(level), layout.tiles(level), layout.max_seqlen(level))
    settings = spans, scale, backend, deterministic
    out: Tensor
    if not ops.unwatched(qkv):
        out, _ = ops.call("hier_attention", qkv, *ops.flat_attention(*settings, level))
    elif torch.is_grad_enabled():
        out = ops.attend_with_graph(qkv, settings)
    else:
        out, _ = ops.attend(qkv, *settings)
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
    """`residual + path_scale * layer_scale * update`, moved from level `src` to `dst`, and its LayerNorm.

    Every row is read where it lies at `src` and written where it lies at `dst`: group after group, in each its prefix
    rows and then its patches. Prefix rows are averaged going to a coarser level, every fine group counting the
    same, and cloned going to a finer one. With `src == dst` this is a plain residual add and LayerNorm.

    Args:
        residual: (R_src, C) - R_src = G_src * P + T rows, in the order of `src`.
        update: the same shape; its dtype may differ.
        layout: the batch's groups, on the device of `residual`.
        weight, bias: (C) - of the LayerNorm.
        path_scale: (G_src) - stochastic depth: a constant factor for all rows of a group; 1 if None.
        layer_scale: (C) - a learned factor for each channel; 1 if None.
        backend: "auto", "native", "triton" or "torch"; a name never falls back.

    Returns:
        (R_dst, C) the new residual in the dtype of `residual`, and its normalised rows in that of `update`; both in the
        order of `dst`.

    Raises:
        ValueError: shapes that do not belong together, mixed devices, or a backend that cannot run, with the reasons.

    Source: HLIP (arXiv 2505.21862), section 3.1, for the prefix rows.
    """
    check_level(src)
    _refuse_trace()
    shape = residual.shape
    if len(shape) != 2 or update.shape != shape:
        raise ValueError(
            f"residual and update: expected two tensors (rows, width) of one shape, got {tuple(shape)} and "
            f"{tuple(update.shape)}"
        )
    _check_rows("residual", residual, layout, src)
    device, width = residual.device, shape[1:]
    for name, x, expected in (
        ("residual", residual, shape),
        ("update", update, shape),
        ("weight", weight, width),
        ("bias", bias, width),
        ("layer_scale", layer_scale, width),
        ("path_scale", path_scale, (layout.num_groups(src),)),
    ):
        if x is not None and (x.shape != expected or x.device != device or x.dtype not in DTYPES):
            raise ValueError(
                f"{name}: expected floating-point {tuple(expected)} on {device}, got {x.dtype} {tuple(x.shape)} on "
                f"{x.device}"
            )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be 0 or more and finite, got {eps}")
    if path_scale is not None and path_scale.requires_grad:
        raise ValueError("path_scale: expected a constant; there is no gradient for it")
    if not torch.compiler.is_compiling():
        backend = choose_norm_backend(backend, device.type, residual.dtype, update.dtype)
    tensors = residual, update, weight, bias, layer_scale
    regroup = _regroup(layout, src, dst)
    if not ops.unwatched(*tensors, path_scale):
        x, y, _, _ = ops.call("add_regroup_norm", *tensors, path_scale, *regroup, eps, backend)
    elif torch.is_grad_enabled():
        x, y = ops.add_and_norm_with_graph(*tensors, (path_scale, regroup, eps, backend))
    else:
        x, y, _, _ = ops.add_and_norm(*tensors, path_scale, regroup, eps, backend)
    return x, y


def regroup(x: Tensor, layout: StudyLayout, src: Level, dst: Level) -> Tensor:
    """Move the rows of level `src` to where they lie at level `dst`; for those who bring their own norm.

    Going to a coarser level, prefix rows are averaged, every fine group counting the same; going to a finer one they
    are cloned. `add_regroup_norm` moves them in the pass that adds and normalises.

    Args:
        x: (R_src, C) - group after group, in each its prefix rows and then its patches.
        layout: the batch's groups, on the device of `x`.

    Returns:
        (R_dst, C), in the same order of the groups of `dst`. It is `x` itself where the two levels are one.

    Raises:
        ValueError: the number of rows does not fit `src`.

    Source: HLIP (arXiv 2505.21862), section 3.1.
    """
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x: expected a floating-point tensor (rows, width), got {x.dtype} {tuple(x.shape)}")
    _check_rows("x", x, layout, src)
    _refuse_trace()
    ops.refuse_tangents(x)
    return move(x, _regroup(layout, src, dst))


def regroup_prefix(*_: object, **__: object) -> Tensor:
    """Was for tensors that had the prefix rows of all groups first.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "regroup_prefix went with version 0.2.0, in which every group's prefix rows lie in front of its own patches: "
        "call regroup(x, layout, src, dst) on the rows of the whole level; CHANGELOG.md shows old and new code"
    )


def _regroup(layout: StudyLayout, src: Level, dst: Level) -> Regroup:
    views, num_prefix = layout.views(), layout.num_prefix
    bounds = views.cu_seqlens[src], views.cu_seqlens[check_level(dst)]
    if src == dst:
        return Regroup(*bounds, views.tiles[src][0], None, None, num_prefix, False)
    coarser = LEVELS.index(src) < LEVELS.index(dst)
    pair = (src, dst) if coarser else (dst, src)
    tiles = views.tiles[pair[0]][0]
    return Regroup(*bounds, tiles, views.children[pair], views.parents[pair], num_prefix, coarser)


def _refuse_trace() -> None:
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace would keep the groups of this batch for all others. Use torch.compile, or torch.export."
        )


def _check_rows(name: str, x: Tensor, layout: StudyLayout, level: Level) -> None:
    rows = layout.num_rows(level)
    if x.shape[0] != rows:
        raise ValueError(
            f"{name}: expected {rows} rows at level {level!r} ({layout.num_groups(level)} groups x {layout.num_prefix} "
            f"prefix + {layout.num_tokens} patches), got {x.shape[0]}"
        )
    if x.device != layout.device:
        raise ValueError(f"{name} is on {x.device}, the layout on {layout.device}; move one with .to(device)")
