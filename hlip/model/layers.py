"""The MLP, and linear layers that do not keep their input for backward, where it is cheap to compute again.

Beside what the norm keeps in any case, a block then keeps its query, key and value rows, the output of attention and
the hidden rows of the MLP: 0.7 of what its layers would keep by themselves.

Shapes: R rows, C and D widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def linear_of_norm(linear: nn.Linear, norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """linear(y), where y = norm(x): (R, C) to (R, D). Keeps x, to which no gradient goes from here, in place of y."""
    if not _plain(linear):
        return linear(y)
    return _LinearOfNorm.apply(y, x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)


def linear_of_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(gelu(x)): (R, C) to (R, D). Keeps x alone."""
    if not _plain(linear):
        return linear(F.gelu(x))
    return _LinearOfGelu.apply(x, linear.weight, linear.bias)


def _plain(linear: nn.Module) -> bool:
    """Whether backward may be ours: a layer put in its place, or a hook on it, must see its input."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
    return torch.is_grad_enabled() and type(linear) is nn.Linear and linear.bias is not None and not hooks


class _LinearOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)
        ctx.eps = eps
        return F.linear(y, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        if not any(ctx.needs_input_grad[5:]):
            return _gradient(grad, weight), *[None] * 6
        y = F.layer_norm(x, x.shape[1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), ctx.eps)
        return _gradient(grad, weight), None, None, None, None, *_parameter_gradients(grad, y, weight)


class _LinearOfGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradients: tuple[Tensor | None, ...] = (None, None)
        if any(ctx.needs_input_grad[1:]):
            gradients = _parameter_gradients(grad, F.gelu(x), weight)
        return torch.ops.aten.gelu_backward(_gradient(grad, weight), x), *gradients


def _gradient(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight.to(grad.dtype)


def _parameter_gradients(grad: Tensor, given: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias. Under autocast grad is of 16 bits, and so are the products."""
    return (grad.T @ given.to(grad.dtype)).to(weight.dtype), grad.sum(0).to(weight.dtype)
