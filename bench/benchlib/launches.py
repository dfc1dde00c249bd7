"""The Triton kernels as they are launched: compiled on all cores before anything is timed, then each by itself.

A worker process compiles what it is given by calling the ops on small tensors, as all callers do: so a later launch
finds the kernel in Triton's cache, under the same key.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from hlip_kernels import Level, StudyLayout
from hlip_kernels.backends import NORM_BACKENDS, choose_backend, choose_norm_backend
from hlip_kernels.norm import _regroup
from hlip_kernels.tiles import architecture, attention_config

from . import encoders, machine_code, right
from .options import DTYPES
from .problems import Case
from .report import Row
from .timing import ceilings, seconds_of, synchronise
from .trial import Problem


class Job(NamedTuple):
    """A call on a device that launches kernels. facts: of their rows."""

    facts: Row
    call: Callable[[str], Any]


PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4, "backward": 7}  # of L x L x D a head
PASSES = {"forward": 4, "dq": 6, "dkdv": 6, "backward": 8}  # tensors of (R, H, D) read and written
CHANGES: tuple[tuple[Level, Level], ...] = (("scan", "scan"), ("scan", "study"), ("study", "scan"))
NO_DRIVER: Row = {"backend": "triton", "reason": "Triton has no driver here: no GPU"}
read_cubin = functools.cache(machine_code.read_cubin)  # jobs of a process share kernels


def has_driver() -> bool:
    """Tell whether Triton can launch."""
    try:
        from triton.runtime import driver

        return bool(driver.active.get_current_target())
    except (ImportError, RuntimeError):
        return False


def attention_jobs(groups: right.Groups, dtypes: Sequence[str], head_dims: Sequence[int], heads: int) -> list[Job]:
    """One for each dtype and head dim: kernels are the same for all groups."""
    cases = [right.attention_cases(groups, *kind, heads)[0] for kind in product(dtypes, head_dims)]
    return [Job({"dtype": case.dtype, "head_dim": case.head_dim}, partial(_train_attention, case)) for case in cases]


def norm_jobs(groups: right.Groups, dtypes: Sequence[str], width: int) -> list[Job]:
    """One for each pair of dtypes, direction between levels and number of prefix rows."""
    pairs = [(dtype, residual) for dtype in dtypes for residual in right.residuals(dtype)]
    every = product(pairs, CHANGES, groups.prefixes)
    changes = [right.Change(groups.grids, *pair, width, *levels, prefix) for pair, levels, prefix in every]
    return [
        Job({"dtype": c.dtype, "residual": c.residual, "width": width, "case": str(c)}, partial(_train_norm, c))
        for c in changes
    ]


def unscaled_norm_job(width: int) -> Job:
    """The norm as `norm_alone` times it."""
    return Job({"dtype": "bf16", "width": width, "case": "a norm without scales"}, partial(_run_norm, width))


def encoder_job(mode: str, width: int, depth: int) -> Job:
    """A pass of an encoder in bf16, which launches the norm with other types of weights than a layer by itself."""
    facts = {"dtype": "bf16", "width": width, "case": f"an encoder's {mode}"}
    return Job(facts, partial(_run_encoder, mode, width, depth))


def _train_attention(case: right.Case, device: str) -> None:
    right.attention_way("triton", case, device)[0].training()


def _train_norm(change: right.Change, device: str) -> None:
    right.norm_results(change, *right.norm_inputs(change, device), "triton")


def _run_norm(width: int, device: str) -> None:
    layout = StudyLayout.from_grids([[(2, 2, 2)] * 2], device=device)
    for src, dst in CHANGES:
        for run in norm_runs("triton", layout, src, dst, width).values():
            run()


def _run_encoder(mode: str, width: int, depth: int, device: str) -> None:
    setting = encoders.Setting("bf16", device, width, depth)
    encoders.ready(encoders.build(encoders.OURS, encoders.table9(1, 32), setting), mode, "bf16")()


def compiled(jobs: Sequence[Job], device: str, processes: int | None = None) -> Iterator[Row]:
    """A row for every kernel, with what its code takes. One that does not compile is wrong; one that spills, which is
    this compiler's doing, is reported."""
    if not has_driver():
        yield NO_DRIVER
        return
    processes = processes or len(os.sched_getaffinity(0))
    waiting, seen = dict(enumerate(jobs)), set()
    while waiting:
        processes = min(processes, len(waiting))
        with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            chosen = list(waiting)[: None if processes > 1 else 1]
            running = {pool.submit(compile_job, waiting[at], device): at for at in chosen}
            for future in as_completed(running):
                error = future.exception()
                if isinstance(error, BrokenProcessPool) and processes > 1:
                    continue  # one of them ended its process, and all others with it: try fewer at once
                job = waiting.pop(running[future])
                if error:  # whatever the compiler says: others may compile
                    yield {"case": "attention"} | job.facts | {"wrong": f"{type(error).__name__}: {error}"[:300]}
                    continue
                new = [row for row in future.result() if row["kernel_hash"] not in seen]
                seen |= {row["kernel_hash"] for row in new}
                yield from new
        processes = max(1, processes // 2)


def compile_job(job: Job, device: str) -> list[Row]:
    """Call the op forward and backward, which compiles what it launches; facts of the kernels."""
    with recorded() as calls:
        job.call(device)
    return [job.facts | code_facts(call) for call in {call.compiled.hash: call for call in calls}.values()]


def run_once(groups: right.Groups, heads: int, head_dim: int, width: int, device: str = "cuda") -> None:
    """Attention and norm forward and backward, for a tool that watches a process; kernels that were compiled before are
    found again."""
    for job in (*attention_jobs(groups, ("bf16",), (head_dim,), heads), *norm_jobs(groups, ("bf16",), width)):
        job.call(device)
    synchronise()


class Call(NamedTuple):
    """A launch, as Triton was asked for it: kernel, arguments, and options, the grid among them."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    compiled: Any

    def again(self) -> None:
        self.kernel.run(*self.args, **self.options)


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """A list that gets what Triton launches inside."""
    from triton.runtime.jit import JITFunction

    run, calls = JITFunction.run, list[Call]()

    def note(kernel: Any, *args: Any, **options: Any) -> Any:
        compiled = run(kernel, *args, **options)
        calls.append(Call(kernel, args, options, compiled))
        return compiled

    with patch.object(JITFunction, "run", note):
        yield calls


def code_facts(call: Call) -> Row:
    """Ask the driver, and the disassembler where Triton brings one."""
    kernel = call.compiled
    facts = {
        "kernel": call.kernel.fn.__name__, "warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages,
        "shared_bytes": kernel.metadata.shared, "registers": kernel.n_regs, "spills": kernel.n_spills,
        "kernel_hash": kernel.hash,
    }  # fmt: skip
    with contextlib.suppress(KeyError, OSError, ValueError, subprocess.CalledProcessError):
        facts |= read_cubin(kernel.asm["cubin"])
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
        runs = _triton_runs(problem, dtype, head_dim) if name == "triton" else problem.runs(name)
        for kernel, run in runs.items():
            seconds = seconds_of(run, device)
            flops = 2 * PRODUCTS[kernel] * pairs * heads * head_dim
            moved = rows * heads * (PASSES[kernel] * head_dim * problem.qkv.element_size() + 8)
            yield facts | {"backend": name, "kernel": kernel, "p50_s": seconds, **limits.rates(seconds, flops, moved)}


def _launched_only(problem: Problem, dtype: str, head_dim: int) -> Iterator[Row]:
    """On a CPU: launches of the Triton kernels, where Triton has a driver all the same; nothing is timed."""
    if not has_driver():
        yield NO_DRIVER
        return
    for kernel, run in _triton_runs(problem, dtype, head_dim).items():
        run()
        yield {"backend": "triton", "kernel": kernel, "reason": "launched, not timed: no GPU"}


def _triton_runs(problem: Problem, dtype: str, head_dim: int) -> dict[str, Callable[[], object]]:
    """The kernels in an order in which each finds what the one before wrote."""
    tiles = vars(attention_config(architecture(), DTYPES[dtype], head_dim))
    return {kernel: partial(problem.launch, kernel, tile) for kernel, tile in tiles.items()}


def norm_alone(layout: StudyLayout, width: int, device: str) -> Iterator[Row]:
    """The norm of both directions on its own, residuals in float32 and updates in bf16; beside a copy of this run."""
    limits = ceilings(device, torch.bfloat16)
    layout = layout.to(device)
    name = choose_norm_backend("auto", device, torch.float32, torch.bfloat16)
    for src, dst in CHANGES:
        rows = [layout.num_rows(level) for level in (src, dst)]
        for kernel, run in norm_runs(name, layout, src, dst, width).items():
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
