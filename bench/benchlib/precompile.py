"""Attention kernels compiled ahead in many processes, into Triton's cache, where launches on the GPU then find them.

A worker has no GPU: a driver that compiles for the GPU's architecture and launches nothing lets it go the way of a real
launch, with small tensors of the same types, strides and alignment, so that Triton looks for the same key later.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from hlip_kernels.tiles import Tile

from . import machine_code
from .trial import Problem, tf32_products


class Job(NamedTuple):
    """A kernel as it will be launched."""

    dtype: torch.dtype
    tf32: bool
    heads: int
    head_dim: int
    kernel: str
    tile: Tile


def compile_ahead(
    jobs: Sequence[Job], target: Any, seconds: float, workers: int | None = None
) -> dict[Job, dict[str, Any]]:
    """Compile in this order, on all cores.

    A kernel that does not compile is left out in silence: its launch says why.

    Args:
        target: of Triton's compiler, as its driver names the GPU at hand.
        seconds: after which no compilation begins.
        workers: processes; as many as cores if None.

    Returns:
        Of each kernel that was compiled the facts of `machine_code.read_cubin`; for a GPU of AMD there are none.
    """
    workers = min(len(jobs), workers or len(os.sched_getaffinity(0)))
    if not workers:
        return {}
    facts: dict[Job, dict[str, Any]] = {}
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(target,))
    with tqdm(total=len(jobs), desc="compiling", unit="kernel", disable=None, leave=False) as progress:
        try:
            futures = {pool.submit(_compile, job): job for job in jobs}
            for future in futures:
                future.add_done_callback(lambda _: progress.update())
            done = wait(futures, None if seconds == float("inf") else seconds).done
            right = [future for future in done if not future.cancelled() and future.exception() is None]
            facts = {futures[future]: future.result() for future in right}
        except BrokenProcessPool:  # a worker was killed, for memory most often: launches compile what is missing
            pass
        finally:
            pool.shutdown(cancel_futures=True)
    return facts


def _start(target: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    torch.set_num_threads(1)
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    warnings.simplefilter("ignore")  # the process that launches has them, too
    import triton

    from .stub_driver import CompilerOnly

    triton.runtime.driver.set_active(CompilerOnly(target))


def _compile(job: Job) -> dict[str, Any]:
    import triton

    with tf32_products(job.tf32):
        Problem((1,), job.heads, job.dtype, job.head_dim, "cpu").launch(job.kernel, job.tile)
    driver = triton.runtime.driver.active
    return machine_code.read_cubin(driver.binary) if driver.target.backend == "cuda" else {}
