"""The ops as PyTorch sees them: schemas, fake kernels, autograd.

Shapes: R = G * P + T rows, G groups, P prefix rows a group, T patch tokens, H heads, D head dim, C width.
Backward passes are ops of their own, so that they can be dispatched, traced and tested by themselves. The backend is
chosen inside, when an op runs: a compiled model sees one op, whatever runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library import autograd
from torch.autograd import forward_ad

from . import flops
from .backends import BACKENDS, NORM_BACKENDS, choose_backend, choose_norm_backend
from .backends import native_product as amx
from .backends.base import QKV, Regroup, Spans, wide_dtype

_library = torch.library.Library("hlip_kernels", "DEF")


def _define(name: str, arguments: str, results: str, implementation: Any, fake: Any) -> None:
    _library.define(f"{name}({arguments}) -> {results}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hlip_kernels::{name}", fake, lib=_library)


# Attention: out is (R, H, D), lse (H, R): the logarithm of each softmax's denominator, not differentiable.

_GROUPS = "Tensor cu_seqlens, Tensor[] tiles, SymInt max_seqlen"
_SETTINGS = "float softmax_scale, str backend, bool deterministic"


def _attention(
    qkv: Tensor, cu_seqlens: Tensor, tiles: list[Tensor], max_seqlen: int, scale: float, backend: str, repeat: bool
) -> tuple[Tensor, Tensor]:
    name, spans = _backend(qkv, backend, repeat), Spans(cu_seqlens, tiles, max_seqlen)
    return BACKENDS[name].forward(*_slots(qkv), spans, spans, scale)


def _backend(qkv: Tensor, backend: str, deterministic: bool) -> str:
    return choose_backend(backend, qkv.device.type, qkv.dtype, qkv.shape[3], deterministic)


def _slots(qkv: Tensor) -> QKV:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected (rows, 3, heads, head_dim), got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(1)
    return q, k, v


def _attention_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, _slots, heads, head_dim = qkv.shape
    return qkv.new_empty(rows, heads, head_dim), qkv.new_empty(heads, rows, dtype=wide_dtype(qkv.dtype))


def _attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, tiles: list[Tensor], max_seqlen: int, scale: float, backend: str, repeat: bool,
) -> Tensor:  # fmt: skip
    name, spans = _backend(qkv, backend, repeat), Spans(cu_seqlens, tiles, max_seqlen)
    grad_qkv = qkv.new_empty(qkv.shape)
    q, k, v = _slots(qkv)
    BACKENDS[name].backward(_slots(grad_qkv), grad_out, q, k, v, out, lse, spans, spans, scale, repeat)
    return grad_qkv


def _attention_backward_fake(grad_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


_define(
    "hier_attention",
    f"Tensor qkv, {_GROUPS}, {_SETTINGS}",
    "(Tensor out, Tensor lse)",
    _attention,
    _attention_fake,
)
_define(
    "hier_attention_backward",
    f"Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {_GROUPS}, {_SETTINGS}",
    "Tensor",
    _attention_backward,
    _attention_backward_fake,
)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, tiles, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, *tiles)


def _attention_autograd(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    qkv, out, lse, cu_seqlens, *tiles = ctx.saved_tensors  # may be asked for once only, under checkpointing
    grad_qkv = None
    if grad_out is not None:
        grad_qkv = call("hier_attention_backward", grad_out, qkv, out, lse, cu_seqlens, tiles, *ctx.settings)
    return grad_qkv, None, [None] * len(tiles), *[None] * 4


# Residual add, regroup, LayerNorm: x is (R of dst, C), the new residual; y the same, normalised; mean and rstd (R).

_REGROUP = "Tensor src, Tensor dst, Tensor tiles, Tensor? children, Tensor? parents, int num_prefix"
_SCALES = "Tensor? path_scale, Tensor? layer_scale, Tensor weight"


def _norm(residual: Tensor, update: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    path_scale, layer_scale, weight, bias, *maps, eps, backend = rest
    name = choose_norm_backend(backend, residual.device.type, residual.dtype, update.dtype)
    return NORM_BACKENDS[name].forward(residual, update, path_scale, layer_scale, weight, bias, Regroup(*maps), eps)


def _norm_fake(residual: Tensor, update: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = residual.shape[0] + Regroup(*rest[4:10]).rows_added
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
    grad_residual = x.new_empty(x.shape[0] - Regroup(*settings[:6]).rows_added, x.shape[1])
    shared = path_scale is None and layer_scale is None and grad_y.dtype == x.dtype
    return (
        grad_residual,
        grad_y.new_empty(0 if shared else grad_residual.shape),
        weight.new_empty(0) if layer_scale is None else torch.empty_like(layer_scale),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


_define(
    "add_regroup_norm",
    f"Tensor residual, Tensor update, {_SCALES}, Tensor bias, {_REGROUP}, float eps, str backend",
    "(Tensor x, Tensor y, Tensor mean, Tensor rstd)",
    _norm,
    _norm_fake,
)
_define(
    "add_regroup_norm_backward",
    f"Tensor? grad_x, Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? update, {_SCALES}, {_REGROUP}, "
    "str backend",
    # grad_update is empty where it equals grad_residual: one tensor serves as both
    "(Tensor grad_residual, Tensor grad_update, Tensor grad_layer_scale, Tensor grad_weight, Tensor grad_bias)",
    _norm_backward,
    _norm_backward_fake,
)


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, update, path_scale, layer_scale, weight, _, *maps, num_prefix, _, backend = inputs
    x, y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.settings = (num_prefix, backend)
    ctx.dtype = y.dtype
    kept = update if layer_scale is not None else None
    ctx.save_for_backward(x, mean, rstd, kept, path_scale, layer_scale, weight, *maps)


def _norm_autograd(ctx: Any, grad_x: Tensor | None, grad_y: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_x is None and grad_y is None:
        return (None,) * 14
    x, *saved = ctx.saved_tensors
    if grad_y is None:
        grad_y = x.new_zeros(x.shape, dtype=ctx.dtype)
    residual, update, layer_scale, weight, bias = call(
        "add_regroup_norm_backward", grad_x, grad_y, x, *saved, *ctx.settings
    )
    return (
        residual,
        update if update.numel() else residual,
        None,
        layer_scale if layer_scale.numel() else None,
        weight,
        bias,
        *[None] * 8,
    )


# Linear layers on AMX, called where no graph is made: see `linear`.


def _amx_tiles_fake(weight: Tensor, transposed: bool) -> Tensor:
    inner, columns = weight.shape if transposed else weight.shape[::-1]
    return weight.new_empty(amx.tiles_shape(inner, columns), dtype=torch.uint8)


def _amx_layers_fake(x: Tensor, tiles: list[Tensor], biases: list[Tensor], columns: list[int], gelu: bool) -> Tensor:
    return x.new_empty(x.shape[0], columns[-1])


def _amx_mlp_fake(x: Tensor, tiles: Any, biases: Any, columns: list[int]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], columns[1]), x.new_empty(x.shape[0], columns[0])


def _amx_hidden_gradient_fake(grad: Tensor, tiles: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


_define("amx_tiles", "Tensor weight, bool transposed", "Tensor", amx.pack, _amx_tiles_fake)
_define(
    "amx_layers",
    "Tensor x, Tensor[] tiles, Tensor[] biases, int[] columns, bool gelu",
    "Tensor",
    amx.layers,
    _amx_layers_fake,
)
_define(
    "amx_mlp",
    "Tensor x, Tensor[] tiles, Tensor[] biases, int[] columns",
    "(Tensor out, Tensor hidden)",
    amx.mlp,
    _amx_mlp_fake,
)
_define(
    "amx_hidden_gradient",
    "Tensor grad, Tensor tiles, Tensor hidden",
    "(Tensor active, Tensor grad_hidden)",
    amx.hidden_gradient,
    _amx_hidden_gradient_fake,
)
_define(
    "amx_weight_gradient",
    "Tensor grad, Tensor x, Tensor(a!) weight, Tensor(b!) bias, bool add",
    "()",
    amx.weight_gradient,
    lambda *_: None,
)


# Derivatives. The dispatcher knows those of an op; the transforms of torch.func take them from a Function alone.


def second_derivative(*_: Any) -> Any:
    raise RuntimeError("the ops of hlip_kernels can be differentiated once only")


def _forward_mode(*_: Any) -> Any:
    raise NotImplementedError(
        "the ops of hlip_kernels have no forward-mode derivatives (jvp, jacfwd, hessian, linearize, dual tensors). Use "
        "reverse mode: torch.func.vjp, torch.func.jacrev or backward()"
    )


def refuse_tangents(*args: Any) -> None:
    if forward_ad._current_level < 0:  # nobody has made dual tensors
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        _forward_mode()


def _reverse_only(op: Any, formula: Any, context: Any) -> Any:
    """The op's autograd kernel, which drops tangents in silence, behind a check that there are none."""
    kernel = autograd.make_autograd_impl(op, autograd.Info(formula, context))

    def checked(keys: Any, *args: Any) -> Any:
        refuse_tangents(*args)
        return kernel(keys, *args)

    return checked


def _for_torch_func(op: Any, formula: Any, context: Any) -> type[torch.autograd.Function]:
    """The op as torch.func.grad, vjp, jacrev and vmap take it."""

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return tuple(None if isinstance(grad, list) else grad for grad in formula(ctx, *grads))

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise ValueError("torch.func.vmap over no elements: the ops of hlip_kernels need one or more")
        calls = [
            [x if d is None or isinstance(d, list) else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]
            for i in range(info.batch_size)
        ]
        outs = [call(op._opname, *arguments) for arguments in calls]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(column) for column in zip(*outs, strict=True)), (0,) * len(outs[0])

    methods = {
        "forward": op,
        "setup_context": context or (lambda *_: None),
        "backward": backward,
        "jvp": _forward_mode,
        "vmap": one_by_one,
    }
    return type(op._opname, (torch.autograd.Function,), {name: staticmethod(f) for name, f in methods.items()})


def call(name: str, *args: Any) -> Any:
    """Call the op of this name, also under the transforms of torch.func."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[name].apply(*args)
    return getattr(torch.ops.hlip_kernels, name)(*args)


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
for _name, _formula, _context in (
    ("hier_attention", _attention_autograd, _attention_context),
    ("add_regroup_norm", _norm_autograd, _norm_context),
    ("hier_attention_backward", second_derivative, None),
    ("add_regroup_norm_backward", second_derivative, None),
):
    _op = getattr(torch.ops.hlip_kernels, _name).default
    _library.impl(_name, _reverse_only(_op, _formula, _context), "Autograd", with_keyset=True)
    _FUNCTIONS[_name] = _for_torch_func(_op, _formula, _context)

flops.register_when_imported()
