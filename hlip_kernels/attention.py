"""Attention within the groups of a level: the public function, its op, and the Function that stands for it.

Shapes: R = G * P + T rows, G groups of the level, P prefix rows a group, T patch tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import BACKENDS, choose_backend
from .backends.base import FLOATS, Spans, wide_dtype
from .layout import TILE_ROWS, Level, StudyLayout, check_rows


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
    if qkv.dim() != 4 or qkv.shape[1] != 3 or 0 in qkv.shape[2:] or qkv.dtype not in FLOATS:
        raise ValueError(
            f"qkv: expected a floating-point tensor (rows, 3, heads, head_dim), got {tuple(qkv.shape)} {qkv.dtype}"
        )
    ops.refuse_trace()
    if softmax_scale is not None and not 0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    check_rows("qkv", qkv, layout, level)
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
        out, _ = ops.call("hier_attention", qkv, *flat_attention(*settings, level))
    elif torch.is_grad_enabled():
        out = _attend_with_graph(qkv, settings)
    else:
        out, _ = _attend(qkv, *settings)
    return out


# The op: out is (R, H, D), lse (H, R): the logarithm of each softmax's denominator, not differentiable.

_TILES = ", ".join(f"Tensor tiles{rows}" for rows in TILE_ROWS)
_GROUPS = f"Tensor cu_seqlens, {_TILES}, SymInt max_seqlen"
_SETTINGS = "float softmax_scale, str backend, bool deterministic, str level"


def _attend(qkv: Tensor, spans: Spans, scale: float, backend: str, _: bool) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    return BACKENDS[backend].forward(q, k, v, spans, spans, scale)


def _attend_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float, backend: str, repeat: bool
) -> Tensor:
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    q, k, v = qkv.unbind(1)
    grads: Any = grad_qkv.unbind(1)
    BACKENDS[backend].backward(grads, grad_out, q, k, v, out, lse, spans, spans, scale, repeat)
    return grad_qkv


def flat_attention(spans: Spans, *settings: Any) -> tuple[Any, ...]:
    """The arguments of the op after `qkv`."""
    return spans.cu_seqlens, *spans.tiles, spans.max_seqlen, *settings


def _attention_settings(qkv: Tensor, flat: tuple[Any, ...]) -> tuple[Spans, float, str, bool]:
    """The reverse of `flat_attention`, and the backend's own name for "auto"."""
    cu_seqlens, *tiles, max_seqlen, scale, backend, repeat, level = flat
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected (rows, 3, heads, head_dim), got {tuple(qkv.shape)}")
    name = choose_backend(backend, qkv.device.type, qkv.dtype, qkv.shape[3], repeat, level)
    return Spans(cu_seqlens, tiles, max_seqlen), scale, name, repeat


def _attention(qkv: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    return _attend(qkv, *_attention_settings(qkv, flat))


def _attention_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, _slots, heads, head_dim = qkv.shape
    return qkv.new_empty(rows, heads, head_dim), qkv.new_empty(heads, rows, dtype=wide_dtype(qkv.dtype))


def _attention_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *flat: Any) -> Tensor:
    return _attend_backward(grad_out, qkv, out, lse, *_attention_settings(qkv, flat))


def _attention_backward_fake(grad_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    *tensors, max_seqlen, scale, backend, repeat, level = inputs
    ctx.settings = max_seqlen, scale, backend, repeat, level
    ctx.save_for_backward(out, lse, *tensors)


def _attention_autograd(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    out, lse, qkv, *maps = ctx.saved_tensors  # may be asked for once only, under checkpointing
    grad_qkv = None
    if grad_out is not None:
        grad_qkv = ops.call("hier_attention_backward", grad_out, qkv, out, lse, *maps, *ctx.settings)
    return grad_qkv, *[None] * (len(maps) + len(ctx.settings))


def _forward_flops(qkv: Tensor, *groups: Any, out_val: Any) -> int:
    return 2 * _product_flops(qkv, *groups)


def _backward_flops(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *groups: Any, out_val: Any) -> int:
    return 5 * _product_flops(qkv, *groups)  # with the scores once more, as PyTorch counts FlashAttention's


def _product_flops(qkv: Tensor, cu_seqlens: Tensor, *rest: Any) -> int:
    """Count one product of all rows with all rows of their groups; or the most that it may be, from shapes alone."""
    rows, _slots, heads, head_dim = qkv.shape
    if type(cu_seqlens) is Tensor and cu_seqlens.device.type != "meta":
        pairs: int = sum((end - start) ** 2 for start, end in pairwise(cu_seqlens.tolist()))
    else:
        pairs = rows * rest[len(TILE_ROWS)]  # the longest group
    return 2 * heads * head_dim * pairs


ops.define(
    "hier_attention",
    f"Tensor qkv, {_GROUPS}, {_SETTINGS}",
    "(Tensor out, Tensor lse)",
    _attention,
    _attention_fake,
    _forward_flops,
)
ops.define(
    "hier_attention_backward",
    f"Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {_GROUPS}, {_SETTINGS}",
    "Tensor",
    _attention_backward,
    _attention_backward_fake,
    _backward_flops,
)
ops.differentiate("hier_attention", _attention_autograd, _attention_context)
ops.differentiate("hier_attention_backward", ops.second_derivative)


class _Attend(torch.autograd.Function):
    """`hier_attention`. settings: what `_attend` takes after qkv; in one tuple, as every argument takes time.

    It saves what the op saves: under checkpointing one may run forward, and the other again in backward.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, settings: tuple[Spans, float, str, bool]) -> Tensor:
        out, lse = _attend(qkv, *settings)
        spans, *ctx.settings = settings
        ctx.max_seqlen = spans.max_seqlen
        ctx.save_for_backward(out, lse, qkv, spans.cu_seqlens, *spans.tiles)
        return out

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, saved: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        out, lse, qkv, *maps = saved
        if not ops.unwatched(grad_out):  # the level counts for "auto" alone
            flat = *maps, ctx.max_seqlen, *ctx.settings, "study"
            return ops.call("hier_attention_backward", grad_out, qkv, out, lse, *flat), None
        cu_seqlens, *tiles = maps
        spans = Spans(cu_seqlens, tiles, ctx.max_seqlen)
        return _attend_backward(grad_out, qkv, out, lse, spans, *ctx.settings), None


# `apply` as Function inherits it. Its own looks for the transforms of torch.func first, which are not at work here.
_attend_with_graph: Callable[..., Tensor] = super(torch.autograd.Function, _Attend).apply
