"""Launches and host time of the Triton backend's calls, on the stub driver; see `host.py`.

The groups whose calls are timed are the slices of two small studies, in bfloat16.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime import driver

from hlip.model.config import VisionConfig
from hlip.model.encoder import Block, Stream
from hlip_kernels import Level, StudyLayout, attention, hold_weights, norm
from hlip_kernels import products as forms

from . import stub_driver
from .host_calls import thread_seconds
from .launches import norm_runs, recorded
from .report import MEGA, Row, columns, print_table
from .timing import OpTraffic, tensor_bytes
from .trial import Problem

ARCHITECTURE = "sm_90"
WIDTH, HEADS = 768, 12
LAYOUT = StudyLayout.from_grids([[(14, 14, 14)]], 1)  # a volume of 224 x 224 x 224 voxels: 14 slices, 2758 rows
SRC: Level = "scan"
DST: Level = "slice"  # the level changes, as it does in every second block of Table 9
WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "weights converted in every pass": nullcontext,
    "weights held": hold_weights,
}

BEST_OF = 15


def count() -> list[Row]:
    """A row for every kernel, in the order of launches."""
    launched = stub_driver.install(ARCHITECTURE)
    torch.manual_seed(0)
    block = Block(VisionConfig(WIDTH, HEADS, patch_size=(16, 16, 16), grid=(14, 14, 14), levels=(DST,)), 0.0).train()
    block.attn.backend = "triton"
    rows: list[Row] = []
    for way, context in WAYS.items():
        with context(), forms_for_gpus(launched) as counter:
            for _ in range(2):  # the second finds what is held
                counter.rows.clear()
                block.zero_grad()
                step(block, counter)
            rows += [{"way": way, **row} for row in counter.rows]
    show(rows)
    return rows


def step(block: Block, counter: Launches) -> None:
    x, update = (
        torch.randn(LAYOUT.num_rows(SRC), WIDTH).to(d).requires_grad_() for d in (torch.float32, torch.bfloat16)
    )
    with counter:
        counter.direction = "forward"
        with torch.autocast("cpu", torch.bfloat16):
            out = block(Stream(x, update, None), LAYOUT, SRC, DST)
    assert out.update is not None
    grads = [torch.ones_like(out.x), torch.ones_like(out.update)]
    with counter:
        counter.direction = "backward"
        torch.autograd.backward([out.x, out.update], grads)


class Launches(OpTraffic):
    """Writes down every op that would launch a kernel, and what Triton launches."""

    def __init__(self, launched: stub_driver.Launches) -> None:
        super().__init__()
        self.launched, self.rows, self.direction = launched, list[Row](), ""

    def decompose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the bodies of our ops, too."""
        body = BODIES.get(func)
        out = body(*args, **kwargs) if body else super().decompose(func, args, kwargs)
        self.add_launched()
        return out

    def count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.add(str(func), tensor_bytes((args, kwargs, out)))

    def add(self, kernel: str, size: int) -> None:
        self.rows.append({"pass": self.direction, "kernel": kernel, "bytes": size})

    def add_launched(self) -> None:
        for launch in self.launched:
            tensors = [x for x in launch.args.values() if isinstance(x, stub_driver.Memory)]
            memory = {x.address: math.prod(x.shape) * x.dtype.itemsize for x in tensors}
            few = launch.name.startswith("prefix")  # rows of what it is given
            self.add(launch.name, 0 if few else sum(memory.values()))
        self.launched.clear()


BODIES: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.hlip_kernels, name).default: body
    for name, body in (
        ("hier_attention", attention._attention), ("hier_attention_backward", attention._attention_backward),
        ("add_regroup_norm", norm._norm), ("add_regroup_norm_backward", norm._norm_backward),
    )
}  # fmt: skip


@contextmanager
def forms_for_gpus(launched: stub_driver.Launches) -> Iterator[Launches]:
    """The linear layers' forms for GPUs, on a CPU."""
    counter = Launches(launched)

    def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply as CUDA does, without a conversion afterwards."""
        with torch.utils._python_dispatch._disable_current_modes():
            out = (a @ b).to(dtype)
        counter.add("aten.mm.dtype", tensor_bytes((a, b, out)))
        return out

    replaced: dict[str, Any] = {
        "on_cpu": lambda *_: False,
        "has_triton": lambda _: True,
        "runs": lambda x, *_: [slice(0, len(x))],
        "_product": product,
    }
    with patch.multiple(forms, **replaced):
        yield counter


def show(rows: list[Row]) -> None:
    print(f"A block of width {WIDTH} in training, {LAYOUT.num_rows(DST)} rows, {SRC} to {DST}. Counted, not run.")
    for way in WAYS:
        totals: dict[tuple[str, str], list[int]] = defaultdict(list)
        for row in (row for row in rows if row["way"] == way):
            for kernel in (row["kernel"], "all"):
                totals[row["pass"], kernel].append(row["bytes"])
        print(f"\n{way}: {sum(len(sizes) for (_, kernel), sizes in totals.items() if kernel == 'all')} launches")
        lines = [[*key, len(sizes), MEGA(sum(sizes))] for key, sizes in totals.items()]
        print_table(["pass", "kernel", "launches", "MB"], lines)


def microseconds(call: Callable[[], Any]) -> float:
    """A call's CPU time in the best round."""
    return 1e6 * min(thread_seconds(call) for _ in range(BEST_OF))


def launches_of(call: Callable[[], Any]) -> Callable[[], None]:
    """Keep the part of a call that is Triton's alone."""
    with recorded() as calls:
        call()

    def launch() -> None:
        for made in calls:
            made.again()

    return launch


def times() -> list[Row]:
    """A row of microseconds for each call."""
    torch.set_num_threads(1)
    stub_driver.install(ARCHITECTURE)
    driver.set_active(stub_driver.CompilerOnly(driver.active.get_current_target()))  # recording takes time, too
    layout = StudyLayout.from_grids([[(6, 14, 14)] * 2, [(2, 5, 7)]])
    lengths = layout.seqlens("slice").tolist()
    calls = {
        f"attention, {way}": run for way, run in Problem(lengths, 12, torch.bfloat16, 64, "cpu").runs("triton").items()
    }
    changes: tuple[Level, ...] = ("slice", "scan")
    for dst in changes:
        runs = norm_runs("triton", layout, "slice", dst, 768)
        calls |= {f"norm, slice to {dst}, {way}": run for way, run in runs.items()}
    timed: list[Row] = [
        {"call": name, "us": microseconds(call), "launches_us": microseconds(launches_of(call))}
        for name, call in calls.items()
    ]
    print_table(*columns(timed, timed[0]))
    return timed
