"""A change of level and the attention after it: in one pass and in place, beside copies and flash attention.

    python bench/layer.py
    python bench/layer.py --dtype fp32 --scans 8 --results bench/results/layer.jsonl

The layer's memory-bound part is the residual add, the move of rows to the next level, and the LayerNorm; then comes
attention over the groups of that level. The products with weights between them are the same in all ways, and left out:
attention reads q, k and v that are given in the level's order.

hlip      `add_regroup_norm`, then `hier_attention`, each with the backend that `auto` takes
copies    the released encoder's way on dense tensors (groups, 1 + n, C): add, split the cls rows off, reshape the
          patches, average or repeat the cls rows, concatenate, LayerNorm; then `scaled_dot_product_attention`

Bytes are those of the ops forward and backward, each reading its tensors once and writing its results once
(`timing.py`). Results are compared before anything is timed. Residuals are float32, updates, q, k and v of --dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchlib.baselines import regroup as regroup_by_copies
from benchlib.options import DTYPES, command
from benchlib.report import Row, provenance, run_cases, show
from benchlib.timing import CALLS, OpTraffic, distance, timed
from hlip.model.memory import keep_memory
from hlip_kernels import Grid, Level, StudyLayout, add_regroup_norm, hier_attention

SCAN: Grid = (6, 14, 14)
WIDTH, HEADS = 768, 12
CHANGES: tuple[tuple[Level, Level], ...] = (
    ("scan", "scan"), ("slice", "scan"), ("scan", "study"), ("study", "slice"), ("study", "scan"),
)  # fmt: skip
MODES = ("forward", "training")
SHOWN = ("case", "dtype", "mode", "way", "p50_s", "times_ours", "bytes")
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-5}  # of the norm of the difference over the norm
Run = Callable[[], list[Tensor]]


class Layer:
    """One change of level, its inputs, and the ways to do it.

    A way gives the new residual, its normalised rows and attention's result; in training the gradients of residual,
    update and qkv.
    """

    def __init__(self, scans: int, src: Level, dst: Level, dtype: torch.dtype, device: str) -> None:
        self.layout = StudyLayout.from_grids([[SCAN] * scans], num_prefix=1).to(device)
        self.src, self.dst = src, dst
        generator = torch.Generator().manual_seed(0)
        rows = [self.layout.num_rows(level) for level in (src, dst)]

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.leaves = draw(rows[0], WIDTH), draw(rows[0], WIDTH, dtype=dtype), draw(rows[1], 3 * WIDTH, dtype=dtype)
        self.weight, self.bias = draw(WIDTH), draw(WIDTH)
        self.grads = draw(rows[1], WIDTH), draw(rows[1], WIDTH, dtype=dtype), draw(rows[1], WIDTH, dtype=dtype)

    def runs(self, training: bool) -> dict[str, Run]:
        return {
            "hlip": partial(self.run, self.in_one_pass, training),
            "copies": partial(self.run, self.by_copies, training),
        }

    def run(self, way: Callable[..., tuple[Tensor, ...]], training: bool) -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [x.reshape(len(grad), -1) for x, grad in zip(way(*self.leaves), self.grads, strict=True)]
        leaves = [x.detach().requires_grad_() for x in self.leaves]
        outs = way(*leaves)
        return list(torch.autograd.grad(outs, leaves, [g.view_as(x) for g, x in zip(self.grads, outs, strict=True)]))

    def in_one_pass(self, residual: Tensor, update: Tensor, qkv: Tensor) -> tuple[Tensor, ...]:
        x, y = add_regroup_norm(residual, update, self.layout, self.src, self.dst, self.weight, self.bias)
        return x, y, hier_attention(qkv.unflatten(1, (3, HEADS, -1)), self.layout, self.dst)

    def by_copies(self, residual: Tensor, update: Tensor, qkv: Tensor) -> tuple[Tensor, ...]:
        before, after = (self.layout.num_groups(level) for level in (self.src, self.dst))
        x = (residual + update).unflatten(0, (before, -1))
        if self.src != self.dst:
            x = regroup_by_copies(x, after)
        y = F.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-6).to(update.dtype)
        q, k, v = qkv.view(after, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        return x, y, F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def main() -> int:
    parser = command(__doc__, "--device", "--results", "--rounds", "--scans", "--threads", rounds=7)
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=list(TOLERANCE), help="default: both")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    facts = provenance(torch.device(args.device))
    title = f"{args.scans} scans of {SCAN}, width {WIDTH}, {facts['device']}, {facts['threads']} threads"
    return run_cases(
        ([row | facts for change in CHANGES for mode in MODES for row in measure(args, dtype, *change, mode)]
         for dtype in args.dtype),
        partial(show, title, keys=SHOWN), args,
    )  # fmt: skip


def measure(args: argparse.Namespace, dtype: str, src: Level, dst: Level, mode: str) -> Iterator[Row]:
    """A row for each way."""
    layer = Layer(args.scans, src, dst, DTYPES[dtype], args.device)
    runs = layer.runs(mode == "training")
    expected = runs["hlip"]()
    facts = {}
    for name, run in runs.items():
        with OpTraffic() as traffic:
            results = run()
        facts[name] = {"bytes": traffic.counts.bytes, "wrong": differences(results, expected, TOLERANCE[dtype])}
    for name, row in timed(runs, args.rounds, CALLS[args.device], "hlip").items():
        yield {
            "case": f"{src} to {dst}", "dtype": dtype, "scans": args.scans, "width": WIDTH, "mode": mode, "way": name,
            **row, **facts[name],
        }  # fmt: skip


def differences(results: list[Tensor], expected: list[Tensor], tolerance: float) -> str:
    error = max(map(distance, results, expected))
    return "" if error <= tolerance else f"results differ by {error:.2g}"


if __name__ == "__main__":
    sys.exit(main())
