"""`bench/check.py` on the stub driver, in small: its processes import this file again, and so get the driver, too.

REHEARSAL in the environment holds JSON: `stub`, whether Triton gets the driver; `wrong`, names of backends whose
results are to be off; `steps`, names of steps to add; `long`, names of steps that are said to take hours; `grace`,
seconds in place of `check.GRACE`.
"""

# ruff: noqa: E402 - what is imported after the driver was installed uses it

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchlib import stub_driver

ASKED = json.loads(os.environ["REHEARSAL"])
if ASKED.get("stub"):
    stub_driver.install("sm_90")

import check
from benchlib import launches, steps, timing
from benchlib.peers import PEERS
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.native import Native


class Off(Native):
    """Native attention that is off; under the name of another library it is that one's."""

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def forward(self, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, *rest)
        return out + 0.1 * out.abs().max(), lse


def raises(setup: steps.Setup) -> Iterator[steps.Row]:
    yield {"backend": "first", "p50_s": 1.0}
    raise RuntimeError("no such kernel")


def loses_the_gpu(setup: steps.Setup) -> Iterator[steps.Row]:
    """From here on the process can do nothing more on it."""
    yield {"backend": "first", "p50_s": 1.0}

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    check.synchronise = fail
    check.synchronise()


def stands_still(setup: steps.Setup) -> Iterator[steps.Row]:
    yield {"backend": "first", "p50_s": 1.0}
    time.sleep(60)


def ends(setup: steps.Setup) -> Iterator[steps.Row]:
    yield {"backend": "first", "p50_s": 1.0}
    os._exit(3)


timing.SIDE["cpu"], timing.COPIED["cpu"] = 256, 2**20
attention_jobs, norm_jobs = launches.attention_jobs, launches.norm_jobs
launches.attention_jobs = lambda *given: [job for job in attention_jobs(*given) if job.facts["dtype"] == "bf16"]
launches.norm_jobs = lambda *given: norm_jobs(*given)[:1]  # a kernel takes seconds to compile
for name in ("cpu", "reference"):  # slower than the others, and as right
    del BACKENDS[name], PEERS[f"hlip-{name}"]
for name in ASKED.get("wrong", ()):
    BACKENDS[name] = Off(name)
check.GRACE = ASKED.get("grace", check.GRACE)
added = {
    "raises": raises,
    "loses the GPU": loses_the_gpu,
    "stands still": stands_still,
    "ends": ends,
    "a library ends": ends,
}
check.STEPS = tuple(
    step._replace(seconds=(1e4, 1e5)) if step.name in ASKED.get("long", ()) else step for step in check.STEPS
)
first = [steps.Step(name, "memory", (1, 1), added[name]) for name in ASKED.get("steps", ())]
check.STEPS = (*(step._replace(foreign="library" in step.name) for step in first), *check.STEPS)

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(check.main())
