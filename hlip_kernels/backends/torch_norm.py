"""Residual add, regroup and LayerNorm with PyTorch's own ops, on any device.

Shapes: T patch tokens, P prefix rows a group, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import Regroup, wide_dtype


def norm_not_supported_reasons(device: str, dtype: torch.dtype, update_dtype: torch.dtype) -> list[str]:
    return []


def move_prefix(prefix: Tensor, regroup: Regroup) -> Tensor:
    """Prefix rows (G_src * P, C) to (G_dst * P, C): means of a coarse group's fine ones, or clones."""
    if regroup.children is None:
        return prefix
    sets = prefix.reshape(regroup.src_groups, regroup.num_prefix * prefix.shape[1])
    if regroup.coarser:
        moved = _segment_reduce(sets, "mean", regroup.children)
    else:
        moved = sets.repeat_interleave(regroup.children.diff(), dim=0, output_size=regroup.dst_groups)
    return moved.reshape(-1, prefix.shape[1])


def _move_gradient(grad: Tensor, regroup: Regroup) -> Tensor:
    """The adjoint of `move_prefix`: (G_dst * P, C) to (G_src * P, C)."""
    assert regroup.children is not None
    sets = grad.reshape(regroup.dst_groups, regroup.num_prefix * grad.shape[1])
    if regroup.coarser:
        counts = regroup.children.diff()
        moved = (sets / counts[:, None]).repeat_interleave(counts, dim=0, output_size=regroup.src_groups)
    else:
        moved = _segment_reduce(sets, "sum", regroup.children)
    return moved.reshape(-1, grad.shape[1])


def _segment_reduce(sets: Tensor, reduce: str, bounds: Tensor) -> Tensor:
    # It sums each group by itself: no atomics, the same bits on every run. It sums in the dtype it is given, and a
    # study's mean may run over thousands of slices.
    wide = sets.to(wide_dtype(sets.dtype))
    return torch.segment_reduce(wide, reduce, offsets=bounds.long(), axis=0).to(sets.dtype)


def norm_forward(
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
    src, dst = (groups * regroup.num_prefix for groups in (regroup.src_groups, regroup.dst_groups))
    x = residual.new_empty(residual.shape[0] - src + dst, residual.shape[1])
    torch.add(residual[src:], update[src:], out=x[dst:])
    x[:dst] = move_prefix(residual[:src] + update[:src], regroup)
    y, mean, rstd = torch.native_layer_norm(x, x.shape[1:], _parameter(weight, x), _parameter(bias, x), eps)
    return x, y.to(dtype), mean.view(-1), rstd.view(-1)


def norm_backward(
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
    if regroup.children is None:
        grad_residual = grad if grad_x is None else grad.add_(grad_x)
    else:
        src, dst = (groups * regroup.num_prefix for groups in (regroup.src_groups, regroup.dst_groups))
        grad_residual = x.new_empty(x.shape[0] - dst + src, x.shape[1])
        if grad_x is None:
            grad_residual[src:] = grad[dst:]
            grad_prefix = grad[:dst]
        else:
            torch.add(grad[dst:], grad_x[dst:], out=grad_residual[src:])
            grad_prefix = grad[:dst] + grad_x[:dst]
        grad_residual[:src] = _move_gradient(grad_prefix, regroup)

    grad_update, grad_layer_scale = grad_y.new_empty(0), weight.new_empty(0)
    if path_scale is not None or layer_scale is not None or grad_y.dtype != x.dtype:
        scaled = grad_residual
        if path_scale is not None:
            scaled = scaled * _row_scale(path_scale, len(scaled), regroup)
        if layer_scale is not None:
            assert update is not None
            grad_layer_scale = (scaled * update).sum(0, dtype=wide_dtype(x.dtype)).to(layer_scale.dtype)
            scaled = scaled * layer_scale
        grad_update = scaled.to(grad_y.dtype)
    return grad_residual, grad_update, grad_layer_scale, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _row_scale(path_scale: Tensor, num_rows: int, regroup: Regroup) -> Tensor:
    """A value for each group of src to one for each row: (G_src) to (R_src, 1)."""
    prefix = path_scale.repeat_interleave(regroup.num_prefix)
    lengths = regroup.cu_seqlens.diff()
    patches = path_scale.repeat_interleave(lengths, output_size=num_rows - len(prefix))
    return torch.cat([prefix, patches])[:, None]


def _parameter(parameter: Tensor, x: Tensor) -> Tensor:
    # On the CPU, float32 parameters make PyTorch keep the statistics of 16-bit rows in float32.
    return parameter.to(wide_dtype(x.dtype) if x.device.type == "cpu" else x.dtype)
