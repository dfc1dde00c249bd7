"""Packed batches of studies with any number of scans, beside the ways of making them equal.

    python bench/packing.py --mix pub_brain_5 --json rows.json
    python bench/packing.py --mix brain_mri --mode forward --width 384 --grid 9 7 7

The same studies and the same weights, in one run and in turns:

    packed       this library's encoder: no padding, no repeats
    repeat10     every study repeated or cropped to 10 scans, dense, regrouped by copies: how HLIP was trained
    repeat10_us  the same repeated studies by this library's encoder: what packing alone brings, without its kernels
    pad_max      every study padded with empty scans to the most of the batch; a mask hides those from study attention
    block_mask   all studies in one sequence with a block-diagonal mask per level: NaViT's way, also MONAI's

The dense encoder is a plain one: PyTorch's layers and `scaled_dot_product_attention` on the packed encoder's own
parameters. Embeddings (and with `--mode train` the gradients) are compared in the same run: repeat10 with repeat10_us,
the others with packed. `tokens` are patch tokens that a policy encodes, `flops` those of its matrix products, by their
shapes, with a training step as three forwards.

`peak_bytes` is what the step that is compared takes at most beyond weights and input: on a GPU as PyTorch allocates, on
a CPU in resident memory of the process, with the C library's allocator as it is. While steps are timed on a CPU, the
process keeps the memory that tensors leave, which serves all. `bytes_modelled` adds up what the ops of the step are
given and give, each tensor once for each op (`timing.py`).

Without a GPU: a narrow model of few layers (`--width 256 --depth 3`) and small scans (`--grid 6 7 7 --patch 4 6 6`),
in which attention costs as much beside the other products as in the published model (882 kept tokens of a scan to a
width of 768; 294 to 256). The narrower it is, the more weigh copies, norms and GELU. With a GPU: the published sizes
(768, 12, 6 14 14, 8 16 16). No dropout in either. Every study brings at most `--max-scans` scans, 10 as in the
published training.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchlib.baselines import plain_block, published
from benchlib.encoders import TOLERANCE, Job, gradients, operations, precision, training_step
from benchlib.options import command, number
from benchlib.problems import SCANS, draw_scans
from benchlib.report import Row, provenance, show, write
from benchlib.timing import OpTraffic, Peak, distance, timed
from hlip.model.config import VisionConfig
from hlip.model.encoder import StudyEncoder
from hlip.model.levels import level_pattern
from hlip.model.memory import keep_memory
from hlip.model.plan import TokenBatch, plan
from hlip.study import pack
from hlip_kernels import Level, StudyLayout, regroup

REPEAT = 10  # scans of every study in the published training
REFERENCES = dict.fromkeys(("repeat10_us", "repeat10"), "repeat10_us")  # of results; of the others packed
SHOWN = (
    "policy", "studies_per_s", "packed_over_this", "interval", "tokens", "flops", "peak_bytes", "moved", "p20_s",
    "p50_s", "p80_s", "error",
)  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"studies": 8, "width": 256, "depth": 3, "grid": [6, 7, 7], "patch": [4, 6, 6], "dtype": "fp32"},
    "cuda": {"studies": 32, "width": 768, "depth": 12, "grid": [6, 14, 14], "patch": [8, 16, 16], "dtype": "bf16"},
}
FIGURES = (
    "p20_s", "p50_s", "p80_s", "studies_per_s", "packed_over_this", "interval", "peak_bytes", "bytes_modelled",
)  # fmt: skip
Studies = list[list[Tensor]]


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    counts = draw_scans(args.mix, args.studies, args.seed, args.max_scans)
    config = VisionConfig(
        args.width, args.width // 64, patch_size=tuple(args.patch), grid=tuple(args.grid), init_std=0.05,
        levels=level_pattern("scan+study", args.depth, args.depth // 3), max_scans=max(40, int(counts.max())),
    )  # fmt: skip
    encoder = StudyEncoder(config).to(device)
    shape = [n * p for n, p in zip(config.grid, config.patch_size, strict=True)]
    studies = [[torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(count)] for count in counts]
    step = functools.partial(train_step if args.mode == "train" else forward, dtype=args.dtype)
    with OpTraffic():
        for job in policies(encoder, [studies[0][:1]], device).values():
            step(job)  # what first calls load is no policy's memory
    jobs = policies(encoder, studies, device)
    rows = measure(jobs, step, args.rounds, TOLERANCE[args.dtype])
    case = {
        "mix": args.mix, "mode": args.mode, "dtype": args.dtype, "studies": args.studies, "scans": int(counts.sum()),
        "max_scans": args.max_scans, "width": args.width, "depth": args.depth, "grid": args.grid, "patch": args.patch,
        "seed": args.seed, "rounds": args.rounds, **provenance(device),
    }  # fmt: skip
    for row, job in zip(rows, jobs.values(), strict=True):
        row |= {"tokens": job.tokens, "flops": (job.flops or 0) * (3 if args.mode == "train" else 1), **case}
        row["studies_per_s"] = row["p50_s"] and args.studies / row["p50_s"]
    show(" ".join(f"{key}={value}" for key, value in case.items()), rows, SHOWN)
    write(args, rows)


def parse() -> argparse.Namespace:
    parser = command(__doc__, "--device", "--json", "--results", "--rounds", "--width", "--depth", "--grid", "--seed")
    parser.add_argument("--mix", choices=SCANS, default="pub_brain_5", help="how many scans studies have")
    parser.add_argument(
        "--mode",
        choices=("train", "forward"),
        default="train",
        help="train is forward and backward (default), forward without gradients",
    )
    parser.add_argument("--studies", type=number, help="of the batch (default: 8 without a GPU, 32 with one)")
    parser.add_argument(
        "--max-scans", type=number, default=10, help="more of a study are left out (default: %(default)s)"
    )
    parser.add_argument("--patch", type=number, nargs=3, help="voxels of a token (default: 4 6 6 or 8 16 16)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="of products (default: fp32 without a GPU, bf16 with one)"
    )
    args = parser.parse_args()
    for name, value in DEFAULTS[args.device].items():
        setattr(args, name, getattr(args, name) or value)
    return args


# --- policies


def policies(encoder: StudyEncoder, studies: Studies, device: torch.device) -> dict[str, Job]:
    """With what others are compared before them."""
    repeated = [[scans[m % len(scans)] for m in range(REPEAT)] for scans in studies]
    return {
        "packed": packed(encoder, studies, device),
        "repeat10_us": packed(encoder, repeated, device),
        "repeat10": dense(encoder, repeated, device),
        "pad_max": dense(encoder, studies, device),
        "block_mask": block_mask(encoder, studies, device),
    }


def packed(encoder: StudyEncoder, studies: Studies, device: torch.device) -> Job:
    tokens = tokens_of(encoder, studies, device)
    return job(encoder, lambda: encoder(tokens)[:, 0], tokens.layout)


def dense(encoder: StudyEncoder, studies: Studies, device: torch.device) -> Job:
    """All studies with as many scans as the longest: empty ones are put behind those that have fewer."""
    most = max(map(len, studies))
    full = [scans + [torch.zeros_like(scans[0])] * (most - len(scans)) for scans in studies]
    tokens = tokens_of(encoder, full, device)
    present = torch.tensor([[m < len(scans) for m in range(most)] for scans in studies], device=device)
    padding = None if bool(present.all()) else present
    return job(encoder, lambda: published(encoder, tokens, present=padding), tokens.layout)


def block_mask(encoder: StudyEncoder, studies: Studies, device: torch.device) -> Job:
    tokens = tokens_of(encoder, studies, device)
    layout = tokens.layout

    def mask(level: Level) -> Tensor:
        groups = torch.arange(layout.num_groups(level), device=device)
        group = groups.repeat_interleave(layout.cu_seqlens(level).diff(), output_size=layout.num_rows(level))
        return group[:, None] == group

    def encode() -> Tensor:
        masks = {level: mask(level) for level in encoder.config.levels}
        x, level = encoder.embed(tokens).x, encoder.config.levels[0]
        for block, next_level in zip(encoder.blocks, encoder.config.levels, strict=True):
            x, level = regroup(x, layout, level, next_level), next_level
            x = plain_block(block, x[None], masks[level])[0]
        return encoder.norm(regroup(x, layout, level, "study")[layout.prefix_rows("study")])

    return job(encoder, encode, layout, masked=True)


def tokens_of(encoder: StudyEncoder, studies: Studies, device: torch.device) -> TokenBatch:
    """Read by every policy, and made by a data loader: not part of what is measured."""
    return plan(pack(studies, encoder.config.patch_size), encoder.config, training=False).to(device)


def job(encoder: StudyEncoder, encode: Callable[[], Tensor], layout: StudyLayout, masked: bool = False) -> Job:
    return Job(encoder, encode, layout.num_tokens, operations(encoder.config, layout, masked))


# --- measurement


def forward(job: Job, dtype: str) -> list[Tensor]:
    with torch.no_grad(), precision(job.module, dtype):
        return [job.encode()]


def train_step(job: Job, dtype: str) -> list[Tensor]:
    """Forward and backward. Returns the embeddings, then all gradients."""
    embeddings = training_step(job, dtype)
    grads = torch.cat([grad.flatten() for grad in gradients(job.module).values()])
    job.module.zero_grad(set_to_none=True)
    return [embeddings, grads]


def measure(jobs: dict[str, Job], step: Callable[[Job], list[Tensor]], rounds: int, tolerance: float) -> list[Row]:
    """Check every job once, which also warms it up and shows what memory it takes, then time all of them in turns.

    Args:
        jobs: what others are compared with before them.

    Returns:
        A row for each: memory of its step at most, bytes that its ops move, seconds of its rounds, and the median of
        their ratios to packed's of the same round with its 95% interval (`timing.ratio`); no seconds of a job that ran
        out of memory.

    Raises:
        SystemExit: a job's results differ from its reference's.
    """
    rows: dict[str, Row] = {name: {"policy": name, **dict.fromkeys(FIGURES), "error": "out of memory"} for name in jobs}
    results: dict[str, list[Tensor]] = {}
    for name, job in jobs.items():
        with contextlib.suppress(torch.OutOfMemoryError):
            with Peak() as peak, OpTraffic() as traffic:
                results[name] = step(job)
            error = compare(name, results, tolerance)
            rows[name] |= {"peak_bytes": peak.bytes, "bytes_modelled": traffic.counts.bytes, "error": error}
    ran = {name: functools.partial(step, jobs[name]) for name in results if not isinstance(rows[name]["error"], str)}
    results.clear()
    if not torch.cuda.is_available():
        keep_memory()
        most = max((rows[name]["peak_bytes"] or 0 for name in ran), default=0)
        torch.ones(most, dtype=torch.uint8)  # pages that the steps will write
    for name, times in timed(ran, rounds, ours="packed").items():
        median, *interval = times.pop("times_ours")
        rows[name] |= times | {"packed_over_this": median, "interval": interval}
    return list(rows.values())


def compare(name: str, results: dict[str, list[Tensor]], tolerance: float) -> float | str:
    """The largest distance of results from those that they should be, or why they are not compared."""
    reference = REFERENCES.get(name, "packed")
    if reference not in results:
        return f"not compared, as {reference} ran out of memory"
    error = max(map(distance, results[name], results[reference]))
    if not error <= tolerance:
        raise SystemExit(f"{name}: results are {error:.2g} of their norm away from {reference}")
    return error


if __name__ == "__main__":
    main()
