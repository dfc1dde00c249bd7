"""The ops as PyTorch sees them: schemas, fake kernels, autograd.

Shapes: R = G * P + T rows, G groups, P prefix rows a group, T patch tokens, H heads, D head dim, C width.
Backward passes are ops of their own, so that they can be dispatched, traced and tested by themselves. The backend is
chosen inside, when an op runs: a compiled model sees one op, whatever runs it.

Compilers, modes and the transforms of torch.func are shown these ops. Where none of them is at work, a
Function stands for an op and calls the backend itself, because PyTorch's dispatcher takes the host three times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor  # as `is_grads_batched` makes them
from torch._library import autograd
from torch.autograd import forward_ad

from . import flops
from .backends import BACKENDS, NORM_BACKENDS, choose_backend, choose_norm_backend
from .backends import native_product as amx
from .backends.base import Regroup, Spans, wide_dtype
from .layout import TILE_ROWS

_library = torch.library.Library("hlip_kernels", "DEF")


def _define(name: str, arguments: str, results: str, implementation: Any, fake: Any) -> None:
    _library.define(f"{name}({arguments}) -> {results}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hlip_kernels::{name}", fake, lib=_library)


# Attention: out is (R, H, D), lse (H, R): the logarithm of each softmax's denominator, not differentiable.

_TILES = ", ".join(f"Tensor tiles{rows}" for rows in TILE_ROWS)
_GROUPS = f"Tensor cu_seqlens, {_TILES}, SymInt max_seqlen"
_SETTINGS = "float softmax_scale, str backend, bool deterministic, str level"


def attend(qkv: Tensor, spans: Spans, scale: float, backend: str, _: bool) -> tuple[Tensor, Tensor]:
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
    return attend(qkv, *_attention_settings(qkv, flat))


def _attention_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, _slots, heads, head_dim = qkv.shape
    return qkv.new_empty(rows, heads, head_dim), qkv.new_empty(heads, rows, dtype=wide_dtype(qkv.dtype))


def _attention_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *flat: Any) -> Tensor:
    return _attend_backward(grad_out, qkv, out, lse, *_attention_settings(qkv, flat))


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
        grad_qkv = call("hier_attention_backward", grad_out, qkv, out, lse, *maps, *ctx.settings)
    return grad_qkv, *[None] * (len(maps) + len(ctx.settings))


# Residual add, regroup, LayerNorm: x is (R of dst, C), the new residual; y the same, normalised; mean and rstd (R).

_REGROUP = "Tensor src, Tensor dst, Tensor tiles, Tensor? children, Tensor? parents, int num_prefix, bool coarser"
_SCALES = "Tensor? path_scale, Tensor? layer_scale, Tensor weight"


def add_and_norm(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor | None,
    path_scale: Tensor | None, regroup: Regroup, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return NORM_BACKENDS[backend].forward(residual, update, path_scale, layer_scale, weight, bias, regroup, eps)


def _norm(residual: Tensor, update: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias, layer_scale, path_scale, *maps, eps, backend = rest
    name = choose_norm_backend(backend, residual.device.type, residual.dtype, update.dtype)
    return add_and_norm(residual, update, weight, bias, layer_scale, path_scale, Regroup(*maps), eps, name)


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
    "Tensor residual, Tensor update, Tensor weight, Tensor bias, Tensor? layer_scale, Tensor? path_scale, "
    f"{_REGROUP}, float eps, str backend",
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
    grads = call("add_regroup_norm_backward", grad_x, grad_y, x, *saved, *ctx.settings)
    return *_norm_gradients(*grads), *[None] * 10


def _norm_gradients(
    residual: Tensor, update: Tensor, layer_scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor | None, ...]:
    """Put the results of a backend into the order of the op's arguments."""
    update = update if update.numel() else residual
    return residual, update, weight, bias, layer_scale if layer_scale.numel() else None


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

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise ValueError("torch.func.vmap over no elements: the ops of hlip_kernels need one or more")
        calls = [
            [x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]
            for i in range(info.batch_size)
        ]
        outs = [call(op._opname, *arguments) for arguments in calls]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(column) for column in zip(*outs, strict=True)), (0,) * len(outs[0])

    methods = {
        "forward": op,
        "setup_context": context or (lambda *_: None),
        "backward": formula,
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


# The same where nobody looks at PyTorch's ops.

_PLAIN = {Tensor, nn.Parameter, type(None)}


def unwatched(*tensors: Tensor | None) -> bool:
    """Tell whether a Function may stand for an op: no compiler, mode, transform or forward-mode derivative is at work,
    and the tensors are not of a special kind. Asked before forward, and of its gradients before backward."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, tensors))
        or (tensors[0] is not None and (tensors[0].is_meta or is_legacy_batchedtensor(tensors[0])))
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of a Function, whose own derivative is an error. It is given the saved tensors, too.

    PyTorch's decorator of this name raises nothing where only some tensors' second derivatives are asked for.
    """

    def wrapper(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        return _Once.apply(lambda: backward(ctx, saved, *grads), *grads, *saved)  # type: ignore[no-untyped-call]

    return wrapper


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backward: Callable[[], Any], *inputs: Any) -> Any:
        return backward()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return second_derivative()


class Attend(torch.autograd.Function):
    """`hier_attention`. settings: what `attend` takes after qkv; in one tuple, as every argument takes time.

    It saves what the op saves: under checkpointing one may run forward, and the other again in backward.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, settings: tuple[Spans, float, str, bool]) -> Tensor:
        out, lse = attend(qkv, *settings)
        spans, *ctx.settings = settings
        ctx.max_seqlen = spans.max_seqlen
        ctx.save_for_backward(out, lse, qkv, spans.cu_seqlens, *spans.tiles)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        out, lse, qkv, *maps = saved
        if not unwatched(grad_out):  # the level counts for "auto" alone
            flat = *maps, ctx.max_seqlen, *ctx.settings, "study"
            return call("hier_attention_backward", grad_out, qkv, out, lse, *flat), None
        cu_seqlens, *tiles = maps
        spans = Spans(cu_seqlens, tiles, ctx.max_seqlen)
        return _attend_backward(grad_out, qkv, out, lse, spans, *ctx.settings), None


class AddAndNorm(torch.autograd.Function):
    """`add_regroup_norm`. settings: what `add_and_norm` takes after the tensors that have gradients. It saves what the
    op saves, as `Attend` does."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor | None,
        settings: tuple[Tensor | None, Regroup, float, str],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, y, mean, rstd = add_and_norm(residual, update, weight, bias, layer_scale, *settings)
        path_scale, (*maps, num_prefix, coarser), _, backend = settings
        ctx.settings = num_prefix, coarser, backend, y.dtype
        ctx.set_materialize_grads(False)
        kept = None if layer_scale is None else update
        ctx.save_for_backward(x, mean, rstd, kept, path_scale, layer_scale, weight, *maps)
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Any, grad_x: Tensor | None, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_x is None and grad_y is None:
            return (None,) * 6
        x, mean, rstd, update, path_scale, layer_scale, weight, src, dst, tiles, children, parents = saved
        num_prefix, coarser, backend, dtype = ctx.settings
        if grad_y is None:
            grad_y = x.new_zeros(x.shape, dtype=dtype)
        tensors = grad_x, grad_y, x, mean, rstd, update, path_scale, layer_scale, weight
        regroup = Regroup(src, dst, tiles, children, parents, num_prefix, coarser)
        if unwatched(grad_y, grad_x):
            grads = NORM_BACKENDS[backend].backward(*tensors, regroup)
        else:
            grads = call("add_regroup_norm_backward", *tensors, *regroup, backend)
        return *_norm_gradients(*grads), None


# `apply` as Function inherits it. Its own looks for the transforms of torch.func first, which are not at work here.
attend_with_graph: Callable[..., Tensor] = super(torch.autograd.Function, Attend).apply
add_and_norm_with_graph: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, AddAndNorm).apply

flops.register_when_imported()
