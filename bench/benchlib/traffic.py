"""Bytes and operations of Triton's kernels, counted in its interpreter as they are asked for.

The interpreter runs where `TRITON_INTERPRET=1` is set before this module is imported. All loads and stores of a kernel
pass through two of its methods, all products through a third.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from hlip_kernels.backends import triton_attention, triton_norm

from .op_traffic import Counts

KERNELS = {
    triton_attention: ("attention_forward", "attention_dq", "attention_dkdv"),
    triton_norm: ("norm_forward", "norm_backward", "prefix_forward", "prefix_backward"),
}


@dataclass
class Traffic:
    """Counts of the kernels launched so far, by name."""

    kernels: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))
    _kernel: str = ""
    _ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def total(self) -> Counts:
        return sum(self.kernels.values(), Counts())

    def clear(self) -> None:
        self.kernels.clear()

    def see(self, pointers: Any, mask: Any, stored: bool) -> None:
        active = pointers.data[mask.data.astype(bool)]
        if not active.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first, last = int(active.min()), int(active.max()) + size
        inside = any(start <= first and last <= end for start, end in self._ranges)
        assert inside, f"{self._kernel}: addresses from {first} to {last} are not in one tensor"
        counts = self.kernels[self._kernel]
        if stored:
            counts.stored += active.size * size
        else:
            counts.loaded += active.size * size


class _Launch:
    """In place of a kernel: tells `traffic` which one is running, and which memory it was given."""

    def __init__(self, name: str, kernel: Any, traffic: Traffic) -> None:
        self.name, self.kernel, self.traffic = name, kernel, traffic

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> None:
            self.traffic._kernel = self.name
            self.traffic._ranges = [_extent(x) for x in args if isinstance(x, torch.Tensor) and x.numel()]
            self.kernel[grid](*args, **constants)

        return run


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor, which may be a view, and the one after its last."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


@contextmanager
def watched(compute: bool = True) -> Iterator[Traffic]:
    """Counts what the kernels of attention and norm ask for inside the block.

    Args:
        compute: False leaves the matrix products out and the results meaningless. Addresses do not depend on them.
    """
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    dot = InterpreterBuilder.create_dot

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.see(pointers, mask, stored=False)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.see(pointers, mask, stored=True)
        return store(self, pointers, value, mask, *rest)

    def watched_dot(self: Any, a: Any, b: Any, added: Any, *rest: Any) -> Any:
        (rows, inner), columns = a.data.shape, b.data.shape[1]
        traffic.kernels[traffic._kernel].flops += 2 * rows * inner * columns
        return dot(self, a, b, added, *rest) if compute else TensorHandle(added.data, added.dtype)

    watch = {"create_masked_load": watched_load, "create_masked_store": watched_store, "create_dot": watched_dot}
    replaced: dict[Any, dict[str, Any]] = {InterpreterBuilder: watch}
    for module, names in KERNELS.items():
        replaced[module] = {name: _Launch(name, getattr(module, name), traffic) for name in names}
    with ExitStack() as stack:
        for owner, values in replaced.items():
            stack.enter_context(patch.multiple(owner, **values))
        yield traffic
