"""How the benchmarks time: several ways of the same work, in turns within one run, compared as paired ratios, and
beside what the machine can do at most; and the memory that work takes, and the bytes that its ops move."""

from __future__ import annotations

import contextlib
import functools
import timeit
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hlip.model.memory import return_memory
from hlip_kernels.native import release_scratch

Way = TypeVar("Way", bound=Hashable)
Result = TypeVar("Result")
DRAWS = 2000  # of the bootstrap
CALLS = {"cuda": 10, "cpu": 1}  # in a row, so that on a GPU the host's time for a call does not show
ROUNDS = 5  # of a kernel, a product or a copy by itself
SIDE = {"cuda": 8192, "cpu": 4096}  # of the matrices
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes, beyond the caches
FREE = ("_unsafe_view", "empty", "new_empty", "detach", "alias")  # ops, by the beginnings of their names
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
    for name in turns(ways, rounds):
        seconds[name].append(clock(ways[name], calls))
    return seconds


def turns(ways: Mapping[Way, object], rounds: int) -> Iterator[Way]:
    """Names in the order in which they have their turns."""
    for i in range(rounds):
        yield from ways if i % 2 else reversed(list(ways))


def timed(
    ways: Mapping[Way, Callable[[], Any]], rounds: int, calls: int = 1, ours: Way | None = None
) -> dict[Way, dict[str, Any]]:
    """Time every way in turns: percentiles of its seconds, and how many times as long as ours it takes, if that is one
    of them."""
    seconds = in_turns(ways, rounds, calls)
    return {
        name: {
            **{f"p{p}_s": float(np.percentile(mine, p)) for p in (20, 50, 80)},
            "times_ours": ratio(mine, seconds[ours]) if ours in seconds else None,
        }
        for name, mine in seconds.items()
    }


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
    return timeit.timeit(run, number=calls) / calls


def seconds_of(run: Callable[[], Any], device: str = "cuda") -> float:
    """Time one call: on a GPU the median by its events, with an empty L2 cache; on a CPU by the wall."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median") / 1000
    run()
    return float(np.median([clock(run) for _ in range(ROUNDS)]))


def host_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of a call, the median, until all of its work is enqueued on an idle GPU, which the host does not wait
    for."""
    seconds = []
    for _ in range(rounds):
        synchronise()
        seconds.append(timeit.timeit(run, number=1))
    synchronise()
    return float(np.median(seconds))


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


class Unfit(Exception):
    """Why something is not to be timed, in its own words."""


@contextlib.contextmanager
def failures() -> Iterator[list[str]]:
    """A list that gets the reason where something fails inside, whatever a compiler, a driver or a library says: what
    comes after it may run."""
    reasons: list[str] = []
    try:
        yield reasons
    except Unfit as error:
        reasons.append(str(error))
    except Exception as error:
        synchronise()  # raises if the GPU is lost to this process
        lines = str(error).strip().splitlines() or ["no message"]
        reasons.append(f"{type(error).__name__}: {lines[0][:200]}")


def distance(result: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """How far a result lies from another one, relative to the norm of that one, or to `least`."""
    wanted = expected.double()
    return float((result.double() - wanted).norm() / max(float(wanted.norm()), least))


class Kept(saved_tensors_hooks):
    """What autograd keeps for backward while this is entered, beyond the memory of some tensors: `bytes`."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.own = {x.untyped_storage().data_ptr() for x in own}
        self.storages: dict[int, int] = {}
        super().__init__(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = (tensor.values() if tensor.layout == torch.jagged else tensor).untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


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
    return 1024 * int(next(entry for entry in lines if entry.startswith(line)).split()[1])


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Ceilings(NamedTuple):
    """What the machine can do at most: the fastest round of this run, not a data sheet's figure.

    flops: a second, of a matrix product.
    bytes: a second, read and written by a copy.
    """

    flops: float
    bytes: float

    def rates(self, seconds: float, flops: float | None, moved: float) -> dict[str, float]:
        """Operations and bytes of some work, a second, and as parts of what the machine can do."""
        rates = {"bytes_modelled": moved, "bytes_per_s": moved / seconds, "of_copy": moved / seconds / self.bytes}
        if flops is not None:
            rates = {"flops": flops, "flop_per_s": flops / seconds, "of_matmul": flops / seconds / self.flops} | rates
        return rates


@functools.cache  # of a run
def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Of a large matrix product and a large copy; operands are random: products of zeros run faster, as they take less
    power."""
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(0, 256, (COPIED[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = functools.partial(torch.mm, a, b, out=product), functools.partial(target.copy_, source)
    multiply, copy = (min(clock(run, CALLS[device]) for _ in range(1 + ROUNDS)) for run in runs)  # the first warms up
    return Ceilings(2 * side**3 / multiply, 2 * source.nbytes / copy)


@dataclass
class Counts:
    """Bytes that were asked for, and operations of matrix products. A byte asked for twice counts twice."""

    loaded: int = 0
    stored: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.loaded + other.loaded, self.stored + other.stored, self.flops + other.flops)

    def __mul__(self, times: int) -> Counts:
        return Counts(self.loaded * times, self.stored * times, self.flops * times)


class OpTraffic(TorchDispatchMode):
    """Counts the bytes of the ops inside the block, forward and backward: each reads its tensors once and writes its
    results once, views and empty tensors nothing. That is the least they can do; what an op keeps to itself is not
    seen. Works on meta tensors, which have no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode ops arrive that consist of others, views among them
            out = self.decompose(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            # A view, or memory that is not written, moves nothing.
            if not (func.is_view or func.__name__.startswith(FREE)):
                self.count(func, args, kwargs, out)
        return out

    def decompose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that consists of others; NotImplemented for others."""
        return func.decompose(*args, **kwargs)

    def count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        said = zip(args, func._schema.arguments, strict=False)
        changed = [x for x, of in said if of.alias_info is not None and of.alias_info.is_write]
        self.counts.loaded += tensor_bytes((args, kwargs))
        self.counts.stored += tensor_bytes((out, changed))


def tensor_bytes(tree: Any) -> int:
    """Bytes of the tensors in nested arguments, each tensor once."""
    return sum(x.nbytes for x in {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())
