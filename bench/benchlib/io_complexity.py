"""What attention asks of memory, counted, beside what theory claims.

    python bench/attention.py --io

The claims (arXiv 2505.21862, section 3.1 and Appendix E), for N tokens of width c in M scans of d slices:

    level    bytes, standard attention    operations
    study    N^2 + N c                    N^2 c
    scan     N^2 / M + N c                N^2 c / M
    slice    N^2 / (M d) + N c            N^2 c / (M d)

Flash attention (arXiv 2205.14135, theorem 2) keeps no N^2 values; in one study it moves N^2 D^2 / S bytes for a head
dim of D and S bytes of fast memory, and in scans and slices as much less as above. A program of our kernels holds
`rows` rows of a head, so S is rows * D: the law is N^2 D / rows, and N^2 D^2 at a given S.

How it is counted:

- **ours**: our Triton kernels run in Triton's interpreter (where `TRITON_INTERPRET=1` is set before this module is
  imported). Their loads and stores pass through two methods of its builder, products through a third, launches through
  its executor of grids, where they are counted as they are asked for: one head, fp16.
  Prefix rows are rows like all others, and count among the N tokens. Backward is the sum of its two kernels. These are
  requests to the caches, not DRAM traffic. One group of each length is counted and multiplied. Streamed tiles have 1024
  rows; bytes do not depend on that, and the sizes are such that tiles are full, so that operations are those needed.
- **standard**: attention as a product, a softmax and a product (`baselines.unfused`), as PyTorch's ops and autograd run
  it, each op reading its tensors once and writing its results once. Groups are 16 times as long, without memory behind
  them.

Each sweep changes one thing, and an exponent is the slope of a straight line through the logarithms, without a term for
what is of lower order. Sizes are such that the quadratic term rules: the rest (own rows, and in backward the statistics
of rows) is at most an eighth of a count, and takes up to 0.05 off an exponent.

`regroup` counts what a change of level costs in a whole encoder: in the published way a copy of all tokens, forward and
backward, of residual rows in float32; in ours the programs of the prefix rows, the residual add and norm of these rows
included. Both for one study.
"""

from __future__ import annotations

import argparse
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise, product
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from hlip.model.config import preset
from hlip_kernels import Level, StudyLayout
from hlip_kernels.backends import triton_norm
from hlip_kernels.backends.base import Regroup
from hlip_kernels.layout import LEVELS
from hlip_kernels.tiles import Tile, built_in_config, row_of

from .baselines import regroup, unfused
from .report import Row, columns, power, print_table, provenance, run_cases
from .timing import Counts, OpTraffic
from .trial import Problem

TOLERANCE = 0.05  # of exponents
PASSES: dict[str, tuple[str, ...]] = {"forward": ("forward",), "backward": ("dq", "dkdv")}
LONGER = 16  # groups of standard attention
STREAMED = 1024  # rows of the streamed tile: more than on a GPU, as the interpreter is slow and no byte depends on it
SLICE = 1024  # rows, so that tiles are full
PUBLISHED = (197, 1177, 2745)  # rows of a slice, and of scans of 6 and 14 slices
ENCODERS = {  # of the released models, and scans of the study
    "clip_vit_base_scan_study_token1176": 10,
    "vit_base_multiscan_h3_token1176": 10,
    "clip_vit_base_slice_scan_token2744": 1,
}


class Point(NamedTuple):
    """tokens: N. scans: M. slices: d, of a scan. head_dim: D. rows: of a program's tile."""

    tokens: int
    scans: int
    slices: int
    head_dim: int = 64
    rows: int = 32

    def groups(self, level: Level) -> int:
        return {"study": 1, "scan": self.scans, "slice": self.scans * self.slices}[level]

    def length(self, level: Level) -> int:
        return self.tokens // self.groups(level)


class Sweep(NamedTuple):
    """claimed: the exponents of bytes, and of operations, of ours at slice, scan and study level."""

    name: str
    what: str
    of: Callable[[Point], int]
    points: tuple[Point, ...]
    bytes: tuple[int, int, int]
    flops: tuple[int, int, int]
    standard: bool = True  # whether it says anything of standard attention


KINDS = {"ours": "counted", "standard": "estimated", "published": "estimated"}  # of the ways' figures
DOUBLED = (1, 2, 4)
SWEEPS = (
    Sweep("N", "longer slices, 2 scans of 1", lambda p: p.tokens,
          tuple(Point(2 * SLICE * k, 2, 1) for k in (1, 2, 3)), (2, 2, 2), (2, 2, 2)),
    Sweep("M", "more scans of 1 slice, same N", lambda p: p.scans, tuple(Point(4 * SLICE, k, 1) for k in DOUBLED),
          (-1, -1, 0), (-1, -1, 0)),
    Sweep("d", "more slices of 1 scan, same N", lambda p: p.slices, tuple(Point(4 * SLICE, 1, k) for k in DOUBLED),
          (-1, 0, 0), (-1, 0, 0)),
    Sweep("scans", "a study grows by scans of 2 slices", lambda p: p.scans,
          tuple(Point(SLICE * k, k, 2) for k in DOUBLED), (1, 1, 2), (1, 1, 2)),
    Sweep("D", "head dim, same tile rows", lambda p: p.head_dim,
          tuple(Point(2 * SLICE, 2, 1, head_dim=k) for k in (32, 64, 128)), (1, 1, 1), (1, 1, 1), standard=False),
    Sweep("S", "tile rows: fast memory", lambda p: p.rows,
          tuple(Point(4 * SLICE, 1, 1, rows=k) for k in (32, 64, 128)), (-1, -1, -1), (0, 0, 0), standard=False),
    Sweep("D at S", "head dim, same fast memory", lambda p: p.head_dim,
          tuple(Point(4 * SLICE, 1, 1, head_dim=k, rows=4096 // k) for k in (32, 64, 128)),
          (2, 2, 2), (1, 1, 1), standard=False),
)  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Count, show, and write rows to the files of `run_cases`."""
    facts = provenance(torch.device("cpu"))
    return run_cases([(row | facts for row in chain(fitted(), at_published_lengths(), regroup_traffic()))], show, args)


def fitted() -> Iterator[Row]:
    """A row for every way, pass, level, sweep, and for bytes and operations."""
    for sweep in tqdm(SWEEPS, "counting", unit="sweep", disable=None):
        ways = WAYS if sweep.standard else ("ours",)
        for way, direction, (at, level) in product(ways, PASSES, enumerate(LEVELS)):
            counts = [WAYS[way](direction, point, level) for point in sweep.points]
            x = [sweep.of(point) for point in sweep.points]
            for quantity, claims in (("bytes", sweep.bytes), ("flops", sweep.flops)):
                y = [getattr(counted, quantity) for counted in counts]
                slope, claimed = exponent(x, y), claims[at]
                off = not abs(slope - claimed) <= TOLERANCE
                yield {
                    "kind": "exponent", "way": way, "pass": direction, "level": level, "sweep": sweep.name,
                    "quantity": quantity, "claimed": claimed, "exponent": slope,
                    "points": [point._asdict() for point in sweep.points], "x": x, "counted": y,
                    "times_longer": LONGER if way == "standard" else 1,
                    "kinds": {"counted": KINDS[way], "exponent": KINDS[way]},
                    **({"wrong": f"at level {level} {slope:.3f} is not {claimed}"} if off else {}),
                }  # fmt: skip


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Of a power law, by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(np.array(y, dtype=float)), 1)[0])


def ours(direction: str, point: Point, level: Level) -> Counts:
    counts = (kernel_counts(kernel, point.length(level), point.head_dim, point.rows) for kernel in PASSES[direction])
    return sum(counts, Counts()) * point.groups(level)


@functools.cache
def kernel_counts(kernel: str, length: int, head_dim: int, rows: int, streamed: int = STREAMED) -> Counts:
    """Count what one of our kernels asks for on a group of `rows` rows."""
    problem = Problem([length - 1], 1, torch.float16, head_dim, "cpu")
    with watched(compute=False) as traffic:
        problem.launch(kernel, Tile(rows, streamed, 4, 1))
    return traffic.total


def standard(direction: str, point: Point, level: Level) -> Counts:
    return standard_counts(LONGER * point.length(level), point.head_dim)[direction] * point.groups(level)


@functools.cache
def standard_counts(length: int, head_dim: int) -> dict[str, Counts]:
    """Of attention of one head that writes its weights to memory."""
    return op_counts(unfused, *[(1, 1, length, head_dim)] * 3, dtype=torch.float16)


def op_counts(
    run: Callable[..., Tensor], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> dict[str, Counts]:
    """Count what the ops of a call with inputs of these shapes move and multiply, forward and backward."""
    inputs = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
    with OpTraffic() as forward, FlopCounterMode(display=False) as forward_flops:
        out = run(*inputs)
    grad = torch.empty_like(out)
    with OpTraffic() as backward, FlopCounterMode(display=False) as backward_flops:
        torch.autograd.grad(out, inputs, grad)
    ways = zip(PASSES, (forward, backward), (forward_flops, backward_flops), strict=True)
    return {way: replace(traffic.counts, flops=flops.get_total_flops()) for way, traffic, flops in ways}


WAYS: dict[str, Callable[[str, Point, Level], Counts]] = {"ours": ours, "standard": standard}


def at_published_lengths() -> Iterator[Row]:
    """Groups of the released models, with the tiles that the table has for sm_90: what is asked for, beside standard
    attention and beside the least, which is every row once."""
    head_dim = 64
    for length in tqdm(PUBLISHED, "published lengths", unit="length", disable=None):
        tiles = built_in_config(row_of("sm_90", torch.float16, head_dim))
        for direction, kernels in PASSES.items():
            used = [getattr(tiles, kernel) for kernel in kernels]
            counts = sum(
                (kernel_counts(kernel, length, head_dim, tile.rows, tile.streamed)
                 for kernel, tile in zip(kernels, used, strict=True)), Counts(),
            )  # fmt: skip
            plain = standard_counts(length, head_dim)[direction]
            least = 4 * 2 * head_dim + 4 if direction == "forward" else 8 * 2 * head_dim + 4
            yield {
                "kind": "length", "pass": direction, "rows": length, "head_dim": head_dim,
                "tiles": [f"{tile.rows}x{tile.streamed}" for tile in used], "bytes": counts.bytes,
                "standard_bytes": plain.bytes, "least_bytes": length * least,
                "flops": counts.flops, "least_flops": (4 if direction == "forward" else 10) * length**2 * head_dim,
                "kinds": {"bytes": "counted", "flops": "counted", "standard_bytes": "estimated",
                          "least_bytes": "estimated", "least_flops": "estimated"},
            }  # fmt: skip


def regroup_traffic() -> Iterator[Row]:
    """A row for every encoder: bytes of all its changes of level."""
    for name, scans in ENCODERS.items():
        config = preset(name).vision
        levels = config.levels
        d, h, w = config.grid
        tokens = scans * d * h * w
        changes = [(src, dst) for src, dst in pairwise(levels) if src != dst]
        # What prefix rows add does not depend on patches, so slices of one patch will do.
        layout = StudyLayout.from_grids([[(d, 1, 1)] * scans])
        moved = {
            (src, dst): {
                "published": published_change(layout.num_groups(src), layout.num_groups(dst), tokens, config.width),
                "ours": prefix_change(layout, src, dst, config.width),
            }
            for src, dst in set(changes)
        }
        row: Row = {
            "kind": "regroup", "model": name, "scans": scans, "tokens": tokens, "kinds": {}, "changes": len(changes),
        }  # fmt: skip
        for way, direction in product(("published", "ours"), PASSES):
            row[f"{way}_{direction}_bytes"] = sum(moved[change][way][direction].bytes for change in changes)
            row["kinds"][f"{way}_{direction}_bytes"] = KINDS[way]
        yield row


def published_change(src: int, dst: int, tokens: int, width: int) -> dict[str, Counts]:
    """Forward and backward of the change from `src` groups to `dst`."""
    return op_counts(lambda x: regroup(x, dst), (src, 1 + tokens // src, width))


def prefix_change(layout: StudyLayout, src: Level, dst: Level, width: int) -> dict[str, Counts]:
    """Count the bytes that prefix rows add, forward and backward, to those of our kernels of the norm."""
    with_prefix, without = (norm_traffic(layout.with_num_prefix(p), src, dst, width) for p in (layout.num_prefix, 0))
    return {direction: counts + without[direction] * -1 for direction, counts in with_prefix.items()}


def norm_traffic(layout: StudyLayout, src: Level, dst: Level, width: int) -> dict[str, Counts]:
    fine, coarse = sorted((src, dst), key=LEVELS.index)
    change = Regroup(
        layout.cu_seqlens(src), layout.cu_seqlens(dst), layout.tiles(fine)[0], layout.children(fine, coarse),
        layout.parents(fine, coarse), layout.num_prefix, src == fine,
    )  # fmt: skip
    residual, vector = torch.randn(layout.num_rows(src), width), torch.randn(width)
    with watched() as traffic:
        x, y, mean, rstd = triton_norm.forward(residual, residual, None, None, vector, vector, change, 1e-6)
        triton_norm.backward(x, y, x, mean, rstd, None, None, None, vector, change)
    return {way: traffic.kernels[f"norm_{way}"] + traffic.kernels[f"prefix_{way}"] for way in PASSES}


def show(rows: Sequence[Row]) -> None:
    exponents, lengths, changes = ([r for r in rows if r["kind"] == kind] for kind in ("exponent", "length", "regroup"))
    print("Exponents, counted (claimed): of bytes, then of operations\n")
    figures = [f"{level} {quantity}" for quantity in ("bytes", "flops") for level in LEVELS]
    cells: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in exponents:
        cells[row["sweep"], row["way"], row["pass"]][f"{row['level']} {row['quantity']}"] = power(row)
    what = {sweep.name: sweep.what for sweep in SWEEPS}
    lines = [[key[0], what[key[0]], *key[1:], *map(of.get, figures)] for key, of in cells.items()]
    print_table(["sweep", "", "way", "pass", *figures], lines)
    print(
        "\nOne group of the released models, one head of 64, fp16, with the tiles of sm_90. Operations beyond those"
        "\nneeded are those of padded tiles, and in backward seven products for five, as both kernels need scores.\n"
    )
    over = [{**row, "operations over needed": f"{row['flops'] / row['least_flops']:.3f}"} for row in lengths]
    keys = ("rows", "pass", "tiles", "bytes", "standard_bytes", "least_bytes", "operations over needed")
    print_table(*columns(over, keys))
    print("\nChanges of level in a whole encoder: MB of one study\n")
    figures = [f"{way}_{direction}_bytes" for direction in PASSES for way in ("published", "ours")]
    print_table(*columns(changes, ["model", "scans", "tokens", "changes", *figures]))
    print(
        "\nNothing is measured here. counted: ours, request by request; estimated: standard, published and least, from"
        "\nthe shapes of what they read and write; claimed, in brackets: theory."
    )


@dataclass
class Traffic:
    """Counts of the kernels launched so far, by name."""

    kernels: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))
    _kernel: str = ""
    _ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def total(self) -> Counts:
        return sum(self.kernels.values(), Counts())

    def size(self, pointers: Any, mask: Any) -> int:
        """Bytes at the pointers that a mask lets through."""
        active = pointers.data[mask.data.astype(bool)]
        if not active.size:
            return 0
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first, last = int(active.min()), int(active.max()) + size
        inside = any(start <= first and last <= end for start, end in self._ranges)
        assert inside, f"{self._kernel}: addresses from {first} to {last} are not in one tensor"
        return int(active.size) * size


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor, which may be a view, and the one after its last."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


@contextmanager
def watched(compute: bool = True) -> Iterator[Traffic]:
    """Counts what kernels ask for inside the block.

    Args:
        compute: False leaves the matrix products out and the results meaningless. Addresses do not depend on them.
    """
    traffic = Traffic()
    launch, dot = GridExecutor.__call__, InterpreterBuilder.create_dot
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_launch(self: Any, *args: Any, **constants: Any) -> Any:
        traffic._kernel = self.fn.__name__
        traffic._ranges = [_extent(x) for x in args if isinstance(x, torch.Tensor) and x.numel()]
        return launch(self, *args, **constants)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.kernels[traffic._kernel].loaded += traffic.size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.kernels[traffic._kernel].stored += traffic.size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_dot(self: Any, a: Any, b: Any, added: Any, *rest: Any) -> Any:
        (rows, inner), columns = a.data.shape, b.data.shape[1]
        traffic.kernels[traffic._kernel].flops += 2 * rows * inner * columns
        return dot(self, a, b, added, *rest) if compute else TensorHandle(added.data, added.dtype)

    watch: dict[str, Any] = {
        "create_masked_load": watched_load,
        "create_masked_store": watched_store,
        "create_dot": watched_dot,
    }
    with patch.multiple(InterpreterBuilder, **watch), patch.object(GridExecutor, "__call__", watched_launch):
        yield traffic
