"""`hlip interpret`: which parts of a study speak for a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import argument
from ..embed.inputs import unlike
from ..evaluate.evaluation import compare, scale_of, zeroshot_classifier
from ..evaluate.tasks import Task
from ..explain.maps import as_arrays, montage, write_overlays
from ..explain.page import page
from ..explain.relevance import Relevance, relevance
from ..model.clip import HLIPModel
from ..output import check_writable, replacing_folder, shown_name, write_json, write_text
from ..prepare.studies import load_study_on_grids
from ..read.scan import Volume
from ..store.store import Store
from ..study import Study
from ..terminal import say
from .shared import (
    FILES_HELP,
    MODEL,
    SAID,
    SOME_LEFT_OUT,
    Said,
    add_command,
    as_json,
    bar,
    bars,
    check_results,
    load_model,
    prompt_arguments,
    read_prompts,
    rejected_lines,
    rejections,
    said_lines,
    said_of,
    study_paths,
)

OWN = ("relevance.json", "relevance.npz", "montage.png", "page.html", "overlays")  # what the folder holds
DESCRIPTION = """\
Say which patches of a study make its embedding like that of a text: attention times its gradient (Chefer et al. 2021).
FOLDER gets montage.png; page.html, to look through all scans in a browser; overlays/, an image for each scan to be laid
over its file in a viewer such as 3D Slicer; relevance.npz with the maps; and relevance.json with each scan's share of
the relevance, and of several classes what `hlip zeroshot` says of them. Exit status 3: some scans of a folder could
not be used; relevance.json and the page say which and why."""


def add(commands: Any) -> None:
    """Add `interpret` to the subparsers of `hlip`."""
    add_command(
        commands,
        "interpret",
        _interpret,
        "show which parts of a study speak for a finding",
        DESCRIPTION,
        [
            argument("study", nargs="+", metavar="STUDY", help=f"{FILES_HELP}. With --store: the study's uid"),
            argument("--store", type=Path, help="take the study from this store; there are no overlays then"),
            argument("--target", required=True, metavar="TEXT", help="the finding; with --prompts, a class of it"),
            argument(
                "--against",
                metavar="TEXT",
                help="what the target is to be told from, such as 'no abnormality': the relevance is then of the "
                "difference between the two. Texts on one kind of image are much alike, so this often shows more",
            ),
            *prompt_arguments("another class, for shares among the classes; repeat for each"),
            argument(
                "--layers",
                choices=("all", "last"),
                default="all",
                help="all: carried back through all layers and levels; last: what the last layer attends to "
                "(default: all)",
            ),
            argument(
                "--normalize",
                action="store_true",
                help="let every layer weigh the same, whatever the size of its gradients; without it, as published",
            ),
            argument("--out", required=True, type=Path, metavar="FOLDER", help="new, or of an earlier run"),
            *MODEL,
        ],
    )


def _interpret(args: argparse.Namespace) -> int:
    task = _task(args)
    _check_out(args.out)
    store = None
    if args.store:
        if len(args.study) > 1:
            raise ValueError(f"--store: give the uid of one study, got {', '.join(args.study)}")
        store = Store(args.store)
        (number,) = store.indices(args.study).tolist()
    else:
        groups = study_paths([Path(name) for name in args.study])
        if len(groups) > 1:
            raise ValueError(f"one study at a time, got {len(groups)} folders")
    model = load_model(args)
    grids: list[Volume] | None = None
    if store is not None:
        say(*unlike(model.config.recipe, store), file=sys.stderr)
        study = store.study(number)
    else:
        study, grids = load_study_on_grids(groups[0], model.config.preprocess)
    names = list(task.classes)
    texts = zeroshot_classifier(model, task, args.templates)
    against = texts[names.index(args.against)] if args.against else None
    target = texts[names.index(args.target)]
    result = relevance(model, study, target, args.layers, against, args.normalize, bar("layer", "going back"))
    said = said_of(task, compare(model, [study], texts)[1][0], scale_of(model)) if len(texts) > 1 else {}
    title = f"{result.uid}: relevance to {args.target!r}" + (f" against {args.against!r}" if args.against else "")
    with replacing_folder(args.out) as folder:
        _fill(folder, args, model, study, result, grids, said, title, SAID[task.kind])
    say(f"{title}, {args.layers} layers; cosine {result.similarity:.3f}")
    if said:
        say(*said_lines(task, said))
    shares = zip(result.names, result.shares.tolist(), strict=True)
    say("  share of the relevance", *bars((name, share, None) for name, share in shares))
    say(*rejected_lines(rejections(study.left_out)))
    say(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    return SOME_LEFT_OUT if study.left_out else 0


def _task(args: argparse.Namespace) -> Task:
    """The task with the classes, target and --against among them."""
    if not args.target.strip():
        raise ValueError(f"--target {args.target!r}: expected words")
    if args.against == args.target:
        raise ValueError(f"--against {args.against!r}: the same as --target")
    others = [args.against, *args.prompt] if args.against else args.prompt
    task = read_prompts(args, list(dict.fromkeys([args.target, *others])))
    for flag, name in (("--target", args.target), ("--against", args.against)):
        if name is not None and name not in task.classes:
            raise ValueError(f"{flag} {name!r}: not a class of {args.prompts}; there are {', '.join(task.classes)}")
    return task


def _fill(
    folder: Path,
    args: argparse.Namespace,
    model: HLIPModel,
    study: Study,
    result: Relevance,
    grids: list[Volume] | None,
    said: Said,
    title: str,
    caption: str,
) -> None:
    with (folder / "montage.png").open("wb") as file:
        montage(study, result, file, title)
    facts = {
        "Model": shown_name(args.model),
        "Layers": ("all layers and levels" if args.layers == "all" else "the last layer")
        + ", normalized" * args.normalize,
        "Cosine of study and text": f"{result.similarity:.3f}",
    }
    if study.left_out:
        facts["Scans left out"] = "; ".join(f"{scan.scan} ({scan.rule}: {scan.reason})" for scan in study.left_out)
    write_text(folder / "page.html", page(study, result, title, facts, said, caption, bar("scan", "drawing scans")))
    overlays: list[str | None] = [None] * len(result.maps)
    if grids is not None:
        (folder / "overlays").mkdir()
        overlays = write_overlays(result, grids, model.config.preprocess, folder / "overlays")
    with (folder / "relevance.npz").open("wb") as file:
        np.savez(file, **as_arrays(result))
    content = {
        "study": result.uid,
        "target": args.target,
        "against": args.against,
        "layers": args.layers,
        "normalize": args.normalize,
        "model": shown_name(args.model),
        "similarity": round(result.similarity, 6),
        **as_json(said),
        "scans": [
            {"name": name, "share": round(float(share), 6), "overlay": overlay and f"overlays/{overlay}"}
            for name, share, overlay in zip(result.names, result.shares, overlays, strict=True)
        ],
        "left_out": rejections(study.left_out),
    }
    write_json(folder / "relevance.json", content)


def _check_out(folder: Path) -> None:
    check_results(folder)
    check_writable(folder.absolute().parent)  # a whole folder takes its place
    strange = [path.name for path in folder.iterdir() if path.name not in OWN] if folder.exists() else []
    if strange:
        raise ValueError(f"--out {folder}: holds something else ({min(strange)}); choose a new folder")
