"""The kernels that a block in training would launch on a GPU, and their bytes, counted on a CPU; see `host.py`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hlip.model.config import VisionConfig
from hlip.model.encoder import Block, Stream
from hlip_kernels import Level, StudyLayout, attention, hold_weights, norm
from hlip_kernels import products as forms

from . import stub_driver
from .op_traffic import OpTraffic, tensor_bytes
from .report import print_table, short

ARCHITECTURE = "sm_90"
WIDTH, HEADS = 768, 12
LAYOUT = StudyLayout.from_grids([[(14, 14, 14)]], 1)  # a volume of 224 x 224 x 224 voxels: 14 slices, 2758 rows
SRC: Level = "scan"
DST: Level = "slice"  # the level changes, as it does in every second block of Table 9
WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "weights converted in every pass": nullcontext,
    "weights held": hold_weights,
}

Row = dict[str, Any]


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


class Launches(TorchDispatchMode):
    """Writes down every op that would launch a kernel, and what Triton launches."""

    def __init__(self, launched: stub_driver.Launches) -> None:
        super().__init__()
        self.launched, self.rows, self.direction = launched, list[Row](), ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        body = BODIES.get(func)
        with self:  # ops that consist of others
            out = body(*args, **kwargs) if body else func.decompose(*args, **kwargs)
        self.add_launched()
        if body is None and out is NotImplemented:
            out = func(*args, **kwargs)
            if not OpTraffic.is_free(func):
                self.add(str(func), tensor_bytes((args, kwargs, out)))
        return out

    def add(self, kernel: str, size: int) -> None:
        self.rows.append({"pass": self.direction, "kernel": kernel, "bytes": size})

    def add_launched(self) -> None:
        for launch in self.launched:
            memory = {x.address: math.prod(x.shape) * x.dtype.itemsize for x in launch.args.values() if is_memory(x)}
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


def is_memory(x: object) -> bool:
    return isinstance(x, stub_driver.Memory)


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
        totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for row in rows:
            if row["way"] == way:
                for key in ((row["pass"], row["kernel"]), (row["pass"], "all")):
                    totals[key][0] += 1
                    totals[key][1] += row["bytes"]
        print(f"\n{way}: {sum(count for (_, kernel), (count, _) in totals.items() if kernel == 'all')} launches")
        lines = [[*key, count, short(size / 1e6)] for key, (count, size) in totals.items()]
        print_table(["pass", "kernel", "launches", "MB"], lines)
