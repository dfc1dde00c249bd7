"""Whole encoders side by side: the paper's Table 9 and Figure 1b.

    python bench/encoder.py --table9
    python bench/encoder.py --figure1b --studies 1 2 --json rows.json
    python bench/encoder.py --table9 --models hlip published --rounds 9
    python bench/encoder.py --scaling scans --sizes 1 4 16 64 162

Table 9 encodes one volume of 224 x 224 x 224 voxels, with patches of 16; Figure 1b studies of 8 scans of
48 x 224 x 224, with patches of 8 x 16 x 16. All but `swin` have 12 layers of width 768. `--scans` are those of a study
of Figure 1b. `--scaling` lets a study have
more and more scans, a scan more slices, or a batch more studies: of the published sizes on a GPU; on a CPU of small
scans (294 tokens), through 3 layers of width 128. A model that needs more memory than `--limit-gb` is left out from
there on.

Models are described in `baselines.py`: `hlip` is this library's encoder on a packed batch, `published` the same model
computed as the released code does, `vit` a plain vision transformer, `swin` and `navit` MONAI's. `flash` says whether
attention is one op that keeps no weights of attention, or writes them to memory; ours and NaViT come in one kind only.

All models run in one process, in turns, on the same input. Inference is without gradients, with weights of the type of
the products; training is forward and backward with autocast and weights in fp32. Before anything is timed, embeddings
of `hlip` and `published`, and in training all gradients, are compared with those of the published way in float32, and
outputs of the others with and without flash with each other.

On a CPU the process keeps the memory that tensors leave (`--allocator kept`), as this library's programs do. That
serves the other models still more: with the C library's defaults, as in programs of their own, large results are given
back to the system and cleared page by page at every call (`--allocator default`).

Memory of training: on a GPU what PyTorch allocates at most beyond weights and input. On a CPU `saved_gb`, what autograd
keeps for backward, and `memory_gb`, by how much the largest resident size of a fresh process grows in one step.

`of_matmul` is the share of the rate at which PyTorch multiplies two large matrices in the same run: all products of the
model by the time of all that it does. `bytes_modelled` (GB moved) adds up what the ops of a pass are
given and give, each tensor once for each op (`timing.py`): the least that this sequence of ops can move.

`host ms` is what the host needs to enqueue a pass on an idle GPU; where that is most of the time, the GPU waits for
Python. With `--cuda-graphs` each pass is also captured once and replayed, which leaves the host nothing to do.

The paper's column was measured by its authors on an A40 and is printed beside for comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

from benchlib.encoders import (
    KINDS,
    MODELS,
    MODES,
    NOT_RUN,
    SIZES,
    Case,
    Job,
    Kind,
    Setting,
    build,
    figure1b,
    in_a_fresh_process,
    measure,
    replayed,
    scaling,
    table9,
)  # fmt: skip
from benchlib.options import DTYPES, command, number, positive
from benchlib.report import Row, provenance, run_cases, show
from hlip.model.memory import keep_memory
from hlip_kernels import hold_weights

UNTRIED = "not tried, as a training step ran out of memory"
SHOWN = (
    "model", "flash", "mode", "parameters", "vol_per_s", "host_s", "times_ours", "of_matmul", "moved", "memory_gb",
    "saved_gb", "error", "a40_vol_per_s", "a40_memory_gb",
)  # fmt: skip


def main() -> int:
    parser = command(
        __doc__, "--device", "--json", "--results", "--rounds", "--threads", "--scans", "--width", "--depth", scans=8
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table9", action="store_true", help="one volume of 224 x 224 x 224 voxels")
    what.add_argument("--figure1b", action="store_true", help="studies of scans of 48 x 224 x 224 voxels")
    what.add_argument("--scaling", choices=SIZES, help="ever larger studies, scans or batches")
    add = parser.add_argument
    add("--sizes", nargs="+", type=number, help="of --scaling (default: some of each)")
    add(
        "--limit-gb", type=positive, metavar="GIB", help="of a training step (default: none; 8 with --scaling on a CPU)"
    )
    add("--models", nargs="+", choices=MODELS, help="default: all; hlip, published and vit with --scaling")
    add("--flash", choices=("true", "false"), help="only with or without (default: both)")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add("--studies", nargs="+", type=number, default=[1], help="in a batch; a run for each (default: 1)")
    add("--dtype", choices=DTYPES, default="bf16", help="of products (default: %(default)s)")
    add("--no-memory", dest="memory", action="store_false", help="leave the memory of training out")
    add("--cuda-graphs", action="store_true", help="also replay each pass as a CUDA graph")
    add("--allocator", choices=("kept", "default"), default="kept", help="whether a CPU process keeps freed memory")
    args = parser.parse_args()
    small = args.scaling and args.device == "cpu"
    args.width, args.depth = args.width or (128 if small else 768), args.depth or (3 if small else 12)
    args.models = args.models or (("hlip", "published", "vit") if args.scaling else MODELS)
    args.limit_gb = 8.0 if args.limit_gb is None and small else args.limit_gb
    if args.sizes and not args.scaling:
        parser.error("--sizes belongs to --scaling")
    torch.set_num_threads(args.threads)
    if args.allocator == "kept":
        keep_memory()
    lost: set[Kind] = set()  # what ran out of memory at a smaller size
    return run_cases((run(case, args, lost) for case in cases(args)), show_case, args)


def cases(args: argparse.Namespace) -> list[Case]:
    if args.scaling:
        return [
            scaling(args.scaling, size, args.device == "cuda") for size in sorted(args.sizes or SIZES[args.scaling])
        ]
    return [table9(studies) if args.table9 else figure1b(studies, args.scans) for studies in args.studies]


def run(case: Case, args: argparse.Namespace, lost: set[Kind]) -> Iterator[Row]:
    """A row for every model and mode.

    Args:
        lost: models that ran out of memory, to which those are added that do so now.
    """
    setting = Setting(args.dtype, args.device, args.width, args.depth)
    facts = {
        "case": case.name, "studies": case.studies, "scans": case.scans, "shape": case.shape, "patch": case.patch,
        "tokens": case.tokens,
        "dtype": args.dtype, "width": args.width, "depth": args.depth, "rounds": args.rounds,
        "allocator": args.allocator if args.device == "cpu" else None, "limit_gb": args.limit_gb,
        **provenance(torch.device(args.device)),
    }  # fmt: skip
    memory: dict[Kind, Row] = {}
    jobs: dict[Kind, Job] = {}
    kinds = [kind for kind in KINDS if kind.model in args.models and args.flash in (None, str(kind.flash).lower())]
    for kind in tqdm(kinds, f"{case.name}: building", unit="model", disable=None):
        try:
            if kind in lost:
                raise MemoryError("out of memory at a smaller size")
            if args.memory and "training" in args.modes and (kind, "training") not in NOT_RUN:
                memory[kind] = in_a_fresh_process(kind, case, setting, args.threads, args.limit_gb, args.allocator)
            jobs[kind] = build(kind, case, setting)
        except MemoryError as error:
            lost.add(kind)
            reasons = {"training": str(error), "inference": UNTRIED}
        except (NotImplementedError, ImportError) as error:
            reasons = dict.fromkeys(MODES, str(error))
        if kind not in jobs:
            yield from ({**kind._asdict(), "mode": mode, "reason": reasons[mode], **facts} for mode in args.modes)
    for mode in args.modes:
        with hold_weights() if mode == "inference" else contextlib.nullcontext():
            for rows in (measure, replayed)[: 1 + args.cuda_graphs]:
                for row in rows(jobs, mode, case, setting, args.rounds):
                    more = memory.get(Kind(row["model"], row["flash"]), {}) if mode == "training" else {}
                    yield row | more | facts


def show_case(rows: list[Row]) -> None:
    row = rows[0]
    show(
        f"{row['case']}: {row['studies']} x {row['scans']} x {row['shape']}, {row['dtype']}, {row['device']}",
        rows,
        SHOWN,
    )


if __name__ == "__main__":
    sys.exit(main())
