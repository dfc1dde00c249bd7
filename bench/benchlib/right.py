"""Checks that this library computes right on a device: attention and norm against float64, a training step, memory.

Each function yields rows. One with `wrong` fails the check; a `mistake` is another library's, which is not this one's
to mend. One with a `reason` could not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import encoder
from hlip.study import Draws, patch_dropout
from hlip_kernels import Grid, Level, StudyLayout, add_regroup_norm
from hlip_kernels.backends import NORM_BACKENDS, choose_backend, not_supported_reasons
from hlip_kernels.layout import LEVELS

from .kernels import BEFORE, DTYPES, TOLERANCE, Oracle, Way, own
from .peers import Ours, Problem
from .timing import Peak, synchronise

DROPOUTS = 0.0, 0.5
MEMORY_GROWTH = 1.1  # times as many bytes as a row may come to need
STEP_TOLERANCE = 5e-2  # of the norm of all gradients
RESULTS = 2  # of the norm: new residual, normalised rows; gradients follow
SHOWN = 3  # faults of a row
ON_A_CPU = "its kernels are for GPUs: on a CPU they are compiled and launched, not compared"
Row = dict[str, Any]


class Groups(NamedTuple):
    """grids: of the scans of each study. prefixes: numbers of prefix rows."""

    grids: Sequence[Sequence[Grid]]
    prefixes: Sequence[int]


class Case(NamedTuple):
    """A layer's attention in small."""

    grids: Sequence[Sequence[Grid]]
    dtype: str
    head_dim: int
    heads: int
    level: Level
    prefix: int
    dropout: float

    def __str__(self) -> str:
        return f"{self.level}, {self.prefix} prefix rows, dropout {self.dropout}"


def attention_cases(groups: Groups, dtype: str, head_dim: int, heads: int) -> list[Case]:
    every = product(LEVELS, groups.prefixes, DROPOUTS)
    return [Case(groups.grids, dtype, head_dim, heads, *rest) for rest in every]


def attention(
    groups: Groups, backends: Sequence[str], dtypes: Sequence[str], head_dims: Sequence[int], heads: int, device: str
) -> Iterator[Row]:
    """A row for each backend, dtype and head dim."""
    for dtype, head_dim, name in product(dtypes, head_dims, backends):
        row: Row = {"backend": name, "dtype": dtype, "head_dim": head_dim}
        reasons = not_supported_reasons(name, device, DTYPES[dtype], head_dim)
        reasons += [ON_A_CPU] * (device == "cpu" and name == "triton")
        if reasons:
            yield row | {"reason": "; ".join(reasons)}
            continue
        cases = attention_cases(groups, dtype, head_dim, heads)
        yield row | worst(own(name), cases, partial(check_attention, name, device))


class Checked(NamedTuple):
    """errors: of results as `out`, of gradients as `grad`. repeats: whether a second call gave the same bits."""

    errors: dict[str, float]
    repeats: bool
    faults: list[str]


def worst(ours: bool, cases: Iterable[Any], check: Callable[[Any], Checked]) -> Row:
    """The largest errors of all cases, whether all gave the same bits twice, and what is wrong."""
    row: Row = {"cases": 0, "error": 0.0, "grad_error": 0.0, "repeats": True}
    faults = []
    for case in cases:
        row["cases"] += 1
        try:
            checked = check(case)
        except Exception as error:  # whatever it is belongs into the report; other cases may be right
            synchronise()  # raises if the GPU is lost to this process
            faults.append(f"{type(error).__name__}: {str(error)[:200]} ({case})")
            continue
        row["repeats"] &= checked.repeats
        for key, distance in zip(("error", "grad_error"), checked.errors.values(), strict=True):
            row[key] = distance if math.isnan(distance) else max(row[key], distance)
        again = ["not the same bits twice"] * (not checked.repeats)
        faults += [f"{fault} ({case})" for fault in (*checked.faults, *again)]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        row["wrong" if ours else "mistake"] = f"{'; '.join(faults[:SHOWN])}{more}"
    return row


def attention_way(backend: str, case: Case, device: str) -> tuple[Way, Problem, Tensor, Tensor]:
    """Ready to be called, with what it is given."""
    make = partial(layout_of, case.grids, case.prefix, case.dropout)
    dtype = DTYPES[case.dtype]
    problem = Problem(make, case.level, BEFORE[case.level], case.heads, case.head_dim, dtype, device)
    generator = torch.Generator().manual_seed(0)
    shape = problem.num_rows, 3, case.heads, case.head_dim
    qkv = torch.randn(shape, generator=generator).to(device, problem.dtype)
    grad_out = torch.randn(shape[0], *shape[2:], generator=generator).to(device, problem.dtype)
    peer = Ours(problem, backend, deterministic=True)
    peer.prepare()
    return Way(peer, qkv, grad_out), problem, qkv, grad_out


def check_attention(backend: str, device: str, case: Case) -> Checked:
    """Errors by the norm of each group."""
    way, problem, qkv, grad_out = attention_way(backend, case, device)
    first, second = way.first_call("training")[0], way.first_call("training")[0]
    errors = Oracle(problem, qkv, grad_out).errors(first)
    allowed = {"out": TOLERANCE[case.dtype], "grad": 2 * TOLERANCE[case.dtype]}
    faults = [f"{name} off by {errors[name]:.2g}" for name in allowed if not errors[name] <= allowed[name]]
    return Checked(errors, all(torch.equal(first[name], second[name]) for name in first), faults)


def layout_of(grids: Sequence[Sequence[Grid]], prefix: int, dropout: float) -> StudyLayout:
    layout = StudyLayout.from_grids(grids, prefix)
    if not dropout:
        return layout
    return layout.select(patch_dropout(layout, dropout, "scan", Draws(range(len(grids)))))


class Change(NamedTuple):
    """From the rows of one level to those of the next, the norm of them included."""

    grids: Sequence[Sequence[Grid]]
    dtype: str  # of the update; residuals are float32 where `wide` says so
    wide: bool
    width: int
    src: Level
    dst: Level
    prefix: int

    def __str__(self) -> str:
        return f"{self.src} to {self.dst}, {self.prefix} prefix rows"


def residuals(dtype: str) -> tuple[bool, ...]:
    """List whether residuals are wide: both for updates of 16 bits."""
    return (True,) if dtype == "fp32" else (True, False)


def changes(groups: Groups, dtype: str, wide: bool, width: int) -> list[Change]:
    every = product(LEVELS, LEVELS, groups.prefixes)
    return [Change(groups.grids, dtype, wide, width, *rest) for rest in every]


def norm(groups: Groups, dtypes: Sequence[str], width: int, device: str) -> Iterator[Row]:
    """A row for each backend and dtype, with residuals in float32 and in the dtype of the update."""
    for dtype, name in product(dtypes, NORM_BACKENDS):
        for wide in residuals(dtype):
            residual = torch.float32 if wide else DTYPES[dtype]
            row: Row = {"backend": name, "dtype": dtype, "residual": "fp32" if wide else dtype, "width": width}
            reasons = NORM_BACKENDS[name].not_supported_reasons(device, residual, DTYPES[dtype])
            reasons += [ON_A_CPU] * (device == "cpu" and name == "triton")
            if reasons:
                yield row | {"reason": "; ".join(reasons)}
                continue
            yield row | worst(True, changes(groups, dtype, wide, width), partial(check_norm, name, device))


def check_norm(backend: str, device: str, change: Change) -> Checked:
    """Sums over rows are only held to be as good as PyTorch's own, which some devices round at every step."""
    layout, inputs = norm_inputs(change, device)
    first, second = (norm_results(inputs, layout, change, backend) for _ in range(2))
    exact = norm_results([x.double() for x in inputs], layout, change, "torch")
    eager = norm_results(inputs, layout, change, "torch")
    errors, faults = {"out": 0.0, "grad": 0.0}, []
    for at, (mine, theirs, wanted) in enumerate(zip(first, eager, exact, strict=True)):
        error, usual = (float((x.double() - wanted).norm() / wanted.norm()) for x in (mine, theirs))
        name = "out" if at < RESULTS else "grad"
        errors[name] = error if math.isnan(error) else max(errors[name], error)
        if not error <= max(2 * TOLERANCE[change.dtype], 3 * usual):
            faults.append(f"{name} off by {error:.2g}")
    return Checked(errors, all(map(torch.equal, first, second)), faults)


def norm_inputs(change: Change, device: str) -> tuple[StudyLayout, list[Tensor]]:
    """Residual, update, weight, bias, layer scale, and the gradients of both results; parameters in float32."""
    layout = layout_of(change.grids, change.prefix, 0.5).to(device)
    before, after = (layout.num_rows(level) for level in (change.src, change.dst))
    generator = torch.Generator().manual_seed(0)
    shapes = [(before, change.width)] * 2 + [(change.width,)] * 3 + [(after, change.width)] * 2
    update = DTYPES[change.dtype]
    residual = torch.float32 if change.wide else update
    types = [residual, update, *[torch.float32] * 3, residual, update]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return layout, [x.to(device, dtype) for x, dtype in zip(drawn, types, strict=True)]


def norm_results(inputs: list[Tensor], layout: StudyLayout, change: Change, backend: str) -> list[Tensor]:
    """Both results, and the gradients of residual, update, weight, bias and layer scale."""
    leaves = [x.clone().requires_grad_() for x in inputs[:5]]
    residual, update, weight, bias, scale = leaves
    moved = add_regroup_norm(
        residual, update, layout, change.src, change.dst, weight, bias, layer_scale=scale, backend=backend
    )
    return [*(x.detach() for x in moved), *torch.autograd.grad(moved, leaves, inputs[5:])]


def memory(scans: Sequence[int], heads: int, device: str) -> Iterator[Row]:
    """Bytes that a training call of attention needs, of ever longer studies: they must grow with the rows."""
    least = math.inf
    for count in scans:
        make = partial(StudyLayout.from_grids, [[(6, 14, 14)] * count])
        problem = Problem(make, "study", "scan", heads, 64, torch.bfloat16, device)
        shape = problem.num_rows, heads, 64
        qkv = torch.randn(shape[0], 3, *shape[1:]).to(device, problem.dtype)
        peer = Ours(problem, choose_backend("auto", device, problem.dtype, 64))
        peer.prepare()
        way = Way(peer, qkv, torch.randn(shape).to(device, problem.dtype))
        with Peak() as peak:
            way.training()
        # Of a CPU what autograd keeps, which is counted.
        key, used = "peak_bytes", peak.bytes
        if device == "cpu":
            key, used = "saved_bytes", way.first_call("training")[2]["saved_bytes"]
        assert used is not None
        row = {"backend": peer.backend, "rows": shape[0], key: used, f"{key}_per_row": used / shape[0]}
        least = min(least, used / shape[0])
        grown = used / shape[0] / least
        yield row | ({"wrong": f"{grown:.2f} times as many bytes a row"} if grown > MEMORY_GROWTH else {})


def training(case: encoder.Case, width: int, depth: int, device: str) -> Iterator[Row]:
    """The gradients of a step of an encoder in bf16, against those of the same step in float32 on the CPU."""
    gradients = []
    for dtype, where in (("bf16", device), ("fp32", "cpu")):
        setting = encoder.Setting(dtype, where, width, depth)
        job = encoder.build(encoder.Kind("hlip", True), case, setting)
        encoder.training_step(job, setting)
        parameters = job.module.parameters()
        gradients.append(torch.cat([p.grad.flatten().float().cpu() for p in parameters if p.grad is not None]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    row = {
        "gradients": gradients[0].numel(),
        "tokens": case.tokens,
        "width": width,
        "depth": depth,
        "grad_error": error,
    }
    yield row | ({} if error <= STEP_TOLERANCE else {"wrong": f"more than {STEP_TOLERANCE:g} of their norm"})
