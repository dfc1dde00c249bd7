"""Print, as JSON, the CPU seconds that a call of each op takes when its backend does nothing.

`host.py` runs this file with the package of one revision or another, so it imports no more than that package and torch,
and takes backends as modules, as they were before 0.2.0, or as objects.
"""

from __future__ import annotations

import json
import sys
import time
import timeit
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hlip_kernels import StudyLayout, add_regroup_norm, backends, hier_attention

CALLS, WARM_UP = 100, 20
HEADS, HEAD_DIM, WIDTH = 2, 16, 32
LAYOUT = StudyLayout.from_grids([[(6, 14, 14)] * 2, [(2, 5, 7)]], 1)
AS_MODULES = isinstance(backends.BACKENDS["reference"], ModuleType)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    calls = {"attention": attention(), "norm, same level": norm("slice"), "norm, slice to scan": norm("scan")}
    seconds = {name: min(thread_seconds(call) for _ in range(rounds)) for name, call in calls.items()}
    print(json.dumps(seconds))


def thread_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call, the mean of `CALLS`."""
    timeit.timeit(call, number=WARM_UP)
    return timeit.timeit(call, timer=time.thread_time, number=CALLS) / CALLS


def rows(level: Any) -> int:
    return LAYOUT.num_groups(level) * LAYOUT.num_prefix + LAYOUT.num_tokens


def attention() -> Callable[[], object]:
    """Forward and backward."""
    qkv = torch.randn(rows("slice"), 3, HEADS, HEAD_DIM).requires_grad_()
    grad_out, grad_qkv = torch.randn(rows("slice"), HEADS, HEAD_DIM), torch.zeros_like(qkv)

    def forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        shape = (x.shape[0], *x.shape[2:]) if AS_MODULES else x.shape
        return x.new_empty(shape), x.new_empty(HEADS, x.shape[0], dtype=torch.float32)

    stand_in = {"forward": forward, "backward": lambda *_: grad_qkv if AS_MODULES else None}
    backends.BACKENDS["native"] = backend(stand_in)
    backends.choose_backend.cache_clear()
    return lambda: torch.autograd.grad(hier_attention(qkv, LAYOUT, "slice"), qkv, grad_out)


def norm(dst: Any) -> Callable[[], object]:
    """Forward and backward, from the slices' level."""
    before, after = rows("slice"), rows(dst)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((before, WIDTH), (before, WIDTH), (WIDTH,), (WIDTH,))]
    given = torch.randn(after, WIDTH), torch.randn(after, WIDTH)
    empty = torch.zeros(0)
    grads = torch.zeros(before, WIDTH), empty, empty, torch.zeros(WIDTH), torch.zeros(WIDTH)

    def forward(residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
        x, y = residual.new_empty(after, WIDTH), residual.new_empty(after, WIDTH)
        return x, y, x.new_empty(after), x.new_empty(after)

    stand_in = backend({"forward": forward, "backward": lambda *_: grads})

    def call() -> object:
        backends.NORM_BACKENDS["native"] = stand_in
        residual, update, weight, bias = leaves
        outs = add_regroup_norm(residual, update, LAYOUT, "slice", dst, weight, bias)
        return torch.autograd.grad(outs, leaves, given)

    return call


def backend(functions: dict[str, Any]) -> Any:
    """A backend of any revision, with these functions."""
    names = {f"{prefix}{name}": function for name, function in functions.items() for prefix in ("", "norm_")}
    asked = "not_supported_reasons", "norm_not_supported_reasons", "not_repeating_reasons"
    reasons: dict[str, Any] = {name: lambda *_: [] for name in asked}
    return SimpleNamespace(name="native", repeats="always", **names, **reasons)


if __name__ == "__main__":
    main(int(sys.argv[1]))
