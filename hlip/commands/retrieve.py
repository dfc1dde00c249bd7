"""`hlip retrieve`: studies by their reports, and back."""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.batch import Study, pack
from ..data.dataset import StudyDataset
from ..data.store import Store
from ..model.clip import HLIPModel
from ..tasks.baselines import PREFIX, SliceEncoder, read_slices
from ..tasks.embeddings import Embeddings
from ..tasks.retrieve import DIRECTIONS, KS, Pairs, draw_recall, embed_texts, nearest, retrieve
from .shared import add_model, load_model, write_whole

DESCRIPTION = """\
Rank all reports of a store for each of its studies, and all studies for each report: recall at k and median rank.
Studies with the same report are matches of each other, as nobody could tell which of them it belongs to. Of equally
similar ones, those that do not match come first. Studies without a report are left out.

A model with two embeddings of a study is measured twice: the first against impressions (head 0), the second against
findings (head 1); either section stands in for the other if that is empty."""
EPILOG = """\
writes into OUT:
  retrieve.json    recall at k, the same of a random order, median rank; answers to --query and --study
  ranks.csv        for each study the rank of its report, and for its report the rank of the study
  recall.png       recall against k"""


def add(commands: Any) -> None:
    """Add `retrieve` to the subparsers of `hlip`."""
    command = commands.add_parser(
        "retrieve",
        help="find studies by reports and reports by studies; recall at k",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("store", type=Path, metavar="STORE", help="studies with reports, of `hlip prepare`")
    add_model(command)
    command.add_argument(
        "--embeddings", type=Path, metavar="FILE", help="of the store by this model (default: they are made)"
    )
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write into")
    command.add_argument("--k", nargs="+", type=int, default=KS, metavar="K", help=f"default: {' '.join(map(str, KS))}")
    command.add_argument(
        "--query", action="append", default=[], metavar="TEXT", help="show the studies it fits; repeat"
    )
    command.add_argument(
        "--study", action="append", default=[], metavar="UID", help="show the studies and reports nearest to it; repeat"
    )
    command.add_argument("--top", type=int, default=5, metavar="N", help="how many to show (default: 5)")
    command.add_argument(
        "--pool",
        choices=("mean", "max"),
        default="mean",
        help=f"of the slices, for --model {PREFIX}... (default: mean)",
    )
    command.add_argument("--slices", type=Path, metavar="JSON", help=f"the slices to see, for --model {PREFIX}...")
    command.set_defaults(run=_retrieve)


def _retrieve(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out}: expected a folder")
    if args.top < 1 or min(args.k) < 1:
        raise ValueError(f"--k and --top must be positive, got {min(*args.k, args.top)}")
    if empty := [text for text in args.query if not text.strip()]:
        raise ValueError(f"--query {empty[0]!r}: expected words")
    store = Store(args.store)
    store.indices(args.study)
    made = Embeddings.read(args.embeddings) if args.embeddings else None
    model = _load(args)
    if made is None:
        made = _embed(model, store)
    bar = functools.partial(tqdm, disable=None)
    pairs = Pairs.embed(model, store, made, progress=functools.partial(bar, desc="reports", unit="batch"))
    if absent := [uid for uid in args.study if uid not in pairs.uids]:
        raise ValueError(f"--study {absent[0]}: has no report or no embedding")
    figures = retrieve(pairs, args.k, functools.partial(bar, desc="ranking", unit="block"))
    for what, uids in (
        ("without report", pairs.without_report),
        ("without embedding", pairs.without_embedding),
        ("not in the store", pairs.not_in_store),
    ):
        if uids:
            more = ", ..." if len(uids) > 5 else ""
            print(f"studies {what}, left out: {len(uids)} ({', '.join(uids[:5])}{more})", file=sys.stderr)
    queries = [_answer(pairs, text, embed_texts(model, [text])[0], args.top) for text in args.query]
    studies = [_neighbours(pairs, uid, args.top) for uid in args.study]

    names = [f"{each['direction']}, head {each['head']}" for each in figures]
    columns = [each["ranks"].tolist() for each in figures]
    _write_csv(args.out / "ranks.csv", [["study", *names], *zip(pairs.uids, *columns, strict=True)])
    write_whole(args.out / "recall.png", lambda file: draw_recall(figures, file, "png"))
    content = {
        "studies": len(pairs.uids),
        "without_report": pairs.without_report,
        "without_embedding": pairs.without_embedding,
        "not_in_store": pairs.not_in_store,
        "embeddings": made.facts,
        "figures": [{key: value for key, value in each.items() if key != "ranks"} for each in figures],
        "queries": queries,
        "nearest": studies,
    }
    text = json.dumps(content, indent=1) + "\n"
    write_whole(args.out / "retrieve.json", lambda file: file.write(text.encode()))
    _print(figures, queries, studies)
    print(f"{args.out}: retrieve.json, ranks.csv, recall.png")


def _load(args: argparse.Namespace) -> HLIPModel | SliceEncoder:
    if not args.model.startswith(PREFIX):
        if args.slices or args.pool != "mean":
            raise ValueError(f"--pool and --slices are for 2D models: --model {PREFIX}FOLDER")
        return load_model(args)
    model = SliceEncoder.from_pretrained(args.model, args.pool, read_slices(args.slices) if args.slices else None)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: cannot be used ({str(error).splitlines()[0]})") from error


def _embed(model: HLIPModel | SliceEncoder, store: Store) -> Embeddings:
    """Embeddings of all studies of a store, of every head that is compared with texts."""
    dataset = StudyDataset(store)
    studies = (dataset[i] for i in tqdm(range(len(dataset)), "embedding", unit="study", disable=None))
    if isinstance(model, HLIPModel):
        heads = 2 if model.config.objective == "dual" else 1
        pairs = list(_by_tokens(model, studies, heads))
    else:
        heads = 1
        if model.pool == "max":
            raise ValueError(
                "--pool max has no embedding that could be compared with texts; retrieval needs --pool mean"
            )
        pairs = [(uid, embedding[None]) for uid, embedding in model.encode_studies(studies)]
    uids = np.repeat(np.array([uid for uid, _ in pairs]), heads)
    embedding = torch.cat([each for _, each in pairs]).numpy()
    head = np.tile(np.arange(heads, dtype=np.int8), len(pairs))
    return Embeddings(uids, np.full(len(uids), ""), head, embedding)


@torch.no_grad()
def _by_tokens(
    model: HLIPModel, studies: Iterator[Study], heads: int, max_tokens: int = 8192
) -> Iterator[tuple[str, Tensor]]:
    """Yield uids and (heads, E) embeddings of studies, packed together up to so many patch tokens."""
    voxels = int(np.prod(model.config.vision.patch_size))
    waiting: list[Study] = []
    for study in _ended(studies):
        size = sum(scan.numel() for each in waiting for scan in each.scans)
        if waiting and (study is None or size + sum(scan.numel() for scan in study.scans) > max_tokens * voxels):
            batch = pack(waiting, model.config.vision.patch_size)
            embeddings = model.encode_image(batch).float().cpu()
            rows = embeddings[:, :heads] if model.config.per_prefix else embeddings[:, None]
            yield from zip(batch.uids, rows, strict=True)
            waiting = []
        if study is not None:
            waiting.append(study)


def _ended(studies: Iterator[Study]) -> Iterator[Study | None]:
    yield from studies
    yield None


def _answer(pairs: Pairs, text: str, query: Tensor, top: int) -> dict[str, Any]:
    """The studies that a text fits, by the first head."""
    found = nearest(query, pairs.image[0], top)
    return {"query": text, "studies": [_entry(pairs, *each) for each in found]}


def _neighbours(pairs: Pairs, uid: str, top: int) -> dict[str, Any]:
    """The studies nearest to a study, and the reports that fit it, by the first head."""
    i = pairs.uids.index(uid)
    studies = nearest(pairs.image[0, i], pairs.image[0], top, leave=i)
    reports = nearest(pairs.image[0, i], pairs.text[0], top)
    return {
        "study": uid,
        "studies": [_entry(pairs, *each) for each in studies],
        "reports": [_entry(pairs, *each) for each in reports],
    }


def _entry(pairs: Pairs, i: int, similarity: float) -> dict[str, Any]:
    return {"study": pairs.uids[i], "similarity": round(similarity, 6), "text": pairs.texts[0][i]}


def _print(figures: Sequence[dict[str, Any]], queries: Sequence[dict[str, Any]], studies: Sequence[Any]) -> None:
    several = len(figures) > len(DIRECTIONS)
    for each in figures:
        head = f" (head {each['head']})" if several else ""
        print(f"{each['direction']}{head}: {each['studies']} studies, {each['texts']} different texts")
        for k, value in each["recall"].items():
            print(f"  recall at {k:<4} {value:6.1%}   random {each['chance'][k]:6.1%}")
        print(f"  median rank {each['median_rank']:g}")
    for each in (*queries, *studies):
        for what in ("studies", "reports"):
            if what in each:
                print(f"{what} nearest to {each.get('query') or each['study']!r}")
                for entry in each[what]:
                    text = " ".join(entry["text"].split())
                    print(
                        f"  {entry['similarity']:.3f}  {entry['study']}  {text[:80]}{'...' if len(text) > 80 else ''}"
                    )


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))
