"""How the ops of this library are made known to PyTorch: their schemas, fake kernels, derivatives and FLOPs.

Backward passes are ops of their own, so that they can be dispatched, traced and tested by themselves. The backend is
chosen inside, when an op runs: a compiled model sees one op, whatever runs it.

Compilers, modes and the transforms of torch.func are shown these ops. Where none of them is at work, a
Function stands for an op and calls the backend itself, because PyTorch's dispatcher takes the host three times as long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor  # as `is_grads_batched` makes them
from torch._library import autograd
from torch.autograd import forward_ad

COUNTER = "torch.utils.flop_counter"

_library = torch.library.Library("hlip_kernels", "DEF")
_functions: dict[str, type[torch.autograd.Function]] = {}  # the ops as the transforms of torch.func take them
_formulas: dict[Any, Callable[..., int]] = {}  # an op, or a packet of them -> its FLOPs


def define(
    name: str, arguments: str, results: str, implementation: Any, fake: Any, flops: Callable[..., int] | None = None
) -> None:
    """Define an op by its schema, its implementation and what it gives for fake tensors.

    flops: see `count`; None for an op without products.
    """
    _library.define(f"{name}({arguments}) -> {results}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hlip_kernels::{name}", fake, lib=_library)
    count(getattr(torch.ops.hlip_kernels, name), flops or (lambda *_, out_val: 0))


def differentiate(name: str, formula: Any, context: Any = None) -> None:
    """Give an op its derivative, as the arguments `backward` and `setup_context` of `torch.library.register_autograd`.

    The dispatcher knows the derivative of an op; the transforms of torch.func take it from a Function alone.
    """
    op = getattr(torch.ops.hlip_kernels, name).default
    _library.impl(name, _reverse_only(op, formula, context), "Autograd", with_keyset=True)
    _functions[name] = _for_torch_func(op, formula, context)


def call(name: str, *args: Any) -> Any:
    """Call the op of this name, also under the transforms of torch.func."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _functions[name].apply(*args)
    return getattr(torch.ops.hlip_kernels, name)(*args)


def refuse_trace() -> None:
    """Raise NotImplementedError under `torch.jit.trace`."""
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace would keep the groups of this batch for all others. Use torch.compile, or torch.export."
        )


# Derivatives


def second_derivative(*_: Any) -> Any:
    raise RuntimeError("the ops of hlip_kernels can be differentiated once only")


def _forward_mode(*_: Any) -> Any:
    raise NotImplementedError(
        "the ops of hlip_kernels have no forward-mode derivatives (jvp, jacfwd, hessian, linearize, dual tensors). Use "
        "reverse mode: torch.func.vjp, torch.func.jacrev or backward()"
    )


def refuse_tangents(*args: Any) -> None:
    """Raise NotImplementedError for dual tensors."""
    if forward_ad._current_level < 0:  # nobody has made any
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


# Where nobody looks at PyTorch's ops

_PLAIN = {Tensor, nn.Parameter, type(None)}


def transformed() -> bool:
    """Tell whether `torch.func` or forward-mode differentiation is at work. Neither differentiates a Function of ours.

    A compiler, which cannot be asked about the latter, differentiates what it is shown.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def unwatched(*tensors: Tensor | None) -> bool:
    """Tell whether a Function may stand for an op: no compiler, mode, transform or forward-mode derivative is at work,
    and the tensors are not of a special kind. Asked before forward, and of its gradients before backward."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or transformed()
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


# FLOPs


def count(op: Any, formula: Callable[..., int]) -> None:
    """Have PyTorch's FlopCounterMode count by this formula: two for a multiplication and an addition, of products only.

    Importing the counter takes the import of Triton, so that formulas are registered once someone else imports it.
    """
    _formulas[op] = formula
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])


def _register(counter: ModuleType) -> None:
    for op, formula in _formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == COUNTER else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                load(module)
                _register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
