"""Is this library right on this GPU, and how fast? Everything in one report.

    python bench/check.py
    python bench/check.py --out h100.md --stages attention throughput
    python bench/check.py --device cpu --stages environment attention norm memory training

Goes through the stages one by one, and goes on where one fails:

    environment  versions, devices, backends
    attention    results and gradients of every backend that runs here against the formula in float64: all types and
                 head dims, slices, scans and studies, 0, 1 and 3 prefix rows, half of the patches dropped; and every
                 result twice, which must be the same to the last bit
    norm         the same of residual add, regroup and LayerNorm, from every level to every other; as exact as PyTorch
    memory       what a training call of attention needs, which must not grow faster than the tokens
    training     gradients of a step of an encoder in bf16 against the same step in float32 on the CPU
    tune         times other tile sizes for this GPU and writes the fastest to the user's table (not on a CPU)
    throughput   attention beside other libraries, and the whole encoders of Table 9

Exits with 1 if any stage failed. The report is Markdown, to be sent along with an issue.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import encoder
from hlip.data.batch import Draws, patch_dropout
from hlip_kernels import Grid, Level, StudyLayout, add_regroup_norm
from hlip_kernels.backends import BACKENDS, NORM_BACKENDS, choose_backend, not_supported_reasons
from hlip_kernels.env import report as environment_report
from hlip_kernels.layout import LEVELS
from kernels import BEFORE, DTYPES, TOLERANCE, Oracle, Way
from options import written
from peers import Ours, Problem
from plot import table
from report import provenance
from timing import Peak

GRIDS: list[list[Grid]] = [[(4, 7, 9)], [(2, 14, 14), (1, 3, 5), (6, 8, 8)], [(1, 3, 4)]]
HEADS, HEAD_DIMS, WIDTH = 3, (16, 32, 64, 80, 96, 128), 768
MEMORY_SCANS, MEMORY_GROWTH = (2, 4, 8), 1.1  # of a study; bytes a token may become so many times as many
STEP_TOLERANCE = 5e-2  # of the norm of all gradients


class Found(NamedTuple):
    """What a stage found. text: Markdown."""

    text: str
    right: bool = True


def environment(device: str) -> Found:
    return Found(f"```\n{environment_report()}\n```")


def attention(device: str) -> Found:
    lines: list[list[object]] = []
    right = True
    for name, dtype in product(BACKENDS, DTYPES):
        dims = [d for d in HEAD_DIMS if not not_supported_reasons(name, device, DTYPES[dtype], d)]
        if not dims:
            reasons = not_supported_reasons(name, device, DTYPES[dtype], 64)
            lines.append([name, dtype, None, None, None, "; ".join(reasons)])
            continue
        worst, faults = {"out": 0.0, "grad": 0.0}, []
        for head_dim, level, prefix, drop in product(dims, LEVELS, (0, 1, 3), (0.0, 0.5)):
            errors, same = check_attention(name, device, dtype, head_dim, level, prefix, drop)
            where = f"head dim {head_dim}, {level}, {prefix} prefix rows, dropout {drop}"
            for what, error in errors.items():
                worst[what] = max(worst[what], error)
                if not error <= TOLERANCE[dtype] * (1 if what == "out" else 2):
                    faults.append(f"{what} off by {error:.2g} ({where})")
            if not same:
                faults.append(f"not the same twice ({where})")
        lines.append([name, dtype, len(dims), f"{worst['out']:.1e}", f"{worst['grad']:.1e}", "; ".join(faults[:3])])
        right &= not faults
    header = ["backend", "type", "head dims", "error of results", "of gradients", "wrong, or why not run"]
    return Found(table(header, lines), right)


def check_attention(
    backend: str, device: str, dtype: str, head_dim: int, level: Level, prefix: int, dropout: float
) -> tuple[dict[str, float], bool]:
    """Errors by the norm of each group, and whether a second call gives the same bits."""
    problem = Problem(
        lambda: layout_of(prefix, dropout), level, BEFORE[level], HEADS, head_dim, DTYPES[dtype], device
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shape = problem.num_rows, 3, HEADS, head_dim
    qkv = torch.randn(shape, generator=generator).to(device, problem.dtype)
    grad_out = torch.randn(shape[0], *shape[2:], generator=generator).to(device, problem.dtype)
    peer = Ours(problem, backend, deterministic=True)
    peer.prepare()
    way = Way(peer, qkv, grad_out)
    first, second = way.first_call("training")[0], way.first_call("training")[0]
    same = all(torch.equal(first[name], second[name]) for name in first)
    return Oracle(problem, qkv, grad_out).errors(first), same


def layout_of(prefix: int, dropout: float) -> StudyLayout:
    layout = StudyLayout.from_grids(GRIDS, prefix)
    if not dropout:
        return layout
    return layout.select(patch_dropout(layout, dropout, "scan", Draws(range(len(GRIDS)))))


def norm(device: str) -> Found:
    lines: list[list[object]] = []
    right = True
    for name, dtype in product(NORM_BACKENDS, DTYPES):
        reasons = NORM_BACKENDS[name].not_supported_reasons(device, DTYPES[dtype], DTYPES[dtype])
        if reasons:
            lines.append([name, dtype, None, "; ".join(reasons)])
            continue
        worst, faults = 0.0, []
        for src, dst, prefix in product(LEVELS, LEVELS, (0, 1, 3)):
            layout = layout_of(prefix, 0.5).to(device)
            inputs = norm_inputs(layout, src, dst, DTYPES[dtype])
            first, second = (norm_results(inputs, layout, src, dst, name) for _ in range(2))
            exact = norm_results([x.double() for x in inputs], layout, src, dst, "torch")
            eager = norm_results(inputs, layout, src, dst, "torch")
            for mine, theirs, wanted in zip(first, eager, exact, strict=True):
                error, usual = (float((x.double() - wanted).norm() / wanted.norm()) for x in (mine, theirs))
                worst = max(worst, error)
                # Sums over rows in bf16 are only as good as PyTorch's own, which some devices round at every step.
                if not error <= max(2 * TOLERANCE[dtype], 3 * usual):
                    faults.append(f"off by {error:.2g} ({src} to {dst}, {prefix} prefix rows)")
            if not all(map(torch.equal, first, second)):
                faults.append(f"not the same twice ({src} to {dst}, {prefix} prefix rows)")
        lines.append([name, dtype, f"{worst:.1e}", "; ".join(faults[:3])])
        right &= not faults
    return Found(table(["backend", "type", "largest error", "wrong, or why not run"], lines), right)


def norm_inputs(layout: StudyLayout, src: Level, dst: Level, dtype: torch.dtype) -> list[Tensor]:
    """Residual, update, weight, bias, layer scale, and the gradients of both results; parameters in float32."""
    before, after = (layout.num_rows(level) for level in (src, dst))
    generator = torch.Generator().manual_seed(0)
    shapes = [(before, WIDTH)] * 2 + [(WIDTH,)] * 3 + [(after, WIDTH)] * 2
    drawn = [torch.randn(shape, generator=generator).to(layout.device) for shape in shapes]
    return [x if x.dim() == 1 else x.to(dtype) for x in drawn]


def norm_results(inputs: list[Tensor], layout: StudyLayout, src: Level, dst: Level, backend: str) -> list[Tensor]:
    """Both results, and the gradients of residual, update, weight, bias and layer scale."""
    leaves = [x.clone().requires_grad_() for x in inputs[:5]]
    residual, update, weight, bias, scale = leaves
    results = add_regroup_norm(residual, update, layout, src, dst, weight, bias, layer_scale=scale, backend=backend)
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, inputs[5:])]


def memory(device: str) -> Found:
    lines: list[list[object]] = []
    each = []
    for scans in MEMORY_SCANS:
        make = partial(StudyLayout.from_grids, [[(6, 14, 14)] * scans])
        problem = Problem(make, "study", "scan", HEADS, 64, torch.bfloat16, device)
        shape = problem.num_rows, HEADS, 64
        qkv = torch.randn(shape[0], 3, *shape[1:]).to(device, problem.dtype)
        peer = Ours(problem, choose_backend("auto", device, problem.dtype, 64))
        peer.prepare()
        way = Way(peer, qkv, torch.randn(shape).to(device, problem.dtype))
        with Peak() as peak:
            way.training()
        used = (peak.bytes if device == "cuda" else way.first_call("training")[2]["saved_bytes"]) or 0
        each.append(used / problem.num_rows)
        lines.append([problem.num_rows, f"{used / 1e6:.1f}", f"{each[-1]:.0f}"])
    return Found(table(["rows", "MB", "bytes a row"], lines), max(each) <= MEMORY_GROWTH * each[0])


def training(device: str) -> Found:
    large = device == "cuda"
    case = encoder.Case("check", 4, 3, (48, 224, 224) if large else (16, 64, 64), (8, 16, 16), "scan+study")
    width, depth = (768, 12) if large else (128, 3)
    found = []
    for dtype, where in (("bf16", device), ("fp32", "cpu")):
        setting = encoder.Setting(dtype, where, width, depth)
        job = encoder.build(encoder.Kind("hlip", True), case, setting)
        encoder.training_step(job, setting)
        found.append(torch.cat([p.grad.flatten().float().cpu() for p in job.module.parameters() if p.grad is not None]))
    error = float((found[0] - found[1]).norm() / found[1].norm())
    text = f"{found[0].numel():,} gradients of an encoder of width {width}; off by {error:.2g} of their norm."
    return Found(text, error <= STEP_TOLERANCE)


def tune(device: str) -> Found:
    if device == "cpu":
        return Found("Not on a CPU.")
    return program("attention.py", "--tune")


def throughput(device: str) -> Found:
    parts = [
        program("attention.py", "--quick", "--device", device), program("encoder.py", "--table9", "--device", device)
    ]  # fmt: skip
    return Found("\n\n".join(part.text for part in parts), all(part.right for part in parts))


def program(name: str, *options: str) -> Found:
    """Run another benchmark; what it prints."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *options], stdout=subprocess.PIPE, text=True, check=False
    )  # what it says of its progress is seen
    return Found(f"`python bench/{name} {' '.join(options)}`\n\n```\n{done.stdout.rstrip()}\n```", not done.returncode)


STAGES: dict[str, Callable[[str], Found]] = {
    "environment": environment, "attention": attention, "norm": norm, "memory": memory, "training": training,
    "tune": tune, "throughput": throughput,
}  # fmt: skip


def main() -> int:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("check.py: there is no GPU that PyTorch can use; --device cpu checks this processor", file=sys.stderr)
        return 2
    facts = provenance(torch.device(args.device))
    sections = [f"# Check of {facts['device']}\n\n{facts['utc']}, commit {facts['commit']}"]
    wrong = []
    for name in tqdm(args.stages, "checking", unit="stage", disable=None):
        started = time.monotonic()
        try:
            found = STAGES[name](args.device)
        except Exception:  # whatever it is belongs into the report, and the other stages too
            found = Found(f"```\n{traceback.format_exc()}```", right=False)
        wrong += [] if found.right else [name]
        verdict = "right" if found.right else "WRONG"
        sections.append(f"## {name}: {verdict}\n\n{found.text}\n\n{time.monotonic() - started:.0f} s")
        write(args.out, "\n\n".join(sections) + "\n")
    print(f"{args.out}: {', '.join(wrong) + ' WRONG' if wrong else 'all right'}")
    return int(bool(wrong))


def write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="what is checked (default: %(default)s)"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="in this order (default: all)"
    )
    parser.add_argument("--out", type=written, default="check.md", help="the report (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
