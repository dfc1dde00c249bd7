"""A tile table for one GPU: candidates are checked against the float64 oracle, then timed.

How time is measured is an argument, so all of this but the GPU's clock runs in Triton's interpreter too.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hlip_kernels import StudyLayout
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import Spans
from hlip_kernels.configs import (
    BLOCK_D,
    AttentionConfig,
    Row,
    Tile,
    architecture,
    attention_config,
    kind_of,
    table_path,
    user_tiles,
    write_tiles,
)
from hlip_kernels.layout import TILE_ROWS
from report import print_table
from static import DTYPES

WIDTH = 768  # of the model whose attention is timed: heads times head dim
GAIN = 0.97  # a tile gives way to one that takes at most this part of its time; less may be noise
CHECKED = (1, 5, 17, 63, 64, 65, 129, 197, 300)  # patch tokens of the groups that results are checked on
TIMED = (196,) * 512 + (1176,) * 14 + (3528,) * 2  # and of those that are timed: as many scores of each length
SUMS = {"forward": (1, 1), "dq": (2, 1), "dkdv": (2, 2)}  # tiles of scores, and of results, that a program holds

Measure = Callable[[Callable[[], None]], float]  # seconds that a call takes


@dataclass(frozen=True)
class Timing:
    row: Row
    kernel: str
    before: Tile
    before_seconds: float | None  # None if that tile failed
    after: Tile
    after_seconds: float


def main(dtypes: Sequence[str], head_dims: Sequence[int]) -> int:
    path = table_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the long part, not after
        old = user_tiles()
        timings = list(tune(architecture(torch.cuda.current_device()), dtypes, head_dims, gpu_seconds, "cuda"))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {path} stays as it was", file=sys.stderr)
        return 130
    print_timings(timings)
    new = complete_rows(timings)
    if not new:
        print("no row has a tile for every kernel that works: nothing is written", file=sys.stderr)
        return 1
    write_tiles(path, {**old, **new})
    print(f"{len(new)} rows written to {path}")
    return 0


def tune(
    arch: str,
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    measure: Measure,
    device: str,
    candidates: Callable[[str, str, int], Iterable[Tile]] | None = None,
    timed: Sequence[int] = TIMED,
) -> Iterator[Timing]:
    """The best tile of each kernel and row. Of dtypes that share rows, the first is timed and all are checked."""
    kinds = defaultdict(list)
    for dtype in dtypes:
        kinds[kind_of(DTYPES[dtype], dtype == "tf32")].append(DTYPES[dtype])
    jobs = [
        (kind, head_dim, kernel, list((candidates or all_candidates)(kind, kernel, head_dim)))
        for kind, head_dim, kernel in product(kinds, head_dims, SUMS)
    ]
    with tqdm(total=sum(len(tiles) + 1 for *_, tiles in jobs), desc="timing", unit="tile") as progress:
        for kind, head_dim, kernel, tiles in jobs:
            with tf32_products(kind == "tf32"):
                oracles = [Oracle(dtype, head_dim, device) for dtype in kinds[kind]]
                problem = Problem(timed, WIDTH // head_dim, kinds[kind][0], head_dim, device)
                timing = best_tile(Row(arch, kind, head_dim), kernel, tiles, problem, oracles, measure, progress)
                if timing:
                    yield timing


def best_tile(
    row: Row,
    kernel: str,
    tiles: Sequence[Tile],
    problem: Problem,
    oracles: Sequence[Oracle],
    measure: Measure,
    progress: tqdm,
) -> Timing | None:
    """None if no tile works; the tile in use is timed in any case."""
    before = getattr(attention_config(row.arch, problem.qkv.dtype, row.head_dim, row.kind == "tf32"), kernel)
    tried = dict.fromkeys([before, *tiles])
    seconds: dict[Tile, float] = {}
    for tile in tried:
        progress.set_postfix_str(f"{row}, {kernel} {_name(tile)}")
        try:
            faults = [fault for oracle in oracles for fault in oracle.faults(kernel, tile)]
            if not faults:
                seconds[tile] = measure(partial(problem.launch, kernel, tile))
        except Exception as error:  # whatever the compiler or the driver says: this tile is not for this GPU
            faults = [f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"]
            if problem.qkv.is_cuda:
                torch.cuda.synchronize()  # raises if the GPU is lost to this process: then all others would fail too
        progress.update()
        if faults:
            progress.write(f"skipped {row}, {kernel} {_name(tile)}: {'; '.join(faults)}", file=sys.stderr)
    progress.update(1 + len(tiles) - len(tried))
    if not seconds:
        return None
    after = min(seconds, key=lambda tile: seconds[tile])
    if before in seconds and seconds[after] > GAIN * seconds[before]:
        after = before
    return Timing(row, kernel, before, seconds.get(before), after, seconds[after])


def all_candidates(kind: str, kernel: str, head_dim: int) -> Iterator[Tile]:
    """Those whose sums fit in the registers, and give every thread something to do."""
    streamed, warps, stages = (16, 32), (4, 8, 16), (1,)
    if kind != "fp32":
        streamed, warps, stages = (32, 64, 128), (4, 8), (1, 2, 3)  # type: ignore[assignment]
    scores, results = SUMS[kernel]
    for tile in map(Tile._make, product(TILE_ROWS, streamed, warps, stages)):
        threads = 32 * tile.warps
        sums = tile.rows * (scores * tile.streamed + results * BLOCK_D[head_dim])
        if sums < 256 * threads and tile.rows * tile.streamed >= 2 * threads:
            yield tile


def complete_rows(timings: Iterable[Timing]) -> dict[Row, AttentionConfig]:
    """The rows whose three kernels all have a tile."""
    found: dict[Row, dict[str, Tile]] = defaultdict(dict)
    for timing in timings:
        found[timing.row][timing.kernel] = timing.after
    return {row: AttentionConfig(**tiles) for row, tiles in found.items() if len(tiles) == len(SUMS)}


def print_timings(timings: Iterable[Timing]) -> None:
    header = ("row", "kernel", "before", "ms", "after", "ms", "ratio")
    rows = [
        (
            each.row,
            each.kernel,
            _name(each.before),
            None if each.before_seconds is None else f"{1000 * each.before_seconds:.3f}",
            _name(each.after),
            f"{1000 * each.after_seconds:.3f}",
            None if each.before_seconds is None else f"{each.after_seconds / each.before_seconds:.2f}",
        )
        for each in timings
    ]
    print_table(header, rows)


def gpu_seconds(run: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") / 1000


class Problem:
    """The tensors of the three kernels, for groups of `lengths` patch tokens and one prefix row."""

    def __init__(self, lengths: Sequence[int], heads: int, dtype: torch.dtype, head_dim: int, device: str) -> None:
        layout = StudyLayout.from_grids([[(1, 1, n)] for n in lengths], num_prefix=1).to(device)
        self.spans = Spans(layout.cu_seqlens("study"), layout.tiles("study"), layout.max_seqlen("study"))
        self.scale = head_dim**-0.5
        rows = layout.num_rows("study")
        generator = torch.Generator().manual_seed(0)
        self.qkv = torch.randn(rows, 3, heads, head_dim, generator=generator).to(device, dtype)
        self.grad_out = torch.randn(rows, heads, head_dim, generator=generator).to(device, dtype)
        self.out = torch.zeros_like(self.grad_out)
        self.lse = torch.full((heads, rows), 10.0, device=device)
        self.stats = torch.zeros(heads, rows, 2, device=device)
        self.grad_qkv = torch.empty_like(self.qkv)

    def launch(self, kernel: str, tile: Tile) -> None:
        from hlip_kernels.backends import triton_attention as kernels

        (q, k, v), (grad_q, grad_k, grad_v) = self.qkv.unbind(1), self.grad_qkv.unbind(1)
        spans = self.spans
        if kernel == "forward":
            kernels.launch_forward(q, k, v, self.out, self.lse, spans, spans, self.scale, tile)
        elif kernel == "dq":
            gradients = self.grad_out, self.lse, self.stats, grad_q
            kernels.launch_dq(q, k, v, self.out, *gradients, spans, spans, self.scale, tile)
        else:
            gradients = self.grad_out, self.stats, grad_k, grad_v
            kernels.launch_dkdv(q, k, v, *gradients, spans, spans, self.scale, tile)


class Oracle:
    """float64 results, and how far from them a kernel may be: the error of eager PyTorch in the same dtype, 2 times
    over for out and lse and 3 times for gradients, and one rounding."""

    def __init__(self, dtype: torch.dtype, head_dim: int, device: str) -> None:
        self.problem = Problem(CHECKED, 2, dtype, head_dim, device)
        self.exact, eager = self._reference(torch.float64), self._reference(dtype)
        self.allowed = {}
        for part, exact in self.exact.items():
            rounding = torch.finfo(eager[part].dtype).eps * float(exact.abs().max())
            factor = 3 if part.startswith("d") else 2
            self.allowed[part] = factor * float((eager[part].double() - exact).abs().max()) + rounding

    def _reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        problem, reference = self.problem, BACKENDS["reference"]
        spans, scale = problem.spans, problem.scale
        q, k, v = problem.qkv.to(dtype).unbind(1)
        grad_out = problem.grad_out.to(dtype)
        out, lse = reference.forward(q, k, v, spans, spans, scale)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        reference.backward((dq, dk, dv), grad_out, q, k, v, out, lse, spans, spans, scale, True)
        stats = torch.stack([lse / math.log(2), (out * grad_out).sum(2).T.to(lse.dtype)], dim=2)
        return {"out": out, "lse": lse, "stats": stats, "dq": dq, "dk": dk, "dv": dv}

    def faults(self, kernel: str, tile: Tile) -> list[str]:
        """Where the kernel's results are too far off; each kernel is given exact inputs."""
        problem, exact = self.problem, self.exact
        problem.out.copy_(exact["out"])
        problem.lse.copy_(exact["lse"])
        problem.stats.copy_(exact["stats"])
        problem.grad_qkv.fill_(float("nan"))
        if kernel == "forward":
            problem.out.fill_(float("nan"))
            problem.lse.fill_(float("nan"))
        if kernel == "dq":
            problem.stats.fill_(float("nan"))
        problem.launch(kernel, tile)
        grads = {f"d{x}": problem.grad_qkv[:, i] for i, x in enumerate("qkv")}
        parts = {"forward": ("out", "lse"), "dq": ("dq", "stats"), "dkdv": ("dk", "dv")}[kernel]
        found = []
        for part in parts:
            ours: Any = {"out": problem.out, "lse": problem.lse, "stats": problem.stats, **grads}[part]
            error = float((ours.double() - exact[part]).abs().max())
            if not error <= self.allowed[part]:  # nor if it is NaN
                found.append(f"{part} is off by {error:.2g}, more than {self.allowed[part]:.2g}")
        return found


@contextmanager
def tf32_products(allow: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = allow
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _name(tile: Tile) -> str:
    return f"{tile.rows}x{tile.streamed}, {tile.warps} warps, {tile.stages} stages"
