"""Products of rows with weights, GELU and their gradients, in the forms that are fast; elsewhere, PyTorch's own.

Shapes: R rows, C and D widths.

On a CPU, run eagerly in float32 or bfloat16:
- bias and GELU are part of the product, and the GELU's input is not rounded to 16 bits before it;
- bfloat16 products of many rows are the native library's where there is AMX, and oneDNN's elsewhere;
- wide hidden rows of the others are made some rows at a time, so that they stay in the cache and in memory that the
  process holds: the allocator returns a tensor of more than 32 MiB to the system, and every page of the next one is a
  fault;
- the gradient of a weight multiplies a transposed copy of the narrower factor: oneDNN's bfloat16 product takes a first
  factor by rows more than twice as fast as one by columns. Sums over runs of rows are kept in float32.

On a GPU, run eagerly, where every launch takes the host time:
- the parameters that autocast multiplies with are converted once for forward and backward, and within `hold_weights`
  once for all passes;
- gradients of parameters are summed in the parameters' dtype, which takes no conversion and loses no digits;
- GELU and its gradient are one kernel in backward (`triton_rows`).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops
from .backends import choose_norm_backend, native_linear, native_norm_gelu
from .native import native

MM_WIDENS = torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()
ROWS = 1024  # of hidden rows that a thread makes at once: 6 MiB of 3072 bfloat16 values
ROWS_PACKED = 1024  # from which on a weight is packed for one product
ROWS_BACKWARD = 4096  # more, as every run adds to the gradients of the weights


class Tiles(NamedTuple):
    """A weight as the native product takes it. columns: how many values it makes."""

    memory: Tensor
    columns: int


class Held(NamedTuple):
    """A parameter as products take it. state: of the parameter, its version, which a change counts up, and address."""

    product: Tensor | Tiles
    state: tuple[int, int]


_held: contextvars.ContextVar[dict[tuple[Tensor, torch.dtype], Held] | None] = contextvars.ContextVar(
    "held", default=None
)


@contextlib.contextmanager
def hold_weights() -> Iterator[None]:
    """Within it, linear layers convert and pack every parameter once: for inference, and for training with several
    passes to a step.

    A parameter is converted anew after a change in place, and all are after a step of any optimizer of PyTorch's kind.
    Changes through `parameter.data`, and those of a CUDA graph that is replayed, are not seen: leave it and enter it
    again.
    """
    held: dict[tuple[Tensor, torch.dtype], Held] = {}
    token = _held.set(held)
    hook = register_optimizer_step_post_hook(lambda *_: held.clear())  # fused ones count no version up
    try:
        yield
    finally:
        hook.remove()
        _held.reset(token)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16: without them float32 is as fast, and exacter."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def on_cpu(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the forms for CPUs serve products of `dtype`. A compiler does better with PyTorch's own."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast multiplies x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.is_floating_point() else x.dtype


def runs(x: Tensor, rows: int | None = None) -> list[slice]:
    """The rows of x (R, C) in runs of at most `rows`, or ROWS for each thread; in one where they need not be."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, len(x))]
    # Of fewer rows oneDNN makes products on one thread alone.
    rows = ROWS * torch.get_num_threads() if rows is None else rows
    count = max(1, -(-len(x) // rows))
    bounds = [len(x) * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def linear(x: Tensor, weight: Tensor | Tiles, bias: Tensor, gelu: bool = False) -> Tensor:
    """x @ weight.T + bias, and its exact GELU if `gelu`: (R, C) to (R, D), in the dtype of `product_dtype`.

    The weight may be one that `converted` gave.
    """
    dtype = product_dtype(x)
    if isinstance(weight, Tensor):
        if not on_cpu(x, dtype):
            y = F.linear(x, converted(weight, x), converted(bias, x))  # type: ignore[arg-type] # packed on CPUs alone
            return F.gelu(y) if gelu else y
        weight = converted(weight, x)
    x = x.to(dtype)
    out: Tensor
    if isinstance(weight, Tiles):
        out = torch.ops.hlip_kernels.amx_layers(x, [weight.memory], [bias], [weight.columns], gelu)
    elif not weight.numel():  # oneDNN makes no product of nothing
        out = F.linear(x, weight, bias.to(dtype))
        out = F.gelu(out) if gelu else out
    else:
        operation = "gelu" if gelu else "none"
        out = torch.ops.mkldnn._linear_pointwise(x, weight, bias.to(dtype), operation, [], "none")
    return out


def converted(weight: Tensor, x: Tensor, packed: bool = False) -> Tensor | Tiles:
    """The weight as `linear` multiplies x with it; `packed` as that is fastest, which is for several products."""
    dtype = product_dtype(x)
    if weight.is_mkldnn or torch.compiler.is_compiling():
        return weight
    if not on_cpu(x, dtype):
        if dtype == weight.dtype or not torch.is_autocast_enabled(x.device.type):
            return weight
        return _once(weight, dtype, lambda: weight.detach().to(dtype))
    if type(x) is not Tensor and type(x) is not nn.Parameter:  # a fake one: oneDNN's layout cannot be pretended
        return weight.to(dtype)
    if _held.get() is None or not isinstance(weight, nn.Parameter):
        return _packed(weight, dtype) if packed or _pays(x, dtype) else weight.to(dtype)
    return _once(weight, dtype, lambda: _packed(weight, dtype))


def _once(weight: Tensor, dtype: torch.dtype, convert: Callable[[], Tensor | Tiles]) -> Tensor | Tiles:
    """Convert a parameter; within `hold_weights` once, as long as it does not change."""
    held = _held.get()
    if held is None or not isinstance(weight, nn.Parameter) or weight.is_inference():  # which counts no changes
        return convert()
    state = weight._version, weight.data_ptr()
    key = (weight, dtype)  # a tensor is hashed as what it is, not by its values
    if key not in held or held[key].state != state:
        held[key] = Held(convert(), state)
    return held[key].product


def kept_product(product: Tensor | Tiles, weight: Tensor, x: Tensor) -> Tensor | None:
    """Return the weight that `converted` made for rows x, if backward should multiply with it; on a CPU, where memory
    is scarcer than a conversion is slow, it converts once more."""
    if not isinstance(product, Tensor) or product is weight or on_cpu(x, product.dtype):
        return None
    return product


def _pays(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether to pack a weight for a single native product with the rows x."""
    return dtype == torch.bfloat16 and native_linear.available() and len(x) >= ROWS_PACKED


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor | Tiles:
    weight = weight.detach().to(dtype).contiguous()
    if dtype != torch.bfloat16 or not weight.numel():
        return weight
    if native_linear.available():
        return Tiles(torch.ops.hlip_kernels.amx_tiles(weight, False), len(weight))
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def mlp(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """fc2(gelu(fc1(x))) without a graph: (R, C) to (R, C)."""
    parts = runs(x)
    weight1, weight2 = (converted(layer.weight, x, packed=len(parts) > 1) for layer in (fc1, fc2))
    if isinstance(weight1, Tiles) and isinstance(weight2, Tiles):  # hidden rows do not go to memory
        columns = [weight1.columns, weight2.columns]
        out: Tensor = torch.ops.hlip_kernels.amx_layers(
            x.to(torch.bfloat16), [weight1.memory, weight2.memory], [fc1.bias, fc2.bias], columns, False
        )
        return out
    return join([linear(linear(x[run], weight1, fc1.bias, gelu=True), weight2, fc2.bias) for run in parts])


def mlp_kept(
    x: Tensor, fc1: tuple[Tensor, Tensor], fc2: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """fc2(gelu(fc1(x))) (R, C) of layers given as weight and bias; and for backward fc1(x) (R, D), and `kept_product`
    of both weights."""
    x = x.to(product_dtype(x))
    first = converted(fc1[0], x)
    if isinstance(first, Tiles) and isinstance(second := converted(fc2[0], x), Tiles):
        tiles, columns = zip(first, second, strict=True)
        out: Tensor
        out, hidden = torch.ops.hlip_kernels.amx_mlp(x, tiles, [fc1[1], fc2[1]], columns)
        return out, hidden, (None, None)
    hidden = linear(x, first, fc1[1])
    parts = runs(hidden)
    second = converted(fc2[0], hidden, packed=len(parts) > 1)
    out = join([linear(F.gelu(hidden[run]), second, fc2[1]) for run in parts])
    return out, hidden, (kept_product(first, fc1[0], x), kept_product(second, fc2[0], hidden))


def join(parts: list[Tensor]) -> Tensor:
    """What was made for `runs`."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def hidden_gradient(grad: Tensor, weight: Tensor | Tiles, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(hidden) once more, (R, D), and the gradient of `hidden` from that of gelu(hidden) @ weight.T, (R, C)."""
    if isinstance(weight, Tiles):
        active, inner = torch.ops.hlip_kernels.amx_hidden_gradient(grad, weight.memory, hidden)
        return active, inner
    return gelu_backward(input_gradient(grad, weight), hidden)


def gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x) once more, and the gradient of x from that of gelu(x), whose memory it may take."""
    plain = grad.dtype == x.dtype and x.is_contiguous() and grad.is_contiguous() and type(x) is Tensor
    if plain and on_cpu(x, x.dtype) and not native().reason:
        return native_norm_gelu.gelu_backward_(grad, x), grad
    if plain and has_triton(x):
        from .backends import triton_rows

        return triton_rows.gelu_backward_(grad, x), grad
    return F.gelu(x), torch.ops.aten.gelu_backward(grad, x)


def _native(grad: Tensor) -> bool:
    """Whether gradients of linear layers are the native library's."""
    plain = type(grad) is Tensor and grad.dtype == torch.bfloat16 and on_cpu(grad, grad.dtype)
    return plain and native_linear.available()


def gradient_weight(weight: Tensor, grad: Tensor, product: Tensor | None) -> Tensor | Tiles:
    """The weight (D, C) of a layer as `input_gradient` multiplies gradients (R, D) with it. product: of
    `kept_product`."""
    weight = (weight if product is None else product).to(grad.dtype)
    if _native(grad) and _pays(grad, grad.dtype):
        return Tiles(torch.ops.hlip_kernels.amx_tiles(weight, True), weight.shape[1])
    return weight


def input_gradient(grad: Tensor, weight: Tensor | Tiles) -> Tensor:
    """Of x in x @ weight.T, from that of the product: (R, D) to (R, C). The weight is of `gradient_weight`."""
    if isinstance(weight, Tiles):
        out: Tensor = torch.ops.hlip_kernels.amx_layers(grad, [weight.memory], [], [weight.columns], False)
        return out
    return grad @ weight


class Gradients:
    """Of a layer's weight (D, C) and bias (D), summed over runs of rows."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.transposed = False

    def add(self, grad: Tensor, given: Tensor) -> None:
        """A run: its product's gradient (r, D), and what the layer was given, (r, C)."""
        if _native(grad):
            first = self.weight is None
            if self.weight is None or self.bias is None:
                self.weight = grad.new_empty(grad.shape[1], given.shape[1], dtype=torch.float32)
                self.bias = grad.new_empty(grad.shape[1], dtype=torch.float32)
            torch.ops.hlip_kernels.amx_weight_gradient(grad, given, self.weight, self.bias, not first)
            return
        if not on_cpu(grad, grad.dtype):
            weight, bias = _product(grad.T, given, self.dtype), grad.sum(0, dtype=self.dtype)
        elif grad.dtype == torch.float32:
            weight, bias = grad.T @ given, grad.sum(0)
        else:
            self.transposed = given.shape[1] < grad.shape[1]
            narrow, wide = (given, grad) if self.transposed else (grad, given)
            weight, bias = narrow.T.contiguous() @ wide, grad.sum(0)
        if self.weight is None or self.bias is None:
            self.weight, self.bias = weight.to(self.dtype), bias.to(self.dtype)
        else:
            self.weight += weight
            self.bias += bias

    def total(self) -> tuple[Tensor, Tensor]:
        """Of weight and bias, in their dtype."""
        assert self.weight is not None and self.bias is not None
        weight = self.weight.T.contiguous() if self.transposed else self.weight
        return weight.to(self.dtype), self.bias.to(self.dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; on NVIDIA's GPUs, since PyTorch 2.8, without rounding to 16 bits in between.

    Not in a compiled function or on fake tensors, for which PyTorch 2.8 does not know the product's shape.
    """
    if a.dtype.itemsize == 2 and dtype == torch.float32 and _widens(a):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _widens(x: Tensor) -> bool:
    return MM_WIDENS and x.is_cuda and type(x) is Tensor and not torch.compiler.is_compiling()


def has_triton(x: Tensor) -> bool:
    """Tell whether Triton's kernels serve rows x. A compiler makes its own."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return False
    return choose_norm_backend("auto", "cuda", x.dtype, x.dtype) == "triton"


def _pointwise_flops(x: Tensor, *_: Any, out_val: Tensor) -> int:
    return 2 * x.numel() * out_val.shape[-1]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # PyTorch has no formula of its own
    ops.count(torch.ops.mkldnn._linear_pointwise, _pointwise_flops)
