"""From studies as they lie on disk to a store.

The plan says which studies each shard holds. It follows from the studies alone, so that any number of workers, on any
engine, makes the same bytes, and a run that was ended goes on with the shards that are missing. While a store is
unfinished it has a folder `work/`: the plan, the sources of every shard, a lock, and temporary files.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..output import locked, replacing
from ..read.paths import check_within
from ..read.safe import read_json as read_plain
from ..read.scan import Rejection, ScanError, ScanSource
from ..store.format import pyarrow, read_info, read_json, shard_file, write_shard
from ..store.tools import Report, finish
from ..study import PreparedScan, StudyRecord
from .discover import Found
from .plan import Plan, compare_terms, encodable, hash_ids, in_order, terms_of
from .recipe import Recipe, as_recipe
from .workers import STEP_SECONDS, Engine, Event, Step, run_local, run_ray, run_slurm

SHARD_SCANS = 64  # scans of a shard as they are found: 150 MB of brain MRI, and a minute's work to lose


def prepare(
    found: Found,
    recipe: Recipe | str | Path,
    out: Path | str,
    *,
    engine: Engine = "local",
    workers: int = 1,
    salt: str | None = None,
    shard_scans: int = SHARD_SCANS,
    scan_seconds: float = STEP_SECONDS,
    slurm: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Report:
    """Prepare every study of `found` into the store `out`; what was finished there before is left as it is.

    Worker processes are spawned: a script that calls this does so under `if __name__ == "__main__":`.

    Args:
        recipe: or its name or file, as `load_recipe` takes it.
        engine: "local" for processes of this machine, "ray" or "slurm"; see `workers`.
        salt: if given, studies are named by salted hashes and nothing else that names them is kept; see `hash_ids`.
        shard_scans: a shard is closed before it would hold more; one study is never shared out.
        scan_seconds: a scan that takes longer is left out.
        slurm: options of the engine "slurm"; see `run_slurm`.
        progress: show a bar with studies and scans per second and the time left.

    Raises:
        ValueError: no studies, or two of one name; `out` is no store, was begun with other studies, another recipe or
            other options, or is being written by another run.
        OSError: `out` cannot be written. What is finished stays, and the next run goes on.
    """
    if workers < 1 or shard_scans < 1 or not 0 < scan_seconds < math.inf:
        got = f"{workers}, {shard_scans} and {scan_seconds}"
        raise ValueError(f"workers, shard_scans and scan_seconds must be positive and finite, got {got}")
    pyarrow()  # asked for now, not after hours
    out = Path(out)
    recipe, found = as_recipe(recipe), in_order(found if salt is None else hash_ids(found, salt))
    terms = terms_of(found, recipe, shard_scans, salt)
    if not (out / "work").exists() and (report := _finished(out, terms)) is not None:
        return report
    try:
        with _locked(out) as work:
            report = _finished(out, terms)
            if report is None:
                plan = Plan.of(found, terms, out)
                _run(PrepareJob(plan, recipe, scan_seconds), engine, workers, slurm or {}, progress)
                facts: dict[str, Any] = {key: terms[key] for key in ("source_hash", "shard_scans", "hidden_ids")}
                report = finish(out, work, **facts)
            shutil.rmtree(work)
        return report
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"no space left ({error.strerror}); the finished shards stay: make room and run this again"
            raise OSError(error.errno, reason, str(out)) from error
        raise


def _run(job: PrepareJob, engine: Engine, workers: int, slurm: Mapping[str, Any], progress: bool) -> None:
    pending = [k for k in range(len(job.plan.shards)) if not job.is_done(k)]
    with _bar(job.plan, pending, progress) as tick:
        if pending:
            run_array = partial(run_slurm, folder=job.plan.out / "work" / "slurm", options=slurm)
            engines: dict[Engine, Callable[..., None]] = {"local": run_local, "ray": run_ray, "slurm": run_array}
            engines[engine](job, pending, workers, tick)


def prepare_study(
    source: StudyRecord[ScanSource],
    recipe: Recipe,
    left_out: Mapping[int, tuple[str, str]] | None = None,
    begin: Callable[[int], None] = lambda m: None,
    hidden: bool = False,
) -> StudyRecord[PreparedScan]:
    """Read and prepare one study: a function of the source's files and the recipe alone.

    Args:
        hidden: scans are numbered, and their descriptions and the reasons of rejections dropped.
        left_out: places of scans that are not to be tried, with rule and reason.
        begin: called with a scan's place before it is read.
    """
    scans: list[PreparedScan] = []
    rejected: list[Rejection] = []
    for m, scan in enumerate(source.scans):
        kept = replace(scan, name=f"{m:03d}", description="") if hidden else scan
        if left_out and m in left_out:
            rejected.append(Rejection(source.uid, kept.name, *left_out[m]))
            continue
        begin(m)
        try:
            scans += [_checked(prepared).of(kept) for prepared in recipe.prepare(scan)]
        except ScanError as error:
            rejected.append(replace(error.of(source.uid, kept.name), reason=_for_the_store(error.reason, scan)))
        except ImportError:
            raise  # says what to install: no fault of the scan
        except Exception as error:
            reason = _for_the_store(f"{type(error).__name__}: {error}", scan)
            rejected.append(Rejection(source.uid, kept.name, "error", reason))
    if not scans:
        reason = f"none of its {len(source.scans)} scans can be used" if source.scans else "it has no scans"
        rejected.append(Rejection(source.uid, "", "no_scans", reason))
    if hidden:
        rejected = [replace(rejection, reason="") for rejection in rejected]
    return source.having(scans, rejected)


def _checked(scan: PreparedScan) -> PreparedScan:
    if scan.image.dtype != torch.uint8 or scan.image.dim() != 3 or 0 in scan.image.shape:
        raise TypeError(f"the recipe made {scan.image.dtype} {tuple(scan.image.shape)}, not uint8 (D, H, W)")
    return scan


def _for_the_store(reason: str, scan: ScanSource) -> str:
    """Without where the input lay, and without addresses in memory, which differ from run to run."""
    reason = re.sub(r"\b0x[0-9a-f]+", "0x...", reason)
    for folder in sorted({str(file.parent) for file in scan.files}, key=len, reverse=True):
        reason = reason.replace(f"{folder}/", "")
    return encodable(reason)


@dataclass(frozen=True)
class PrepareJob:
    """The job of a plan, a unit of which is a shard (see `workers.Job`)."""

    plan: Plan
    recipe: Recipe
    step_seconds: float

    def run(self, unit: int, notify: Callable[[Event], None]) -> None:
        torch.set_num_threads(1)  # there is a worker for every CPU
        file, studies = shard_file(self.plan.out, unit), self._studies(unit, notify)
        write_shard(file, studies, self.recipe.to_dict(), self.recipe.hash, self.plan.out / "work")

    def _studies(self, k: int, notify: Callable[[Event], None]) -> Iterator[StudyRecord[PreparedScan]]:
        blamed = self._blamed(k)
        for s, source in enumerate(self.plan.studies(k)):
            left_out = {m: why for (at, m), why in blamed.items() if at == s}

            def begin(m: int, s: int = s) -> None:
                notify(Event((s, m), 0, 0))

            study = prepare_study(source, self.recipe, left_out, begin, self.plan.hidden)
            notify(Event(None, 1, len(source.scans)))
            yield study

    def blame(self, unit: int, step: Step, rule: str, reason: str) -> None:
        blamed = [[*at, *why] for at, why in {**self._blamed(unit), step: (rule, reason)}.items()]
        with replacing(self._blame_file(unit), self.plan.out / "work") as temporary:
            temporary.write_text(json.dumps(blamed), encoding="utf-8")

    def _blamed(self, k: int) -> dict[Step, tuple[str, str]]:
        file = self._blame_file(k)
        content = read_plain(file) if file.exists() else []
        return {(s, m): (rule, reason) for s, m, rule, reason in content}

    def _blame_file(self, k: int) -> Path:
        return self.plan.out / "work" / f"{k:05d}.blamed.json"

    def is_done(self, unit: int) -> bool:
        return shard_file(self.plan.out, unit).exists()

    def size(self, unit: int) -> tuple[int, int]:
        return self.plan.shards[unit][:2]


def _finished(out: Path, terms: Mapping[str, Any]) -> Report | None:
    """The report of a finished store on these terms; None if it is not finished."""
    info = read_info(out)
    if not info:
        return None
    compare_terms(out, info, terms)
    return Report(**read_json(out / "report.json", out))


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """The folder `work/` of a new or unfinished store, for this run alone."""
    work = out / "work"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder for the store")
    if out.exists() and not (out / "shards").is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: neither empty nor a store: choose another folder")
    for folder in (out / "shards", work):
        folder.mkdir(parents=True, exist_ok=True)
    for path in (out / "shards", work, *work.iterdir()):
        check_within(path, out)
    with locked(work / "lock", f"{out}: another run is writing this store; wait for its end, or choose another folder"):
        _remove_temporary(work)  # of runs that were killed
        try:
            yield work
        finally:
            _remove_temporary(work)  # of workers that were


def _remove_temporary(work: Path) -> None:
    for temporary in work.glob("*.tmp"):
        temporary.unlink(missing_ok=True)


@contextmanager
def _bar(plan: Plan, pending: Sequence[int], show: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of studies, which starts at those of earlier runs, with scans a second beside it."""
    total, left = sum(shard[0] for shard in plan.shards), sum(plan.shards[k][0] for k in pending)
    done = 0
    with tqdm(total=total, initial=total - left, desc="preparing", unit="study", disable=not show) as bar:

        def tick(studies: int, scans: int) -> None:
            nonlocal done
            done += scans
            if studies:
                bar.set_postfix_str(f"{done / max(1e-9, bar.format_dict['elapsed']):.1f} scans/s", False)
                bar.update(studies)

        yield tick
