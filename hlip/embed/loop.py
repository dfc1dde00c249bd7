"""Embeddings of many studies, batched by tokens, by one process or several, and kept where a job is broken off.

Shapes: N studies, B studies of a batch, P embeddings of a study, E embedding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hlip_kernels import hold_weights, multiplies_bfloat16

from ..model.clip import HLIPModel
from ..model.memory import release_memory
from ..model.plan import TokenBatch
from ..output import write_whole
from ..processes import Processes, share
from ..read.scan import Rejection
from ..read.schema import check_ranges, check_types
from ..store.tools import cut
from ..study import Study
from ..terminal import guard_streams
from .baselines import SliceEncoder
from .encoders import Embedder, MakeBatches
from .inputs import OneScan, Studies, one_scan
from .parts import Parts, holds, parts_of
from .table import Embeddings

MAX_TOKENS = 8192
PARTS = 256  # that a job is cut into if it is large enough; what is lost when it is broken off, and how ranks share it
LARGEST_PART = 32  # batches
Dtype = Literal["auto", "fp32", "bf16"]
Unit = Literal["study", "scan", "both"]
Rows = list[tuple[str, str]]  # of a batch: uid, and the scan's name; empty if it is the whole study


@dataclass(frozen=True)
class Options:
    """What embeddings depend on beside model and studies.

    unit: what an embedding is of: a whole study, a scan as if it were a study of its own, or both.
    max_tokens: studies run together up to so many patch tokens; more is faster on GPUs and needs more memory
    dtype: type of matrix products (default: bf16 on GPUs, and on CPUs with instructions for it; otherwise fp32)
    one_scan: show the model one scan of each study, drawn at random: the baseline of one scan a study

    A batch that is one study may have more tokens. Which studies share a batch changes the last bits.
    """

    unit: Unit = "study"
    max_tokens: int = MAX_TOKENS
    dtype: Dtype = "auto"
    one_scan: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, {"at least 1": ["max_tokens"]})
        if self.unit == "both" and self.one_scan is not None:
            raise ValueError("one scan of each study, or every scan: not both")

    def on(self, device: torch.device) -> Options:
        """With "auto" resolved."""
        auto: Dtype = "bf16" if device.type == "cuda" or multiplies_bfloat16() else "fp32"
        return replace(self, dtype=auto if self.dtype == "auto" else self.dtype)


def embed(
    model: HLIPModel | SliceEncoder,
    studies: Studies | Iterable[Study],
    options: Options | None = None,
    out: Path | None = None,
    workers: int = 0,
    among: Processes | None = None,
    prompts: Sequence[Sequence[str]] | None = None,
) -> Embeddings | None:
    """Embed all studies: rows of each study, then those of its scans; of each, one a head.

    The batches follow from the studies and the options, and processes share the batches out: the number of processes
    changes no bit. What cannot be read is left out: `facts["failed"]` holds (uid, reason) of each study, and
    `facts["left_out"]` (study, scan, rule, reason) of each scan of the others.

    Args:
        studies: of a store, in files or on a list (see `inputs`); or studies as they are, which are taken one by one
            and let go: an error in taking one is the caller's.
        out: file to write, which several processes need. What is finished lies in `parts_of(out)` until all is: a job
            that was broken off goes on from there, and one that `out` holds already is not done again.
        workers: processes that read studies while the model runs; 0 reads in between.
        among: the processes that share the job.
        prompts: for models whose similarities are not those of one embedding, such as `SliceEncoder` with pool "max":
            in place of an embedding, a row holds the similarities to these T prompts, (T), each of several sentences.

    Returns:
        The embeddings on the first process, None on the others.

    Raises:
        ValueError: no study could be embedded; or `out` or its parts are there already, and of another job.
    """
    encoder, among = Embedder.of(model, prompts), among or Processes()
    options = (options or Options()).on(encoder.device)
    if not isinstance(studies, Studies):
        if out is not None or among.size > 1:
            raise ValueError("a job that is kept or shared needs studies of a store, in files or on a list")
        table: Embeddings | None = _embed_given(encoder, studies, options)
    else:
        if out is None and among.size > 1:
            raise ValueError("several processes need a file to write to")
        if options.one_scan is not None:
            studies = OneScan(studies, options.one_scan)
        job = job_of(encoder, studies, options)
        if out is not None and among.agree(holds(out, job) if among.first else False):
            if among.first:
                tqdm.write(f"{out}: holds these embeddings already", file=sys.stderr)
            return Embeddings.read(out) if among.first else None
        table = _embed_job(encoder, studies, options, out, workers, among, job)
    if table is not None and len(table) == 0 and (failed := table.facts["failed"]):
        several = f"none of {len(failed)} studies could be embedded; the first: " if len(failed) > 1 else ""
        raise ValueError(f"{several}{failed[0][1]}")
    return table


def _embed_given(encoder: Embedder, studies: Iterable[Study], options: Options) -> Embeddings:
    if options.one_scan is not None:
        studies = (one_scan(study, options.one_scan) for study in studies)
    with _evaluating(encoder, options):
        batches = _batches(studies, encoder.batches, options)
        return _part(encoder, (_Loaded(len(rows), [(batch, rows)]) for batch, rows in batches))


def _embed_job(
    encoder: Embedder,
    studies: Studies,
    options: Options,
    out: Path | None,
    workers: int,
    among: Processes,
    job: dict[str, Any],
) -> Embeddings | None:
    batches = list(cut(range(len(studies.uids)), lambda i: _tokens(studies, i, options), options.max_tokens))
    size = min(max(1, len(batches) // PARTS), LARGEST_PART)
    units = [batches[first : first + size] for first in range(0, len(batches), size)]
    with Parts.opened(out and parts_of(out), job, len(units), among) as parts:
        for number, table in _embedded(encoder, studies, options, units, parts, workers, among):
            parts.write(number, table)
        among.wait()
        if not among.first:
            return None
        whole = Embeddings.joined(parts.read())
        lost, left_out = [list(pair) for pair in studies.lost], [list(astuple(scan)) for scan in studies.left_out]
        facts = {
            "job": job,
            "failed": lost + whole.facts["failed"],
            "left_out": left_out + whole.facts["left_out"],
        }
        whole = replace(whole, facts=facts)
        if len(whole) and out is not None:
            write_whole(out, lambda file: whole.write(file, out.suffix))
        parts.remove()
    return whole


def job_of(encoder: Embedder, studies: Studies, options: Options) -> dict[str, Any]:
    """What tells a job from others: hashes of what it reads, and its options."""
    return {"model": encoder.digest(), "studies": studies.digest(), **asdict(options)}


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
        pinned = [
            (batch.pin_memory() if isinstance(batch, TokenBatch) else batch, rows) for batch, rows in self.batches
        ]
        return replace(self, batches=pinned)


def _batches(studies: Iterable[Study], make: MakeBatches, options: Options) -> Iterator[tuple[Any, Rows]]:
    """Batches for the model, each with the names of its rows."""
    rows: Rows = []

    def views() -> Iterator[Study]:
        for study in studies:
            if options.unit != "scan":
                rows.append((study.uid, ""))
                yield study
            if options.unit != "study":
                names = study.names or [str(m) for m in range(len(study.scans))]
                for scan, name in zip(study.scans, names, strict=True):
                    rows.append((study.uid, name))
                    yield Study(study.uid, [scan], [name])

    for batch, run in make(views(), options.max_tokens):
        yield batch, rows[: len(run)]
        del rows[: len(run)]


class _Reader(Dataset):
    """Batches of studies, read and made ready for the model."""

    def __init__(self, studies: Studies, batches: Sequence[Sequence[int]], make: MakeBatches, options: Options) -> None:
        self.studies, self.batches, self.make, self.options = studies, batches, make, options

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> _Loaded:
        loaded, readable = _Loaded(len(self.batches[number])), []
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
            readable.append(study)
        loaded.batches = list(_batches(readable, self.make, self.options))
        return loaded


def _reason(error: Exception) -> str:
    """What an error says, in a line, without the folder that its file lies in: it is for the results."""
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    text = str(error).replace(f"{Path(path).parent}/", "") if path else str(error)
    return " ".join(text.split()) or type(error).__name__


def _embedded(
    encoder: Embedder,
    studies: Studies,
    options: Options,
    units: Sequence[Sequence[Sequence[int]]],
    parts: Parts,
    workers: int,
    among: Processes,
) -> Iterator[tuple[int, Embeddings]]:
    """This process' share of the parts that are not there, one by one."""
    missing = among.agree([number for number in range(len(units)) if number not in parts.finished])
    cost = [sum(_tokens(studies, i, options) for batch in units[number] for i in batch) for number in missing]
    mine = [missing[i] for i in share(np.array(cost), among.size)[among.rank]]
    batches = [batch for number in mine for batch in units[number]]
    loader = DataLoader(
        _Reader(studies, batches, encoder.batches, options),
        batch_size=None,
        num_workers=min(workers, max(0, len(batches) - 1)),
        worker_init_fn=_begin_worker,
        pin_memory=encoder.device.type == "cuda",
    )
    whose = f" (process 0 of {among.size})" if among.size > 1 else ""
    total, done = sum(map(len, batches)), sum(len(batch) for number in parts.finished for batch in units[number])
    if among.first and done:
        tqdm.write(f"going on: {done} of {len(studies.uids)} studies are there", file=sys.stderr)
    bar = tqdm(total=total, desc=f"embedding{whose}", unit="study", disable=not among.first or total < 2 or None)
    with bar, _evaluating(encoder, options):
        read = _read(loader)
        for number in mine:
            yield number, _part(encoder, islice(read, len(units[number])), bar.update)


def _read(loader: DataLoader) -> Iterator[_Loaded]:
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that reads studies was ended ({error}): there may be too little memory") from error


@contextlib.contextmanager
def _evaluating(encoder: Embedder, options: Options) -> Iterator[None]:
    training = encoder.module.training
    encoder.module.eval()
    cast = torch.autocast(encoder.device.type, torch.bfloat16, enabled=options.dtype == "bf16")
    try:
        with torch.no_grad(), cast, hold_weights():
            yield
    finally:
        encoder.module.train(training)


def _part(encoder: Embedder, loaded: Iterable[_Loaded], done: Callable[[int], Any] = lambda size: None) -> Embeddings:
    """The embeddings of batches as one table; `done` is told how many studies each had."""
    tables = [_encoded(encoder, _Loaded(0))]  # without rows, as there may be no batch
    for read in loaded:
        tables.append(_encoded(encoder, read))
        done(read.size)
    return Embeddings.joined(tables)


def _encoded(encoder: Embedder, read: _Loaded) -> Embeddings:
    rows: list[tuple[str, str, int]] = []
    vectors: list[np.ndarray] = []
    failed = list(read.failed)
    for batch, names in read.batches:
        try:
            embeddings = encoder.encode(batch).float().cpu().numpy()
        except torch.cuda.OutOfMemoryError as error:
            if len(names) > 1:
                raise ValueError(f"a batch of {len(names)} studies does not fit: lower max_tokens") from error
            failed.append((names[0][0], "does not fit into the device's memory"))
            continue
        for (uid, scan), heads in zip(names, embeddings.reshape(len(names), -1, embeddings.shape[-1]), strict=True):
            if np.isfinite(heads).all():
                rows += [(uid, scan, head) for head in range(len(heads))]
                vectors += [*heads]
            else:
                failed.append((uid, f"the embedding of {f'scan {scan}' if scan else 'the study'} is not finite"))
    uids, scans, numbers = zip(*rows, strict=True) if rows else ((), (), ())
    return Embeddings(
        np.array(uids, dtype=str),
        np.array(scans, dtype=str),
        np.array(numbers, dtype=np.int8),
        np.stack(vectors) if vectors else np.empty((0, 0), dtype=np.float32),
        {"failed": [list(pair) for pair in failed], "left_out": [list(astuple(lost)) for lost in read.left_out]},
    )


def _begin_worker(worker: int) -> None:
    guard_streams()  # which a new interpreter does not inherit
    release_memory()
