"""Bytes that PyTorch's ops move, and ours among them, as the tensors say that they are given and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = ("_unsafe_view", "empty", "new_empty", "detach", "alias")  # ops, by the beginnings of their names


@dataclass
class Counts:
    """Bytes that were asked for, and operations of matrix products. A byte asked for twice counts twice."""

    loaded: int = 0
    stored: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.loaded + other.loaded, self.stored + other.stored, self.flops + other.flops)

    def __mul__(self, times: int) -> Counts:
        return Counts(self.loaded * times, self.stored * times, self.flops * times)


class OpTraffic(TorchDispatchMode):
    """Counts the bytes of the ops inside the block, forward and backward: each reads its tensors once and writes its
    results once, views and empty tensors nothing. That is the least they can do; what an op keeps to itself is not
    seen. Works on meta tensors, which have no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode ops arrive that consist of others, views among them
            out = self.decompose(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            # A view, or memory that is not written, moves nothing.
            if not (func.is_view or func.__name__.startswith(FREE)):
                self.count(func, args, kwargs, out)
        return out

    def decompose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that consists of others; NotImplemented for others."""
        return func.decompose(*args, **kwargs)

    def count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        said = zip(args, func._schema.arguments, strict=False)
        changed = [x for x, of in said if of.alias_info is not None and of.alias_info.is_write]
        self.counts.loaded += tensor_bytes((args, kwargs))
        self.counts.stored += tensor_bytes((out, changed))


def tensor_bytes(tree: Any) -> int:
    """Bytes of the tensors in nested arguments, each tensor once."""
    return sum(x.nbytes for x in {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())
