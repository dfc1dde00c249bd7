"""Checks that this library computes right on a device: attention and norm against float64, a training step, memory.

Each function yields rows. One with `wrong` fails the check; a `mistake` is another library's, which is not this one's
to mend. One with a `reason` could not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hlip_kernels import Grid, Level, StudyLayout, add_regroup_norm
from hlip_kernels.backends import BACKENDS, NORM_BACKENDS, choose_backend, not_supported_reasons
from hlip_kernels.layout import LEVELS

from . import encoders, problems
from .kernels import TOLERANCE, Oracle, Way, own, too_far
from .options import DTYPES
from .peers import Ours
from .problems import Problem
from .report import Row
from .timing import distance, failures

DROPOUTS = 0.0, 0.5
MEMORY_GROWTH = 1.1  # times as many bytes as a row may come to need
STEP_TOLERANCE = 5e-2  # of the norm of all gradients
RESULTS = 2  # of the norm: new residual, normalised rows; gradients follow
SHOWN = 3  # faults of a row
ON_A_CPU = "its kernels are for GPUs: on a CPU they are compiled and launched, not compared"


class Groups(NamedTuple):
    """grids: of the scans of each study. prefixes: numbers of prefix rows."""

    grids: Sequence[Sequence[Grid]]
    prefixes: Sequence[int]


class Case(NamedTuple):
    """A layer's attention in small."""

    groups: problems.Case
    dtype: str
    head_dim: int
    heads: int

    def __str__(self) -> str:
        return self.groups.name


def attention_cases(groups: Groups, dtype: str, head_dim: int, heads: int) -> list[Case]:
    return [
        Case(
            problems.Case(f"{level}, {prefix} prefix rows, dropout {dropout}", level, groups.grids, prefix, dropout),
            dtype, head_dim, heads,
        )
        for level, prefix, dropout in product(LEVELS, groups.prefixes, DROPOUTS)
    ]  # fmt: skip


class Size(NamedTuple):
    """How much of everything. groups: of checks. head_dims: beside the main one. batch: studies of 4 scans.
    lengths: cases of `problems.py`. table9: a volume and its patches. trained: studies of a training step."""

    groups: Groups
    heads: int
    head_dim: int
    head_dims: tuple[int, ...]
    width: int
    batch: int
    lengths: tuple[str, ...]
    rounds: int
    table9: encoders.Case
    table9_width: int
    table9_depth: int
    trained: encoders.Case
    memory_scans: tuple[int, ...]


class Setup(NamedTuple):
    device: str
    size: Size


def attention(setup: Setup, dtypes: Sequence[str], others: bool = False, ours: bool = True) -> Iterator[Row]:
    """A row for each backend, dtype and head dim.

    Args:
        others: check the other head dims.
        ours: False checks other libraries behind our interface: their mistakes are reported, as they are not ours to
            mend.
    """
    size, device = setup.size, setup.device
    names = [name for name in BACKENDS if own(name) == ours]
    for dtype, head_dim, name in product(dtypes, size.head_dims if others else (size.head_dim,), names):
        reasons = not_supported_reasons(name, device, DTYPES[dtype], head_dim)
        cases = attention_cases(size.groups, dtype, head_dim, size.heads)
        row: Row = {"backend": name, "dtype": dtype, "head_dim": head_dim}
        yield row | worst(name, device, reasons, cases, check_attention)


# The errors of results, as `out`, and of gradients, as `grad`; whether a second call gave the same bits; faults.
Checked = tuple[dict[str, float], bool, list[str]]


def worst(
    backend: str, device: str, reasons: list[str], cases: Iterable[Any], check: Callable[[str, str, Any], Checked]
) -> Row:
    """The largest errors of all cases, whether all gave the same bits twice, and what is wrong.

    Args:
        reasons: against running it at all.
    """
    reasons = reasons + [ON_A_CPU] * (device == "cpu" and backend == "triton")
    if reasons:
        return {"reason": "; ".join(reasons)}
    row: Row = {"cases": 0, "error": 0.0, "grad_error": 0.0, "repeats": True}
    faults = []
    for case in cases:
        row["cases"] += 1
        with failures() as wrong:
            errors, repeats, wrong = check(backend, device, case)
            wrong += ["not the same bits twice"] * (not repeats)
            row["repeats"] &= repeats
            for key, off in zip(("error", "grad_error"), errors.values(), strict=True):
                row[key] = float(np.maximum(row[key], off))  # NaN if either is
        faults += [f"{fault} ({case})" for fault in wrong]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        row["wrong" if own(backend) else "mistake"] = f"{'; '.join(faults[:SHOWN])}{more}"
    return row


def attention_way(backend: str, case: Case, device: str) -> tuple[Way, Problem, Tensor, Tensor]:
    """Ready to be called, with what it is given."""
    problem = case.groups.problem(case.heads, case.head_dim, DTYPES[case.dtype], device)
    tensors = problem.draw()
    return Way(Ours(problem, backend, deterministic=True), *tensors), problem, *tensors


def check_attention(backend: str, device: str, case: Case) -> Checked:
    """Errors by the norm of each group."""
    way, problem, qkv, grad_out = attention_way(backend, case, device)
    first, second = way.first_call("training")[0], way.first_call("training")[0]
    errors = Oracle(problem, qkv, grad_out).errors(first)
    repeats = all(torch.equal(first[name], second[name]) for name in first)
    return errors, repeats, too_far(errors, case.dtype)


class Change(NamedTuple):
    """From the rows of one level to those of the next, the norm of them included."""

    grids: Sequence[Sequence[Grid]]
    dtype: str  # of the update
    residual: str
    width: int
    src: Level
    dst: Level
    prefix: int

    def __str__(self) -> str:
        return f"{self.src} to {self.dst}, {self.prefix} prefix rows"


def residuals(dtype: str) -> list[str]:
    """Dtypes of the residual beside updates of a dtype."""
    return list(dict.fromkeys(("fp32", dtype)))


def norm(setup: Setup, dtypes: Sequence[str]) -> Iterator[Row]:
    """A row for each backend and dtype, with residuals in float32 and in the dtype of the update."""
    groups, width = setup.size.groups, setup.size.width
    for dtype, name in product(dtypes, NORM_BACKENDS):
        for residual in residuals(dtype):
            reasons = NORM_BACKENDS[name].not_supported_reasons(setup.device, DTYPES[residual], DTYPES[dtype])
            every = product(LEVELS, LEVELS, groups.prefixes)
            cases = [Change(groups.grids, dtype, residual, width, *rest) for rest in every]
            row: Row = {"backend": name, "dtype": dtype, "residual": residual, "width": width}
            yield row | worst(name, setup.device, reasons, cases, check_norm)


def check_norm(backend: str, device: str, change: Change) -> Checked:
    """Sums over rows are only held to be as good as PyTorch's own, which some devices round at every step."""
    layout, inputs = norm_inputs(change, device)
    first, second = (norm_results(change, layout, inputs, backend) for _ in range(2))
    exact = norm_results(change, layout, [x.double() for x in inputs], "torch")
    eager = norm_results(change, layout, inputs, "torch")
    errors, faults = {"out": 0.0, "grad": 0.0}, []
    for at, (mine, theirs, wanted) in enumerate(zip(first, eager, exact, strict=True)):
        error, usual = (distance(x, wanted) for x in (mine, theirs))
        name = "out" if at < RESULTS else "grad"
        errors[name] = error if math.isnan(error) else max(errors[name], error)
        if not error <= max(2 * TOLERANCE[change.dtype], 3 * usual):
            faults.append(f"{name} off by {error:.2g}")
    return errors, all(map(torch.equal, first, second)), faults


def norm_inputs(change: Change, device: str) -> tuple[StudyLayout, list[Tensor]]:
    """Residual, update, weight, bias, layer scale, and the gradients of both results; parameters in float32."""
    layout = problems.Case("", change.src, change.grids, change.prefix, 0.5).layout()().to(device)
    before, after = (layout.num_rows(level) for level in (change.src, change.dst))
    generator = torch.Generator().manual_seed(0)
    shapes = [(before, change.width)] * 2 + [(change.width,)] * 3 + [(after, change.width)] * 2
    residual, update = DTYPES[change.residual], DTYPES[change.dtype]
    types = [residual, update, *[torch.float32] * 3, residual, update]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return layout, [x.to(device, dtype) for x, dtype in zip(drawn, types, strict=True)]


def norm_results(change: Change, layout: StudyLayout, inputs: list[Tensor], backend: str) -> list[Tensor]:
    """Both results, and the gradients of residual, update, weight, bias and layer scale."""
    leaves = [x.clone().requires_grad_() for x in inputs[:5]]
    residual, update, weight, bias, scale = leaves
    moved = add_regroup_norm(
        residual, update, layout, change.src, change.dst, weight, bias, layer_scale=scale, backend=backend
    )
    return [*(x.detach() for x in moved), *torch.autograd.grad(moved, leaves, inputs[5:])]


def memory(setup: Setup) -> Iterator[Row]:
    """Bytes that a training call of attention needs, of ever longer studies: they must grow with the rows."""
    least, device = math.inf, setup.device
    for count in setup.size.memory_scans:
        case = problems.Case("", "study", [[(6, 14, 14)] * count])
        problem = case.problem(setup.size.heads, 64, torch.bfloat16, device)
        peer = Ours(problem, choose_backend("auto", device, problem.dtype, 64))
        way = Way(peer, *problem.draw())
        way.training()  # what the first call loads is no part of it
        key = "saved_bytes" if device == "cpu" else "peak_bytes"  # of a CPU what autograd keeps, which is counted
        used = way.first_call("training")[1][key]
        a_row = used / problem.num_rows
        row = {"backend": peer.backend, "rows": problem.num_rows, key: used, f"{key}_per_row": a_row}
        least = min(least, a_row)
        yield row | (
            {"wrong": f"{a_row / least:.2f} times as many bytes a row"} if a_row > MEMORY_GROWTH * least else {}
        )


def training(setup: Setup) -> Iterator[Row]:
    """The gradients of a step of an encoder in bf16, against those of the same step in float32 on the CPU."""
    gradients, case = [], setup.size.trained
    width, depth = (768, 12) if setup.device == "cuda" else (128, 3)
    for dtype, where in (("bf16", setup.device), ("fp32", "cpu")):
        job = encoders.build(encoders.OURS, case, encoders.Setting(dtype, where, width, depth))
        encoders.training_step(job, dtype)
        gradients.append(torch.cat([x.flatten().cpu() for x in encoders.gradients(job.module).values()]))
    error = distance(gradients[0], gradients[1])
    row = {
        "gradients": gradients[0].numel(), "tokens": case.tokens, "width": width, "depth": depth, "grad_error": error,
    }  # fmt: skip
    yield row | ({} if error <= STEP_TOLERANCE else {"wrong": f"more than {STEP_TOLERANCE:g} of their norm"})
