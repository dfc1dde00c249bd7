"""Counts the ops that copy, gather or scatter rows of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# By the names of their overload packets, less the _ of those that write into what they are given.
COPYING = {"index", "index_select", "index_copy", "index_put", "index_add", "gather", "scatter", "scatter_add", "take"}
COPYING |= {"cat", "stack", "clone", "copy", "_to_copy", "_foreach_copy", "repeat", "repeat_interleave", "roll"}
COPYING |= {"masked_select", "masked_scatter", "slice_scatter", "select_scatter"}


class Copies(TorchDispatchMode):
    """The names of such ops that are given a tensor of `numel` floating-point numbers or more."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name.rstrip("_") in COPYING and any(x.is_floating_point() and x.numel() >= self.numel for x in tensors):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
