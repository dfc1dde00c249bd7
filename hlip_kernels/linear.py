"""Linear layers and the MLP, which do not keep their input for backward, where it is cheap to compute again.

Each calls the layers themselves where a fused function may not stand for them: see `is_fusible`.

Beside what the norm keeps in any case, a block then keeps its query, key and value rows, the output of attention and
the hidden rows of the MLP: 0.7 of what its layers would keep by themselves.

Shapes: R rows, C and D widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from . import ops, products
from .backends import native_norm_gelu
from .native import DTYPES, native

Saved = tuple[Any, ...]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and no more, so that a fused function may stand for the call.

    One put in its place, a hook on it or on all modules, or another `forward` must see its input. And what transforms
    functions, `torch.func` or forward-mode differentiation, knows PyTorch's layers only.
    """
    return _is_as_made(module, kind) and not _has_any_global_hook() and not ops.transformed()


def is_fusible(*layers: nn.Module) -> bool:
    """Whether weights and biases of these linear layers and LayerNorms stand for calling them."""
    return (
        all(
            (_is_as_made(layer, nn.Linear) or _is_as_made(layer, nn.LayerNorm))
            and layer.bias is not None
            and not hasattr(type(layer.weight), "__tensor_flatten__")  # sharded, or quantized
            for layer in layers
        )
        and not _has_any_global_hook()
        and not ops.transformed()
    )


def _is_as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
    )


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x): (R, C) to (R, D). Keeps x."""
    if not is_fusible(layer):
        out: Tensor = layer(x)
        return out
    if not torch.is_grad_enabled():
        return products.linear(x, layer.weight, layer.bias)
    return _apply(_Linear, x, layer.weight, layer.bias)


def linear_of_norm(linear: nn.Linear, norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """linear(y), where y = norm(x): (R, C) to (R, D). Keeps x, to which no gradient goes from here, in place of y."""
    if not is_fusible(linear, norm):
        out: Tensor = linear(y)
        return out
    if not torch.is_grad_enabled():
        return products.linear(y, linear.weight, linear.bias)
    return _apply(_LinearOfNorm, y, x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)


def mlp_of_norm(fc1: nn.Linear, fc2: nn.Linear, norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """fc2(gelu(fc1(y))), where y = norm(x): (R, C) to (R, C). Keeps x and the hidden rows before the GELU alone."""
    if not is_fusible(fc1, fc2, norm):
        out: Tensor = fc2(F.gelu(fc1(y)))
        return out
    if not torch.is_grad_enabled():
        return products.mlp(y, fc1, fc2)
    return _apply(
        _MlpOfNorm, y, x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias
    )  # fmt: skip


def linear_of_pixels(patches: Tensor, zero: float, unit: float, weight: Tensor, bias: Tensor) -> Tensor:
    """linear((patches - zero) / unit), of uint8 patches: (T, V) to (T, C). Keeps the patches as they are.

    `zero` is a whole number and `unit` a power of two: the difference is exact in every dtype.
    """
    if ops.transformed():
        return F.linear(_pixels(patches, zero, unit, weight.dtype), weight, bias)
    return _apply(_LinearOfPixels, patches, zero, unit, weight, bias)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """PyTorch gives `apply` no types."""
    out: Tensor = function.apply(*args)
    return out


class _Linear(torch.autograd.Function):
    """A linear layer whose backward is that of this module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = x.to(products.product_dtype(x))
        product = products.converted(weight, given)
        ctx.save_for_backward(given, weight, products.kept_product(product, weight, given))
        ctx.dtype = x.dtype
        return products.linear(given, product, bias)

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, product = saved
        sums = products.Gradients(weight)
        parameters: tuple[Tensor | None, ...] = (None, None)
        if any(ctx.needs_input_grad[1:]):
            for run in products.runs(grad, products.ROWS_BACKWARD):
                sums.add(grad[run], x[run])
            parameters = sums.total()
        return products.input_gradient(grad, products.gradient_weight(weight, grad, product)).to(ctx.dtype), *parameters


class _LinearOfPixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor, zero: float, unit: float, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(patches, weight)
        ctx.scale = (zero, unit)
        dtype, parts = products.product_dtype(weight), products.runs(patches)
        converted = products.converted(weight, weight, packed=len(parts) > 1)
        return products.join(
            [products.linear(_pixels(patches[run], zero, unit, dtype), converted, bias) for run in parts]
        )

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        patches, weight = saved
        if not any(ctx.needs_input_grad[3:]):
            return (None,) * 5
        zero, unit = ctx.scale
        sums = products.Gradients(weight)
        for run in products.runs(grad, products.ROWS_BACKWARD):
            sums.add(grad[run], _pixels(patches[run], zero, unit, grad.dtype))
        return None, None, None, *sums.total()


def _pixels(patches: Tensor, zero: float, unit: float, dtype: torch.dtype) -> Tensor:
    return patches.to(dtype).sub_(zero).mul_(1 / unit)


class _LinearOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:
        product = products.converted(weight, y)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, products.kept_product(product, weight, y))
        ctx.eps = eps
        return products.linear(y, product, bias)

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, product = saved
        gradient = products.input_gradient(grad, products.gradient_weight(weight, grad, product))
        if not any(ctx.needs_input_grad[5:]):
            return gradient, *[None] * 6
        sums = products.Gradients(weight)
        for run in products.runs(grad, products.ROWS_BACKWARD):
            sums.add(grad[run], _normalised(x[run], norm_weight, norm_bias, ctx.eps, grad.dtype))
        return gradient, None, None, None, None, *sums.total()


class _MlpOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
        weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    ) -> Tensor:  # fmt: skip
        out, hidden, kept = products.mlp_kept(y, (weight1, bias1), (weight2, bias2))
        ctx.save_for_backward(x, norm_weight, norm_bias, weight1, weight2, hidden, *kept)
        ctx.eps = eps
        return out

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight1, weight2, hidden, *kept = saved
        sums1, sums2 = (products.Gradients(weight) for weight in (weight1, weight2))
        weight1, weight2 = (
            products.gradient_weight(weight, grad, product)
            for weight, product in zip((weight1, weight2), kept, strict=True)
        )
        parts = []
        for run in products.runs(grad, products.ROWS_BACKWARD):
            active, inner = products.hidden_gradient(grad[run], weight2, hidden[run])
            if any(ctx.needs_input_grad[7:]):
                sums2.add(grad[run], active)
            if any(ctx.needs_input_grad[5:7]):
                sums1.add(inner, _normalised(x[run], norm_weight, norm_bias, ctx.eps, inner.dtype))
            parts.append(products.input_gradient(inner, weight1))
        parameters: list[Tensor | None] = []
        for sums, wanted in ((sums1, ctx.needs_input_grad[5:7]), (sums2, ctx.needs_input_grad[7:])):
            parameters += sums.total() if any(wanted) else (None, None)
        return products.join(parts), None, None, None, None, *parameters


def _normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The LayerNorm of x (R, C) once more, in `dtype`."""
    plain = type(x) is Tensor
    if plain and products.on_cpu(x, dtype) and x.dtype in DTYPES and not native().reason:
        return native_norm_gelu.normalised(x, weight, bias, eps, dtype)
    if plain and products.has_triton(x):
        from .backends import triton_rows

        return triton_rows.normalised(x, weight, bias, eps, dtype)
    return F.layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(dtype)
