"""The steps of `check.py`, the most telling first.

A step's rows come one by one: what it has found is kept where it ends early. Seconds are estimates, on an H200 with 16
cores and on a CPU with 2: they only decide what fits into the minutes that are given.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from hlip_kernels import StudyLayout, hold_weights
from hlip_kernels.backends import choose_backend
from hlip_kernels.env import report as environment_report
from hlip_kernels.tiles import BLOCK_D

from . import encoders, kernels, launches, problems, right
from .kernels import own
from .options import DTYPES
from .peers import PEERS
from .report import Row, output
from .right import Setup, Size
from .timing import CALLS, ceilings

STAGES = (
    "environment", "compile", "attention", "norm", "ceilings", "kernels", "peers", "encoder", "training", "memory",
    "tune", "sanitizer",
)  # fmt: skip
LENGTHS = ("slice-197", "scan-1177", "study-4705")
LIBRARIES = (
    "hlip-flash", "hlip-flash3", "hlip-flash4", "hlip-xformers", "flash-attn", "flash-attn-3", "flash-attn-4",
    "xformers",
)  # fmt: skip
FLEX = ("flex",)  # compiles for tens of seconds, so it comes later
OTHERS = tuple(name for name in PEERS if name not in (*LIBRARIES, *FLEX))
PACKAGES = ("flash_attn", "flash_attn_interface", "xformers")  # that these import
SLOW = ("hlip-reference", "hlip-cpu", "sdpa", "padded", "block-mask")  # left out on a GPU
TUNED_MINUTES = 0.75
BENCH = Path(__file__).parents[1]
QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"


def _trained(studies: int, shape: tuple[int, int, int]) -> encoders.Case:
    return encoders.Case("check", studies, 3, shape, (8, 16, 16), "scan+study")


FULL = right.Groups([[(4, 7, 9)], [(2, 14, 14), (1, 3, 5), (6, 8, 8)], [(1, 3, 4)]], (0, 1, 3))
SMALL = right.Groups([[(2, 5, 7)], [(2, 5, 5), (1, 3, 5), (3, 6, 6)], [(1, 3, 4)]], (0, 1, 3))
TINY = right.Groups([[(2, 3, 3)], [(1, 3, 4), (2, 2, 4)]], (1,))
SIZES = {
    "full": Size(
        FULL, 12, 64, tuple(d for d in BLOCK_D if d != 64), 768, 8, LENGTHS, 5, encoders.table9(1, 224), 768, 12,
        _trained(2, (48, 224, 224)), (2, 4, 8),
    ),
    "small": Size(
        SMALL, 4, 64, (32,), 192, 1, LENGTHS, 3, encoders.table9(1, 112), 384, 6, _trained(2, (16, 64, 64)), (2, 4, 8),
    ),
    "tiny": Size(
        TINY, 2, 16, (32,), 64, 1, ("slice-99",), 2, encoders.table9(1, 32), 64, 3, _trained(2, (16, 32, 32)), (1, 2),
    ),
}  # fmt: skip


class Step(NamedTuple):
    """seconds: estimates on a card and on a CPU. checks: whether its rows say right or wrong. there: whether what it
    runs is installed. foreign: whether it may fail by the fault of other libraries."""

    name: str
    stage: str
    seconds: tuple[float, float]
    rows: Callable[[Setup], Iterator[Row]]
    checks: bool = False
    there: Callable[[], bool] = lambda: True
    foreign: bool = False


def environment(setup: Setup) -> Iterator[Row]:
    yield {"text": environment_report()}
    yield {"text": output("nvidia-smi") or "nvidia-smi is not there"}


def clocks() -> Row:
    """The card's clocks, power and temperature, as nvidia-smi tells them; nothing where it is not."""
    line = output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader").partition("\n")[0]
    return dict(zip(QUERY.split(","), line.split(", "), strict=False)) if line else {}


def compiled(setup: Setup, dtypes: Sequence[str], others: bool = False) -> Iterator[Row]:
    size = setup.size
    jobs = launches.attention_jobs(size.groups, dtypes, size.head_dims if others else (size.head_dim,), size.heads)
    if not others:
        jobs += launches.norm_jobs(size.groups, dtypes, size.width)
    if "bf16" in dtypes and not others:
        jobs.append(launches.unscaled_norm_job(size.width))
        jobs += [launches.encoder_job(mode, size.table9_width, size.table9_depth) for mode in encoders.MODES]
    yield from launches.compiled(jobs, setup.device)


def measured_ceilings(setup: Setup) -> Iterator[Row]:
    limits = ceilings(setup.device, torch.bfloat16)
    yield {"dtype": "bf16", "matmul_flop_per_s": limits.flops, "copy_bytes_per_s": limits.bytes}


def kernels_alone(setup: Setup, others: bool = False) -> Iterator[Row]:
    size, device = setup.size, setup.device
    head_dim = max(size.head_dims) if others else size.head_dim
    yield from launches.attention_alone(_cases(setup), "bf16", size.heads, head_dim, device)
    if not others:
        layout = StudyLayout.from_grids([[(6, 14, 14)] * 4] * size.batch)
        yield from launches.norm_alone(layout, size.width, device)


def peers(setup: Setup, at: int, chosen: Collection[str]) -> Iterator[Row]:
    """One case of `attention.py`; ours is always in it, as what the others are compared with."""
    size, device = setup.size, setup.device
    if at >= len(size.lengths):
        return
    ours = f"hlip-{choose_backend('auto', device, torch.bfloat16, size.head_dim)}"
    left_out = SLOW if device == "cuda" else ("hlip-triton",)  # which could only run on a driver that is none
    names = [name for name in PEERS if (name == ours or name in chosen) and name not in left_out]
    memory = 0.8 * torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0.4 * 2**30
    settings = kernels.Settings(
        "bf16", size.heads, size.head_dim, device, size.rounds, CALLS[device], memory, names, kernels.MODES
    )  # fmt: skip
    for row in kernels.run(_cases(setup)[at], settings, ceilings(device, torch.bfloat16)):
        yield row if own(row["backend"]) else {key: value for key, value in row.items() if key != "wrong"}


def _cases(setup: Setup) -> list[problems.Case]:
    by_name = {case.name: case for case in problems.all_cases(setup.device, setup.size.batch)}
    return [by_name[name] for name in setup.size.lengths]


def any_library() -> bool:
    return any(map(importlib.util.find_spec, PACKAGES))


def table9(setup: Setup, mode: str, graphs: bool = False) -> Iterator[Row]:
    """Ours, the published way and a plain transformer; MONAI's models are left to `encoder.py`."""
    size, case = setup.size, setup.size.table9
    setting = encoders.Setting("bf16", setup.device, size.table9_width, size.table9_depth)
    kinds = (encoders.Kind(model, True) for model in ("hlip", "published", "vit"))
    jobs = {kind: encoders.build(kind, case, setting) for kind in kinds}
    with hold_weights() if mode == "inference" else contextlib.nullcontext():
        rows = encoders.replayed if graphs else encoders.measure
        for row in rows(jobs, mode, case, setting, size.rounds):
            yield {"case": case.name, "shape": "x".join(map(str, case.shape)), **row}


def tuned(setup: Setup) -> Iterator[Row]:
    """One row of the tile table, in a process of its own."""
    if setup.device == "cpu":
        yield {"reason": "tiles are of a GPU"}
        return
    options = ["--tune", "--dtype", "bf16", "--head-dim", "64", "--minutes", str(TUNED_MINUTES)]
    with tempfile.TemporaryDirectory() as folder:  # what few tiles were tried for is not to be used later
        yield from program([sys.executable, str(BENCH / "attention.py"), *options], XDG_CACHE_HOME=folder)
        for path in Path(folder).glob("*/tiles.json"):
            yield {"text": path.read_text(encoding="utf-8")}


def sanitized(setup: Setup) -> Iterator[Row]:
    """Every access to memory of attention and norm, watched by NVIDIA's tool."""
    tool = sanitizer()
    if setup.device == "cpu" or not tool:
        yield {"reason": "compute-sanitizer is not there" if setup.device == "cuda" else "memory of a GPU is watched"}
        return
    size = setup.size
    given = f"steps.TINY, {size.heads}, {size.head_dim}, {size.width}"
    script = f"from benchlib import launches, steps; launches.run_once({given})"
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else it takes PyTorch's pool for one piece of memory
    yield from program([tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", script], **variables)


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def program(command: Sequence[str], **variables: str) -> Iterator[Row]:
    """Run another program; the end of what it prints."""
    paths = [str(BENCH.parent), str(BENCH), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, errors="replace"
    )
    yield {"text": done.stdout[-6000:]}
    if done.returncode:
        yield {"wrong": f"{Path(command[0]).name} ended with {done.returncode}"}


def _peers(
    name: str, seconds: tuple[float, float], at: int, chosen: Collection[str], there: Callable[[], bool] = lambda: True
) -> Step:
    return Step(name, "peers", seconds, partial(peers, at=at, chosen=chosen), there=there, foreign=True)


ALL = tuple(DTYPES)
STEPS = (
    Step("environment", "environment", (6, 5), environment),
    Step("compile bf16", "compile", (35, 60), partial(compiled, dtypes=("bf16",))),
    Step("attention bf16", "attention", (6, 10), partial(right.attention, dtypes=("bf16",)), True),
    Step("norm bf16", "norm", (8, 5), partial(right.norm, dtypes=("bf16",)), True),
    Step("ceilings", "ceilings", (3, 6), measured_ceilings),
    Step("kernels alone", "kernels", (12, 25), kernels_alone),
    Step("compile fp16, fp32", "compile", (35, 120), partial(compiled, dtypes=("fp16", "fp32"))),
    Step("attention fp16, fp32", "attention", (8, 15), partial(right.attention, dtypes=("fp16", "fp32")), True),
    Step("norm fp16, fp32", "norm", (10, 5), partial(right.norm, dtypes=("fp16", "fp32")), True),
    _peers("peers slice", (20, 30), 0, OTHERS),
    _peers("peers scan", (20, 30), 1, OTHERS),
    _peers("peers study", (20, 60), 2, OTHERS),
    Step("Table 9, inference", "encoder", (20, 10), partial(table9, mode="inference")),
    Step("Table 9, training", "encoder", (25, 10), partial(table9, mode="training")),
    Step("Table 9, inference, CUDA graphs", "encoder", (12, 2), partial(table9, mode="inference", graphs=True)),
    Step("Table 9, training, CUDA graphs", "encoder", (15, 2), partial(table9, mode="training", graphs=True)),
    Step("a training step", "training", (20, 5), right.training, True),
    Step("memory", "memory", (5, 10), right.memory, True),
    Step(
        "libraries: right",
        "attention",
        (40, 2),
        partial(right.attention, dtypes=("bf16", "fp16"), ours=False),
        there=any_library,
        foreign=True,
    ),
    _peers("libraries: slice", (30, 20), 0, LIBRARIES, any_library),
    _peers("libraries: scan", (30, 20), 1, LIBRARIES, any_library),
    _peers("libraries: study", (30, 20), 2, LIBRARIES, any_library),
    _peers("FlexAttention: slice", (45, 60), 0, FLEX),
    Step("tune bf16, head dim 64", "tune", (60 * TUNED_MINUTES + 15, 1), tuned),
    Step("compile other head dims", "compile", (60, 90), partial(compiled, dtypes=ALL, others=True)),
    Step("attention other head dims", "attention", (45, 60), partial(right.attention, dtypes=ALL, others=True), True),
    Step("kernels alone, largest head dim", "kernels", (10, 20), partial(kernels_alone, others=True)),
    _peers("FlexAttention: scan", (45, 60), 1, FLEX),
    _peers("FlexAttention: study", (45, 60), 2, FLEX),
    Step("compute-sanitizer", "sanitizer", (90, 1), sanitized, True, lambda: sanitizer() is not None),
)
