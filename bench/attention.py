"""Benchmarks of the kernels.

    python bench/attention.py --quick                  attention of a few cases, ours and others', in minutes
    python bench/attention.py --cases 'slice-*' 'pub_brain_5-study*' --dtype bf16 fp32 --results attention.jsonl
    python bench/attention.py --io                     bytes and operations counted, beside those that theory claims
    python bench/attention.py --static                 every row of the tile table, compiled without a GPU
    python bench/attention.py --static --arch sm_90 --json static.json
    python bench/attention.py --tune                   the fastest tiles, and the fastest library, of this GPU
    python bench/attention.py --tune --dtype bf16 --head-dim 64 --minutes 10

Without a mode, forward alone and forward with backward (`training`) of attention within slices, scans and studies are
timed for all of our backends and the ways of others (`peers.py` describes them, `problems.py` the cases). All run in
turns on the same tensors, after their results were checked against float64. `times ours` is the median of the rounds'
ratios to our default backend, with its 95% interval. `prepare` is what a batch costs before the first layer: the layout
for ours, masks and bounds for others. The first call is shown apart, as that is where compilers run. GFLOP/s and the
part of a copy's bandwidth count the work itself, no padding, and stand beside a matrix product and a copy of the same
run. A line under each table says which figures were measured, counted or estimated; in the rows, `kinds` does. What
cannot run here is listed with the reason. On a CPU the process keeps the memory that tensors leave while ways are
timed, as this library's programs do, which serves all alike.

`--io` needs no GPU; `io_complexity.py` says what is counted.

`--static` compiles each kernel of the attention and of the norm ahead of time with Triton's own compiler and looks at
the machine code: registers, bytes spilled to the stack, shared memory, programs that fit a multiprocessor, matrix
instructions, whether (on sm_90) each of them waits for the one before, and the code of the assembler's warning if it
says so, the number of instructions of the loop over whole tiles, and for bf16 that of plain dense attention with the
same tile (`dense.py`). Nothing is run and no time is measured. Exits with 1 if any kernel spills, needs more shared
memory than there is, leaves the matrix units idle or makes them wait (before Triton 3.4: where dense attention does
not); fp32 without tf32 and the norm do not use them. `static_versions.py` does so for several versions of Triton.

`--tune` times candidate tiles of our kernels on the GPU at hand, for each kind of arithmetic and head dim, on short and
long groups together; and, in bf16 and fp16, the attention libraries that are installed beside our kernels, on groups of
slices, of scans and of studies. What fails to compile or run, strays from the float64 oracle, or makes a group's result
depend on those beside it, is reported and passed over. Kernels are compiled ahead on all cores. The fastest become rows
of the user's table, from which `hlip_kernels` takes tiles, and `auto` the library for each level, in every process that
begins later; Ctrl-C leaves the table as it was. bf16 and head dim 64 come first, and in each row the tiles in use and
the libraries, so that `--minutes` leaves out what tells least. What it leaves out is listed.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch

from benchlib import kernels, machine_code, problems, static, tune
from benchlib.options import add_common, command, number, positive, refusals
from benchlib.peers import PEERS
from benchlib.report import columns, print_table
from benchlib.timing import CALLS
from hlip.output import write_json
from hlip_kernels.tiles import ARCHITECTURES, BLOCK_D, SAME_TILES

CPU_MEMORY, QUICK_CPU_MEMORY = 4.0, 0.4  # GiB that a way may need; what needs more is slow, too
GPU_MEMORY = 0.8  # of what the GPU has


def main() -> int:
    args, parser = parse()
    if args.io:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
        from benchlib import io_complexity

        return io_complexity.main(args)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    if args.tune:
        if not torch.cuda.is_available():
            parser.exit(2, f"{parser.prog}: --tune needs a GPU that PyTorch can use, and there is none\n")
        head_dims = list(BLOCK_D) if args.head_dim is None else args.head_dim
        return tune.main(args.dtype or list(static.DTYPES), head_dims, args.minutes)
    return compiled(args, parser) if args.static else timed(args, parser)


def timed(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    torch.set_num_threads(args.threads)
    gpu = args.device == "cuda"
    memory = (args.memory_limit or (QUICK_CPU_MEMORY if args.quick else CPU_MEMORY)) * 2**30
    if gpu and not args.memory_limit:
        memory = GPU_MEMORY * torch.cuda.get_device_properties(0).total_memory
    cases = problems.all_cases(args.device, args.batch or (8 if gpu else 1))
    with refusals(parser):
        cases = problems.chosen(cases, kernels.QUICK if args.quick else args.cases, args.device)
    rounds = args.rounds or (kernels.QUICK_ROUNDS if args.quick else kernels.ROUNDS)
    settings = [
        kernels.Settings(
            dtype, args.heads, head_dim, args.device, rounds, CALLS[args.device], memory, args.backends or list(PEERS),
            args.modes,
        )
        for dtype, head_dim in product(args.dtype or ["bf16"], args.head_dim or [64])
    ]  # fmt: skip
    return kernels.main(cases, settings, args)


def compiled(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    strange = [arch for arch in args.arch if arch.startswith("sm_") and not machine_code.can_assemble(arch)]
    if strange:
        parser.exit(2, f"{parser.prog}: Triton's assembler has no code for {', '.join(strange)}; choose by --arch\n")
    head_dims = list(BLOCK_D) if args.head_dim is None else args.head_dim
    attention = static.attention_cases(args.arch, args.dtype or list(static.DTYPES), head_dims)
    rows = static.run([*attention, *static.row_cases(args.arch, args.width)], args.workers)
    print_table(*columns(rows, static.COLUMNS))
    if args.json:
        write_json(args.json, rows)
    faults = static.faults(rows, version("triton"))
    print(
        f"{len(rows)} kernels compiled, {sum(row['stack_bytes'] > 0 for row in rows)} of them spill", *faults, sep="\n"
    )
    return int(bool(faults))


def parse() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = command(__doc__, "--json", "--results")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--io", action="store_true", help="count bytes and operations; needs no GPU")
    mode.add_argument("--static", action="store_true", help="compile the tile table ahead of time; needs no GPU")
    mode.add_argument("--tune", action="store_true", help="time tiles and libraries on this GPU for the user's table")
    parser.add_argument("--dtype", nargs="+", choices=static.DTYPES, help="default: bf16; of --static and --tune all")
    parser.add_argument(
        "--head-dim", nargs="*", type=int, choices=BLOCK_D, help="default: 64; of --static and --tune all"
    )
    timing = parser.add_argument_group("without a mode")
    timing.add_argument(
        "--quick", action="store_true",
        help=f"only {', '.join(kernels.QUICK)}, in {kernels.QUICK_ROUNDS} rounds",
    )  # fmt: skip
    timing.add_argument("--cases", nargs="+", metavar="NAME", help="patterns of names such as 'scan-*' (default: all)")
    timing.add_argument(
        "--backends", nargs="+", choices=PEERS, metavar="NAME", help=f"of {', '.join(PEERS)} (default: all)"
    )
    timing.add_argument("--modes", nargs="+", choices=kernels.MODES, default=list(kernels.MODES), help="default: both")
    timing.add_argument(
        "--batch", type=number, help="studies of a case (default: 1, with a GPU 8); of a mix four times as many"
    )
    timing.add_argument("--rounds", type=number, help=f"measurements of each way (default: {kernels.ROUNDS})")
    timing.add_argument(
        "--memory-limit", type=positive, metavar="GIB",
        help=f"leave out what would need more (default: {CPU_MEMORY:g}, with --quick {QUICK_CPU_MEMORY:g}, of a GPU "
        f"{GPU_MEMORY:g} of what it has)",
    )  # fmt: skip
    add_common(timing, "--heads", "--device", "--threads")
    timing.add_argument("--profile", type=Path, metavar="FOLDER", help="write a Chrome trace of every case there")
    only = parser.add_argument_group("with --static")
    only.add_argument(
        "--arch", nargs="+", choices=(*ARCHITECTURES, *SAME_TILES), default=ARCHITECTURES,
        help=f"default: {' '.join(ARCHITECTURES)}",
    )  # fmt: skip
    only.add_argument(
        "--width", nargs="*", type=number, default=static.WIDTHS, help="of the norm; default: %(default)s, may be none"
    )
    add_common(only, "--workers")
    tuning = parser.add_argument_group("with --tune")
    tuning.add_argument("--minutes", type=positive, help="after which nothing new is tried (default: no limit)")
    args = parser.parse_args()
    if args.quick and args.cases:
        parser.error("--quick and --cases both choose cases: give one")
    timing_mode = not (args.io or args.static or args.tune)
    if timing_mode and "tf32" in (args.dtype or ()):
        parser.error("--dtype tf32 is for --static and --tune")
    if args.minutes and not args.tune:
        parser.error("--minutes is for --tune")
    return args, parser


if __name__ == "__main__":
    sys.exit(main())
