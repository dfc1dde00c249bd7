"""Time and memory of attention within groups, ours and others' (`peers.py`), on the groups that studies make.

Cases have the names of levels and lengths (patches and prefix rows of a group), or of a mix of studies:

    slice-197, slice-198, slice-99       slices of 14 x 14 tokens; with two prefix rows; at half the patches
    scan-1177, scan-1569, scan-2745      scans of 6, 8 and 14 slices
    scan-883                             at a patch dropout of 0.25
    study-4705                           4 scans; the tokens of slice-197 and scan-1177 as one study
    study-16465, -36457, -254017         14, 31 and 162 scans; not tried without a GPU unless named
    MIX-LEVEL, MIX-LEVEL-drop25, -drop50 studies with the scan counts of `cases.py`, in a mix drawn by its distribution

Every result is compared with the formula in float64 before anything is timed, on the groups and heads that the row
names; one that is off is not timed, and the run ends with 1.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hlip.model.memory import keep_memory, release_memory
from hlip.study import Draws, patch_dropout
from hlip_kernels import Grid, Level, StudyLayout
from hlip_kernels.backends import choose_backend

from . import ceilings, columns
from .cases import SCANS, draw_scans
from .ceilings import Ceilings
from .peers import OWN, PEERS, Peer, Problem
from .report import append_rows, print_table, provenance, write_json
from .timing import Peak, clock, in_turns, percentiles, ratio, synchronise

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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
BEFORE: dict[Level, Level] = {"slice": "scan", "scan": "study", "study": "scan"}


class Case(NamedTuple):
    """grids: of the scans of each study. dropout: of patches, in every group of `dropped`."""

    name: str
    level: Level
    grids: list[list[Grid]]
    num_prefix: int = 1
    dropout: float = 0.0
    dropped: Level = "scan"
    before: Level | None = None

    def problem(self, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> Problem:
        full = StudyLayout.from_grids(self.grids, self.num_prefix)
        keep = patch_dropout(full, self.dropout, self.dropped, Draws(range(len(self.grids))))

        def make() -> StudyLayout:
            layout = StudyLayout.from_grids(self.grids, self.num_prefix)
            return layout.select(keep) if self.dropout else layout

        return Problem(make, self.level, self.before or BEFORE[self.level], heads, head_dim, dtype, device)


def all_cases(device: str, batch: int, seed: int = 0) -> list[Case]:
    """
    Args:
        batch: studies of the cases of one length, the longest excepted; four times as many of the ragged ones.
    """
    scan: Grid = (6, 14, 14)
    four: list[list[Grid]] = [[scan] * 4] * batch
    chest: Grid = (14, 14, 14)
    found = [
        Case("slice-197", "slice", four),
        Case("slice-198", "slice", [[(8, 14, 14)] * 3] * batch, num_prefix=2),
        Case("slice-99", "slice", four, dropout=0.5, dropped="slice"),
        Case("scan-1177", "scan", four),
        Case("scan-1569", "scan", [[(8, 14, 14)] * 3] * batch),
        Case("scan-2745", "scan", [[chest]] * 2 * batch, before="slice"),
        Case("scan-883", "scan", four, dropout=0.25),
        Case("study-4705", "study", four),
        Case("study-16465", "study", [[scan] * 14]),
        Case("study-36457", "study", [[scan] * 31]),
        Case("study-254017", "study", [[(8, 14, 14)] * 162]),
    ]
    for mix in SCANS:
        scans = draw_scans(mix, 4 * batch, seed, most=None if device == "cuda" else 10)
        grids = [[scan] * int(count) for count in scans]
        levels: tuple[Level, ...] = ("slice", "scan", "study")
        for level in levels:
            for dropout in (0.0, 0.25, 0.5):
                suffix = f"-drop{100 * dropout:.0f}" if dropout else ""
                found.append(Case(f"{mix}-{level}{suffix}", level, grids, dropout=dropout))
    return found


def chosen(cases: Sequence[Case], patterns: Sequence[str] | None, device: str) -> list[Case]:
    """The cases that a pattern names; without patterns all, but without a GPU not the longest studies.

    Raises:
        ValueError: a pattern that no case fits.
    """
    if patterns is None:
        return [case for case in cases if device == "cuda" or longest(case) < 10**4 or len(case.grids) > 1]
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"no case {pattern!r}; there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def longest(case: Case) -> int:
    """Patches of the longest study, before dropout."""
    return max(sum(d * h * w for d, h, w in study) for study in case.grids)


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
    """A peer with its tensors in place."""

    def __init__(self, peer: Peer, qkv: Tensor, grad_out: Tensor) -> None:
        self.peer = peer
        self.inputs = [x.detach().requires_grad_() for x in peer.inputs(qkv)]
        self.constants = [x.detach() for x in self.inputs]
        self.grad_out = peer.outputs(grad_out)

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return self.peer.attend(*self.constants)

    def training(self) -> tuple[list[Tensor], Sequence[Tensor]]:
        out = self.peer.attend(*self.inputs)
        return out, torch.autograd.grad(out, self.inputs, self.grad_out)

    def run(self, mode: str) -> Callable[[], Any]:
        return self.forward if mode == "forward" else self.training

    def first_call(self, mode: str) -> tuple[dict[str, Tensor], float, dict[str, int | None]]:
        """
        Returns:
            In the order of the level's tensor: out (R, H, D), and after training the gradient of qkv (R, 3, H, D).
            Seconds of the call. Bytes of memory at most, and on a CPU those that autograd kept for backward beyond the
            inputs.
        """
        own = {x.untyped_storage().data_ptr() for x in self.inputs}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = (tensor.values() if tensor.layout == torch.jagged else tensor).untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.peer.problem.device == "cpu":  # elsewhere compilers would see them; and peak memory says more
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with Peak() as peak, hooks:
            begin = time.perf_counter()
            found = self.run(mode)()
            synchronise()
            seconds = time.perf_counter() - begin
        out, grads = (found, None) if mode == "forward" else found
        results = {"out": self.peer.take([x.detach() for x in out])}
        if grads is not None:
            results["grad"] = self.peer.grads(grads)
        memory = {"peak_bytes": peak.bytes}
        if self.peer.problem.device == "cpu":
            memory["saved_bytes"] = sum(kept.values())
        return results, seconds, memory


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
                    if error > errors[name] or isnan(error):  # of which nothing is larger
                        errors[name] = error
        return errors


def exact(qkv: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """softmax(q k^T / sqrt(D)) v and the gradient of qkv, (L, 3, H, D), a few queries at a time."""
    length, _, heads, head_dim = qkv.shape
    q, k, v = qkv.permute(1, 2, 0, 3)
    grad = grad_out.transpose(0, 1)
    out, grads = torch.empty_like(q), torch.zeros_like(qkv)
    dq, dk, dv = grads.permute(1, 2, 0, 3)
    step = max(1, ORACLE_ELEMENTS // (length * heads))
    for at in range(0, length, step):
        part = slice(at, at + step)
        weights = (q[:, part] @ k.mT * head_dim**-0.5).softmax(-1)
        out[:, part] = weights @ v
        d_weights = grad[:, part] @ v.mT
        delta = (grad[:, part] * out[:, part]).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - delta) * head_dim**-0.5
        dq[:, part] = d_scores @ k
        dk += d_scores.mT @ q[:, part]
        dv += weights.mT @ grad[:, part]
    return {"out": out.transpose(0, 1), "grad": grads}


def main(
    cases: Sequence[Case],
    settings: Sequence[Settings],
    json: Path | None = None,
    results: Path | None = None,
    profile: Path | None = None,
) -> int:
    """Times every case in every setting, and writes what is found after each case.

    Args:
        json, results: files for the rows; of the second, what is there is kept.
        profile: a folder for traces of one more call of every way.
    """
    found: list[dict[str, Any]] = []
    try:
        for setting in settings:
            limit = ceilings.measure(setting.device, DTYPES[setting.dtype])
            print(
                f"{setting.dtype}, {setting.heads} heads of {setting.head_dim}, "
                f"{provenance(torch.device(setting.device))['device']}, {torch.get_num_threads()} threads. A matrix "
                f"product does {limit.flops / 1e9:.4g} GFLOP/s here, a copy {limit.bytes / 1e9:.3g} GB/s."
            )
            for case in cases:
                rows = list(run(case, setting, limit, profile))
                show(case, rows)
                found += rows
                if results:
                    append_rows(rows, results)
                if json:
                    write_json(found, json)
    except KeyboardInterrupt:
        print("interrupted: the cases before are written", file=sys.stderr)
        return 130
    wrong = [f"{row['backend']}, {row['case']}, {row['mode']}: {row['reason']}" for row in found if row.get("wrong")]
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


def run(case: Case, settings: Settings, limits: Ceilings, profile: Path | None = None) -> Iterator[dict[str, Any]]:
    """A row for every backend and mode; one with a `reason` for one that cannot run."""
    problem = case.problem(settings.heads, settings.head_dim, DTYPES[settings.dtype], settings.device)
    lengths = problem.lengths
    facts = {
        "case": case.name, "level": case.level, "dtype": settings.dtype, "heads": settings.heads,
        "head_dim": settings.head_dim, "num_prefix": case.num_prefix, "dropout": case.dropout,
        "groups": len(lengths), "rows": problem.num_rows, "shortest": int(lengths.min()), "longest": int(lengths.max()),
        "rounds": settings.rounds, "calls": settings.calls, **provenance(torch.device(settings.device)),
        "matmul_flop_per_s": limits.flops, "copy_bytes_per_s": limits.bytes,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shape = problem.num_rows, 3, settings.heads, settings.head_dim
    qkv = torch.randn(shape, generator=generator).to(settings.device, problem.dtype)
    grad_out = torch.randn(shape[0], *shape[2:], generator=generator).to(settings.device, problem.dtype)
    oracle = Oracle(problem, qkv, grad_out)
    ways: dict[str, Way] = {}
    reasons: dict[str, str] = {}
    failed: set[str] = set()  # of ours, which must run
    prepare: dict[str, float] = {}
    for name in settings.backends:
        try:
            peer = PEERS[name](problem)
            why = peer.reasons()
            if why:
                reasons[name] = "; ".join(why)
            elif peer.scratch(False) > settings.memory:
                reasons[name] = _too_much(peer, False, settings)
            else:
                peer.prepare()
                prepare[name] = clock(peer.prepare)
                ways[name] = Way(peer, qkv, grad_out)
        except Exception as error:  # whatever a library says of itself: it cannot run here, and others can
            reasons[name] = _said(error)
            failed |= {name} if own(name) else set()
    for name, reason in reasons.items():
        yield facts | {"backend": name, "mode": None, "reason": reason} | ({"wrong": True} if name in failed else {})
    ours = f"hlip-{choose_backend('auto', settings.device, problem.dtype, settings.head_dim)}"
    for mode in settings.modes:
        checked, refused = first_calls(ways, mode, oracle, settings)
        yield from (facts | row for row in refused)
        runs = {name: ways[name].run(mode) for name in checked}
        keep_memory()
        in_turns(runs, 1)  # from now on the process has the pages that calls write
        seconds = in_turns(runs, settings.rounds, settings.calls)
        release_memory()
        for name, mine in seconds.items():
            times = ratio(mine, seconds[ours]) if ours in seconds else None
            row = {"backend": name, "mode": mode, "times_ours": times, "prepare_s": prepare[name]}
            spread = percentiles(mine)
            row |= spread | rates(problem, mode, spread["p50_s"], limits) | checked[name]
            row = facts | row
            yield row | {"kinds": columns.kinds(row)}
        if profile:
            trace(runs, profile / f"{case.name}-{settings.dtype}-{mode}.json")


def first_calls(
    ways: dict[str, Way], mode: str, oracle: Oracle, settings: Settings
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Calls every way, which warms it up, and checks its results.

    Returns:
        What is known of each then, and rows of those that are not to be timed.
    """
    checked: dict[str, dict[str, Any]] = {}
    refused: list[dict[str, Any]] = []
    for name, way in tqdm(ways.items(), f"{mode}: first calls", unit="way", disable=None, leave=False):
        row: dict[str, Any] = {"backend": name, "mode": mode}
        if mode == "training" and way.peer.scratch(True) > settings.memory:
            refused.append(row | {"reason": _too_much(way.peer, True, settings)})
            continue
        try:
            results, first, memory = way.first_call(mode)
            if settings.device == "cuda" or way.peer.compiles:
                with Peak() as peak:  # now that nothing is compiled or tried any more
                    way.run(mode)()
                memory["peak_bytes"] = peak.bytes
        except Exception as error:  # as in `run`; but ours must run
            refused.append(row | {"reason": _said(error)} | ({"wrong": True} if own(name) else {}))
            synchronise()  # raises if the GPU is lost to this process
            continue
        errors = oracle.errors(results)
        off = [
            f"{part} is {error:.2g} of its norm away from float64"
            for part, error in errors.items()
            if not error <= TOLERANCE[settings.dtype] * (1 if part == "out" else 2)
        ]
        if off:
            refused.append(row | {"reason": "wrong: " + ", ".join(off), "wrong": True})
        else:
            checked[name] = {"error": max(errors.values()), "checked": oracle.checked, "first_s": first, **memory}
    return checked, refused


def own(backend: str) -> bool:
    """Tell whether a row's kernels are this library's."""
    return backend.removeprefix("hlip-") in OWN


def rates(problem: Problem, mode: str, seconds: float, limits: Ceilings) -> dict[str, float]:
    """Operations and bytes that the work takes at least, a second, and as parts of what the machine can do."""
    flops, moved = (count(mode == "training") for count in (problem.flops, problem.least_bytes))
    return {
        "flops": flops,
        "flop_per_s": flops / seconds,
        "of_matmul": flops / seconds / limits.flops,
        "bytes_modelled": moved,
        "bytes_per_s": moved / seconds,
        "of_copy": moved / seconds / limits.bytes,
        "tokens_per_s": problem.layout.num_tokens / seconds,
    }


def trace(runs: Mapping[str, Callable[[], Any]], path: Path) -> None:
    """One call of each way in Chrome's trace format, under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:  # of the CPU, and of the GPU if there is one
        for name, call in runs.items():
            with torch.profiler.record_function(name):
                call()
                synchronise()
    partial = path.with_name(f".{path.name}.tmp")
    profiler.export_chrome_trace(str(partial))
    partial.replace(path)
    print(f"{path}: for ui.perfetto.dev or chrome://tracing")


def show(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    dropped = f", patch dropout {case.dropout}" if case.dropout else ""
    print(
        f"\n{case.name}: {first['groups']} groups of {first['shortest']} to {first['longest']} rows, "
        f"{first['rows']} in all{dropped}"
    )
    print_table(
        list(map(columns.heading, SHOWN)),
        [[columns.cell(row, key) for key in SHOWN] for row in rows if "reason" not in row],
    )
    print(columns.legend(SHOWN))
    for row in rows:
        if "reason" in row:
            print(f"  {row['backend']}{'' if row['mode'] is None else ', ' + row['mode']}: not run: {row['reason']}")


def _too_much(peer: Peer, backward: bool, settings: Settings) -> str:
    needed = peer.scratch(backward)
    return f"would need about {needed / 2**30:.3g} GiB, more than the limit of {settings.memory / 2**30:.3g}"


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"
