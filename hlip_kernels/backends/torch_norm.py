"""Residual add, regroup and LayerNorm with PyTorch's own ops, on any device.

Shapes: R rows of a level, G groups, P prefix rows a group, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import NormBackend, Regroup, shares_gradient, wide_dtype


class TorchNorm(NormBackend):
    name = "torch"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, update_dtype: torch.dtype) -> list[str]:
        return []

    def forward(
        self,
        residual: Tensor,
        update: Tensor,
        path_scale: Tensor | None,
        layer_scale: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        regroup: Regroup,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = update.dtype
        if layer_scale is not None:
            update = update * layer_scale
        if path_scale is not None:
            update = update * _row_scale(path_scale, residual.shape[0], regroup)
        x = _move((residual + update).to(residual.dtype), regroup)
        y, mean, rstd = torch.native_layer_norm(x, x.shape[1:], _parameter(weight, x), _parameter(bias, x), eps)
        return x, y.to(dtype), mean.view(-1), rstd.view(-1)

    def backward(
        self,
        grad_x: Tensor | None,
        grad_y: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        update: Tensor | None,
        path_scale: Tensor | None,
        layer_scale: Tensor | None,
        weight: Tensor,
        regroup: Regroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        parameter = _parameter(weight, x)
        statistics = mean.view(-1, 1), rstd.view(-1, 1)
        grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(x.dtype), x, x.shape[1:], *statistics, parameter, parameter, [True] * 3
        )
        if grad_x is not None:
            grad.add_(grad_x)
        grad_residual = _move_gradient(grad, regroup)

        grad_update, grad_layer_scale = grad_y.new_empty(0), weight.new_empty(0)
        if not shares_gradient(x, grad_y, path_scale, layer_scale):
            scaled = grad_residual
            if path_scale is not None:
                scaled = scaled * _row_scale(path_scale, len(scaled), regroup)
            if layer_scale is not None:
                assert update is not None
                grad_layer_scale = (scaled * update).sum(0, dtype=wide_dtype(x.dtype)).to(layer_scale.dtype)
                scaled = scaled * layer_scale
            grad_update = scaled.to(grad_y.dtype)
        return grad_residual, grad_update, grad_layer_scale, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def move(x: Tensor, regroup: Regroup) -> Tensor:
    """Rows (R_src, C) to where they lie at dst, (R_dst, C); prefix rows as means, or as clones.

    Gradients of clones are added up in a fixed order, and in `wide_dtype`.
    """
    if regroup.children is None or not regroup.num_prefix:
        return x
    if torch.compiler.is_compiling():  # which takes no such Function; gradients are then in the compiler's order
        return _move(x, regroup)
    moved: Tensor = _Move.apply(x, False, *regroup)  # type: ignore[no-untyped-call]
    return moved


class _Move(torch.autograd.Function):
    """`_move`, or its adjoint; each is the other's derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, adjoint: bool, *regroup: Any) -> Tensor:
        return (_move_gradient if adjoint else _move)(x, Regroup(*regroup))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.adjoint, *maps, ctx.num_prefix, ctx.coarser = inputs
        ctx.save_for_backward(*maps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        moved: Tensor = _Move.apply(grad, not ctx.adjoint, *ctx.saved_tensors, ctx.num_prefix, ctx.coarser)  # type: ignore[no-untyped-call]
        return moved, *[None] * 8


def _move(x: Tensor, regroup: Regroup) -> Tensor:
    if regroup.children is None or not regroup.num_prefix:
        return x
    rows = _coarse_rows(regroup, max(x.shape[0], x.shape[0] + regroup.rows_added))
    if not regroup.coarser:
        return x.index_select(0, rows)
    moved = x.new_empty(x.shape[0] + regroup.rows_added, x.shape[1]).index_copy_(0, rows, x)
    return _write_prefixes(moved, regroup.dst, _reduce(x, regroup.src, "mean", regroup), regroup)


def _move_gradient(grad: Tensor, regroup: Regroup) -> Tensor:
    """The adjoint of `_move`: (R_dst, C) to (R_src, C)."""
    if regroup.children is None or not regroup.num_prefix:
        return grad
    num_rows = grad.shape[0] - regroup.rows_added
    rows = _coarse_rows(regroup, max(grad.shape[0], num_rows))
    if not regroup.coarser:
        moved = grad.new_empty(num_rows, grad.shape[1]).index_copy_(0, rows, grad)
        return _write_prefixes(moved, regroup.src, _reduce(grad, regroup.dst, "sum", regroup), regroup)
    assert regroup.parents is not None
    shares = grad[_prefix_rows(regroup.dst, regroup)] / regroup.children.diff()[:, None, None]
    return _write_prefixes(grad.index_select(0, rows), regroup.src, shares[regroup.parents], regroup)


def _coarse_rows(regroup: Regroup, fine_rows: int) -> Tensor:
    """For each row of the finer level, the row of the coarser one that it comes from, or goes to: (R_fine) int64."""
    assert regroup.parents is not None
    fine, coarse = regroup.fine_and_coarse
    fine, coarse, parents = fine.long(), coarse.long(), regroup.parents.long()
    groups = torch.arange(parents.shape[0], device=fine.device)
    lengths = fine.diff()
    patch_shift = (parents - groups) * regroup.num_prefix
    prefix_shift = coarse[parents] - fine[:-1]
    of_row = groups.repeat_interleave(lengths, output_size=fine_rows)
    rows = torch.arange(fine_rows, device=fine.device)
    is_prefix = rows - fine[of_row] < regroup.num_prefix
    return rows + torch.where(is_prefix, prefix_shift[of_row], patch_shift[of_row])


def _prefix_rows(bounds: Tensor, regroup: Regroup) -> Tensor:
    """(G, P) int64"""
    return bounds[:-1, None].long() + torch.arange(regroup.num_prefix, device=bounds.device)


def _write_prefixes(x: Tensor, bounds: Tensor, prefixes: Tensor, regroup: Regroup) -> Tensor:
    return x.index_copy_(0, _prefix_rows(bounds, regroup).flatten(), prefixes.flatten(0, 1))


def _reduce(x: Tensor, bounds: Tensor, reduce: str, regroup: Regroup) -> Tensor:
    """The prefix rows of each coarse group's fine groups, at the bounds of the finer level: (G_coarse, P, C)."""
    # It sums each group by itself: no atomics, the same bits on every run. It sums in the dtype it is given, and a
    # study's mean may run over thousands of slices.
    assert regroup.children is not None
    sets = x[_prefix_rows(bounds, regroup)].to(wide_dtype(x.dtype)).flatten(1)
    reduced: Tensor = torch.segment_reduce(sets, reduce, offsets=regroup.children.long(), axis=0)
    return reduced.to(x.dtype).view(-1, regroup.num_prefix, x.shape[1])


def _row_scale(path_scale: Tensor, num_rows: int, regroup: Regroup) -> Tensor:
    """A value for each group of src to one for each row: (G_src) to (R_src, 1)."""
    return path_scale.repeat_interleave(regroup.src.diff(), output_size=num_rows)[:, None]


def _parameter(parameter: Tensor, x: Tensor) -> Tensor:
    # On the CPU, float32 parameters make PyTorch keep the statistics of 16-bit rows in float32.
    return parameter.to(wide_dtype(x.dtype) if x.device.type == "cpu" else x.dtype)
