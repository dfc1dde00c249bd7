"""CPU time of calls of the Triton backend, and of Triton's launches in them, on the stub driver; see `host.py`.

The groups are the slices of two small studies, in bfloat16.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from hlip_kernels import StudyLayout
from hlip_kernels.backends import triton_attention, triton_norm
from hlip_kernels.backends.base import Spans
from hlip_kernels.norm import _regroup

from .stub_driver import install

ROUNDS, CALLS = 15, 100
SCALE = 0.125


def microseconds(call: Callable[[], Any]) -> float:
    """A call's CPU time in the best round."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.thread_time() - begin)
    return 1e6 * best / CALLS


def launches_of(call: Callable[[], Any]) -> Callable[[], None]:
    """Keep the part of a call that is Triton's alone."""
    run, calls = JITFunction.run, []

    def note(kernel: JITFunction, *args: Any, **options: Any) -> Any:
        calls.append((kernel, args, dict(options)))
        return run(kernel, *args, **options)

    with mock.patch.object(JITFunction, "run", note):
        call()

    def launch() -> None:
        for kernel, args, options in calls:
            kernel.run(*args, **options)

    return launch


def measure() -> list[dict[str, Any]]:
    """A row of microseconds for each call."""
    torch.set_num_threads(1)
    install("sm_90").recording = False
    layout = StudyLayout.from_grids([[(6, 14, 14)] * 2, [(2, 5, 7)]])
    rows = layout.num_rows("slice")
    groups = Spans(layout.cu_seqlens("slice"), layout.tiles("slice"), layout.max_seqlen("slice"))
    qkv, grad = (torch.zeros(rows, 3, 12, 64, dtype=torch.bfloat16) for _ in range(2))
    q, k, v = qkv.unbind(1)
    attention = q, k, v, groups, groups, SCALE
    out, lse = triton_attention.forward(*attention)
    backward: Any = grad.unbind(1), out, q, k, v, out, lse, groups, groups, SCALE
    calls: dict[str, Callable[[], Any]] = {
        "attention, forward": partial(triton_attention.forward, *attention),
        "attention, backward": partial(triton_attention.backward, *backward),
    }
    residual, update = torch.zeros(rows, 768), torch.zeros(rows, 768, dtype=torch.bfloat16)
    weight, bias = torch.ones(768), torch.zeros(768)
    for dst in ("slice", "scan"):
        move = _regroup(layout, "slice", dst)
        forward = partial(triton_norm.forward, residual, update, None, None, weight, bias, move, 1e-6)
        x, y, mean, rstd = forward()
        calls[f"norm, slice to {dst}, forward"] = forward
        calls[f"norm, slice to {dst}, backward"] = partial(
            triton_norm.backward, x, y, x, mean, rstd, None, None, None, weight, move
        )
    return [
        {"call": name, "us": microseconds(call), "launches_us": microseconds(launches_of(call))}
        for name, call in calls.items()
    ]
