"""Time and memory of attention within groups, ours and others' (`peers.py`), on the groups that studies make
(`problems.py`).

Every result is compared with the formula in float64 before anything is timed, on the groups and heads that the row
names; one that is off is not timed, and the run ends with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hlip.model.memory import keep_memory, release_memory
from hlip.output import replacing
from hlip_kernels.backends import choose_backend

from .options import DTYPES
from .peers import OWN, PEERS, Peer, taken_back
from .problems import Case, Problem
from .report import Row, kinds, provenance, run_cases, show
from .timing import Ceilings, Kept, Peak, ceilings, clock, failures, in_turns, synchronise, timed

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}  # of norms; gradients twice
MODES = ("forward", "training")  # training is forward and backward
QUICK_ROUNDS, ROUNDS = 3, 5
QUICK = (
    "slice-197", "scan-1177", "study-4705", "pub_brain_5-slice-drop50", "pub_brain_5-study", "brain_mri-slice-drop25",
    "head_ct-study-drop50",
)  # fmt: skip
CHECKED = {"cpu": 6e7, "cuda": 1e11}  # pairs of a query and a key, in float64
ORACLE_ELEMENTS = 2**24  # of a matrix of scores
SHOWN = (
    "backend", "mode", "p50_s", "times_ours", "flop_per_s", "of_matmul", "of_copy", "tokens_per_s", "peak_bytes",
    "prepare_s", "first_s", "error",
)  # fmt: skip


class Settings(NamedTuple):
    """memory: bytes that a way may need, by its own estimate. calls: see `timing.in_turns`."""

    dtype: str
    heads: int
    head_dim: int
    device: str
    rounds: int
    calls: int
    memory: float
    backends: Sequence[str]
    modes: Sequence[str]


class Way:
    """A peer that is prepared, with its tensors in place."""

    def __init__(self, peer: Peer, qkv: Tensor, grad_out: Tensor) -> None:
        peer.prepare()
        self.peer, self.qkv, self.rows = peer, qkv, grad_out
        self.inputs = [x.detach().requires_grad_() for x in peer.inputs(qkv)]
        self.constants = [x.detach() for x in self.inputs]
        self.grad_out = peer.outputs(grad_out)

    def forward(self) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Return what `attend` does, and no gradients."""
        with torch.no_grad():
            return self.peer.attend(*self.constants), ()

    def training(self) -> tuple[list[Tensor], Sequence[Tensor]]:
        out = self.peer.attend(*self.inputs)
        return out, torch.autograd.grad(out, self.inputs, self.grad_out)

    def first_call(self, mode: str) -> tuple[dict[str, Tensor], Row]:
        """
        Returns:
            In the order of the level's tensor: out (R, H, D), and after training the gradient of qkv (R, 3, H, D).
            Seconds of the call, bytes of memory at most, and on a CPU those that autograd kept for backward beyond the
            inputs.
        """
        kept = Kept(self.inputs)
        counts = self.peer.problem.device == "cpu"  # elsewhere compilers would see them; and peak memory says more
        with Peak() as peak, kept if counts else contextlib.nullcontext():
            begin = time.perf_counter()
            out, grads = getattr(self, mode)()
            synchronise()
            seconds = time.perf_counter() - begin
        results = {"out": taken_back(self.peer.outputs, out, self.rows)}
        if grads:
            results["grad"] = taken_back(self.peer.inputs, grads, self.qkv)
        facts = {"first_s": seconds, "peak_bytes": peak.bytes} | ({"saved_bytes": kept.bytes} if counts else {})
        return results, facts


class Oracle:
    """The formula in float64, for as many pairs of a query and a key as the device has time for: the longest group in
    as many heads as that allows, the last among them, and with these heads the shortest group and further ones."""

    def __init__(self, problem: Problem, qkv: Tensor, grad_out: Tensor) -> None:
        budget = CHECKED[problem.device]
        pairs = problem.lengths.astype(float) ** 2
        order = np.argsort(-pairs, kind="stable")
        order = np.concatenate([order[:1], order[-1:], order[1:-1]])[: len(order)]
        count = min(problem.heads, max(1, int(budget / pairs.max()))) if len(pairs) else problem.heads
        self.heads = np.linspace(problem.heads - 1, 0, count)[::-1].round().astype(int).tolist()
        fits = np.cumsum(pairs[order]) * len(self.heads) <= budget
        fits[: min(2, len(order))] = True
        self.num_prefix = problem.layout.num_prefix
        self.groups = [problem.rows[g] for g in order[fits]]
        self.checked = f"{len(self.groups)} of {len(order)} groups, {len(self.heads)} of {problem.heads} heads"
        self.exact = [
            exact(qkv[rows][:, :, self.heads].double(), grad_out[rows][:, self.heads].double()) for rows in self.groups
        ]

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """The largest over groups and heads of the difference's norm over the norm, for out and for dq, dk and dv; and
        the same of the prefix rows alone, which are few beside patches, at a quarter, as one row averages nothing."""
        errors = dict.fromkeys(results, 0.0)
        for rows, expected in zip(self.groups, self.exact, strict=True):
            for name, result in results.items():
                wanted = expected[name]
                heads = result[rows][..., self.heads, :].double()
                for some, weight in ((slice(None), 1.0), (slice(self.num_prefix), 0.25)):
                    off = (heads - wanted)[some].square().sum((0, -1)) / wanted[some].square().sum((0, -1))
                    error = weight * float(off.sqrt().max()) if wanted[some].numel() else 0.0
                    errors[name] = float(np.maximum(errors[name], error))  # NaN if either is
        return errors


def exact(qkv: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """softmax(q k^T / sqrt(D)) v and the gradient of qkv, (L, 3, H, D), a few queries at a time."""
    length, _, heads, head_dim = qkv.shape
    leaf = qkv.detach().requires_grad_()
    q, k, v = leaf.permute(1, 2, 0, 3)
    out, grad = torch.empty_like(grad_out), torch.zeros_like(qkv)
    step = max(1, ORACLE_ELEMENTS // (length * heads))
    for rows in (slice(at, at + step) for at in range(0, length, step)):
        of_rows = ((q[:, rows] @ k.mT * head_dim**-0.5).softmax(-1) @ v).transpose(0, 1)
        out[rows] = of_rows.detach()
        grad += torch.autograd.grad(of_rows, leaf, grad_out[rows], retain_graph=True)[0]
    return {"out": out, "grad": grad}


def too_far(errors: Mapping[str, float], dtype: str) -> list[str]:
    """Name the results that are further from float64 than a dtype allows."""
    allowed = {"out": TOLERANCE[dtype], "grad": 2 * TOLERANCE[dtype]}
    return [f"{name} off by {off:.2g} of its norm" for name, off in errors.items() if not off <= allowed[name]]


def main(cases: Sequence[Case], settings: Sequence[Settings], args: argparse.Namespace) -> int:
    """Time every case in every setting; args: of `run_cases`, with `profile`, a folder for traces of one more call."""

    def rows() -> Iterator[Iterator[Row]]:
        for setting in settings:
            limits = ceilings(setting.device, DTYPES[setting.dtype])
            print(
                f"{setting.dtype}, {setting.heads} heads of {setting.head_dim}, "
                f"{provenance(torch.device(setting.device))['device']}, {torch.get_num_threads()} threads. A matrix "
                f"product does {limits.flops / 1e9:.4g} GFLOP/s here, a copy {limits.bytes / 1e9:.3g} GB/s."
            )
            yield from (run(case, setting, limits, args.profile) for case in cases)

    return run_cases(rows(), show_case, args)


def run(case: Case, settings: Settings, limits: Ceilings, profile: Path | None = None) -> Iterator[Row]:
    """A row for every backend and mode; one with a `reason` for one that cannot run."""
    problem = case.problem(settings.heads, settings.head_dim, DTYPES[settings.dtype], settings.device)
    facts = {
        "case": case.name, "level": case.level, "dtype": settings.dtype, "heads": settings.heads,
        "head_dim": settings.head_dim, "num_prefix": case.num_prefix, "dropout": case.dropout,
        "groups": len(problem.rows), "rows": problem.num_rows,
        "shortest": int(problem.lengths.min()), "longest": int(problem.lengths.max()), "rounds": settings.rounds,
        "calls": settings.calls, **provenance(torch.device(settings.device)),
        "matmul_flop_per_s": limits.flops, "copy_bytes_per_s": limits.bytes,
    }  # fmt: skip
    tensors = problem.draw()
    oracle = Oracle(problem, *tensors)
    ways: dict[str, Way] = {}
    prepare: dict[str, float] = {}
    for name in settings.backends:
        with told(name) as row:
            peer = PEERS[name](problem)
            reasons = peer.reasons() or too_much(peer, False, settings)
            if reasons:
                row["reason"] = "; ".join(reasons)
            else:
                ways[name] = Way(peer, *tensors)
                prepare[name] = clock(peer.prepare)
        if row:
            yield facts | {"backend": name, "mode": None} | row
    ours = f"hlip-{choose_backend('auto', settings.device, problem.dtype, settings.head_dim)}"
    for mode in settings.modes:
        progress = tqdm(ways.items(), f"{mode}: first calls", unit="way", disable=None, leave=False)
        calls = {name: first_call(name, way, mode, oracle, settings) for name, way in progress}
        yield from (facts | row for row in calls.values() if "reason" in row)
        runs = {name: getattr(ways[name], mode) for name, row in calls.items() if "reason" not in row}
        keep_memory()
        in_turns(runs, 1)  # from now on the process has the pages that calls write
        times = timed(runs, settings.rounds, settings.calls, ours)
        release_memory()
        for name, row in times.items():
            training = mode == "training"
            rates = limits.rates(row["p50_s"], problem.flops(training), problem.least_bytes(training))
            speed = {"tokens_per_s": problem.layout.num_tokens / row["p50_s"], "prepare_s": prepare[name]}
            row = facts | calls[name] | row | rates | speed
            yield row | {"kinds": kinds(row)}
        if profile:
            trace(runs, profile / f"{case.name}-{settings.dtype}-{mode}.json")


def first_call(name: str, way: Way, mode: str, oracle: Oracle, settings: Settings) -> Row:
    """Call a way, which warms it up, and check its results; a row with a `reason` of one that is not to be timed."""
    row: Row = {"backend": name, "mode": mode}
    if mode == "training" and (reasons := too_much(way.peer, True, settings)):
        return row | {"reason": reasons[0]}
    with told(name) as failed:
        results, facts = way.first_call(mode)
        if settings.device == "cuda" or way.peer.compiles:
            with Peak() as peak:  # now that nothing is compiled or tried any more
                getattr(way, mode)()
            facts["peak_bytes"] = peak.bytes
        errors = oracle.errors(results)
        if off := too_far(errors, settings.dtype):
            failed["reason"] = failed["wrong"] = f"wrong: {', '.join(off)}"
        else:
            row |= {"error": max(errors.values()), "checked": oracle.checked, **facts}
    return row | failed


@contextlib.contextmanager
def told(name: str) -> Iterator[Row]:
    """A row that gets the reason where something fails inside: a library that does cannot run here, and others can;
    ours must run."""
    row: Row = {}
    with failures() as reasons:
        yield row
    for reason in reasons:
        row |= {"reason": reason} | ({"wrong": reason} if own(name) else {})


def too_much(peer: Peer, backward: bool, settings: Settings) -> list[str]:
    needed = peer.scratch(backward)
    if needed <= settings.memory:
        return []
    return [f"would need about {needed / 2**30:.3g} GiB, more than the limit of {settings.memory / 2**30:.3g}"]


def own(backend: str) -> bool:
    """Tell whether a row's kernels are this library's."""
    return backend.removeprefix("hlip-") in OWN


def trace(runs: Mapping[str, Callable[[], Any]], path: Path) -> None:
    """One call of each way in Chrome's trace format, under its name."""
    with torch.profiler.profile() as profiler:  # of the CPU, and of the GPU if there is one
        for name, call in runs.items():
            with torch.profiler.record_function(name):
                call()
                synchronise()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        profiler.export_chrome_trace(str(partial))
    print(f"{path}: for ui.perfetto.dev or chrome://tracing")


def show_case(rows: Sequence[Row]) -> None:
    row = rows[0]
    dropped = f", patch dropout {row['dropout']}" if row["dropout"] else ""
    groups = f"{row['groups']} groups of {row['shortest']} to {row['longest']} rows, {row['rows']} in all{dropped}"
    show(f"{row['case']}: {groups}", rows, SHOWN)
