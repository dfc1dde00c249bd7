"""Benchmarks of the kernels.

    python bench/attention.py --static                 every row of the tile table, compiled without a GPU
    python bench/attention.py --static --arch sm_90 --json static.json
    python bench/attention.py --tune                   a tile table for this GPU
    python bench/attention.py --tune --dtype bf16 --head-dim 64

`--static` compiles each kernel of the attention and of the norm ahead of time with Triton's own compiler and looks at
the machine code: registers, bytes spilled to the stack, shared memory, programs that fit a multiprocessor, matrix
instructions, the number of instructions of the loop over full tiles, and for bf16 that of plain dense attention with
the same tile (`dense.py`). Nothing is run and no time is measured. Exits with 1 if any kernel spills, needs more shared
memory than there is, or leaves the matrix units idle; fp32 without tf32 and the norm do not use them.

`--tune` times candidate tiles on the GPU at hand, for each kind of arithmetic, head dim and length of groups. One that
fails to compile or run, or strays from the float64 oracle, is reported and passed over. The fastest become rows of the
user's tile table, which `hlip_kernels` reads from then on; Ctrl-C leaves the table as it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

import static
import tune
from hlip_kernels.configs import ARCHITECTURES, BLOCK_D
from report import print_table, write_json


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmarks of the kernels.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--static", action="store_true", help="compile the tile table ahead of time; needs no GPU")
    mode.add_argument("--tune", action="store_true", help="time tiles on this GPU and write the user's tile table")
    parser.add_argument("--dtype", nargs="+", choices=static.DTYPES, default=list(static.DTYPES), help="default: all")
    parser.add_argument("--head-dim", nargs="*", type=int, choices=BLOCK_D, default=list(BLOCK_D), help="default: all")
    only = parser.add_argument_group("with --static")
    only.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all")
    only.add_argument(
        "--width", nargs="*", type=int, default=static.WIDTHS, help="of the norm; default: %(default)s, may be none"
    )
    only.add_argument("--json", type=Path, help="also write the rows to this file")
    only.add_argument("--workers", type=int, default=os.cpu_count(), help="compiler processes (default: %(default)s)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    if args.tune:
        if not torch.cuda.is_available():
            parser.exit(2, f"{parser.prog}: --tune needs a GPU that PyTorch can use, and there is none\n")
        return tune.main(args.dtype, args.head_dim)
    cases = [
        *static.attention_cases(args.arch, args.dtype, args.head_dim),
        *static.norm_cases(args.arch, args.width),
    ]
    rows = static.run(cases, args.workers)
    print_table(static.COLUMNS, [[row[column] for column in static.COLUMNS] for row in rows])
    if args.json:
        write_json(rows, args.json)
    faults = static.faults(rows)
    print(
        f"{len(rows)} kernels compiled, {sum(row['stack_bytes'] > 0 for row in rows)} of them spill", *faults, sep="\n"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
