"""Linear layers and the MLP, which do not keep their input for backward, where it is cheap to compute again.

Each calls the layers themselves where a fused function may not stand for them: see `linear.is_fusible`.

Beside what the norm keeps in any case, a block then keeps its query, key and value rows, the output of attention and
the hidden rows of the MLP: 0.7 of what its layers would keep by themselves.

Shapes: R rows, C and D widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import linear as kernels
from . import ops


def linear_of_norm(linear: nn.Linear, norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """linear(y), where y = norm(x): (R, C) to (R, D). Keeps x, to which no gradient goes from here, in place of y."""
    if not kernels.is_fusible(linear, norm):
        out: Tensor = linear(y)
        return out
    if not torch.is_grad_enabled():
        return kernels.linear(y, linear.weight, linear.bias)
    return _apply(_LinearOfNorm, y, x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)


def mlp_of_norm(fc1: nn.Linear, fc2: nn.Linear, norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """fc2(gelu(fc1(y))), where y = norm(x): (R, C) to (R, C). Keeps x and the hidden rows before the GELU alone."""
    if not kernels.is_fusible(fc1, fc2, norm):
        out: Tensor = fc2(F.gelu(fc1(y)))
        return out
    if not torch.is_grad_enabled():
        return kernels.mlp(y, fc1, fc2)
    return _apply(
        _MlpOfNorm, y, x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias
    )  # fmt: skip


def linear_of_pixels(patches: Tensor, zero: float, unit: float, weight: Tensor, bias: Tensor) -> Tensor:
    """linear((patches - zero) / unit), of uint8 patches: (T, V) to (T, C). Keeps the patches as they are.

    `zero` is a whole number and `unit` a power of two: the difference is exact in every dtype.
    """
    if kernels.transformed():
        return F.linear(_pixels(patches, zero, unit, weight.dtype), weight, bias)
    return _apply(_LinearOfPixels, patches, zero, unit, weight, bias)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """PyTorch gives `apply` no types."""
    out: Tensor = function.apply(*args)
    return out


class _LinearOfPixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor, zero: float, unit: float, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(patches, weight)
        ctx.scale = (zero, unit)
        dtype, parts = kernels.product_dtype(weight), kernels.runs(patches)
        converted = kernels.converted(weight, weight, packed=len(parts) > 1)
        return kernels.join(
            [kernels.linear(_pixels(patches[run], zero, unit, dtype), converted, bias) for run in parts]
        )

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, saved: kernels.Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        patches, weight = saved
        if not any(ctx.needs_input_grad[3:]):
            return (None,) * 5
        zero, unit = ctx.scale
        sums = kernels.Gradients(weight)
        for run in kernels.runs(grad, kernels.ROWS_BACKWARD):
            sums.add(grad[run], _pixels(patches[run], zero, unit, grad.dtype))
        return None, None, None, *sums.total()


def _pixels(patches: Tensor, zero: float, unit: float, dtype: torch.dtype) -> Tensor:
    return patches.to(dtype).sub_(zero).mul_(1 / unit)


class _LinearOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:
        product = kernels.converted(weight, y)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, kernels.kept_product(product, weight, y))
        ctx.eps = eps
        return kernels.linear(y, product, bias)

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, saved: kernels.Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, product = saved
        gradient = kernels.input_gradient(grad, kernels.gradient_weight(weight, grad, product))
        if not any(ctx.needs_input_grad[5:]):
            return gradient, *[None] * 6
        sums = kernels.Gradients(weight)
        for run in kernels.runs(grad, kernels.ROWS_BACKWARD):
            sums.add(grad[run], kernels.normalised(x[run], norm_weight, norm_bias, ctx.eps, grad.dtype))
        return gradient, None, None, None, None, *sums.total()


class _MlpOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
        weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    ) -> Tensor:  # fmt: skip
        out, hidden, products = kernels.mlp_kept(y, (weight1, bias1), (weight2, bias2))
        ctx.save_for_backward(x, norm_weight, norm_bias, weight1, weight2, hidden, *products)
        ctx.eps = eps
        return out

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, saved: kernels.Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight1, weight2, hidden, *products = saved
        sums1, sums2 = (kernels.Gradients(weight) for weight in (weight1, weight2))
        weight1, weight2 = (
            kernels.gradient_weight(weight, grad, product)
            for weight, product in zip((weight1, weight2), products, strict=True)
        )
        parts = []
        for run in kernels.runs(grad, kernels.ROWS_BACKWARD):
            active, inner = kernels.hidden_gradient(grad[run], weight2, hidden[run])
            if any(ctx.needs_input_grad[7:]):
                sums2.add(grad[run], active)
            if any(ctx.needs_input_grad[5:7]):
                sums1.add(inner, kernels.normalised(x[run], norm_weight, norm_bias, ctx.eps, inner.dtype))
            parts.append(kernels.input_gradient(inner, weight1))
        parameters: list[Tensor | None] = []
        for sums, wanted in ((sums1, ctx.needs_input_grad[5:7]), (sums2, ctx.needs_input_grad[7:])):
            parameters += sums.total() if any(wanted) else (None, None)
        return kernels.join(parts), None, None, None, None, *parameters
