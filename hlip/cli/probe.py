"""`hlip probe`: linear probes on embeddings."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..embed.table import Embeddings
from ..evaluate.bootstrap import DRAWS, interval
from ..evaluate.labels import LabelTable, read_label_table
from ..evaluate.probe import AUC, PROTOCOLS, SAME_CLASS, Probe, auc_intervals, draw_bars, fit_probe
from ..evaluate.probe_data import ProbeData, read_split
from ..output import check_folder, new_figure, write_csv, write_text, write_whole
from ..read.safe import finite_number
from ..terminal import say, visible
from .shared import report_unjoined

DESCRIPTION = """\
Fit a logistic regression for each class on the embeddings of studies, and score it on studies that it has not seen.
With the embeddings of a second model, both are fitted and scored on the same studies, side by side.

The split is by study: --split, or at random (--fractions, --seed). The penalty is chosen on the validation studies, or
without any by cross-validation on the training studies; the probe is then fitted on both. With --apply, a fitted probe
is scored on other embeddings; of RSNA's classes and CQ500's, those that are the same are matched."""
EPILOG = """\
writes into FOLDER:
  probe.json       AUC and interval of every class and their mean, choices made, classes and studies left out
  auc.csv          the same figures as a table
  auc.png          a bar for each class, sorted
  NAME.probe.npz   the fitted probe: classes, weight (classes, width), bias; for --apply
  NAME.scores.csv  the probability of every class for every test study
  split.csv        the part of every study, for another run's --split"""


def add(commands: Any) -> None:
    """Add `probe` to the subparsers of `hlip`."""
    probe = commands.add_parser(
        "probe",
        help="fit and score linear probes on embeddings, one model or two side by side",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    probe.add_argument("embeddings", type=Path, metavar="EMBEDDINGS", help=".parquet or .npz of `hlip embed`")
    probe.add_argument(
        "other", nargs="?", type=Path, metavar="OTHER", help="the same of another model, to compare with"
    )
    probe.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="a column study, study_uid or VolumeName, and one for each class: 1, 0, or -1 or empty if missing",
    )
    probe.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write into")
    probe.add_argument(
        "--names", nargs="+", metavar="NAME", help="what to call the models in results (default: the files' names)"
    )
    classes = probe.add_mutually_exclusive_group()
    classes.add_argument(
        "--classes", nargs="+", default=[], metavar="COLUMN", help="columns of labels to probe for (default: all)"
    )
    classes.add_argument("--protocol", choices=sorted(PROTOCOLS), help="the columns that this benchmark is probed for")
    probe.add_argument(
        "--split",
        nargs="+",
        metavar="COLUMN|FILE",
        help="a column of the labels or a CSV with study and split (train, val, test); or two or three files of uids: "
        "train, val (of three), test",
    )
    probe.add_argument(
        "--fractions",
        nargs=3,
        type=finite_number,
        default=(0.7, 0.1, 0.2),
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares of a random split; 0 for VAL cross-validates (default: 0.7 0.1 0.2)",
    )
    probe.add_argument(
        "--patients",
        metavar="COLUMN",
        help="column that names patients, none of whom is then in two parts of a random split",
    )
    probe.add_argument("--seed", type=int, default=0, help="of the split and the draws (default: %(default)s)")
    probe.add_argument(
        "--minimum",
        type=int,
        default=5,
        metavar="N",
        help="leave out classes with fewer positives or negatives in any part (default: 5)",
    )
    probe.add_argument(
        "--head", type=int, metavar="N", help="which of the model's embeddings, if it gives several of a study"
    )
    probe.add_argument("--c", nargs="+", type=finite_number, metavar="C", help="inverse penalties to choose from")
    probe.add_argument("--as_is", action="store_true", help="do not standardise the embeddings")
    probe.add_argument(
        "--draws",
        type=int,
        default=DRAWS,
        metavar="N",
        help="how often studies are drawn anew, for intervals (default: %(default)s)",
    )
    probe.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes that fit classes side by side (default: 1)"
    )
    probe.add_argument("--apply", type=Path, metavar="PROBE", help="score this fitted probe; --labels may be left out")
    probe.set_defaults(run=_probe)


def _probe(args: argparse.Namespace) -> None:
    new_figure(1, 1)  # needs matplotlib: said now, not after hours
    check_folder(args.out)
    for name in ("minimum", "draws"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be positive, got {getattr(args, name)}")
    if args.c and min(args.c) <= 0:
        raise ValueError(f"--c must be positive, got {min(args.c):g}")
    if args.apply:
        _apply(args)
        return
    if args.labels is None:
        raise ValueError("--labels missing: a probe is fitted to labels")
    paths = [path for path in (args.embeddings, args.other) if path is not None]
    names = _names(paths, args.names)
    tables = [Embeddings.read(path) for path in paths]
    labels = read_label_table(args.labels, args.classes or PROTOCOLS.get(args.protocol, ()))
    data = ProbeData.join(
        labels,
        tables,
        split=read_split(args.split, labels) if args.split else None,
        fractions=tuple(args.fractions),
        seed=args.seed,
        patients=args.patients,
        minimum=args.minimum,
        head=args.head,
    )
    _report_join(data)
    test = data.of("test")
    probes, aucs = {}, {}
    for m, name in enumerate(names):
        bar = functools.partial(tqdm, desc=name, unit="class", disable=None)
        probes[name] = fit_probe(data, m, not args.as_is, args.c, bar, args.jobs)
        scores = probes[name].scores(data.embeddings[m][test])
        aucs[name] = auc_intervals(data.labels[test], scores, args.draws, args.seed)
        if late := probes[name].facts["not_converged"]:
            say(f"{name}: did not converge for {', '.join(late)}", file=sys.stderr)
        # What goes into a probe's file says where it comes from.
        facts = {"embeddings": tables[m].facts, "labels": args.labels.name, "head": args.head}
        probes[name].facts.update(facts)
    for name, m in zip(names, range(len(names)), strict=True):
        _write_scores(
            args.out / f"{name}.scores.csv", [data.uids[i] for i in test], probes[name], data.embeddings[m][test]
        )
        write_whole(args.out / f"{name}.probe.npz", probes[name].write)
    rows = [["study", "split"], *([uid, part] for uid, part in zip(data.uids, data.parts.tolist(), strict=True))]
    write_csv(args.out / "split.csv", rows)
    content: dict[str, Any] = {
        "studies": {part: len(data.of(part)) for part in ("train", "val", "test")},
        "seed": args.seed,
        "draws": args.draws,
        "left_out": data.left_out,
        "without_label": data.without_label,
        "without_embedding": data.without_embedding,
    }
    _write_figures(args.out, data.classes, data.labels[test], aucs, probes, content)


def _names(paths: Sequence[Path], given: Sequence[str] | None) -> list[str]:
    names = list(given or (path.stem for path in paths))
    if not given and len(set(names)) < len(names):
        names = [f"{path.resolve().parent.name}_{path.stem}" for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise ValueError(f"--names: expected {len(paths)} different names, got {names}")
    if wrong := [name for name in names if not name or name.startswith(".") or set(name) & set("/\\")]:
        raise ValueError(f"--names: {wrong[0]!r} cannot be part of a file's name")
    return names


def _report_join(data: ProbeData) -> None:
    parts = ", ".join(f"{len(data.of(part))} {part}" for part in ("train", "val", "test"))
    say(f"{len(data.uids)} studies with labels and embeddings: {parts}; {len(data.classes)} classes")
    report_unjoined("without label", data.without_label)
    report_unjoined("without embedding", data.without_embedding)
    for name, reason in data.left_out.items():
        say(f"left out {name}: {reason}", file=sys.stderr)


def _apply(args: argparse.Namespace) -> None:
    """Score a fitted probe on other embeddings; with labels, say how well."""
    if args.other or args.split or args.patients or args.c:
        raise ValueError("--apply scores a fitted probe on one file of embeddings: nothing is split or fitted")
    probe = Probe.read(args.apply)
    uids, embeddings = Embeddings.read(args.embeddings).of_studies(args.head)
    try:
        scores = probe.scores(embeddings)
    except ValueError as error:
        raise ValueError(f"{args.apply}: {error} ({args.embeddings})") from error
    (name,) = _names([args.embeddings], args.names)
    if args.labels is None:
        _write_scores(args.out / f"{name}.scores.csv", uids, probe, embeddings)
        say(f"{args.out / f'{name}.scores.csv'}: {len(uids)} studies x {len(probe.classes)} classes")
        return
    table = read_label_table(args.labels, args.classes or PROTOCOLS.get(args.protocol, ()))
    pairs = _same_classes(probe.classes, table)
    rows = {uid: i for i, uid in enumerate(table.uids)}
    joined = [i for i, uid in enumerate(uids) if uid in rows]
    if not joined:
        raise ValueError(f"{args.labels}: no study of {args.embeddings} has labels")
    labels = table.values[[rows[uids[i]] for i in joined]][:, [column for _, column in pairs]]
    counts = np.array([[(column == 0).sum(), (column == 1).sum()] for column in labels.T])
    kept = np.flatnonzero(counts.min(1) >= args.minimum)
    left_out = {
        probe.classes[k]: "no column of labels"
        for k in range(len(probe.classes))
        if k not in [mine for mine, _ in pairs]
    } | {
        probe.classes[pairs[j][0]]: f"{positives} positives, {negatives} negatives"
        for j, (negatives, positives) in enumerate(counts.tolist())
        if j not in kept
    }
    if not len(kept):
        raise ValueError(f"{args.labels}: no class has {args.minimum} positives and negatives: {left_out}")
    for reason in left_out.items():
        say(f"left out {': '.join(reason)}", file=sys.stderr)
    mine = [pairs[j][0] for j in kept]
    auc = auc_intervals(labels[:, kept], scores[np.ix_(joined, mine)], args.draws, args.seed)
    without_label = sorted(set(uids) - rows.keys())
    without_embedding = sorted(rows.keys() - set(uids))
    report_unjoined("without label", without_label)
    report_unjoined("without embedding", without_embedding)
    _write_scores(args.out / f"{name}.scores.csv", uids, probe, embeddings)
    content = {
        "studies": {"test": len(joined)},
        "probe": args.apply.name,
        "seed": args.seed,
        "draws": args.draws,
        "left_out": left_out,
        "without_label": without_label,
        "without_embedding": without_embedding,
    }
    fitted = Probe(
        tuple(probe.classes[k] for k in mine), probe.weight[mine], probe.bias[mine], probe.c[mine], probe.facts
    )
    _write_figures(args.out, fitted.classes, labels[:, kept], {name: auc}, {name: fitted}, content)


def _same_classes(classes: Sequence[str], table: LabelTable) -> list[tuple[int, int]]:
    """Pairs of a class of the probe and a column of the labels: of one name, or the same in RSNA and CQ500."""
    other = SAME_CLASS | {value: key for key, value in SAME_CLASS.items()}
    pairs = []
    for k, name in enumerate(classes):
        column = next((each for each in (name, other.get(name)) if each in table.classes), None)
        if column is not None:
            pairs.append((k, table.classes.index(column)))
    if not pairs:
        raise ValueError(f"{table.path}: has none of the probe's classes {', '.join(classes)}")
    return pairs


def _write_figures(
    out: Path,
    classes: Sequence[str],
    labels: np.ndarray,
    aucs: dict[str, AUC],
    probes: dict[str, Probe],
    content: dict[str, Any],
) -> None:
    """Write probe.json, auc.csv and auc.png, and print the table."""
    positives, negatives = (labels == 1).sum(0).tolist(), (labels == 0).sum(0).tolist()
    rows: list[list[Any]] = [["model", "class", "positives", "negatives", "auc", "low", "high", "c"]]
    content["models"] = {}
    for name, auc in aucs.items():
        figures = [auc.value, auc.low, auc.high, probes[name].c]
        table = [
            {"class": each, "positives": p, "negatives": n, "auc": a, "low": low, "high": high, "c": c}
            for each, p, n, a, low, high, c in zip(
                classes, positives, negatives, *(each.tolist() for each in figures), strict=True
            )
        ]
        macro = {"auc": auc.macro, "low": auc.macro_low, "high": auc.macro_high}
        content["models"][name] = {"macro": macro, "classes": table, "probe": probes[name].facts}
        rows += [[name, *(_cell(value) for value in row.values())] for row in table]
        rows.append([name, "macro", "", "", *(_cell(value) for value in macro.values()), ""])
    if len(aucs) == 2:
        first, second = aucs.values()
        low, high = interval(first.macro_drawn - second.macro_drawn) or (math.nan, math.nan)
        content["difference"] = {"auc": first.macro - second.macro, "low": low, "high": high}
    write_csv(out / "auc.csv", rows)
    text = json.dumps(content, indent=1) + "\n"
    write_text(out / "probe.json", text)
    write_whole(out / "auc.png", lambda file: draw_bars(classes, aucs, file, "png"))

    shown = list(map(visible, classes))
    width = max(len("mean"), *map(len, shown))
    say(f"{'':{width}}  positives  " + "  ".join(f"{name:<21}" for name in aucs))
    for k in np.argsort(-next(iter(aucs.values())).value, kind="stable"):
        cells = (f"{auc.value[k]:.3f} [{auc.low[k]:.3f}, {auc.high[k]:.3f}]" for auc in aucs.values())
        say(f"{shown[k]:{width}}  {positives[k]:9}  {'  '.join(cells)}")
    cells = (f"{auc.macro:.3f} [{auc.macro_low:.3f}, {auc.macro_high:.3f}]" for auc in aucs.values())
    say(f"{'mean':{width}}  {'':9}  {'  '.join(cells)}")
    if "difference" in content:
        value, low, high = content["difference"].values()
        say(f"difference of the means: {value:+.3f} [{low:+.3f}, {high:+.3f}]")
    say(f"{out}: probe.json, auc.csv, auc.png")


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _write_scores(path: Path, uids: Sequence[str], probe: Probe, embeddings: np.ndarray) -> None:
    scores = probe.scores(embeddings).tolist()
    write_csv(
        path, [["study", *probe.classes], *([uid, *map(_cell, row)] for uid, row in zip(uids, scores, strict=True))]
    )
