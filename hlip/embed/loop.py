"""Embeddings of many studies, batched by tokens, by one process or several, and kept where a job is broken off.

Shapes: N studies, B studies of a batch, P embeddings of a study, E embedding.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hlip_kernels import hold_weights, multiplies_bfloat16

from ..model.clip import HLIPModel
from ..model.memory import release_memory
from ..model.plan import TokenBatch
from ..output import locked, write_text, write_whole
from ..processes import Processes
from ..read.paths import check_within
from ..read.safe import MOST_SETTINGS, read_json
from ..read.scan import Rejection
from ..store.tools import cut
from ..study import Study
from ..terminal import guard_streams
from .baselines import Encoder
from .encoders import Embedder, MakeBatches, packed
from .inputs import OneScan, Studies
from .table import Embeddings

MAX_TOKENS = 8192
PARTS = 256  # that a job is cut into if it is large enough; what is lost when it is broken off, and how ranks share it
LARGEST_PART = 32  # batches
Dtype = Literal["auto", "fp32", "bf16"]
Unit = Literal["study", "scan", "both"]
Rows = list[tuple[str, str]]  # of a batch: uid, and the scan's name; empty if it is the whole study


@torch.no_grad()
def embed_studies(
    model: HLIPModel, studies: Iterable[Study], max_tokens: int = MAX_TOKENS
) -> Iterator[tuple[str, Tensor]]:
    """Yield each study's uid and its (E) float32 embedding of unit length, on the host, in order.

    Args:
        max_tokens: studies are packed together up to this many patch tokens; a larger study runs alone.
    """
    training = model.training
    model.eval()
    try:
        for batch, run in packed(model.config.vision, studies, max_tokens):
            embeddings = model.encode_image(batch)
            if model.config.per_prefix:  # the first is for zero-shot classification
                embeddings = embeddings[:, 0]
            yield from zip((study.uid for study in run), embeddings.float().cpu(), strict=True)
    finally:
        model.train(training)


@dataclass(frozen=True)
class Options:
    """What embeddings depend on beside model and studies.

    unit: what an embedding is of: a whole study, a scan as if it were a study of its own, or both.
    max_tokens: of a batch, if it is not one study. Which studies share a batch changes the last bits.
    dtype: of products of matrices; "auto" is bf16 on GPUs, and on CPUs that have instructions for it, otherwise fp32.
    one_scan: of each study only one scan is seen, drawn with this seed; None for all. See `inputs.OneScan`.
    """

    unit: Unit = "study"
    max_tokens: int = MAX_TOKENS
    dtype: Dtype = "auto"
    one_scan: int | None = None

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        if self.unit == "both" and self.one_scan is not None:
            raise ValueError("one scan of each study, or every scan: not both")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {self.max_tokens}")

    def on(self, device: torch.device) -> Options:
        """With "auto" resolved."""
        auto: Dtype = "bf16" if device.type == "cuda" or multiplies_bfloat16() else "fp32"
        return replace(self, dtype=auto if self.dtype == "auto" else self.dtype)


def embed(
    model: HLIPModel | Encoder,
    studies: Studies,
    options: Options | None = None,
    out: Path | None = None,
    workers: int = 0,
    among: Processes | None = None,
) -> Embeddings | None:
    """Embed all studies: rows of each study, then those of its scans; of each, one a head.

    The batches follow from the studies and the options, and processes share the batches out: the number of processes
    changes no bit. What cannot be read is left out: `facts["failed"]` holds (uid, reason) of each study, and
    `facts["left_out"]` (study, scan, rule, reason) of each scan of the others.

    Args:
        out: file to write, which several processes need. What is finished lies in `parts_of(out)` until all is: a job
            that was broken off goes on from there, and one that `out` holds already is not done again.
        workers: processes that read studies while the model runs; 0 reads in between.
        among: the processes that share the job.

    Returns:
        The embeddings on the first process, None on the others.

    Raises:
        ValueError: no study could be embedded; or `out` or its parts are there already, and of another job.
    """
    return _encode_all(Embedder.of(model), studies, options, out, workers, among)


def embed_similarities(
    model: Encoder,
    prompts: Sequence[Sequence[str]],
    studies: Studies,
    options: Options | None = None,
    out: Path | None = None,
    workers: int = 0,
    among: Processes | None = None,
) -> Embeddings | None:
    """As `embed`, but a row holds a study's similarities to T prompts, (T), each prompt given by its sentences.

    For models whose similarities are not those of one embedding, such as `SliceEncoder` with pool "max".
    """
    return _encode_all(Embedder.of_similarities(model, prompts), studies, options, out, workers, among)


def _encode_all(
    model: Embedder,
    studies: Studies,
    options: Options | None,
    out: Path | None,
    workers: int,
    among: Processes | None,
) -> Embeddings | None:
    options, among = (options or Options()).on(model.device), among or Processes()
    if options.one_scan is not None:
        studies = OneScan(studies, options.one_scan)
    if out is None and among.size > 1:
        raise ValueError("several processes need a file to write to")
    job = job_of(model, studies, options)
    if out is not None and among.agree(_holds(out, job) if among.first else False):
        if among.first:
            tqdm.write(f"{out}: holds these embeddings already", file=sys.stderr)
        return Embeddings.read(out) if among.first else None
    batches = list(cut(range(len(studies.uids)), lambda i: _tokens(studies, i, options), options.max_tokens))
    each = min(max(1, len(batches) // PARTS), LARGEST_PART)
    units = [batches[first : first + each] for first in range(0, len(batches), each)]
    with _Folder.opened(out and parts_of(out), job, len(units), among) as folder:
        for number, part in _embedded(model, studies, options, units, folder, workers, among):
            folder.write(number, part)
        among.wait()
        if not among.first:
            return None
        table = folder.joined(job, studies)
        if len(table) and out is not None:
            write_whole(out, lambda file: table.write(file, out.suffix))
        folder.remove()
    if len(table) == 0:
        failed = table.facts["failed"]
        several = f"none of {len(failed)} studies could be embedded; the first: " if len(failed) > 1 else ""
        raise ValueError(f"{several}{failed[0][1]}")
    return table


def parts_of(out: Path) -> Path:
    """Where a job keeps what is finished."""
    return out.with_name(f"{out.name}.parts")


def _holds(out: Path, job: dict[str, Any]) -> bool:
    """Whether a file is what the job would write.

    Raises:
        ValueError: it is something else, which is not to be lost.
    """
    if not out.exists():
        return False
    known = Embeddings.read(out).facts.get("job")
    if known != job:
        raise ValueError(f"{out} is of another job ({_differ(known, job)}): remove it, or choose another name")
    return True


def _differ(known: Any, job: dict[str, Any]) -> str:
    names = [key for key in job if not isinstance(known, dict) or known.get(key) != job[key]]
    return f"{', '.join(names)} {'differs' if len(names) == 1 else 'differ'}"


def job_of(model: Embedder, studies: Studies, options: Options) -> dict[str, Any]:
    """What tells a job from others: hashes of what it reads, and its options."""
    return {"model": model.digest(), "studies": studies.digest(), **asdict(options.on(model.device))}


def _tokens(studies: Studies, i: int, options: Options) -> int:
    """What study `i` takes of a batch: all of it, if its size is not known."""
    return int(studies.tokens[i]) * (2 if options.unit == "both" else 1) or options.max_tokens


@dataclass
class _Loaded:
    """A batch as read: more than one if it turned out larger than thought.

    size: studies, those that failed included.
    """

    size: int
    batches: list[tuple[Any, Rows]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[Rejection] = field(default_factory=list)

    def pin_memory(self) -> _Loaded:
        pinned = [(each.pin_memory() if isinstance(each, TokenBatch) else each, rows) for each, rows in self.batches]
        return replace(self, batches=pinned)


class _Batches(Dataset):
    """Batches of studies, read and made ready for the model."""

    def __init__(self, studies: Studies, batches: Sequence[Sequence[int]], make: MakeBatches, options: Options) -> None:
        self.studies, self.batches, self.make, self.options = studies, batches, make, options

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> _Loaded:
        loaded = _Loaded(len(self.batches[number]))
        views: list[Study] = []
        names: list[str] = []
        for i in self.batches[number]:
            try:
                study = replace(self.studies.read(i), uid=self.studies.uids[i])
                if not self.studies.tokens[i]:
                    list(self.make([study], self.options.max_tokens))  # says so if it does not suit the model
            except ImportError:
                raise  # says what to install: no fault of the study
            except Exception as error:  # damaged files can raise anything
                loaded.failed.append((self.studies.uids[i], _reason(error)))
                continue
            loaded.left_out += study.left_out
            if self.options.unit != "scan":
                views.append(study)
                names.append("")
            if self.options.unit != "study":
                of_scans = study.names or [str(m) for m in range(len(study.scans))]
                views += [Study(study.uid, [scan], [name]) for scan, name in zip(study.scans, of_scans, strict=True)]
                names += of_scans
        rows = zip((view.uid for view in views), names, strict=True)
        for batch, run in self.make(views, self.options.max_tokens):
            loaded.batches.append((batch, list(islice(rows, len(run)))))
        return loaded


def _reason(error: Exception) -> str:
    """What an error says, in a line, without the folder that its file lies in: it is for the results."""
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    text = str(error).replace(f"{Path(path).parent}/", "") if path else str(error)
    return " ".join(text.split()) or type(error).__name__


def _embedded(
    model: Embedder,
    studies: Studies,
    options: Options,
    units: Sequence[Sequence[Sequence[int]]],
    folder: _Folder,
    workers: int,
    among: Processes,
) -> Iterator[tuple[int, Embeddings]]:
    """This process' share of the parts that are not there, one by one."""
    missing = among.agree([number for number in range(len(units)) if number not in folder.finished])
    cost = [sum(_tokens(studies, i, options) for batch in units[number] for i in batch) for number in missing]
    mine = [missing[i] for i in _shares(cost, among.size)[among.rank]]
    batches = [batch for number in mine for batch in units[number]]
    loader = DataLoader(
        _Batches(studies, batches, model.batches, options),
        batch_size=None,
        num_workers=min(workers, max(0, len(batches) - 1)),
        worker_init_fn=_begin_worker,
        pin_memory=model.device.type == "cuda",
    )
    whose = f" (process 0 of {among.size})" if among.size > 1 else ""
    total, done = sum(map(len, batches)), sum(len(batch) for number in folder.finished for batch in units[number])
    if among.first and done:
        tqdm.write(f"going on: {done} of {len(studies.uids)} studies are there", file=sys.stderr)
    bar = tqdm(total=total, desc=f"embedding{whose}", unit="study", disable=not among.first or total < 2 or None)
    with bar, _evaluating(model, options):
        read = iter(loader)
        for number in mine:
            rows: list[tuple[str, str, int]] = []
            vectors: list[np.ndarray] = []
            failed: list[tuple[str, str]] = []
            left_out: list[Rejection] = []
            for _ in units[number]:
                loaded = _next(read)
                failed += loaded.failed
                left_out += loaded.left_out
                for batch, names in loaded.batches:
                    _encode(model, batch, names, rows, vectors, failed)
                bar.update(loaded.size)
            yield number, _table(rows, vectors, failed, left_out)


def _next(read: Iterator[_Loaded]) -> _Loaded:
    try:
        return next(read)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that reads studies was ended ({error}): there may be too little memory") from error


@contextlib.contextmanager
def _evaluating(model: Embedder, options: Options) -> Iterator[None]:
    training = model.module.training
    model.module.eval()
    cast = torch.autocast(model.device.type, torch.bfloat16, enabled=options.dtype == "bf16")
    try:
        with torch.no_grad(), cast, hold_weights():
            yield
    finally:
        model.module.train(training)


def _encode(
    model: Embedder,
    batch: Any,
    names: Rows,
    rows: list[tuple[str, str, int]],
    vectors: list[np.ndarray],
    failed: list[tuple[str, str]],
) -> None:
    try:
        embeddings = model.encode(batch).float().cpu().numpy()
    except torch.cuda.OutOfMemoryError as error:
        if len(names) > 1:
            raise ValueError(f"a batch of {len(names)} studies does not fit: lower max_tokens") from error
        failed.append((names[0][0], "does not fit into the device's memory"))
        return
    for (uid, scan), heads in zip(names, embeddings.reshape(len(names), -1, embeddings.shape[-1]), strict=True):
        if not np.isfinite(heads).all():
            failed.append((uid, f"the embedding of {f'scan {scan}' if scan else 'the study'} is not finite"))
            continue
        rows += [(uid, scan, head) for head in range(len(heads))]
        vectors += [*heads]


def _table(
    rows: Sequence[tuple[str, str, int]],
    vectors: Sequence[np.ndarray],
    failed: Sequence[tuple[str, str]],
    left_out: Sequence[Rejection],
) -> Embeddings:
    return Embeddings(
        np.array([uid for uid, _, _ in rows], dtype=str),
        np.array([scan for _, scan, _ in rows], dtype=str),
        np.array([head for _, _, head in rows], dtype=np.int8),
        np.stack(vectors) if vectors else np.empty((0, 0), dtype=np.float32),
        {"failed": [list(each) for each in failed], "left_out": [list(astuple(each)) for each in left_out]},
    )


def _shares(cost: Sequence[float], count: int) -> list[list[int]]:
    """Indices for each process, increasing: the costliest first, to the process that has least."""
    members: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, process) for process in range(count)]
    for i in sorted(range(len(cost)), key=lambda i: -cost[i]):
        load, process = heapq.heappop(heap)
        members[process].append(i)
        heapq.heappush(heap, (load + cost[i], process))
    return [sorted(each) for each in members]


def _begin_worker(worker: int) -> None:
    guard_streams()  # which a new interpreter does not inherit
    release_memory()


class _Folder:
    """Finished parts of a job: files, or in memory if there is no folder."""

    def __init__(self, path: Path | None, count: int) -> None:
        self.path, self.count = path, count
        self.memory: dict[int, Embeddings] = {}
        self.finished = {i for i in range(count) if path and self._file(i).exists()}

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path | None, job: dict[str, Any], count: int, among: Processes) -> Iterator[_Folder]:
        """The folder, held by one run at a time. If the run fails before there is a part, the folder goes too.

        Raises:
            ValueError: held by another run, or of another job.
        """
        if path is None:
            yield cls(None, count)
            return
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if among.first:
                stack.enter_context(_held(path))
                _check_job(path / "job.json", job)
            among.wait()
            folder = cls(path, count)
            try:
                yield folder
            finally:
                if among.first and not any(folder._file(i).exists() for i in range(count)):
                    folder.remove()

    def _file(self, number: int) -> Path:
        assert self.path is not None
        return self.path / f"{number:06d}.npz"

    def write(self, number: int, part: Embeddings) -> None:
        if self.path is None:
            self.memory[number] = part
            return
        write_whole(self._file(number), lambda file: part.write(file, ".npz"))

    def joined(self, job: dict[str, Any], studies: Studies) -> Embeddings:
        parts = [self.memory[i] if self.path is None else Embeddings.read(self._file(i)) for i in range(self.count)]
        failed = [list(each) for each in studies.lost] + [each for part in parts for each in part.facts["failed"]]
        left_out = [list(astuple(each)) for each in studies.left_out]
        left_out += [each for part in parts for each in part.facts.get("left_out", ())]
        return replace(Embeddings.joined(parts), facts={"job": job, "failed": failed, "left_out": left_out})

    def remove(self) -> None:
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    for file in (path, *path.iterdir()):
        check_within(file, path.parent)
    with locked(path / "lock", f"{path}: another run is at work here"):
        yield


def _check_job(path: Path, job: dict[str, Any]) -> None:
    try:
        known = read_json(path, MOST_SETTINGS)
    except FileNotFoundError:
        write_text(path, json.dumps(job, indent=1))
        return
    except ValueError:
        known = None
    if known != job:
        raise ValueError(
            f"{path.parent} holds parts of another job ({_differ(known, job)}): go on with that, remove the folder, or "
            "choose another name to write to"
        )
