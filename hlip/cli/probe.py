"""`hlip probe`: linear probes on embeddings."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import OneOf, argument, at_least
from ..embed.table import Embeddings
from ..evaluate.labels import LabelTable, read_label_table
from ..evaluate.metrics import AUC, auc_intervals, interval
from ..evaluate.probe import PARTS, PROTOCOLS, SAME_CLASS, Probe, ProbeData, draw_bars, fit_probe, read_split
from ..output import table, write_csv, write_json, write_whole
from ..read.safe import finite_number
from ..terminal import say
from .shared import FIGURES, RESULTS, add_command, bar, check_results, report_unjoined

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
FIT = (  # how studies are split, and probes fitted
    argument(
        "--split",
        nargs="+",
        metavar="COLUMN|FILE",
        help="a column of the labels or a CSV with study and split (train, val, test); or two or three files of uids: "
        "train, val (of three), test",
    ),
    argument(
        "--fractions",
        nargs=3,
        type=finite_number,
        default=(0.7, 0.1, 0.2),
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares of a random split; 0 for VAL cross-validates (default: 0.7 0.1 0.2)",
    ),
    argument(
        "--patients",
        metavar="COLUMN",
        help="column that names patients, none of whom is then in two parts of a random split",
    ),
    argument(
        "--minimum",
        type=at_least(1),
        default=5,
        metavar="N",
        help="leave out classes with fewer positives or negatives in any part (default: 5)",
    ),
    argument("--c", nargs="+", type=finite_number, metavar="C", help="inverse penalties to choose from"),
    argument("--as_is", action="store_true", help="do not standardise the embeddings"),
    argument("--jobs", type=int, default=1, metavar="N", help="processes that fit classes side by side (default: 1)"),
    argument("--apply", type=Path, metavar="PROBE", help="score this fitted probe; --labels may be left out"),
)


def add(commands: Any) -> None:
    """Add `probe` to the subparsers of `hlip`."""
    add_command(
        commands,
        "probe",
        _probe,
        "fit and score linear probes on embeddings, one model or two side by side",
        DESCRIPTION,
        [
            argument("embeddings", type=Path, metavar="EMBEDDINGS", help=".parquet or .npz of `hlip embed`"),
            argument("other", nargs="?", type=Path, metavar="OTHER", help="the same of another model, to compare with"),
            argument(
                "--labels",
                type=Path,
                metavar="CSV",
                help="a column study, study_uid or VolumeName, and one for each class: 1, 0, or -1 or empty if missing",
            ),
            RESULTS,
            argument(
                "--names",
                nargs="+",
                metavar="NAME",
                help="what to call the models in results (default: the files' names)",
            ),
            OneOf(
                (
                    argument(
                        "--classes",
                        nargs="+",
                        default=[],
                        metavar="COLUMN",
                        help="columns of labels to probe for (default: all)",
                    ),
                    argument(
                        "--protocol", choices=sorted(PROTOCOLS), help="the columns that this benchmark is probed for"
                    ),
                ),
            ),
            *FIGURES,
            *FIT,
        ],
        EPILOG,
    )


def _probe(args: argparse.Namespace) -> None:
    check_results(args.out)
    if args.c and min(args.c) <= 0:
        raise ValueError(f"--c must be positive, got {min(args.c):g}")
    if args.apply:
        _apply(args)
        return
    if args.labels is None:
        raise ValueError("--labels missing: a probe is fitted to labels")
    paths = [path for path in (args.embeddings, args.other) if path is not None]
    names = _names(paths, args.names)
    made = [Embeddings.read(path) for path in paths]
    labels = _read_labels(args)
    split = read_split(args.split, labels) if args.split else None
    data = ProbeData.join(labels, made, split, tuple(args.fractions), args.seed, args.patients, args.minimum, args.head)
    _report_join(data)
    test = data.of("test")
    probes, aucs = {}, {}
    for m, name in enumerate(names):
        probes[name] = fit_probe(data, m, not args.as_is, args.c, bar("class", name), args.jobs)
        scores = probes[name].scores(data.embeddings[m][test])
        aucs[name] = auc_intervals(data.labels[test], scores, args.draws, args.seed)
        if late := probes[name].facts["not_converged"]:
            say(f"{name}: did not converge for {', '.join(late)}", file=sys.stderr)
        # What goes into a probe's file says where it comes from.
        probes[name].facts.update(embeddings=made[m].facts, labels=args.labels.name, head=args.head)
    for m, name in enumerate(names):
        uids = [data.uids[i] for i in test]
        _write_scores(args.out / f"{name}.scores.csv", uids, probes[name], data.embeddings[m][test])
        write_whole(args.out / f"{name}.probe.npz", probes[name].write)
    write_csv(args.out / "split.csv", [["study", "split"], *zip(data.uids, data.parts.tolist(), strict=True)])
    content = {"studies": {part: len(data.of(part)) for part in PARTS}}
    _write_figures(args, data, content, data.left_out, aucs, probes)


def _read_labels(args: argparse.Namespace) -> LabelTable:
    return read_label_table(args.labels, args.classes or PROTOCOLS.get(args.protocol, ()))


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
    parts = ", ".join(f"{len(data.of(part))} {part}" for part in PARTS if len(data.of(part)))
    say(f"{len(data.uids)} studies with labels and embeddings: {parts}; {len(data.classes)} classes")
    report_unjoined("without label", data.without_label)
    report_unjoined("without embedding", data.without_embedding)
    say(*(f"left out {name}: {reason}" for name, reason in data.left_out.items()), file=sys.stderr)


def _apply(args: argparse.Namespace) -> None:
    """Score a fitted probe on other embeddings; with labels, say how well."""
    if args.other or args.split or args.patients or args.c:
        raise ValueError("--apply scores a fitted probe on one file of embeddings: nothing is split or fitted")
    probe, made = Probe.read(args.apply), Embeddings.read(args.embeddings)
    uids, embeddings = made.of_studies(args.head)
    (name,) = _names([args.embeddings], args.names)
    scores_file = args.out / f"{name}.scores.csv"
    try:
        probe.scores(embeddings[:1])
    except ValueError as error:
        raise ValueError(f"{args.apply}: {error} ({args.embeddings})") from error
    if args.labels is None:
        _write_scores(scores_file, uids, probe, embeddings)
        say(f"{scores_file}: {len(uids)} studies x {len(probe.classes)} classes")
        return
    labels = _same_classes(probe.classes, _read_labels(args))
    data = ProbeData.join(
        labels, [made], dict.fromkeys(labels.uids, "test"), minimum=args.minimum, head=args.head, needed=("test",)
    )
    _report_join(data)
    mine = [probe.classes.index(k) for k in data.classes]
    fitted = replace(probe, classes=data.classes, weight=probe.weight[mine], bias=probe.bias[mine], c=probe.c[mine])
    auc = auc_intervals(data.labels, fitted.scores(data.embeddings[0]), args.draws, args.seed)
    _write_scores(scores_file, uids, probe, embeddings)
    left_out = {k: "no column of labels" for k in probe.classes if k not in labels.classes} | data.left_out
    content = {"studies": {"test": len(data.uids)}, "probe": args.apply.name}
    _write_figures(args, data, content, left_out, {name: auc}, {name: fitted})


def _same_classes(classes: Sequence[str], labels: LabelTable) -> LabelTable:
    """The labels of a probe's classes by its names: columns of one name, or of the same class in RSNA and CQ500."""
    other = SAME_CLASS | {value: key for key, value in SAME_CLASS.items()}
    columns = {
        name: labels.classes.index(column)
        for name in classes
        for column in (other.get(name), name)
        if column in labels.classes
    }
    if not columns:
        raise ValueError(f"{labels.path}: has none of the probe's classes {', '.join(classes)}")
    return labels._replace(classes=tuple(columns), values=labels.values[:, list(columns.values())])


def _write_figures(
    args: argparse.Namespace,
    data: ProbeData,
    content: dict[str, Any],
    left_out: dict[str, str],
    aucs: dict[str, AUC],
    probes: dict[str, Probe],
) -> None:
    """Write probe.json, auc.csv and auc.png, and print the table."""
    labels = data.labels[data.of("test")]
    counts = [("positives", (labels == 1).sum(0)), ("negatives", (labels == 0).sum(0))]
    rows: list[list[Any]] = [["model", "class", "positives", "negatives", "auc", "low", "high", "c"]]
    models = {}
    for name, auc in aucs.items():
        columns = [*counts, ("auc", auc.value), ("low", auc.low), ("high", auc.high), ("c", probes[name].c)]
        classes = [
            {"class": label} | {key: column[k].item() for key, column in columns}
            for k, label in enumerate(data.classes)
        ]
        macro = {"auc": auc.macro, "low": auc.macro_low, "high": auc.macro_high}
        models[name] = {"macro": macro, "classes": classes, "probe": probes[name].facts}
        rows += [[name, *(_cell(value) for value in row.values())] for row in classes]
        rows.append([name, "macro", "", "", *(_cell(value) for value in macro.values()), ""])
    content |= {
        "seed": args.seed,
        "draws": args.draws,
        "left_out": left_out,
        "without_label": data.without_label,
        "without_embedding": data.without_embedding,
        "models": models,
    }
    if len(aucs) == 2:
        first, second = aucs.values()
        low, high = interval(first.macro_drawn - second.macro_drawn) or (math.nan, math.nan)
        content["difference"] = {"auc": first.macro - second.macro, "low": low, "high": high}
    write_csv(args.out / "auc.csv", rows)
    write_json(args.out / "probe.json", content)
    write_whole(args.out / "auc.png", lambda file: draw_bars(data.classes, aucs, file, "png"))
    _print(data.classes, counts[0][1], aucs)
    if "difference" in content:
        value, low, high = content["difference"].values()
        say(f"difference of the means: {value:+.3f} [{low:+.3f}, {high:+.3f}]")
    say(f"{args.out}: probe.json, auc.csv, auc.png")


def _print(classes: Sequence[str], positives: np.ndarray, aucs: dict[str, AUC]) -> None:
    rows: list[list[object]] = [["", "positives", *aucs]]
    for k in np.argsort(-next(iter(aucs.values())).value, kind="stable"):
        cells = [f"{auc.value[k]:.3f} [{auc.low[k]:.3f}, {auc.high[k]:.3f}]" for auc in aucs.values()]
        rows.append([classes[k], f"{positives[k]:9}", *cells])
    rows.append(
        ["mean", "", *(f"{auc.macro:.3f} [{auc.macro_low:.3f}, {auc.macro_high:.3f}]" for auc in aucs.values())]
    )
    say(*table(rows))


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _write_scores(path: Path, uids: Sequence[str], probe: Probe, embeddings: np.ndarray) -> None:
    rows = [[uid, *map(_cell, row)] for uid, row in zip(uids, probe.scores(embeddings).tolist(), strict=True)]
    write_csv(path, [["study", *probe.classes], *rows])
