"""Memory of relevance, a study of many scans: the row that is carried back, beside what whole matrices would need.

    python bench/relevance.py          40 scans of 6 x 14 x 14 tokens at study level, 12 heads of 64: minutes on a CPU
    python bench/relevance.py --scans 10

One layer at study level is taken back with every row of its matrix in use, which is the most that a layer can ask for.
Peak memory is that of the process beyond what it held before, which is query, key and value rows and the gradient of
attention's output: these a backward pass has in any case. Whole matrices, of one head alone: attention, its gradient,
and the product of the layers so far, in float32.
"""

from __future__ import annotations

import time

import torch

from benchlib.options import command, number
from benchlib.report import print_table, provenance, write
from benchlib.timing import Peak
from hlip.explain.relevance import times_matrix
from hlip_kernels import StudyLayout

GIB = 2**30


def main() -> None:
    parser = command(__doc__, "--json", "--scans", "--grid", "--heads", scans=40, grid=(6, 14, 14))
    parser.add_argument("--head-dim", type=number, default=64, help="width of a head (default: %(default)s)")
    args = parser.parse_args()
    layout = StudyLayout.from_grids([[tuple(args.grid)] * args.scans])
    rows = 1 + layout.num_tokens
    torch.manual_seed(0)
    qkv = torch.randn(rows, 3, args.heads, args.head_dim)
    grad_out = torch.randn(rows, args.heads, args.head_dim)
    row = torch.rand(rows)
    small = StudyLayout.from_grids([[(1, 2, 2)]])
    times_matrix(row[:5], qkv[:5], grad_out[:5], small, "study")  # what the first call loads is no part of it
    start = time.perf_counter()
    with Peak() as peak:
        result = times_matrix(row, qkv, grad_out, layout, "study")
    seconds = time.perf_counter() - start
    assert result.isfinite().all() and result.min() >= 0
    figures = {
        "tokens": layout.num_tokens,
        "given_gib": round((qkv.nbytes + grad_out.nbytes) / GIB, 2),
        "extra_gib": peak.bytes and round(peak.bytes / GIB, 2),
        "dense_gib_a_head": round(3 * 4 * rows**2 / GIB, 1),
        "seconds": round(seconds, 1),
    }
    print_table(list(figures), [list(figures.values())])
    write(args, [{**figures, **provenance(torch.device("cpu"))}])


if __name__ == "__main__":
    main()
