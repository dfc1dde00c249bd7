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
given and give, each tensor once for each op (`op_traffic.py`).

Without a GPU: a narrow model of few layers and small scans, in which attention costs as much beside the other products
as in the published model (882 kept tokens of a scan to a width of 768; 294 to 256). The narrower it is, the more weigh
copies, norms and GELU. With a GPU: the published sizes. No dropout in either. Every study brings at most `--max-scans`
scans, 10 as in the published training.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchlib.baselines import plain_block, positions
from benchlib.cases import SCANS, draw_scans
from benchlib.op_traffic import OpTraffic
from benchlib.options import add_device, number, written
from benchlib.report import append_rows, gigabytes, megabytes, print_table, provenance, write_json
from benchlib.timing import Peak, in_turns, percentiles, ratio
from hlip.model.config import VisionConfig, level_pattern
from hlip.model.encoder import StudyEncoder
from hlip.model.memory import keep_memory
from hlip.model.plan import TokenBatch, plan
from hlip.study import pack
from hlip_kernels import Level, StudyLayout, regroup

REPEAT = 10  # scans of every study in the published training
REFERENCES = dict.fromkeys(("repeat10_us", "repeat10"), "repeat10_us")  # of results; of the others packed
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of norms
COLUMNS = (
    "policy",
    "studies_per_s",
    "packed_over_this",
    "interval",
    "tokens",
    "gflop",
    "peak_mb",
    "moved_gb",
    "p20_s",
    "p50_s",
    "p80_s",
    "error",
)
Studies = list[list[Tensor]]


class Job(NamedTuple):
    """A batch as one policy encodes it.

    encode: gives the studies' embeddings, (B, C).
    tokens: patch tokens that are encoded.
    rows, pairs: of a layer of each level, its rows, and its pairs of a query and a key.
    """

    encode: Callable[[], Tensor]
    tokens: int
    rows: dict[Level, int]
    pairs: dict[Level, int]


def main() -> int:
    args = parse()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    counts = draw_scans(args.mix, args.studies, args.seed, args.max_scans)
    levels = level_pattern("scan+study", args.depth, args.depth // 3)
    config = VisionConfig(
        args.width, args.width // 64, patch_size=tuple(args.patch), grid=tuple(args.grid), levels=levels,
        max_scans=max(40, int(counts.max())), init_std=0.05,
    )  # fmt: skip
    encoder = StudyEncoder(config).to(device)
    shape = [n * p for n, p in zip(config.grid, config.patch_size, strict=True)]
    studies = [[torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(count)] for count in counts]
    step = functools.partial(train_step if args.mode == "train" else forward, encoder, dtype=args.dtype)
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
    for row in rows:
        job = jobs[row["policy"]]
        row |= {"tokens": job.tokens, "flops": flops(config, job) * (3 if args.mode == "train" else 1)}
        if row["p50_s"] is not None:
            row["studies_per_s"] = args.studies / row["p50_s"]
    print(" ".join(f"{key}={value}" for key, value in case.items()))
    print_table(COLUMNS, [[shown(row, column) for column in COLUMNS] for row in rows])
    if args.json:
        write_json([row | case for row in rows], args.json)
    if args.results:
        append_rows([row | case for row in rows], args.results)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", choices=SCANS, default="pub_brain_5", help="how many scans studies have")
    parser.add_argument(
        "--mode",
        choices=("train", "forward"),
        default="train",
        help="train is forward and backward (default), forward without gradients",
    )
    parser.add_argument("--json", type=written, help="also write the rows to this file")
    parser.add_argument("--results", type=Path, help="also append the rows to this .jsonl file")
    parser.add_argument("--studies", type=number, help="of the batch (default: 8 without a GPU, 32 with one)")
    parser.add_argument(
        "--max-scans", type=number, default=10, help="more of a study are left out (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=number, default=5, help="measurements of each policy (default: %(default)s)")
    parser.add_argument("--width", type=number, help="a multiple of 64 (default: 256 or 768)")
    parser.add_argument("--depth", type=number, help="a multiple of 3 (default: 3 or 12)")
    parser.add_argument("--grid", type=number, nargs=3, help="tokens of a scan (default: 6 7 7 or 6 14 14)")
    parser.add_argument("--patch", type=number, nargs=3, help="voxels of a token (default: 4 6 6 or 8 16 16)")
    parser.add_argument("--dtype", choices=TOLERANCE, help="of products (default: fp32 without a GPU, bf16 with one)")
    add_device(parser)
    parser.add_argument("--seed", type=int, default=0, help="of scan counts and weights (default: %(default)s)")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.studies = args.studies or (32 if gpu else 8)
    args.width = args.width or (768 if gpu else 256)
    args.depth = args.depth or (12 if gpu else 3)
    args.grid = args.grid or ([6, 14, 14] if gpu else [6, 7, 7])
    args.patch = args.patch or ([8, 16, 16] if gpu else [4, 6, 6])
    args.dtype = args.dtype or ("bf16" if gpu else "fp32")
    if args.width % 64 or args.depth % 3:
        parser.error(f"--width must be a multiple of 64, --depth of 3, got {args.width} and {args.depth}")
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
    return Job(lambda: encoder(tokens)[:, 0], *sizes(tokens.layout))


def dense(encoder: StudyEncoder, studies: Studies, device: torch.device) -> Job:
    """All studies with as many scans as the longest: empty ones are put behind those that have fewer."""
    most = max(map(len, studies))
    full = [scans + [torch.zeros_like(scans[0])] * (most - len(scans)) for scans in studies]
    tokens = tokens_of(encoder, full, device)
    present = torch.tensor([[m < len(scans) for m in range(most)] for scans in studies], device=device)
    padded = not bool(present.all())

    def encode() -> Tensor:
        rows = encoder.patch_embed(tokens.patches) + positions(encoder, tokens)
        scan = rows.unflatten(0, (len(studies) * most, -1))
        prefix = encoder.cls_token.expand(len(scan), -1, -1)
        x = torch.cat([prefix.to(scan.dtype), scan], dim=1)
        hidden = torch.cat([present[:, :1], present.repeat_interleave(scan.shape[1], 1)], 1)[:, None, None]
        level: Level = "scan"
        for block, next_level in zip(encoder.blocks, encoder.config.levels, strict=True):
            if next_level != level:
                x = to_study(x, present) if next_level == "study" else to_scans(x, most)
            level = next_level
            x = plain_block(block, x, hidden if padded and level == "study" else None)
        return encoder.norm(x[:, 0] if level == "study" else to_study(x, present)[:, 0])

    return Job(encode, *sizes(tokens.layout))


def to_study(x: Tensor, present: Tensor) -> Tensor:
    """(B * M, 1 + N, C) to (B, 1 + M * N, C): the cls rows averaged over the scans that there are."""
    x = x.unflatten(0, present.shape)
    weights = (present / present.sum(1, keepdim=True)).to(x.dtype)
    cls = (x[:, :, 0] * weights[..., None]).sum(1, keepdim=True)
    return torch.cat([cls, x[:, :, 1:].flatten(1, 2)], dim=1)


def to_scans(x: Tensor, scans: int) -> Tensor:
    """(B, 1 + M * N, C) to (B * M, 1 + N, C): every scan gets the study's cls row."""
    patches = x[:, 1:].unflatten(1, (scans, -1)).flatten(0, 1)
    return torch.cat([x[:, :1].repeat_interleave(scans, 0), patches], dim=1)


def block_mask(encoder: StudyEncoder, studies: Studies, device: torch.device) -> Job:
    tokens = tokens_of(encoder, studies, device)
    layout = tokens.layout
    _, rows, _ = sizes(layout)

    def mask(level: Level) -> Tensor:
        groups = torch.arange(layout.num_groups(level), device=device)
        group = groups.repeat_interleave(layout.cu_seqlens(level).diff(), output_size=layout.num_rows(level))
        return group[:, None] == group

    def encode() -> Tensor:
        masks = {level: mask(level) for level in rows}
        x, level = encoder.embed(tokens).x, encoder.config.levels[0]
        for block, next_level in zip(encoder.blocks, encoder.config.levels, strict=True):
            x, level = regroup(x, layout, level, next_level), next_level
            x = plain_block(block, x[None], masks[level])[0]
        return encoder.norm(regroup(x, layout, level, "study")[layout.prefix_rows("study")])

    return Job(encode, layout.num_tokens, rows, {level: count**2 for level, count in rows.items()})


def tokens_of(encoder: StudyEncoder, studies: Studies, device: torch.device) -> TokenBatch:
    """Read by every policy, and made by a data loader: not part of what is measured."""
    return plan(pack(studies, encoder.config.patch_size), encoder.config, training=False).to(device)


def sizes(layout: StudyLayout) -> tuple[int, dict[Level, int], dict[Level, int]]:
    """What `Job` says of a batch in which a group attends to its own rows."""
    levels: tuple[Level, Level] = ("scan", "study")
    rows = {level: layout.num_rows(level) for level in levels}
    pairs = {level: int(((layout.seqlens(level) + layout.num_prefix) ** 2).sum()) for level in levels}
    return layout.num_tokens, rows, pairs


def flops(config: VisionConfig, job: Job) -> int:
    """Of a forward's matrix products."""
    width = config.width
    total = 2 * job.tokens * int(np.prod(config.patch_size)) * width
    for level in config.levels:
        total += int(job.rows[level] * (8 + 4 * config.mlp_ratio) * width**2) + 4 * width * job.pairs[level]
    return total


# --- measurement


def forward(encoder: StudyEncoder, job: Job, dtype: str) -> list[Tensor]:
    with torch.no_grad(), precision(encoder, dtype):
        return [job.encode()]


def train_step(encoder: StudyEncoder, job: Job, dtype: str) -> list[Tensor]:
    """Forward and backward. Returns the embeddings, then all gradients."""
    with precision(encoder, dtype):
        embeddings = job.encode()
    weights = torch.linspace(-1, 1, embeddings.numel(), device=embeddings.device).view_as(embeddings)
    (embeddings * weights).sum().backward()
    grads = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    encoder.zero_grad(set_to_none=True)
    return [embeddings.detach(), torch.cat([grad.flatten() for grad in grads])]


def precision(encoder: StudyEncoder, dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast(encoder.cls_token.device.type, torch.bfloat16, enabled=dtype == "bf16")


def measure(
    jobs: dict[str, Job], step: Callable[[Job], list[Tensor]], rounds: int, tolerance: float
) -> list[dict[str, Any]]:
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
    errors: dict[str, float | str] = {}
    peaks: dict[str, int | None] = {}
    moved: dict[str, int] = {}
    results: dict[str, list[Tensor]] = {}
    for name, job in jobs.items():
        try:
            with Peak() as peak, OpTraffic() as traffic:
                results[name] = step(job)
        except torch.OutOfMemoryError:
            errors[name] = "out of memory"
            continue
        reference = REFERENCES.get(name, "packed")
        if reference not in results:
            errors[name] = f"not compared, as {reference} ran out of memory"
            continue
        pairs = [(a.double(), b.double()) for a, b in zip(results[name], results[reference], strict=True)]
        errors[name] = error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        if not error <= tolerance:
            raise SystemExit(f"{name}: results are {error:.2g} of their norm away from {reference}")
        peaks[name], moved[name] = peak.bytes, traffic.counts.bytes
    results.clear()
    if not torch.cuda.is_available():
        keep_memory()
        torch.ones(max(filter(None, peaks.values()), default=0), dtype=torch.uint8)  # pages that the steps will write
    times = in_turns({name: functools.partial(step, jobs[name]) for name in peaks}, rounds)
    rows: list[dict[str, Any]] = []
    for name, found_error in errors.items():
        row: dict[str, Any] = dict.fromkeys(
            ("p20_s", "p50_s", "p80_s", "studies_per_s", "packed_over_this", "interval")
        )
        if name in times:
            times_packed = ratio(times[name], times["packed"])
            row |= percentiles(times[name])
            row |= {"packed_over_this": times_packed.median, "interval": [times_packed.low, times_packed.high]}
        row |= {"peak_bytes": peaks.get(name), "bytes_modelled": moved.get(name), "error": found_error}
        rows.append({"policy": name, **row})
    return rows


def shown(row: dict[str, Any], column: str) -> object:
    if column == "gflop":
        return round(row["flops"] / 1e9)
    if column == "peak_mb":
        return megabytes(row, "peak_bytes")
    if column == "moved_gb":
        return gigabytes(row, "bytes_modelled")
    if column == "interval":
        return row[column] and "{:.3g}-{:.3g}".format(*row[column])
    return f"{row[column]:.3g}" if isinstance(row[column], float) else row[column]


if __name__ == "__main__":
    sys.exit(main())
