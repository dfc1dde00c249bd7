"""Residual add, change of level and LayerNorm: the public functions, their op, and the Function that stands for it.

Shapes: R = G * P + T rows, G groups of a level, P prefix rows a group, T patch tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import NORM_BACKENDS, choose_norm_backend
from .backends.base import FLOATS, Regroup, shares_gradient, wide_dtype
from .backends.torch_norm import move
from .layout import LEVELS, Level, StudyLayout, check_level, check_rows


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
    ops.refuse_trace()
    if residual.dim() != 2 or update.shape != residual.shape:
        raise ValueError(
            "residual and update: expected two tensors (rows, width) of one shape, got "
            f"{tuple(residual.shape)} and {tuple(update.shape)}"
        )
    check_rows("residual", residual, layout, src)
    _check_arguments(residual, update, weight, bias, path_scale, layer_scale, layout.num_groups(src), eps)
    if not torch.compiler.is_compiling():
        backend = choose_norm_backend(backend, residual.device.type, residual.dtype, update.dtype)
    tensors = residual, update, weight, bias, layer_scale
    change = _regroup(layout, src, dst)
    if not ops.unwatched(*tensors, path_scale):
        x, y, _, _ = ops.call("add_regroup_norm", *tensors, path_scale, *change, eps, backend)
    elif torch.is_grad_enabled():
        x, y = _add_and_norm_with_graph(*tensors, (path_scale, change, eps, backend))
    else:
        x, y, _, _ = _add_and_norm(*tensors, path_scale, change, eps, backend)
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
    if x.dim() != 2 or x.dtype not in FLOATS:
        raise ValueError(f"x: expected a floating-point tensor (rows, width), got {x.dtype} {tuple(x.shape)}")
    check_rows("x", x, layout, src)
    ops.refuse_trace()
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


def _check_arguments(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    path_scale: Tensor | None,
    layer_scale: Tensor | None,
    num_groups: int,
    eps: float,
) -> None:
    """Raise ValueError unless these are what `add_regroup_norm` takes, with `num_groups` groups of src."""
    device, shape = residual.device, residual.shape
    width = shape[1:]
    for name, x, expected in (
        ("residual", residual, shape),
        ("update", update, shape),
        ("weight", weight, width),
        ("bias", bias, width),
        ("layer_scale", layer_scale, width),
        ("path_scale", path_scale, (num_groups,)),
    ):
        if x is not None and (x.shape != expected or x.device != device or x.dtype not in FLOATS):
            raise ValueError(
                f"{name}: expected floating-point {tuple(expected)} on {device}, got {x.dtype} {tuple(x.shape)} on "
                f"{x.device}"
            )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be 0 or more and finite, got {eps}")
    if path_scale is not None and path_scale.requires_grad:
        raise ValueError("path_scale: expected a constant; there is no gradient for it")


def _regroup(layout: StudyLayout, src: Level, dst: Level) -> Regroup:
    views, num_prefix = layout.views(), layout.num_prefix
    bounds = views.cu_seqlens[src], views.cu_seqlens[check_level(dst)]
    if src == dst:
        return Regroup(*bounds, views.tiles[src][0], None, None, num_prefix, False)
    coarser = LEVELS.index(src) < LEVELS.index(dst)
    pair = (src, dst) if coarser else (dst, src)
    tiles = views.tiles[pair[0]][0]
    return Regroup(*bounds, tiles, views.children[pair], views.parents[pair], num_prefix, coarser)


# The op: x is (R of dst, C), the new residual; y the same, normalised; mean and rstd (R).

_REGROUP = "Tensor src, Tensor dst, Tensor tiles, Tensor? children, Tensor? parents, int num_prefix, bool coarser"
_SCALES = "Tensor? path_scale, Tensor? layer_scale, Tensor weight"


def _add_and_norm(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor | None,
    path_scale: Tensor | None, regroup: Regroup, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return NORM_BACKENDS[backend].forward(residual, update, path_scale, layer_scale, weight, bias, regroup, eps)


def _norm(residual: Tensor, update: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias, layer_scale, path_scale, *maps, eps, backend = rest
    name = choose_norm_backend(backend, residual.device.type, residual.dtype, update.dtype)
    return _add_and_norm(residual, update, weight, bias, layer_scale, path_scale, Regroup(*maps), eps, name)


def _norm_fake(residual: Tensor, update: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = residual.shape[0] + Regroup(*rest[4:11]).rows_added
    x = residual.new_empty(rows, residual.shape[1])
    mean, rstd = (residual.new_empty(rows, dtype=wide_dtype(residual.dtype)) for _ in range(2))
    return x, x.new_empty(x.shape, dtype=update.dtype), mean, rstd


def _norm_backward(grad_x: Tensor | None, grad_y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mean, rstd, update, path_scale, layer_scale, weight, *maps, backend = rest
    name = choose_norm_backend(backend, x.device.type, x.dtype, grad_y.dtype)
    return NORM_BACKENDS[name].backward(
        grad_x, grad_y, x, mean, rstd, update, path_scale, layer_scale, weight, Regroup(*maps)
    )


def _norm_backward_fake(
    grad_x: Tensor | None,
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    update: Tensor | None,
    path_scale: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_residual = x.new_empty(x.shape[0] - Regroup(*settings[:7]).rows_added, x.shape[1])
    shared = shares_gradient(x, grad_y, path_scale, layer_scale)
    return (
        grad_residual,
        grad_y.new_empty(0 if shared else grad_residual.shape),
        weight.new_empty(0) if layer_scale is None else torch.empty_like(layer_scale),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, update, weight, _, layer_scale, path_scale, *maps, num_prefix, coarser, _, backend = inputs
    x, y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.settings = num_prefix, coarser, backend
    ctx.dtype = y.dtype
    kept = update if layer_scale is not None else None
    ctx.save_for_backward(x, mean, rstd, kept, path_scale, layer_scale, weight, *maps)


def _norm_autograd(ctx: Any, grad_x: Tensor | None, grad_y: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_x is None and grad_y is None:
        return (None,) * 14
    x, *saved = ctx.saved_tensors
    if grad_y is None:
        grad_y = x.new_zeros(x.shape, dtype=ctx.dtype)
    grads = ops.call("add_regroup_norm_backward", grad_x, grad_y, x, *saved, *ctx.settings)
    return *_norm_gradients(*grads), *[None] * 10


def _norm_gradients(
    residual: Tensor, update: Tensor, layer_scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor | None, ...]:
    """Put the results of a backend into the order of the op's arguments."""
    update = update if update.numel() else residual
    return residual, update, weight, bias, layer_scale if layer_scale.numel() else None


ops.define(
    "add_regroup_norm",
    "Tensor residual, Tensor update, Tensor weight, Tensor bias, Tensor? layer_scale, Tensor? path_scale, "
    f"{_REGROUP}, float eps, str backend",
    "(Tensor x, Tensor y, Tensor mean, Tensor rstd)",
    _norm,
    _norm_fake,
)
ops.define(
    "add_regroup_norm_backward",
    f"Tensor? grad_x, Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? update, {_SCALES}, {_REGROUP}, "
    "str backend",
    # grad_update is empty where it equals grad_residual: one tensor serves as both
    "(Tensor grad_residual, Tensor grad_update, Tensor grad_layer_scale, Tensor grad_weight, Tensor grad_bias)",
    _norm_backward,
    _norm_backward_fake,
)
ops.differentiate("add_regroup_norm", _norm_autograd, _norm_context)
ops.differentiate("add_regroup_norm_backward", ops.second_derivative)


class _AddAndNorm(torch.autograd.Function):
    """`add_regroup_norm`. settings: what `_add_and_norm` takes after the tensors that have gradients. It saves what the
    op saves, as attention's does."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor | None,
        settings: tuple[Tensor | None, Regroup, float, str],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, y, mean, rstd = _add_and_norm(residual, update, weight, bias, layer_scale, *settings)
        path_scale, (*maps, num_prefix, coarser), _, backend = settings
        ctx.settings = num_prefix, coarser, backend, y.dtype
        ctx.set_materialize_grads(False)
        kept = None if layer_scale is None else update
        ctx.save_for_backward(x, mean, rstd, kept, path_scale, layer_scale, weight, *maps)
        return x, y

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, saved: Any, grad_x: Tensor | None, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_x is None and grad_y is None:
            return (None,) * 6
        x, mean, rstd, update, path_scale, layer_scale, weight, src, dst, tiles, children, parents = saved
        num_prefix, coarser, backend, dtype = ctx.settings
        if grad_y is None:
            grad_y = x.new_zeros(x.shape, dtype=dtype)
        tensors = grad_x, grad_y, x, mean, rstd, update, path_scale, layer_scale, weight
        regroup = Regroup(src, dst, tiles, children, parents, num_prefix, coarser)
        if ops.unwatched(grad_y, grad_x):
            grads = NORM_BACKENDS[backend].backward(*tensors, regroup)
        else:
            grads = ops.call("add_regroup_norm_backward", *tensors, *regroup, backend)
        return *_norm_gradients(*grads), None


# As for attention.
_add_and_norm_with_graph: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, _AddAndNorm).apply
