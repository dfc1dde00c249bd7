"""The op as PyTorch sees it: schemas, fake kernels, autograd.

Shapes: R = G * P + T rows, G groups, P prefix rows a group, T patch tokens, H heads, D head dim.
out is (R, H, D), lse (H, R): the logarithm of each softmax's denominator, not differentiable.
Backward is an op of its own, so that it can be dispatched, traced and tested by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .backends.groups import Groups, lse_dtype

_library = torch.library.Library("hlip_kernels", "DEF")
_GROUPS = "Tensor cu_seqlens, Tensor q_tiles, Tensor k_tiles, int num_prefix, int max_seqlen"
_library.define(f"hier_attention(Tensor qkv, {_GROUPS}, float softmax_scale, str backend) -> (Tensor out, Tensor lse)")
_library.define(
    f"hier_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {_GROUPS}, "
    "float softmax_scale, str backend) -> Tensor"
)


def _forward(qkv: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    *groups, softmax_scale, backend = settings
    return BACKENDS[backend].forward(qkv, Groups(*groups), softmax_scale)


def _backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *settings: Any) -> Tensor:
    *groups, softmax_scale, backend = settings
    return BACKENDS[backend].backward(grad_out, qkv, out, lse, Groups(*groups), softmax_scale)


_library.impl("hier_attention", _forward, "CompositeExplicitAutograd")
_library.impl("hier_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("hlip_kernels::hier_attention", lib=_library)
def _forward_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, _slots, heads, head_dim = qkv.shape
    return qkv.new_empty(rows, heads, head_dim), qkv.new_empty(heads, rows, dtype=lse_dtype(qkv.dtype))


@torch.library.register_fake("hlip_kernels::hier_attention_backward", lib=_library)
def _backward_fake(grad_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, q_tiles, k_tiles, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, q_tiles, k_tiles)


def _autograd(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grad_qkv = None
    if grad_out is not None:
        grad_qkv = torch.ops.hlip_kernels.hier_attention_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    return grad_qkv, *[None] * 7


def _no_second_derivative(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    raise RuntimeError("hier_attention can be differentiated once only")


torch.library.register_autograd("hlip_kernels::hier_attention", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("hlip_kernels::hier_attention_backward", _no_second_derivative, lib=_library)
