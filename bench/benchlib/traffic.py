"""Bytes and operations of Triton's kernels, counted in its interpreter as they are asked for.

The interpreter runs where `TRITON_INTERPRET=1` is set before this module is imported. All loads and stores of a kernel
pass through two methods of its builder, all products through a third, and all launches through its executor of grids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from .op_traffic import Counts


@dataclass
class Traffic:
    """Counts of the kernels launched so far, by name."""

    kernels: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))
    _kernel: str = ""
    _ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def total(self) -> Counts:
        return sum(self.kernels.values(), Counts())

    def size(self, pointers: Any, mask: Any) -> int:
        """Bytes at the pointers that a mask lets through."""
        active = pointers.data[mask.data.astype(bool)]
        if not active.size:
            return 0
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first, last = int(active.min()), int(active.max()) + size
        inside = any(start <= first and last <= end for start, end in self._ranges)
        assert inside, f"{self._kernel}: addresses from {first} to {last} are not in one tensor"
        return int(active.size) * size


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor, which may be a view, and the one after its last."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


@contextmanager
def watched(compute: bool = True) -> Iterator[Traffic]:
    """Counts what kernels ask for inside the block.

    Args:
        compute: False leaves the matrix products out and the results meaningless. Addresses do not depend on them.
    """
    traffic = Traffic()
    launch, dot = GridExecutor.__call__, InterpreterBuilder.create_dot
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_launch(self: Any, *args: Any, **constants: Any) -> Any:
        traffic._kernel = self.fn.__name__
        traffic._ranges = [_extent(x) for x in args if isinstance(x, torch.Tensor) and x.numel()]
        return launch(self, *args, **constants)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.kernels[traffic._kernel].loaded += traffic.size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.kernels[traffic._kernel].stored += traffic.size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_dot(self: Any, a: Any, b: Any, added: Any, *rest: Any) -> Any:
        (rows, inner), columns = a.data.shape, b.data.shape[1]
        traffic.kernels[traffic._kernel].flops += 2 * rows * inner * columns
        return dot(self, a, b, added, *rest) if compute else TensorHandle(added.data, added.dtype)

    watch: dict[str, Any] = {
        "create_masked_load": watched_load,
        "create_masked_store": watched_store,
        "create_dot": watched_dot,
    }
    with patch.multiple(InterpreterBuilder, **watch), patch.object(GridExecutor, "__call__", watched_launch):
        yield traffic
