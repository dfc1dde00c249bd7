"""`hlip retrieve`: studies by their reports, and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import argument, at_least
from ..embed.baselines import PREFIX
from ..embed.texts import check_lengths, embed_texts
from ..evaluate.retrieve import DIRECTIONS, KS, Pairs, draw_recall, nearest, reports_of, retrieve
from ..output import table, write_csv, write_json, write_whole
from ..processes import processes
from ..store.store import Store
from ..study import join_report
from ..terminal import say
from .shared import (
    ENCODER,
    RESULTS,
    add_command,
    bar,
    check_results,
    embedding_arguments,
    embedding_options,
    embeddings_of,
    load_encoder,
    open_studies,
    report_failed,
    report_unjoined,
)

DESCRIPTION = """\
Rank all reports of a store for each of its studies, and all studies for each report: recall at k and median rank.
Studies with the same report are matches of each other, as nobody could tell which of them it belongs to. Of equally
similar ones, those that do not match come first. Studies without a report are left out.

A model with two embeddings of a study is measured twice: the first against impressions (head 0), the second against
findings (head 1); either section stands in for the other if that is empty.

Whatever ends the job, the same command goes on where it stopped."""
EPILOG = """\
writes into FOLDER:
  retrieve.json    recall at k, the same of a random order, median rank; answers to --query and --study
  ranks.csv        for each study the rank of its report, and for its report the rank of the study
  recall.png       recall against k
  embeddings.npz   of the studies, unless they were given (--embeddings)

Under torchrun processes share the embedding, and change no figure. Exit status as of `hlip embed`."""


def add(commands: Any) -> None:
    """Add `retrieve` to the subparsers of `hlip`."""
    add_command(
        commands,
        "retrieve",
        _retrieve,
        "find studies by reports and reports by studies; recall at k",
        DESCRIPTION,
        [
            argument("store", type=Path, metavar="STORE", help="studies with reports, of `hlip prepare`"),
            *ENCODER,
            argument(
                "--embeddings",
                type=Path,
                metavar="FILE",
                help="what `hlip embed` wrote of the store with this model (default: they are made)",
            ),
            RESULTS,
            argument(
                "--k",
                nargs="+",
                type=at_least(1),
                default=KS,
                metavar="K",
                help=f"recall at each (default: {' '.join(map(str, KS))})",
            ),
            argument("--query", action="append", default=[], metavar="TEXT", help="show the studies it fits; repeat"),
            argument(
                "--study",
                action="append",
                default=[],
                metavar="UID",
                help="show the studies and reports nearest to it; repeat",
            ),
            argument("--top", type=at_least(1), default=5, metavar="N", help="how many to show (default: 5)"),
            *embedding_arguments(),
        ],
        EPILOG,
    )


def _retrieve(args: argparse.Namespace) -> int:
    store = _checked_store(args)
    options = embedding_options(args)
    with processes() as among:
        model = load_encoder(args)
        check_lengths(model, args.query)
        studies = None if args.embeddings else open_studies([args.store], model)
        made = embeddings_of(args, model, studies, options, among)
    if made is None:
        return 0
    pairs = Pairs.embed(model, store, made, progress=bar("batch", "reports"))
    if absent := [uid for uid in args.study if uid not in pairs.uids]:
        raise ValueError(f"--study {absent[0]}: has no embedding")
    figures = retrieve(pairs, args.k, bar("block", "ranking"))
    report_unjoined("without report, left out", pairs.without_report)
    report_unjoined("without embedding, left out", pairs.without_embedding)
    report_unjoined("not in the store, left out", pairs.not_in_store)
    queries = [
        {"query": text, "studies": _near(pairs, embed_texts(model, [text])[0], pairs.image, args.top)}
        for text in args.query
    ]
    neighbours = []
    for uid in args.study:
        i = pairs.uids.index(uid)
        image = pairs.image[0, i]
        near = {
            "studies": _near(pairs, image, pairs.image, args.top, leave=i),
            "reports": _near(pairs, image, pairs.text, args.top),
        }
        neighbours.append({"study": uid, **near})
    names = [f"{figure['direction']}, head {figure['head']}" for figure in figures]
    columns = [figure["ranks"].tolist() for figure in figures]
    write_csv(args.out / "ranks.csv", [["study", *names], *zip(pairs.uids, *columns, strict=True)])
    write_whole(args.out / "recall.png", lambda file: draw_recall(figures, file, "png"))
    content = {
        "studies": len(pairs.uids),
        "without_report": pairs.without_report,
        "without_embedding": pairs.without_embedding,
        "not_in_store": pairs.not_in_store,
        "embeddings": made.facts,
        "figures": [{key: value for key, value in figure.items() if key != "ranks"} for figure in figures],
        "queries": queries,
        "nearest": neighbours,
    }
    write_json(args.out / "retrieve.json", content)
    _print(figures, [*queries, *neighbours])
    say(f"{args.out}: retrieve.json, ranks.csv, recall.png")
    return report_failed(made, "retrieve")


def _checked_store(args: argparse.Namespace) -> Store:
    """The store, once all is checked that can be before the work."""
    check_results(args.out)
    if empty := [text for text in args.query if not text.strip()]:
        raise ValueError(f"--query {empty[0]!r}: expected words")
    if args.model.startswith(PREFIX) and args.pool == "max":
        raise ValueError("--pool max has no embedding that could be compared with texts; retrieval needs --pool mean")
    if args.embeddings is not None and args.one_scan is not None:
        raise ValueError("--one_scan: give it to hlip embed in place of --embeddings")
    store = Store(args.store)
    store.indices(args.study)
    reports = reports_of(store)
    if not reports:
        raise ValueError(f"{args.store}: no study has a report")
    if len({join_report(*report).strip() for report in reports.values()}) < 2:
        raise ValueError(
            f"{args.store}: expected two different reports or more, to rank them, got one, of {len(reports)} of its "
            f"{len(store)} studies"
        )
    if absent := [uid for uid in args.study if uid not in reports]:
        raise ValueError(f"--study {absent[0]}: has no report")
    return store


def _near(pairs: Pairs, query: Tensor, gallery: Tensor, top: int, leave: int | None = None) -> list[dict[str, Any]]:
    """The studies or reports of a gallery that are nearest to an embedding, by the first head."""
    return [
        {"study": pairs.uids[i], "similarity": round(similarity, 6), "text": pairs.texts[0][i]}
        for i, similarity in nearest(query, gallery[0], top, leave)
    ]


def _print(figures: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> None:
    several = len(figures) > len(DIRECTIONS)
    for figure in figures:
        head = f" (head {figure['head']})" if several else ""
        say(f"{figure['direction']}{head}: {figure['studies']} studies, {figure['texts']} different texts")
        chance = figure["chance"]
        say(*(f"  recall at {k:<4} {value:6.1%}   random {chance[k]:6.1%}" for k, value in figure["recall"].items()))
        say(f"  median rank {figure['median_rank']:g}")
        if figure["texts"] == 1:
            say("  all texts are the same, so these figures say nothing", file=sys.stderr)
    for answer in answers:
        for what in ("studies", "reports"):
            if what in answer:
                say(f"{what} nearest to {answer.get('query') or answer['study']!r}")
                texts = [" ".join(entry["text"].split()) for entry in answer[what]]
                shown = [text[:80] + "..." * (len(text) > 80) for text in texts]
                rows = zip(answer[what], shown, strict=True)
                say(*table((f"  {entry['similarity']:.3f}", entry["study"], text) for entry, text in rows))
