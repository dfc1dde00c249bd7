"""Measurements on the GPU at hand, for the tile table and `auto`: our kernels with other tiles, and other libraries.

Everything is checked against the float64 oracle before it is timed (`trial.py`). Of a row of the table, the tiles in
use and the libraries come first, then other tiles: those first whose loop has the fewest instructions for a score, as
their machine code says where they were compiled ahead (`trial.py`), else those nearest to the tile in use.

How time is measured is an argument, so all of this but the GPU's clock runs in Triton's interpreter too.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product, zip_longest
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from hlip_kernels import Level
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.external import LibraryBackend, installed
from hlip_kernels.layout import TILE_ROWS
from hlip_kernels.tiles import (
    BLOCK_D,
    AttentionConfig,
    Choice,
    Measured,
    Row,
    Tile,
    architecture,
    attention_config,
    row_of,
    table_path,
    user_table,
    write_table,
)

from .report import print_table, provenance
from .static import DTYPES
from .timing import seconds_of
from .trial import OURS, WIDTH, Job, Measure, Seconds, Trials, compile_ahead, tf32_products, tile_name

GAIN = 0.97  # a tile or our kernels give way to what takes at most this part of their time; less may be noise
TIMED: dict[Level, tuple[int, ...]] = {  # patch tokens of the groups that are timed; tiles on all of them together
    "slice": (196,) * 512, "scan": (1176,) * 14 + (3528,) * 2, "study": (4704,) * 4,
}  # fmt: skip
SUMS = {"forward": (1, 1), "dq": (2, 1), "dkdv": (2, 2)}  # tiles of scores, and of results, that a program holds

Candidates = Callable[[str, str, int], Iterable[Tile]]  # of a kind of arithmetic, a kernel and a head dim


class Budget:
    """A limit of time: `minutes` from now on, or none."""

    def __init__(self, minutes: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, math.inf if minutes is None else now() + 60 * minutes

    def seconds(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._end - self._now())


@dataclass(frozen=True)
class Timing:
    """before: the tile in use, and None for its milliseconds if it failed."""

    row: Row
    kernel: str
    before: Tile
    before_ms: float | None
    after: Tile
    after_ms: float


@dataclass
class Tuned:
    """The results of a row.

    timings: of every kernel of which a tile works.
    seconds: of our kernels, with the fastest tiles, and of other libraries; none if one of our kernels does not work.
    refused: backend -> the reason to pass it over.
    left_out: candidate tiles that there was no time for.
    """

    row: Row
    timings: list[Timing] = field(default_factory=list)
    seconds: Seconds = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    def tiles(self) -> AttentionConfig | None:
        """The fastest; None if a kernel has none."""
        if len(self.timings) < len(SUMS):
            return None
        return AttentionConfig(**{timing.kernel: timing.after for timing in self.timings})


def main(dtypes: Sequence[str], head_dims: Sequence[int], minutes: float | None = None) -> int:
    path = table_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the long part, not after
        old = user_table()
        arch = architecture(torch.cuda.current_device())
        results = list(tune(arch, dtypes, head_dims, Budget(minutes)))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {path} stays as it was", file=sys.stderr)
        return 130
    print_timings([timing for tuned in results for timing in tuned.timings])
    new = measured_rows(results, provenance(torch.device("cuda")))
    print_choices(new)
    print_left_out(results, rows_in_order(arch, dtypes, head_dims))
    if not new:
        print("no row has a tile for every kernel that works: nothing is written", file=sys.stderr)
        return 1
    write_table(path, {**old, **new})
    print(f"rows written to {path}: {len(new)}")
    return 0


def rows_in_order(arch: str, dtypes: Sequence[str], head_dims: Sequence[int]) -> dict[Row, list[torch.dtype]]:
    """The rows and the dtypes that share each, those that most models use first."""
    rows = defaultdict(list)
    for dtype, head_dim in product(dtypes, head_dims):
        rows[row_of(arch, DTYPES[dtype], head_dim, dtype == "tf32")].append(DTYPES[dtype])
    first = sorted(rows, key=lambda row: (row.kind != "half", row.head_dim != 64))  # the others as they were given
    return {row: rows[row] for row in first}


def tune(
    arch: str,
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    budget: Budget,
    measure: Measure = seconds_of,
    device: str = "cuda",
    candidates: Candidates | None = None,
    timed: Mapping[Level, Sequence[int]] = TIMED,
) -> Iterator[Tuned]:
    """One row after the other, for as long as the budget lasts."""
    for row, of_row in rows_in_order(arch, dtypes, head_dims).items():
        if budget.seconds():
            yield tune_row(row, of_row, budget, measure, device, candidates, timed)


def tune_row(
    row: Row,
    dtypes: Sequence[torch.dtype],
    budget: Budget,
    measure: Measure = seconds_of,
    device: str = "cuda",
    candidates: Candidates | None = None,
    timed: Mapping[Level, Sequence[int]] = TIMED,
) -> Tuned:
    """Time a row: our kernels with many tiles, and other libraries. The first dtype is timed, and all are checked.

    The tiles in use and the libraries are timed in any case; other tiles while the budget lasts, of which compiling
    ahead may take a half.
    """
    before = attention_config(row.arch, dtypes[0], row.head_dim, row.kind == "tf32")
    in_use = list(vars(before).items())
    others = {
        kernel: near_first(tile, (candidates or all_candidates)(row.kind, kernel, row.head_dim))
        for kernel, tile in in_use
    }
    with tf32_products(row.kind == "tf32"):
        if device == "cuda":
            costs = compiled_costs(row, dtypes, [*in_use, *in_turns(others)], budget.seconds() / 2)
            for kernel, tiles in others.items():  # those that were not compiled stay last, nearest first
                cost = {tile: costs.get((kernel, tile), math.inf) for tile in tiles}
                tiles.sort(key=cost.__getitem__)
        rest = in_turns(others)
        with tqdm(total=len(in_use) + len(rest), desc=f"timing {row}", unit="tile") as progress:
            trials = Trials(row, dtypes, measure, device, timed, progress)
            for kernel, tile in in_use:
                trials.add_tile(kernel, tile)
            if row.kind == "half":  # of the libraries, xformers alone takes float32
                trials.add_libraries()
            seconds = trials.levels(before)
            for kernel, tile in rest:
                if not budget.seconds():
                    break
                trials.add_tile(kernel, tile)
            tuned = Tuned(row, timings_of(trials, before), seconds, trials.refused, progress.total - progress.n)
            after = tuned.tiles()
            if after and after != before:
                tuned.seconds = trials.levels(after)
    return tuned


def timings_of(trials: Trials, before: AttentionConfig) -> list[Timing]:
    """Set the fastest tile of each kernel beside the one in use, which it may be; a kernel needs one that works."""
    timings = []
    for kernel, old in vars(before).items():
        seconds = {tile: spent for (name, tile), spent in trials.seconds.items() if name == kernel}
        if seconds:
            new = faster(old, seconds)
            ms = {tile: 1000 * spent for tile, spent in seconds.items()}
            timings.append(Timing(trials.row, kernel, old, ms.get(old), new, ms[new]))
    return timings


Way = TypeVar("Way", Tile, str)


def faster(ours: Way, seconds: Mapping[Way, float]) -> Way:
    """Return the fastest if it is faster than ours by more than noise, or ours failed."""
    fastest = min(seconds, key=lambda way: seconds[way])
    return fastest if ours not in seconds or seconds[fastest] <= GAIN * seconds[ours] else ours


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


def near_first(in_use: Tile, tiles: Iterable[Tile]) -> list[Tile]:
    """The others, in the order of how many doublings and stages they are from the tile in use."""

    def distance(tile: Tile) -> float:
        doublings = (abs(math.log2(a / b)) for a, b in zip(tile[:3], in_use[:3], strict=True))
        return sum(doublings) + abs(tile.stages - in_use.stages)

    return sorted((tile for tile in tiles if tile != in_use), key=distance)


def in_turns(tiles: Mapping[str, Sequence[Tile]]) -> list[tuple[str, Tile]]:
    """Kernels and tiles: the first of each kernel, then the second, and so on."""
    columns = ([(kernel, tile) for tile in of_kernel] for kernel, of_kernel in tiles.items())
    return [job for line in zip_longest(*columns) for job in line if job is not None]


def compiled_costs(
    row: Row, dtypes: Sequence[torch.dtype], kernels: Sequence[tuple[str, Tile]], seconds: float
) -> dict[tuple[str, Tile], float]:
    """Compile these kernels ahead, and estimate by the machine code what they cost.

    Returns:
        Instructions that a thread takes for each score of its tile; a thousand times as many where it spills, or each
        matrix instruction waits for the one before.
    """
    from triton.runtime import driver

    tf32, heads = row.kind == "tf32", WIDTH // row.head_dim
    jobs = [Job(dtype, tf32, heads, row.head_dim, kernel, tile) for kernel, tile in kernels for dtype in dtypes]
    costs = {}
    for job, facts in compile_ahead(jobs, driver.active.get_current_target(), seconds).items():
        if job.dtype == dtypes[0] and facts.get("loop_instructions"):
            scores = job.tile.rows * job.tile.streamed / (32 * job.tile.warps)
            penalty = 1000 if facts["stack_bytes"] or facts["serialised"] else 1
            costs[job.kernel, job.tile] = penalty * facts["loop_instructions"] / scores
    return costs


def measured_rows(results: Iterable[Tuned], where: dict[str, Any]) -> dict[Row, Measured]:
    """The rows whose three kernels all have a tile, as the table holds them.

    Args:
        where: as `report.provenance` says it.
    """
    packages = {b.package: installed(b.package) for b in BACKENDS.values() if isinstance(b, LibraryBackend)}
    versions = {**{name: version for name, version in packages.items() if version}, **where["versions"]}
    rows = {}
    for tuned in results:
        if tiles := tuned.tiles():
            rows[tuned.row] = Measured(
                tiles=tiles,
                tile_ms={x.kernel: {"before": x.before_ms, "after": x.after_ms} for x in tuned.timings},
                levels={level: choice_of(modes) for level, modes in tuned.seconds.items()},
                refused={name: "".join(filter(str.isprintable, why)) for name, why in tuned.refused.items()},
                device=where["device"],
                versions=versions,
                commit=where["commit"],
                utc=where["utc"],
            )
    return rows


def choice_of(modes: Mapping[str, Mapping[str, float]]) -> Choice:
    """Choose the backends of a level by the seconds that each took in each mode."""
    ms = {mode: {name: 1000 * spent for name, spent in times.items()} for mode, times in modes.items()}
    training, deterministic = (faster(OURS, modes[m]) for m in ("training", "deterministic"))
    return Choice(training, deterministic, ms)


def print_timings(timings: Iterable[Timing]) -> None:
    lines = [
        (
            timing.row, timing.kernel,
            tile_name(timing.before), timing.before_ms and f"{timing.before_ms:.3f}",
            tile_name(timing.after), f"{timing.after_ms:.3f}",
            timing.before_ms and f"{timing.after_ms / timing.before_ms:.2f}",
        )
        for timing in timings
    ]  # fmt: skip
    print_table(("row", "kernel", "before", "ms", "after", "ms", "ratio"), lines)


def print_choices(rows: Mapping[Row, Measured]) -> None:
    """Print the milliseconds of our kernels and of libraries, and the choices of `auto`, by level and mode."""
    choices = [(row, level, choice) for row, measured in rows.items() for level, choice in measured.levels.items()]
    names = list(dict.fromkeys(name for *_, choice in choices for name in choice.ms["training"]))
    lines = [
        (row, level, mode, *(f"{ms[name]:.3f}" if name in ms else None for name in names), taken)
        for row, level, choice in choices
        for mode, taken in (("training", choice.backend), ("deterministic", choice.deterministic), ("forward", None))
        for ms in [choice.ms[mode]]
    ]
    if lines:
        print_table(("row", "level", "mode", *(f"{name} ms" for name in names), "auto"), lines)


def print_left_out(results: Sequence[Tuned], rows: Iterable[Row]) -> None:
    """Print the tiles and the rows that there was no time for."""
    for tuned in results:
        if tuned.left_out:
            print(f"out of time: {tuned.left_out} tiles of {tuned.row} were not tried")
    begun = {tuned.row for tuned in results}
    if missing := [str(row) for row in rows if row not in begun]:
        print(f"out of time: {', '.join(missing)} were not begun")
