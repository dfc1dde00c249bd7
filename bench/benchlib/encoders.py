"""Encoders to time, the volumes that they encode, and their time and memory, after results were compared.

Models are described in `baselines.py`: `hlip` is this library's encoder on a packed batch, `published` the same model
computed as the released code does, `vit` a plain vision transformer, `swin` and `navit` MONAI's.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import resource
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hlip.model.config import VisionConfig
from hlip.model.encoder import StudyEncoder
from hlip.model.levels import Pattern, level_pattern
from hlip.model.memory import keep_memory
from hlip.study import Study, pack
from hlip_kernels import StudyLayout

from .baselines import flash, navit, published, swin, unfused
from .options import DTYPES
from .report import Row
from .timing import (
    CALLS,
    Kept,
    OpTraffic,
    Peak,
    captured,
    ceilings,
    distance,
    failures,
    host_seconds,
    in_turns,
    process_bytes,
    timed,
)

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}  # of norms
GRADIENTS = 2  # times that, of a parameter's gradient: it passes every layer twice
LEAST = 1e-3  # of the largest gradient's norm: what is smaller is compared with this
MODES = ("inference", "training")


class Kind(NamedTuple):
    """A model, and whether its attention is one op."""

    model: str
    flash: bool


KINDS = (
    Kind("hlip", True), Kind("published", True), Kind("vit", True), Kind("swin", True),
    Kind("published", False), Kind("vit", False), Kind("swin", False), Kind("navit", False),
)  # fmt: skip
MODELS = tuple(dict.fromkeys(kind.model for kind in KINDS))
OURS = Kind("hlip", True)
NOT_RUN = {(Kind("swin", True), "training"): "MONAI's Swin takes flash attention only without gradients"}
# HLIP (arXiv 2505.21862), Table 9: on an A40 volumes per second, and GB in training.
PUBLISHED_A40 = {
    Kind("vit", False): (9.0, 6.6), Kind("vit", True): (44.4, 1.5), Kind("swin", False): (9.9, 8.0),
    Kind("swin", True): (9.9, 9.0), Kind("published", False): (17.5, 4.1), Kind("published", True): (47.6, 1.5),
}  # fmt: skip
NO_MEMORY = ("memory", "could not create a primitive", "could not execute a primitive")  # PyTorch's words, oneDNN's


class Case(NamedTuple):
    """A batch of studies to encode.

    scans: of each study.
    shape: voxels of a scan.
    """

    name: str
    studies: int
    scans: int
    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    levels: Pattern

    @property
    def volumes(self) -> int:
        return self.studies * self.scans

    @property
    def tokens(self) -> int:
        """Patches of all volumes."""
        return self.volumes * math.prod(n // p for n, p in zip(self.shape, self.patch, strict=True))


def table9(studies: int, side: int = 224) -> Case:
    return Case("table9", studies, 1, (side, side, side), (16, 16, 16), "slice+scan")


def figure1b(studies: int, scans: int = 8) -> Case:
    return Case("figure1b", studies, scans, (48, 224, 224), (8, 16, 16), "scan+study")


SIZES = {"scans": (1, 2, 4, 8, 16, 32, 64, 162), "slices": (1, 2, 4, 8, 16, 32), "batch": (1, 2, 4, 8, 16)}


def scaling(axis: str, size: int, gpu: bool) -> Case:
    """Make a case that grows along one axis: `size` scans in a study, `size` slices of tokens in 4 scans, or `size`
    studies of 4 scans."""
    patch = (8, 16, 16) if gpu else (4, 8, 8)
    d, h, w = (6, 14, 14) if gpu else (6, 7, 7)
    studies, scans = size if axis == "batch" else 1, size if axis == "scans" else 4
    shape = ((size if axis == "slices" else d) * patch[0], h * patch[1], w * patch[2])
    return Case(f"scaling_{axis}", studies, scans, shape, patch, "scan+study")


class Setting(NamedTuple):
    """The settings that all encoders of a run share."""

    dtype: str
    device: str
    width: int
    depth: int


class Job(NamedTuple):
    """A model, and its pass over a batch.

    encode: gives embeddings, (B, C).
    tokens: patch tokens that are encoded.
    flops: operations of the products of a forward pass, if they are known; a training step has three times as many.
    """

    module: nn.Module
    encode: Callable[[], Tensor]
    tokens: int
    flops: int | None = None


def build(kind: Kind, case: Case, setting: Setting) -> Job:
    """A model with seeded weights, and its pass over the case's volumes, which are the same for all."""
    model, fused = kind
    torch.manual_seed(0)
    volumes = torch.randint(0, 256, (case.volumes, *case.shape), dtype=torch.uint8)
    if model in ("swin", "navit"):
        if model == "navit" and len(set(case.patch)) > 1:
            raise NotImplementedError(f"NaViT has patches of one side for all axes, not {case.patch}")
        sizes = case.shape, case.patch[0], setting.width, setting.depth
        net, encode = swin(fused) if model == "swin" else navit(*sizes)
        net.to(setting.device)
        scaled = (volumes.to(setting.device)[:, None] / 255).sub_(0.449).div_(0.226)
        return Job(net, lambda: encode(scaled.to(next(net.parameters()).dtype)), case.tokens)
    levels = level_pattern("study" if model == "vit" else case.levels, setting.depth, setting.depth // 3)
    d, h, w = (n // p for n, p in zip(case.shape, case.patch, strict=True))
    config = VisionConfig(
        setting.width, setting.width // 64, patch_size=case.patch, grid=(d, h, w), levels=levels, init_std=0.05,
        max_scans=40 if case.scans > 1 else 0,
    )  # fmt: skip
    encoder = StudyEncoder(config).to(setting.device).eval()
    studies = [
        Study(str(s), list(volumes[s * case.scans : (s + 1) * case.scans]), [str(m) for m in range(case.scans)])
        for s in range(case.studies)
    ]
    tokens = encoder.plan(pack(studies, case.patch)).to(setting.device)
    flops = operations(config, tokens.layout)
    if model == "hlip":
        return Job(encoder, lambda: encoder(tokens)[:, 0], case.tokens, flops)
    return Job(encoder, lambda: published(encoder, tokens, flash if fused else unfused), case.tokens, flops)


def operations(config: VisionConfig, layout: StudyLayout, masked: bool = False) -> int:
    """Floating-point operations of the products of a forward pass; masked: where all rows see all others."""
    width = config.width
    total = 2 * layout.num_tokens * math.prod(config.patch_size) * width
    for level in config.levels:
        rows, lengths = layout.num_rows(level), layout.seqlens(level) + layout.num_prefix
        pairs = rows**2 if masked else int((lengths**2).sum())
        total += int(rows * (8 + 4 * config.mlp_ratio) * width**2) + 4 * width * pairs
    return total


def inference(job: Job) -> Tensor:
    with torch.inference_mode():
        return job.encode()


def precision(module: nn.Module, dtype: str) -> contextlib.AbstractContextManager:
    device = next(module.parameters()).device.type
    return torch.autocast(device, DTYPES[dtype], enabled=dtype != "fp32")


def training_step(job: Job, dtype: str) -> Tensor:
    """Forward and backward, which leaves its gradients; the embeddings."""
    job.module.zero_grad(set_to_none=True)
    with precision(job.module, dtype):
        out = job.encode()
    # Not the mean of squares: that of a norm's result does not change, and has no gradient before the norm.
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out.float() * weights).sum().backward()
    return out.detach()


def ready(job: Job, mode: str, dtype: str) -> Callable[[], Tensor]:
    """A pass in a mode, with weights of the type that it has there."""
    job.module.train(mode == "training").to(DTYPES[dtype] if mode == "inference" else torch.float32)
    return partial(inference, job) if mode == "inference" else partial(training_step, job, dtype)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all parameters by name, in float32."""
    return {name: p.grad.float() for name, p in module.named_parameters() if p.grad is not None}


def results(job: Job, out: Tensor, mode: str) -> dict[str, Tensor]:
    """Embeddings as `out` and, in training, the gradient of each parameter by its name."""
    return {"out": out} | (gradients(job.module) if mode == "training" else {})


def reference(case: Case, setting: Setting, mode: str) -> dict[str, Tensor]:
    """The embeddings of the published way in float32 and, in training, its gradients."""
    job = build(Kind("published", True), case, setting)
    return results(job, ready(job, mode, "fp32")(), mode)


def compare(kind: Kind, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: str) -> float:
    """Return the largest distance of a way's `given` results from the `expected` ones, relative to their norm.

    Raises:
        SystemExit: too far, or not finite.
    """
    least = LEAST * max(float(wanted.norm()) for wanted in expected.values())
    errors = {name: distance(given[name], wanted, least) for name, wanted in expected.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE[dtype] * (1 if name == "out" else GRADIENTS):
            raise SystemExit(f"{kind}: {name} is {error:.2g} of its norm away from what it should be")
    return max(errors.values())


def measure(jobs: Mapping[Kind, Job], mode: str, case: Case, setting: Setting, rounds: int) -> Iterator[Row]:
    """A row for every model in inference or training."""
    ways: dict[Kind, Callable[[], Tensor]] = {}
    facts: dict[Kind, Row] = {}
    outputs: dict[Kind, Tensor] = {}
    expected = reference(case, setting, mode) if {"hlip", "published"} & {kind.model for kind in jobs} else {}
    for kind, job in tqdm(jobs.items(), f"{case.name}, {mode}: first pass", unit="model", disable=None):
        reason = NOT_RUN.get((kind, mode), "out of memory")
        if (kind, mode) not in NOT_RUN:
            way = ready(job, mode, setting.dtype)
            with contextlib.suppress(torch.OutOfMemoryError):
                facts[kind], ways[kind] = first_pass(kind, job, mode, setting.dtype, way, outputs, expected), way
        if kind not in facts:
            yield {**kind._asdict(), "mode": mode, "reason": reason}
    expected.clear()
    calls = CALLS[setting.device]
    if calls > 1:
        in_turns(ways, 1, calls)  # clocks and allocator settle
    times = timed(ways, rounds, calls, OURS)
    limits = ceilings(setting.device, DTYPES[setting.dtype])
    for kind, row in times.items():
        if setting.device == "cuda":
            with Peak() as peak:
                ways[kind]()
            row |= {"host_s": host_seconds(ways[kind], calls), "peak_bytes": peak.bytes}
        training, flops = mode == "training", jobs[kind].flops
        row |= limits.rates(row["p50_s"], flops and flops * (3 if training else 1), facts[kind].pop("moved"))
        if case.name == "table9" and kind in PUBLISHED_A40:
            row["a40_memory_gb" if training else "a40_vol_per_s"] = PUBLISHED_A40[kind][training]
        yield {**kind._asdict(), "mode": mode, **row, **amounts(jobs[kind], case, row["p50_s"]), **facts[kind]}


def first_pass(
    kind: Kind, job: Job, mode: str, dtype: str, way: Callable[[], Tensor], outputs: dict[Kind, Tensor],
    expected: Mapping[str, Tensor],
) -> Row:  # fmt: skip
    """Warm a model up and compare its results; the error and the bytes that its ops move.

    Args:
        outputs: of the models before, to which its own is added.
    """
    same = kind.model in ("hlip", "published")
    if mode == "inference" and same:
        way()  # packs weights, once for all passes
    with OpTraffic() as traffic:
        out = outputs[kind] = way().float()
    error = None
    if same:
        error = compare(kind, results(job, out, mode), expected, dtype)
    elif not kind.flash and kind._replace(flash=True) in outputs:
        error = compare(kind, {"out": out}, {"out": outputs[kind._replace(flash=True)]}, dtype)
    elif not out.isfinite().all():
        raise SystemExit(f"{kind}: the output is not finite")
    return {"error": error, "moved": traffic.counts.bytes}


def amounts(job: Job, case: Case, seconds: float) -> Row:
    """Compute the volumes, studies and tokens that a model encodes in a second; count its parameters."""
    return {
        "vol_per_s": case.volumes / seconds, "studies_per_s": case.studies / seconds,
        "tokens_per_s": case.tokens / seconds, "parameters": sum(p.numel() for p in job.module.parameters()),
    }  # fmt: skip


def replayed(jobs: Mapping[Kind, Job], mode: str, case: Case, setting: Setting, rounds: int) -> Iterator[Row]:
    """A row for every model whose pass is replayed as a CUDA graph, which needs no host; or why it cannot be."""
    replays: dict[Kind, Callable[[], Tensor]] = {}
    errors: dict[Kind, float] = {}
    for kind, job in jobs.items():
        row = {**kind._asdict(), "mode": mode, "graph": True}
        if setting.device != "cuda":
            yield row | {"reason": f"CUDA graphs need a GPU, got {setting.device}"}
            continue
        way = ready(job, mode, setting.dtype)
        wanted = {name: x.clone() for name, x in results(job, way(), mode).items()}
        with failures() as reasons:
            replay = captured(way)
            out = replay()
        if reasons:
            yield row | {"reason": reasons[0]}
            continue
        errors[kind] = compare(kind, results(job, out, mode), wanted, setting.dtype)
        replays[kind] = replay
    for kind, row in timed(replays, rounds, CALLS[setting.device]).items():
        row |= {"host_s": host_seconds(replays[kind], CALLS[setting.device]), "error": errors[kind]}
        yield {**kind._asdict(), "mode": mode, "graph": True, **row, **amounts(jobs[kind], case, row["p50_s"])}


def training_memory(
    kind: Kind, case: Case, setting: Setting, threads: int, limit_gb: float | None, allocator: str
) -> Row:
    """GB that one training step takes; run in a fresh process. Raises RuntimeError beyond the limit."""
    torch.set_num_threads(threads)
    if allocator == "kept":
        keep_memory()
    job = build(kind, case, setting)
    if setting.device == "cuda":
        if limit_gb is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 2**30 / torch.cuda.mem_get_info()[1]))
        with Peak() as peak:
            training_step(job, setting.dtype)
        return {"memory_gb": (peak.bytes or 0) / 2**30}
    if limit_gb is not None:
        most = int(process_bytes("VmSize") + limit_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    before = process_bytes("VmHWM")
    kept = Kept(job.module.parameters())
    with kept:
        training_step(job, setting.dtype)
    return {"memory_gb": (process_bytes("VmHWM") - before) / 2**30, "saved_gb": kept.bytes / 2**30}


def in_a_fresh_process(
    kind: Kind, case: Case, setting: Setting, threads: int, limit_gb: float | None, allocator: str
) -> Row:
    """`training_memory`. Raises MemoryError if it needs more than the limit, or than there is."""
    context = multiprocessing.get_context("forkserver")  # whose server has imported everything, and run nothing
    context.set_forkserver_preload(["benchlib.encoders"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(training_memory, kind, case, setting, threads, limit_gb, allocator).result()
        except (BrokenExecutor, RuntimeError, MemoryError) as error:
            # A process that is refused memory may also just end.
            ended = isinstance(error, (BrokenExecutor, MemoryError))
            if not ended and not any(words in str(error) for words in NO_MEMORY):
                raise
            raise MemoryError(f"out of memory{f' of {limit_gb:g} GiB' if limit_gb else ''}") from error
