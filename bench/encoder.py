"""Whole encoders side by side: the paper's Table 9 and Figure 1b.

    python bench/encoder.py --table9
    python bench/encoder.py --figure1b --studies 1 2 --json rows.json
    python bench/encoder.py --table9 --models hlip published --rounds 9
    python bench/encoder.py --scaling scans --sizes 1 4 16 64 162

Table 9 encodes one volume of 224 x 224 x 224 voxels, with patches of 16; Figure 1b studies of 8 scans of
48 x 224 x 224, with patches of 8 x 16 x 16. All but `swin` have 12 layers of width 768. `--scaling` lets a study have
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

`share` is that of the rate at which PyTorch multiplies two large matrices in the same run (`ceilings.py`): all
products of the model by the time of all that it does. `bytes_modelled` (GB moved) adds up what the ops of a pass are
given and give, each tensor once for each op (`op_traffic.py`): the least that this sequence of ops can move.

`host ms` is what the host needs to enqueue a pass on an idle GPU; where that is most of the time, the GPU waits for
Python. With `--cuda-graphs` each pass is also captured once and replayed, which leaves the host nothing to do.

The paper's column was measured by its authors on an A40 and is printed beside for comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchlib import ceilings
from benchlib.baselines import NaViT, Swin, flash, published, unfused
from benchlib.op_traffic import OpTraffic
from benchlib.options import add_device, number, positive, written
from benchlib.report import append_rows, gigabytes, print_table, provenance, write_json
from benchlib.timing import Peak, captured, host_seconds, in_turns, percentiles, process_bytes, ratio, synchronise
from hlip.model.config import Pattern, VisionConfig, level_pattern
from hlip.model.encoder import StudyEncoder
from hlip.model.memory import keep_memory
from hlip.study import Study, pack
from hlip_kernels import Level, hold_weights

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}  # of norms
GRADIENTS = 2  # times that, of a parameter's gradient: it passes every layer twice
LEAST = 1e-3  # of the largest gradient's norm: what is smaller is compared with this
GPU_CALLS = 10  # in a row, of which a round takes the mean; as many to warm up
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Kind(NamedTuple):
    """A model, and whether its attention is one op."""

    model: str
    flash: bool


KINDS = (
    Kind("hlip", True), Kind("published", True), Kind("vit", True), Kind("swin", True),
    Kind("published", False), Kind("vit", False), Kind("swin", False), Kind("navit", False),
)  # fmt: skip
NOT_RUN = {(Kind("swin", True), "training"): "MONAI's Swin takes flash attention only without gradients"}
# HLIP (arXiv 2505.21862), Table 9: parameters in millions, and on an A40 volumes per second and GB in training.
PUBLISHED_A40 = {
    Kind("vit", False): (88.2, 9.0, 6.6), Kind("vit", True): (88.2, 44.4, 1.5),
    Kind("swin", False): (87.9, 9.9, 8.0), Kind("swin", True): (87.9, 9.9, 9.0),
    Kind("published", False): (88.2, 17.5, 4.1), Kind("published", True): (88.2, 47.6, 1.5),
}  # fmt: skip
A40_UNITS = {"a40_vol_per_s": "vol/s", "a40_memory_gb": "GB"}
NO_MEMORY = ("memory", "could not create a primitive", "could not execute a primitive")  # PyTorch's words, oneDNN's
UNTRIED = "not tried, as a training step ran out of memory"
BOTH = ("inference", "training")
MODELS = tuple(dict.fromkeys(kind.model for kind in KINDS))


class Case(NamedTuple):
    """What is encoded.

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


def table9(studies: int) -> Case:
    return Case("table9", studies, 1, (224, 224, 224), (16, 16, 16), "slice+scan")


def figure1b(studies: int, scans: int = 8) -> Case:
    return Case("figure1b", studies, scans, (48, 224, 224), (8, 16, 16), "scan+study")


SIZES = {"scans": (1, 2, 4, 8, 16, 32, 64, 162), "slices": (1, 2, 4, 8, 16, 32), "batch": (1, 2, 4, 8, 16)}


def scaling(axis: str, size: int, gpu: bool) -> Case:
    """A study of so many scans; of 4 scans of so many slices of tokens; or so many studies of 4 scans."""
    patch = (8, 16, 16) if gpu else (4, 8, 8)
    d, h, w = (6, 14, 14) if gpu else (6, 7, 7)
    studies, scans = size if axis == "batch" else 1, size if axis == "scans" else 4
    shape = ((size if axis == "slices" else d) * patch[0], h * patch[1], w * patch[2])
    return Case(f"scaling_{axis}", studies, scans, shape, patch, "scan+study")


class Setting(NamedTuple):
    """How it is encoded."""

    dtype: str
    device: str
    width: int
    depth: int


class Job(NamedTuple):
    module: nn.Module
    encode: Callable[[], Tensor]


def build(kind: Kind, case: Case, setting: Setting) -> Job:
    """A model with seeded weights, and its pass over the case's volumes, which are the same for all."""
    model, fused = kind
    torch.manual_seed(0)
    volumes = torch.randint(0, 256, (case.volumes, *case.shape), dtype=torch.uint8)
    if model in ("swin", "navit"):
        if model == "navit" and len(set(case.patch)) > 1:
            raise NotImplementedError(f"NaViT has patches of one side for all axes, not {case.patch}")
        net = Swin(fused) if model == "swin" else NaViT(case.shape, case.patch[0], setting.width, setting.depth)
        net = net.to(setting.device)
        scaled = (volumes.to(setting.device)[:, None] / 255).sub_(0.449).div_(0.226)
        return Job(net, lambda: net(scaled.to(next(net.parameters()).dtype)))
    levels = levels_of(model, case, setting.depth)
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
    if model == "hlip":
        return Job(encoder, lambda: encoder(tokens)[:, 0])
    return Job(encoder, lambda: published(encoder, tokens, flash if fused else unfused))


def inference(job: Job) -> Tensor:
    with torch.inference_mode():
        return job.encode()


def training_step(job: Job, setting: Setting) -> Tensor:
    job.module.zero_grad(set_to_none=True)
    with torch.autocast(setting.device, DTYPES[setting.dtype], enabled=setting.dtype != "fp32"):
        out = job.encode()
    # Not the mean of squares: that of a norm's result does not change, and has no gradient before the norm.
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out.float() * weights).sum().backward()
    return out.detach()


def ready(job: Job, mode: str, setting: Setting) -> Callable[[], Tensor]:
    """A pass in a mode, with weights of the type that it has there."""
    job.module.train(mode == "training").to(DTYPES[setting.dtype] if mode == "inference" else torch.float32)
    return partial(inference, job) if mode == "inference" else partial(training_step, job, setting)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of all parameters, float32, by name."""
    return {name: p.grad.float() for name, p in module.named_parameters() if p.grad is not None}


def reference(case: Case, setting: Setting, mode: str) -> dict[str, Tensor]:
    """The embeddings of the published way in float32 and, in training, its gradients."""
    exact = setting._replace(dtype="fp32")
    job = build(Kind("published", True), case, exact)
    if mode == "inference":
        return {"out": inference(job)}
    job.module.train()
    return {"out": training_step(job, exact), **gradients(job.module)}


def training_memory(
    kind: Kind, case: Case, setting: Setting, threads: int, limit_gb: float | None, allocator: str
) -> dict[str, float]:
    """GB that one training step takes; run in a fresh process. Raises RuntimeError beyond the limit."""
    torch.set_num_threads(threads)
    if allocator == "kept":
        keep_memory()
    job = build(kind, case, setting)
    if limit_gb is not None and setting.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 2**30 / torch.cuda.mem_get_info()[1]))
    elif limit_gb is not None:
        most = int(process_bytes("VmSize") + limit_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        training_step(job, setting)
        return {"memory_gb": (torch.cuda.max_memory_allocated() - allocated) / 2**30}
    before = process_bytes("VmHWM")
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in job.module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        training_step(job, setting)
    return {"memory_gb": (process_bytes("VmHWM") - before) / 2**30, "saved_gb": sum(kept.values()) / 2**30}


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.allocator == "kept":
        keep_memory()
    rows: list[dict[str, Any]] = []
    lost: set[Kind] = set()  # what ran out of memory at a smaller size
    try:
        for case in cases(args):
            found = run(case, args, lost)
            show(found, case)
            rows += found
            if args.json:
                write_json(rows, args.json)
            if args.results:
                append_rows(found, args.results)
    except KeyboardInterrupt:
        print("interrupted: the cases before are written", file=sys.stderr)
        return 130
    return 0


def cases(args: argparse.Namespace) -> list[Case]:
    if args.scaling:
        return [
            scaling(args.scaling, size, args.device == "cuda") for size in sorted(args.sizes or SIZES[args.scaling])
        ]
    return [table9(studies) if args.table9 else figure1b(studies, args.scans) for studies in args.studies]


def run(case: Case, args: argparse.Namespace, lost: set[Kind]) -> list[dict[str, Any]]:
    setting = Setting(args.dtype, args.device, args.width, args.depth)
    facts = {
        "case": case.name, "studies": case.studies, "scans": case.scans, "shape": case.shape, "patch": case.patch,
        "tokens": case.tokens,
        "dtype": args.dtype, "width": args.width, "depth": args.depth, "rounds": args.rounds,
        "allocator": args.allocator if args.device == "cpu" else None, "limit_gb": args.limit_gb,
        **provenance(torch.device(args.device)),
    }  # fmt: skip
    kinds = [each for each in KINDS if each.model in args.models and args.flash in (None, str(each.flash).lower())]
    jobs: dict[Kind, Job] = {}
    memory: dict[Kind, dict[str, float]] = {}
    reasons: dict[Kind, dict[str, str]] = {}
    measured = args.memory and "training" in args.modes
    for kind in tqdm(kinds if measured else (), f"{case.name}: memory", unit="model", disable=None):
        if kind in lost or (kind, "training") in NOT_RUN:
            continue
        try:
            memory[kind] = in_a_fresh_process(kind, case, setting, args.threads, args.limit_gb, args.allocator)
        except MemoryError as error:
            lost.add(kind)
            reasons[kind] = {"training": str(error), "inference": UNTRIED}
        except (NotImplementedError, ImportError) as error:
            reasons[kind] = dict.fromkeys(args.modes, str(error))
    for kind in tqdm(kinds, f"{case.name}: building", unit="model", disable=None):
        if kind in lost:
            reasons.setdefault(kind, {"training": "out of memory at a smaller size", "inference": UNTRIED})
        if kind in reasons:
            continue
        try:
            jobs[kind] = build(kind, case, setting)
        except (NotImplementedError, ImportError) as error:
            reasons[kind] = dict.fromkeys(args.modes, str(error))
    rows: list[dict[str, Any]] = [
        {**kind._asdict(), "mode": mode, "reason": of[mode], **facts}
        for kind, of in reasons.items()
        for mode in args.modes
    ]
    for mode in args.modes:
        with hold_weights() if mode == "inference" else contextlib.nullcontext():
            found = list(measure(jobs, mode, case, setting, args.rounds))
            found += list(replayed(jobs, mode, case, setting, args.rounds)) if args.cuda_graphs else []
        for row in found:
            more = memory.get(Kind(row["model"], row["flash"]), {}) if mode == "training" else {}
            rows.append(row | more | facts)
    return rows


def levels_of(model: str, case: Case, depth: int) -> tuple[Level, ...]:
    plain: tuple[Level, ...] = tuple("study" for _ in range(depth))
    return plain if model == "vit" else level_pattern(case.levels, depth, depth // 3)


def operations(case: Case, setting: Setting, model: str) -> float:
    """Floating-point operations of the products of a forward pass; a training step has three times as many."""
    d, h, w = (n // p for n, p in zip(case.shape, case.patch, strict=True))
    of_scan, width = d * h * w, setting.width
    total = 2.0 * case.volumes * of_scan * math.prod(case.patch) * width
    for level in levels_of(model, case, setting.depth):
        groups, length = {
            "slice": (case.volumes * d, h * w), "scan": (case.volumes, of_scan),
            "study": (case.studies, of_scan * case.scans),
        }[level]  # fmt: skip
        total += groups * (length + 1) * width * (24.0 * width + 4.0 * (length + 1))
    return total


def measure(jobs: Mapping[Kind, Job], mode: str, case: Case, setting: Setting, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every model in inference or training."""
    ways: dict[Kind, Callable[[], Tensor]] = {}
    outputs: dict[Kind, Tensor] = {}
    expected = reference(case, setting, mode) if {"hlip", "published"} & {kind.model for kind in jobs} else {}
    errors: dict[Kind, float] = {}
    moved: dict[Kind, int] = {}
    for kind, job in tqdm(jobs.items(), f"{case.name}, {mode}: first pass", unit="model", disable=None):
        if (kind, mode) in NOT_RUN:
            yield {**kind._asdict(), "mode": mode, "reason": NOT_RUN[kind, mode]}
            continue
        way = ready(job, mode, setting)
        try:
            if mode == "inference" and kind.model in ("hlip", "published"):
                way()  # packs weights, once for all passes
            with OpTraffic() as traffic:
                outputs[kind] = way().float()
            ways[kind], moved[kind] = way, traffic.counts.bytes
        except torch.OutOfMemoryError:
            yield {**kind._asdict(), "mode": mode, "reason": "out of memory"}
            continue
        if kind.model in ("hlip", "published"):
            found = {"out": outputs[kind]} | (gradients(job.module) if mode == "training" else {})
            errors[kind] = compare(kind, found, expected, setting.dtype)
        elif kind._replace(flash=True) in outputs and not kind.flash:
            others = {"out": outputs[kind._replace(flash=True)]}
            errors[kind] = compare(kind, {"out": outputs[kind]}, others, setting.dtype)
        elif not outputs[kind].isfinite().all():
            raise SystemExit(f"{kind}: the output is not finite")
    expected.clear()
    calls = GPU_CALLS if setting.device == "cuda" else 1
    if calls > 1:
        in_turns(ways, 1, calls)  # clocks and allocator settle
    seconds = in_turns(ways, rounds, calls)
    limits = ceilings.measure(setting.device, DTYPES[setting.dtype])
    ours = seconds.get(Kind("hlip", True))
    for kind, mine in seconds.items():
        row = {**kind._asdict(), "mode": mode, **percentiles(mine), "times_ours": ratio(mine, ours) if ours else None}
        if setting.device == "cuda":
            row["host_s"] = percentiles(host_seconds(ways[kind], GPU_CALLS))["p50_s"]
            with Peak() as peak:
                ways[kind]()
            row["peak_bytes"] = peak.bytes
        if kind.model in ("hlip", "published", "vit"):
            work = operations(case, setting, kind.model) * (3 if mode == "training" else 1)
            row |= {"flops": work, "flops_per_s": work / row["p50_s"], "share": work / row["p50_s"] / limits.flops}
        bytes_per_s = moved[kind] / row["p50_s"]
        row |= {"bytes_modelled": moved[kind], "bytes_per_s": bytes_per_s, "of_copy": bytes_per_s / limits.bytes}
        if case.name == "table9" and kind in PUBLISHED_A40:
            _, rate_a40, memory_a40 = PUBLISHED_A40[kind]
            row |= {"a40_vol_per_s": rate_a40} if mode == "inference" else {"a40_memory_gb": memory_a40}
        row |= {"vol_per_s": case.volumes / row["p50_s"], "studies_per_s": case.studies / row["p50_s"]}
        row |= {"tokens_per_s": case.tokens / row["p50_s"]}
        yield row | {"parameters": sum(p.numel() for p in jobs[kind].module.parameters()), "error": errors.get(kind)}


def replayed(
    jobs: Mapping[Kind, Job], mode: str, case: Case, setting: Setting, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for every model whose pass is replayed as a CUDA graph, which needs no host; or why it cannot be."""
    replays: dict[Kind, Callable[[], Tensor]] = {}
    errors: dict[Kind, float] = {}
    for kind, job in jobs.items():
        row = {**kind._asdict(), "mode": mode, "graph": True}
        if setting.device != "cuda":
            yield row | {"reason": f"CUDA graphs need a GPU, got {setting.device}"}
            continue
        way = ready(job, mode, setting)
        wanted = {"out": way().clone(), **(gradients(job.module) if mode == "training" else {})}
        wanted = {name: x.clone() for name, x in wanted.items()}
        try:
            replay = captured(way)
            replayed_results = {"out": replay(), **(gradients(job.module) if mode == "training" else {})}
        except RuntimeError as error:
            synchronise()  # raises if the GPU is lost to this process
            yield row | {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        errors[kind] = compare(kind, replayed_results, wanted, setting.dtype)
        replays[kind] = replay
    calls = GPU_CALLS if replays else 1
    for kind, mine in in_turns(replays, rounds, calls).items():
        spread = percentiles(mine)
        host = percentiles(host_seconds(replays[kind], GPU_CALLS))["p50_s"]
        row = {**kind._asdict(), "mode": mode, "graph": True, **spread, "host_s": host, "error": errors[kind]}
        parameters = sum(p.numel() for p in jobs[kind].module.parameters())
        yield row | {"vol_per_s": case.volumes / spread["p50_s"], "parameters": parameters, "times_ours": None}


def compare(kind: Kind, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: str) -> float:
    """How far results lie apart that should be the same, relative to their norm; the largest.

    Args:
        found, expected: the embeddings as `out`, and the gradient of each parameter by its name.

    Raises:
        SystemExit: too far, or not finite.
    """
    errors = {}
    floor = LEAST * max(float(wanted.norm()) for wanted in expected.values())
    for name, wanted in expected.items():
        errors[name] = float((found[name].float() - wanted).norm() / max(float(wanted.norm()), floor))
        if not errors[name] <= TOLERANCE[dtype] * (1 if name == "out" else GRADIENTS):
            raise SystemExit(f"{kind}: {name} is {errors[name]:.2g} of its norm away from what it should be")
    return max(errors.values())


def in_a_fresh_process(
    kind: Kind, case: Case, setting: Setting, threads: int, limit_gb: float | None, allocator: str
) -> dict[str, float]:
    """`training_memory`. Raises MemoryError if it needs more than the limit, or than there is."""
    context = multiprocessing.get_context("forkserver")  # whose server has imported everything, and run nothing
    context.set_forkserver_preload(["encoder"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(training_memory, kind, case, setting, threads, limit_gb, allocator).result()
        except (BrokenExecutor, RuntimeError, MemoryError) as error:
            # A process that is refused memory may also just end.
            known = isinstance(error, (BrokenExecutor, MemoryError)) or any(words in str(error) for words in NO_MEMORY)
            if not known:
                raise
            raise MemoryError(f"out of memory{f' of {limit_gb:g} GiB' if limit_gb else ''}") from error


def named(row: Mapping[str, Any]) -> str:
    return row["model"] + (", CUDA graph" if row.get("graph") else "")


def show(rows: list[dict[str, Any]], case: Case) -> None:
    header = ["model", "flash", "mode", "M parameters", "vol/s", "host ms", "times ours", "share", "GB moved", "GiB"]
    header.append("GiB saved")
    lines: list[list[object]] = []
    for row in rows:
        line: list[object] = [named(row), row["flash"], row.get("mode")]
        if "reason" in row:
            continue
        memory = [f"{row[key]:.2f}" if key in row else None for key in ("memory_gb", "saved_gb")]
        host = f"{1000 * row['host_s']:.3g}" if "host_s" in row else None
        line += [f"{row['parameters'] / 1e6:.1f}", f"{row['vol_per_s']:.3g}", host, row["times_ours"]]
        line += [f"{row['share']:.0%}" if "share" in row else None, gigabytes(row, "bytes_modelled"), *memory]
        line += [None if row["error"] is None else f"{row['error']:.1g}"]
        line += [f"{row[key]} {unit}" for key, unit in A40_UNITS.items() if key in row] or [None]
        lines.append(line)
    print(f"{case.name}: {case.studies} x {case.scans} x {case.shape}, {rows[0]['dtype']}, {rows[0]['device']}")
    print_table([*header, "error", "the paper's A40"], lines)
    for row in rows:
        if "reason" in row:
            print(f"  {named(row)}, flash {row['flash']}, {row.get('mode') or 'all modes'}: not run: {row['reason']}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    add("--modes", nargs="+", choices=BOTH, default=list(BOTH), help="default: both")
    add("--studies", nargs="+", type=number, default=[1], help="in a batch; a run for each (default: 1)")
    add("--scans", type=number, default=8, help="of a study of Figure 1b (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bf16", help="of products (default: %(default)s)")
    add("--rounds", type=number, default=5, help="measurements of each model (default: %(default)s)")
    add("--threads", type=number, default=torch.get_num_threads(), help="of the CPU (default: %(default)s)")
    add("--width", type=number, help="a multiple of 64 (default: 768; 128 with --scaling on a CPU)")
    add("--depth", type=number, help="layers, a multiple of 3 (default: 12; 3 with --scaling on a CPU)")
    add("--no-memory", dest="memory", action="store_false", help="leave the memory of training out")
    add("--cuda-graphs", action="store_true", help="also replay each pass as a CUDA graph")
    add("--allocator", choices=("kept", "default"), default="kept", help="whether a CPU process keeps freed memory")
    add_device(parser)
    add("--json", type=written, help="also write the rows to this file")
    add("--results", type=Path, help="also append the rows to this .jsonl file")
    args = parser.parse_args()
    small = args.scaling and args.device == "cpu"
    args.width, args.depth = args.width or (128 if small else 768), args.depth or (3 if small else 12)
    args.models = args.models or (("hlip", "published", "vit") if args.scaling else MODELS)
    args.limit_gb = 8.0 if args.limit_gb is None and small else args.limit_gb
    if args.sizes and not args.scaling:
        parser.error("--sizes belongs to --scaling")
    if args.limit_gb is not None and not args.limit_gb > 0:
        parser.error(f"--limit-gb must be more than 0, got {args.limit_gb:g}")
    if args.width % 64 or args.depth % 3:
        parser.error(f"--width must be a multiple of 64, --depth of 3, got {args.width} and {args.depth}")
    return args


if __name__ == "__main__":
    sys.exit(main())
