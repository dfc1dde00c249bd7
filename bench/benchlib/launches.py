"""The Triton kernels as they are launched: compiled on all cores before anything is timed, then each by itself.

A worker process compiles what it is given by calling the ops on small tensors, as all callers do: so a later launch
finds the kernel in Triton's cache, under the same key.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from hlip_kernels import Level, StudyLayout
from hlip_kernels.backends import NORM_BACKENDS, choose_backend
from hlip_kernels.layout import LEVELS
from hlip_kernels.norm import _regroup
from hlip_kernels.tiles import architecture, attention_config

from . import encoders, machine_code, right
from .options import DTYPES
from .problems import Case
from .report import Row
from .timing import ceilings, seconds_of, synchronise
from .trial import Problem


class Pass(NamedTuple):
    """A pass of an encoder in bf16, which launches the norm with other types of weights than a layer by itself."""

    mode: str
    width: int
    depth: int
    dtype: str = "bf16"


class Alone(NamedTuple):
    """A norm called as `norm_alone` times it."""

    width: int
    dtype: str = "bf16"


Job = right.Case | right.Change | Pass | Alone
KERNELS = ("forward", "dq", "dkdv")
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4, "backward": 7}  # of L x L x D a head
PASSES = {"forward": 4, "dq": 6, "dkdv": 6, "backward": 8}  # tensors of (R, H, D) read and written
NO_DRIVER = "Triton has no driver here: no GPU"


def has_driver() -> bool:
    """Tell whether Triton can launch."""
    try:
        from triton.runtime import driver

        return bool(driver.active.get_current_target())
    except (ImportError, RuntimeError):
        return False


def attention_jobs(groups: right.Groups, dtypes: Sequence[str], head_dims: Sequence[int], heads: int) -> list[Job]:
    """One for each dtype and head dim: kernels are the same for all groups."""
    return [right.attention_cases(groups, dtype, head_dim, heads)[0] for dtype in dtypes for head_dim in head_dims]


def norm_jobs(groups: right.Groups, dtypes: Sequence[str], width: int) -> list[Job]:
    """One for each pair of dtypes, direction and number of prefix rows."""
    pairs = [(dtype, wide) for dtype in dtypes for wide in right.residuals(dtype)]
    every = [change for pair in pairs for change in right.changes(groups, *pair, width)]
    return list({(c.dtype, c.wide, c.prefix, _direction(c)): c for c in every}.values())


def _direction(change: right.Change) -> int:
    """-1 to a finer level, 0 to the same, 1 to a coarser one."""
    before, after = (LEVELS.index(level) for level in (change.src, change.dst))
    return (after > before) - (after < before)


def compiled(jobs: Sequence[Job], device: str, processes: int | None = None) -> Iterator[Row]:
    """A row for every kernel, with what its code takes. One that does not compile is wrong; one that spills, which is
    this compiler's doing, is reported."""
    if not has_driver():
        yield {"backend": "triton", "reason": NO_DRIVER}
        return
    if not jobs:
        return
    processes = processes or len(os.sched_getaffinity(0))
    waiting, seen = list(jobs), set()
    while waiting:
        at_once = min(processes, len(waiting))
        done: list[Job] = []
        with ProcessPoolExecutor(at_once, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            running = {pool.submit(compile_job, job, device): job for job in waiting[: None if at_once > 1 else 1]}
            for future in as_completed(running):
                job = running[future]
                try:
                    rows = future.result()
                except Exception as error:  # whatever the compiler says: others may compile
                    if isinstance(error, BrokenProcessPool) and at_once > 1:
                        continue  # one of them ended its process, and all others with it: try fewer at once
                    wrong = f"{type(error).__name__}: {error}"[:300]
                    yield {"case": f"{type(job).__name__}, {job}", "dtype": job.dtype, "wrong": wrong}
                    rows = []
                done.append(job)
                for row in rows:
                    if row["kernel_hash"] not in seen:
                        seen.add(row["kernel_hash"])
                        yield row
        waiting = [job for job in waiting if job not in done]
        processes = max(1, at_once // 2)


def compile_job(job: Job, device: str) -> list[Row]:
    """Call the op forward and backward, which compiles what it launches; facts of the kernels that are new since."""
    before = set(launched())
    if isinstance(job, right.Case):
        right.attention_way("triton", job, device)[0].training()
        facts: Row = {"dtype": job.dtype, "head_dim": job.head_dim}
    elif isinstance(job, right.Change):
        layout, inputs = right.norm_inputs(job, device)
        right.norm_results(inputs, layout, job, "triton")
        residual = "fp32" if job.wide else job.dtype
        facts = {"dtype": job.dtype, "residual": residual, "width": job.width, "case": str(job)}
    elif isinstance(job, Alone):
        layout = StudyLayout.from_grids([[(2, 2, 2)] * 2], device=device)
        for src, dst in CHANGES:
            for run in norm_runs("triton", layout, src, dst, job.width).values():
                run()
        facts = {"dtype": job.dtype, "width": job.width, "case": "a norm without scales"}
    else:
        setting = encoders.Setting(job.dtype, device, job.width, job.depth)
        encoders.ready(encoders.build(encoders.OURS, encoders.table9(1, 32), setting), job.mode, job.dtype)()
        facts = {"dtype": job.dtype, "width": job.width, "case": f"an encoder's {job.mode}"}
    return [facts | code_facts(*kernel) for key, kernel in launched().items() if key not in before]


def run_once(groups: right.Groups, heads: int, head_dim: int, width: int, device: str = "cuda") -> None:
    """Attention and norm forward and backward, for a tool that watches a process; kernels that were compiled before are
    found again."""
    for job in (*attention_jobs(groups, ("bf16",), (head_dim,), heads), *norm_jobs(groups, ("bf16",), width)):
        compile_job(job, device)
    synchronise()


def launched() -> dict[str, tuple[str, Any]]:
    """Every kernel that this process has loaded, with its name, by its hash."""
    from triton import JITFunction

    from hlip_kernels.backends import triton_attention, triton_norm, triton_rows

    loaded: dict[str, tuple[str, Any]] = {}
    functions = [x for module in (triton_attention, triton_norm, triton_rows) for x in vars(module).values()]
    for function in (x for x in functions if isinstance(x, JITFunction)):
        caches = getattr(function, "device_caches", None) or getattr(function, "cache", {})  # Triton 3.2 has the latter
        for cache in caches.values():
            kernels = cache[0] if isinstance(cache, tuple) else cache
            loaded |= {kernel.hash: (function.fn.__name__, kernel) for kernel in kernels.values()}
    return loaded


def code_facts(name: str, kernel: Any) -> Row:
    """Ask the driver, and the disassembler where Triton brings one."""
    facts = {
        "kernel": name, "warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages,
        "shared_bytes": kernel.metadata.shared, "registers": kernel.n_regs, "spills": kernel.n_spills,
        "kernel_hash": kernel.hash,
    }  # fmt: skip
    with contextlib.suppress(KeyError, OSError, ValueError, subprocess.CalledProcessError):
        facts |= machine_code.read_cubin(kernel.asm["cubin"])
    spilled = facts.get("stack_bytes") or facts["spills"]
    return facts | ({"mistake": f"{spilled} bytes spill"} if spilled else {})


def attention_alone(cases: Sequence[Case], dtype: str, heads: int, head_dim: int, device: str) -> Iterator[Row]:
    """Each of our kernels on its own, on the groups of a case; beside a product and a copy of this run. Operations are
    those that a kernel does: both of backward make the scores again."""
    limits = ceilings(device, DTYPES[dtype])
    name = "triton" if device == "cuda" else choose_backend("auto", device, DTYPES[dtype], head_dim)
    for case in cases:
        layout = case.problem(heads, head_dim, DTYPES[dtype], device).layout
        lengths = layout.seqlens(case.level).tolist()
        problem = Problem(lengths, heads, DTYPES[dtype], head_dim, device)
        assert layout.num_prefix == 1, "Problem gives every group one prefix row"
        rows, pairs = problem.qkv.shape[0], sum((n + 1) ** 2 for n in lengths)
        facts: Row = {"case": case.name, "rows": rows, "dtype": dtype, "heads": heads, "head_dim": head_dim}
        if device == "cpu":
            yield from (facts | row for row in _launched_only(problem, dtype, head_dim))
        for kernel, run in _runs(problem, name, dtype, head_dim).items():
            seconds = seconds_of(run, device)
            flops = 2 * PRODUCTS[kernel] * pairs * heads * head_dim
            moved = rows * heads * (PASSES[kernel] * head_dim * problem.qkv.element_size() + 8)
            rates = limits.rates(seconds, flops, moved)
            yield facts | {"backend": name, "kernel": kernel, "p50_s": seconds, **rates}


def _launched_only(problem: Problem, dtype: str, head_dim: int) -> Iterator[Row]:
    """On a CPU: launches of the Triton kernels, where Triton has a driver all the same; nothing is timed."""
    if not has_driver():
        yield {"backend": "triton", "reason": NO_DRIVER}
        return
    config = attention_config(architecture(), DTYPES[dtype], head_dim)
    for kernel in KERNELS:
        problem.launch(kernel, getattr(config, kernel))
        yield {"backend": "triton", "kernel": kernel, "reason": "launched, not timed: no GPU"}


def _runs(problem: Problem, name: str, dtype: str, head_dim: int) -> dict[str, Any]:
    """The kernels in an order in which each finds what the one before wrote."""
    if name == "triton":
        config = attention_config(architecture(), DTYPES[dtype], head_dim)
        return {kernel: partial(problem.launch, kernel, getattr(config, kernel)) for kernel in KERNELS}
    return problem.runs(name)


CHANGES: tuple[tuple[Level, Level], ...] = (("scan", "scan"), ("scan", "study"), ("study", "scan"))


def norm_alone(layout: StudyLayout, width: int, device: str) -> Iterator[Row]:
    """The norm of both directions on its own, residuals in float32 and updates in bf16; beside a copy of this run."""
    limits = ceilings(device, torch.bfloat16)
    layout = layout.to(device)
    name = "triton" if device == "cuda" else "native"
    reasons = NORM_BACKENDS[name].not_supported_reasons(device, torch.float32, torch.bfloat16)
    if reasons:
        name = "torch"
    for src, dst in CHANGES:
        rows = [layout.num_rows(level) for level in (src, dst)]
        runs = norm_runs(name, layout, src, dst, width)
        for kernel, run in runs.items():
            seconds = seconds_of(run, device)
            # Forward reads and writes residual and update; backward reads both gradients and x, and writes two.
            moved = (rows[0] + rows[1]) * width * 6 if kernel == "forward" else (rows[1] * 10 + rows[0] * 6) * width
            yield {
                "case": f"{src} to {dst}", "backend": name, "kernel": f"norm {kernel}", "rows": rows[1], "width": width,
                "p50_s": seconds, **limits.rates(seconds, None, moved),
            }  # fmt: skip


def norm_runs(name: str, layout: StudyLayout, src: Level, dst: Level, width: int) -> dict[str, Callable[[], Any]]:
    """Both directions, without scales."""
    norm, device = NORM_BACKENDS[name], layout.device
    before, after = (layout.num_rows(level) for level in (src, dst))
    residual, grad_x = (torch.randn(n, width, device=device) for n in (before, after))
    update, grad_y = (torch.randn(n, width, device=device).to(torch.bfloat16) for n in (before, after))
    weight, bias = torch.ones(width, device=device), torch.zeros(width, device=device)
    maps = _regroup(layout, src, dst)
    forward = partial(norm.forward, residual, update, None, None, weight, bias, maps, 1e-6)
    x, _, mean, rstd = forward()
    return {
        "forward": forward,
        "backward": partial(norm.backward, grad_x, grad_y, x, mean, rstd, None, None, None, weight, maps),
    }
