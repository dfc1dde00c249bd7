"""bfloat16 in Triton's interpreter, which gets it wrong without a word.

The interpreter keeps a bfloat16 as its bits, in numpy's uint16. Whatever only moves bits is right: loads, stores,
transposes. But dots and arithmetic compute with the bits as integers, and casts truncate instead of rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

from hlip_kernels.backends import triton as backend


def correct_bfloat16() -> None:
    """Patch the interpreter for the life of the process, and let the backend have bfloat16."""
    builder, reduction = InterpreterBuilder, ReduceScanOpInterface
    dot, cast, check = builder.create_dot, builder.cast_impl, reduction.check_tensor

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, _widened(a), _widened(b), *rest)  # products are exact in float32, as on a GPU

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16:
            return _narrowed(cast(self, _widened(src), tl.float32))
        return cast(self, _widened(src), dst_type)

    def check_tensor(self: Any, inputs: tuple[Any, ...]) -> None:
        if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            raise NotImplementedError("reductions of bfloat16: cast to float32 first")
        check(self, inputs)

    builder.create_dot, builder.cast_impl, reduction.check_tensor = create_dot, cast_impl, check_tensor
    backend.INTERPRETED += (torch.bfloat16,)
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma"):
        setattr(builder, name, _in_float32(getattr(builder, name)))


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _in_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Arithmetic of bfloat16 in float32, then rounded: for + - * / the same as rounding once."""

    def wrapped(self: Any, *args: Any) -> TensorHandle:
        result = method(self, *map(_widened, args))
        computed = any(map(_is_bfloat16, args)) and result.data.dtype == np.float32  # a comparison gives bool
        return _narrowed(result) if computed else result

    return wrapped


def _is_bfloat16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _widened(x: Any) -> Any:
    return TensorHandle(widen(x.data), tl.float32) if _is_bfloat16(x) else x


def _narrowed(x: TensorHandle) -> TensorHandle:
    return TensorHandle(narrow(x.data), tl.bfloat16)
