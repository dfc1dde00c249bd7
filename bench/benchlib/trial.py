"""Attention by our kernels with any tile, and by other libraries, checked against float64 and timed.

Kernels are compiled ahead in many processes, into Triton's cache, where launches on the GPU then find them. A worker
has no GPU: a driver that compiles for the GPU's architecture and launches nothing lets it go the way of a real launch,
with small tensors of the same types, strides and alignment, so that Triton looks for the same key later.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from hlip_kernels import Level, StudyLayout
from hlip_kernels.backends import BACKENDS, not_supported_reasons
from hlip_kernels.backends.base import Spans
from hlip_kernels.backends.external import LibraryBackend
from hlip_kernels.tiles import MODES, AttentionConfig, Row, Tile

from . import machine_code
from .timing import Unfit, failures

OURS = "triton"
WIDTH = 768  # of the model whose attention is timed: heads times head dim
CHECKED = (1, 5, 17, 63, 64, 65, 129, 197, 300)  # patch tokens of the groups that results are checked on

Measure = Callable[[Callable[[], object]], float]  # seconds that a call takes
Seconds = dict[Level, dict[str, dict[str, float]]]  # level -> mode -> backend -> seconds of a call


class Problem:
    """The tensors of attention, forward and backward, for groups of `lengths` patch tokens and one prefix row."""

    def __init__(self, lengths: Sequence[int], heads: int, dtype: torch.dtype, head_dim: int, device: str) -> None:
        layout = StudyLayout.from_grids([[(1, 1, n)] for n in lengths], num_prefix=1).to(device)
        self.spans = Spans(layout.cu_seqlens("study"), layout.tiles("study"), layout.max_seqlen("study"))
        self.scale = head_dim**-0.5
        rows = layout.num_rows("study")
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.qkv, self.grad_out = random(rows, 3, heads, head_dim), random(rows, heads, head_dim)
        self.out = torch.zeros_like(self.grad_out)
        self.lse = torch.full((heads, rows), 10.0, device=device)
        self.stats = torch.zeros(heads, rows, 2, device=device)
        self.grad_qkv = torch.empty_like(self.qkv)

    def launch(self, kernel: str, tile: Tile) -> None:
        """Run one of our kernels."""
        from hlip_kernels.backends import triton_attention as kernels

        grad_q, grad_k, grad_v = self.grad_qkv.unbind(1)
        tensors = {
            "forward": (self.out, self.lse),
            "dq": (self.out, self.grad_out, self.lse, self.stats, grad_q),
            "dkdv": (self.grad_out, self.stats, grad_k, grad_v),
        }
        launch = getattr(kernels, f"launch_{kernel}")
        launch(*self.qkv.unbind(1), *tensors[kernel], self.spans, self.spans, self.scale, tile)

    def run_ours(self, mode: str, tiles: AttentionConfig) -> None:
        """Run our kernels, whatever tiles are in use; mode: one of `tiles.MODES`."""
        for kernel, tile in vars(tiles).items():
            if mode != "forward" or kernel == "forward":
                self.launch(kernel, tile)

    def forward(self, backend: str) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv.unbind(1)
        return BACKENDS[backend].forward(q, k, v, self.spans, self.spans, self.scale)

    def backward(self, backend: str, out: Tensor, lse: Tensor, deterministic: bool = False) -> None:
        """Write gradients into `grad_qkv`."""
        (q, k, v), (grad_q, grad_k, grad_v) = self.qkv.unbind(1), self.grad_qkv.unbind(1)
        inputs = q, k, v, out, lse, self.spans, self.spans, self.scale
        BACKENDS[backend].backward((grad_q, grad_k, grad_v), self.grad_out, *inputs, deterministic=deterministic)

    def runs(self, backend: str) -> dict[str, Callable[[], object]]:
        """Both directions of a backend, each by itself."""
        return {
            "forward": partial(self.forward, backend),
            "backward": partial(self.backward, backend, *self.forward(backend)),
        }

    def run(self, backend: str, mode: str) -> tuple[Tensor, Tensor]:
        """Run a backend in one of `tiles.MODES`; its out and lse."""
        out, lse = self.forward(backend)
        if mode != "forward":
            self.backward(backend, out, lse, mode == "deterministic")
        return out, lse

    def dependence(self, backend: str, groups: Iterable[int]) -> Iterator[str]:
        """Name those of these groups of which the backend gives other bits than of the group by itself."""
        out, _ = self.run(backend, "forward")
        _, heads, head_dim = out.shape
        for g in groups:
            begin, end = self.spans.cu_seqlens[g : g + 2].tolist()
            alone = Problem([end - begin - 1], heads, out.dtype, head_dim, str(out.device))
            alone.qkv.copy_(self.qkv[begin:end])
            if not torch.equal(alone.run(backend, "forward")[0], out[begin:end]):
                yield f"out of a group of {end - begin} rows depends on the groups beside it"


class Oracle:
    """float64 results, and how far from them a kernel may be: the error of eager PyTorch in the same dtype, 2 times
    over for out and lse and 3 times for gradients, and one rounding."""

    def __init__(self, dtype: torch.dtype, heads: int, head_dim: int, device: str) -> None:
        self.problem = Problem(CHECKED, heads, dtype, head_dim, device)
        self.exact, eager = self._reference(torch.float64), self._reference(dtype)
        self.allowed = {}
        for name, exact in self.exact.items():
            rounding = torch.finfo(eager[name].dtype).eps * float(exact.abs().max())
            factor = 3 if name.startswith("d") else 2
            self.allowed[name] = factor * float((eager[name].double() - exact).abs().max()) + rounding

    def _reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        problem, reference = self.problem, BACKENDS["reference"]
        settings = problem.spans, problem.spans, problem.scale
        (q, k, v), grad_out = problem.qkv.to(dtype).unbind(1), problem.grad_out.to(dtype)
        out, lse = reference.forward(q, k, v, *settings)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        reference.backward((dq, dk, dv), grad_out, q, k, v, out, lse, *settings, True)
        stats = torch.stack([lse / math.log(2), (out * grad_out).sum(2).T.to(lse.dtype)], dim=2)
        return {"out": out, "lse": lse, "stats": stats, "dq": dq, "dk": dk, "dv": dv}

    def kernel_faults(self, kernel: str, tile: Tile) -> list[str]:
        """List the results of a kernel that are too far off; it is given exact inputs."""
        problem = self.problem
        written = {"forward": ("out", "lse"), "dq": ("dq", "stats"), "dkdv": ("dk", "dv")}[kernel]
        tensors = {"out": problem.out, "lse": problem.lse, "stats": problem.stats}
        for name, tensor in tensors.items():
            tensor.copy_(torch.tensor(math.nan) if name in written else self.exact[name])
        problem.grad_qkv.fill_(math.nan)
        problem.launch(kernel, tile)
        results = tensors | self._grads()
        return self._too_far({name: results[name] for name in written})

    def backend_faults(self, backend: str, mode: str) -> list[str]:
        """List reasons why a backend's results cannot stand for ours.

        They are too far off; or those of a group change with the groups beside it; or in the mode "deterministic" a
        second run gives other bits.
        """
        results = self._results(backend, mode)
        faults = self._too_far(results)
        if mode == "deterministic":
            again = self._results(backend, mode)
            other = [name for name in results if not torch.equal(results[name], again[name])]
            faults += [f"{name} is not the same bits in a second run" for name in other]
        return faults or [*islice(self.problem.dependence(backend, range(len(CHECKED))), 1)]

    def _results(self, backend: str, mode: str) -> dict[str, Tensor]:
        self.problem.grad_qkv.fill_(math.nan)
        out, lse = self.problem.run(backend, mode)
        return {"out": out, "lse": lse, **({} if mode == "forward" else self._grads())}

    def _grads(self) -> dict[str, Tensor]:
        return {f"d{name}": self.problem.grad_qkv[:, i].clone() for i, name in enumerate("qkv")}

    def _too_far(self, results: dict[str, Tensor]) -> list[str]:
        errors = {name: float((result.double() - self.exact[name]).abs().max()) for name, result in results.items()}
        return [
            f"{name} is off by {error:.2g}, more than {self.allowed[name]:.2g}"
            for name, error in errors.items()
            if not error <= self.allowed[name]  # nor if it is NaN
        ]


class Trials:
    """Trials of a row of the table. One that fails is reported and passed over.

    seconds: kernel and tile -> the time of a call, if it is right.
    libraries: backend -> the modes in which it is right.
    refused: backend -> the reason to pass it over.
    """

    def __init__(
        self,
        row: Row,
        dtypes: Sequence[torch.dtype],
        measure: Measure,
        device: str,
        timed: Mapping[Level, Sequence[int]],
        progress: tqdm,
    ) -> None:
        heads = WIDTH // row.head_dim
        self.row, self._dtypes, self._device = row, dtypes, device
        self._measure, self._progress = measure, progress
        self._oracles = [Oracle(dtype, heads, row.head_dim, device) for dtype in dtypes]
        self._of_level = {
            level: partial(Problem, lengths, heads, dtypes[0], row.head_dim, device) for level, lengths in timed.items()
        }
        self._problem = Problem([*chain(*timed.values())], heads, dtypes[0], row.head_dim, device)
        self.seconds: dict[tuple[str, Tile], float] = {}
        self.libraries: dict[str, list[str]] = {}
        self.refused: dict[str, str] = {}

    def add_tile(self, kernel: str, tile: Tile) -> None:
        """Check and time one of our kernels."""
        with self._trying(f"{kernel} {tile_name(tile)}"):
            self._confirm(fault for oracle in self._oracles for fault in oracle.kernel_faults(kernel, tile))
            self.seconds[kernel, tile] = self._measure(partial(self._problem.launch, kernel, tile))
        self._progress.update()

    def add_libraries(self) -> None:
        """Check the libraries that are installed."""
        for name, backend in BACKENDS.items():
            if not isinstance(backend, LibraryBackend) or not backend.is_installed():
                continue
            with self._trying(name) as reasons:
                self._check(name, "training")
                self.libraries[name] = ["training", "forward"]
            if reasons:
                self.refused[name] = reasons[0]
                continue
            with self._trying(f"{name}, deterministic"):
                self._check(name, "deterministic")
                self.libraries[name].append("deterministic")

    def levels(self, tiles: AttentionConfig) -> Seconds:
        """Time our kernels with these tiles, and the libraries, at each level; nothing if one of the tiles failed."""
        seconds: Seconds = {}
        for level in self._of_level if self.seconds.keys() >= vars(tiles).items() else ():
            with self._trying(level):
                self._time_level(level, tiles, seconds)
        return seconds

    def _time_level(self, level: Level, tiles: AttentionConfig, seconds: Seconds) -> None:
        problem = self._of_level[level]()
        ours = {mode: self._measure(partial(problem.run_ours, mode, tiles)) for mode in ("training", "forward")}
        ours["deterministic"] = ours["training"]  # the same kernels
        seconds[level] = {mode: {OURS: ours[mode]} for mode in MODES}
        for name, modes in self.libraries.items():
            with self._trying(f"{level}, {name}") as reasons:  # the first group's result does not depend on the others
                self._confirm(problem.dependence(name, [0]))
            for mode in () if reasons else modes:
                with self._trying(f"{level}, {name}, {mode}"):
                    seconds[level][mode][name] = self._measure(partial(problem.run, name, mode))

    def _check(self, backend: str, mode: str) -> None:
        for dtype in self._dtypes:
            deterministic = mode == "deterministic"
            self._confirm(not_supported_reasons(backend, self._device, dtype, self.row.head_dim, deterministic))
        self._confirm(fault for oracle in self._oracles for fault in oracle.backend_faults(backend, mode))

    def _confirm(self, faults: Iterable[str]) -> None:
        if why := "; ".join(faults):
            raise Unfit(why)

    @contextmanager
    def _trying(self, name: str) -> Iterator[list[str]]:
        """Report what fails inside, and pass it over."""
        self._progress.set_postfix_str(name)
        with failures() as reasons:
            yield reasons
        for why in reasons:
            self._progress.write(f"skipped {self.row}, {name}: {why}", file=sys.stderr)


def tile_name(tile: Tile) -> str:
    return f"{tile.rows}x{tile.streamed}, {tile.warps} warps, {tile.stages} stages"


@contextmanager
def tf32_products(allow: bool) -> Iterator[None]:
    """Let products of float32 run in tf32, or not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = allow
    try:
        yield
    finally:
        matmul.allow_tf32 = before


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
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(target,))
    with tqdm(total=len(jobs), desc="compiling", unit="kernel", disable=None, leave=False) as progress:
        try:
            futures = {pool.submit(_compile, job): job for job in jobs}
            for future in futures:
                future.add_done_callback(lambda _: progress.update())
            done = wait(futures, None if seconds == float("inf") else seconds).done
            right = [future for future in done if not future.cancelled() and future.exception() is None]
            return {futures[future]: future.result() for future in right}
        except BrokenProcessPool:  # a worker was killed, for memory most often: launches compile what is missing
            return {}
        finally:
            pool.shutdown(cancel_futures=True)


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
