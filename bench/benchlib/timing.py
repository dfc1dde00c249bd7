"""How the benchmarks time: several ways of the same work, in turns within one run, compared as paired ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from hlip.model.memory import return_memory
from hlip_kernels.native import release_scratch

Way = TypeVar("Way", bound=Hashable)
Result = TypeVar("Result")
DRAWS = 2000  # of the bootstrap
RESET_PEAK = Path("/proc/self/clear_refs")  # Linux: 5 sets VmHWM to what is resident


class Ratio(NamedTuple):
    """How many times as long one way takes as another: the median of the rounds' ratios, and where it lies in 95% of
    bootstrap draws of the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def in_turns(ways: Mapping[Way, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[Way, list[float]]:
    """Seconds of every way in each round. Rounds go through the ways forwards and backwards by turns, so that what
    slows the machine down for a while slows all of them; call each once before, to warm up.

    Args:
        calls: of a way in a row, whose mean is taken. With several, a GPU does not wait for the host between them.
    """
    seconds: dict[Way, list[float]] = {name: [] for name in ways}
    for i in range(rounds):
        for name in list(ways) if i % 2 else reversed(list(ways)):
            seconds[name].append(clock(ways[name], calls))
    return seconds


def clock(run: Callable[[], Any], calls: int = 1) -> float:
    """Seconds that a call takes: by the GPU's own events where there is one, else by the wall."""
    synchronise()
    if torch.cuda.is_available():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        synchronise()
        return begin.elapsed_time(end) / 1000 / calls
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def host_seconds(run: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each call until all of its work is enqueued on an idle GPU, which the host does not wait for."""
    seconds = []
    for _ in range(rounds):
        synchronise()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    synchronise()
    return seconds


def captured(run: Callable[[], Result]) -> Callable[[], Result]:
    """A replay of all that a call launches, as a CUDA graph. It returns the captured call's result, written anew.

    Raises:
        RuntimeError: the call does what a graph cannot hold, such as wait for the GPU.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what libraries allocate and tune in their first calls is no part of a graph
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def ratio(slower: list[float], faster: list[float], seed: int = 0) -> Ratio:
    """Of the seconds of two ways, of the same rounds."""
    pairs = np.array(slower) / np.array(faster)
    drawn = np.random.default_rng(seed).integers(len(pairs), size=(DRAWS, len(pairs)))
    low, high = np.quantile(np.median(pairs[drawn], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(pairs)), float(low), float(high))


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}_s": float(np.percentile(seconds, p)) for p in (20, 50, 80)}


class Peak:
    """What memory holds at most while this is entered, beyond what it held before: `bytes`. Of a GPU as its allocator
    counts; of a CPU in resident pages of the process, None where the system does not say.

    For a CPU the C library's allocator must be as it is: one that keeps memory leaves gaps, and fills others."""

    bytes: int | None = None

    def __enter__(self) -> Peak:
        if torch.cuda.is_available():
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        elif RESET_PEAK.exists():
            release_scratch()
            return_memory()
            RESET_PEAK.write_text("5")
            self.before = process_bytes("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif RESET_PEAK.exists():
            self.bytes = process_bytes("VmHWM") - self.before


def process_bytes(line: str) -> int:
    """Of this process: VmRSS, what is resident; VmHWM, the most so far; VmSize, all its addresses."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(each for each in lines if each.startswith(line)).split()[1])


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
