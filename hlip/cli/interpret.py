"""`hlip interpret`: which parts of a study speak for a text."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..embed.loop import embed_studies
from ..embed.texts import embed_prompts
from ..evaluate.zeroshot import DEFAULT_TEMPLATE, Prompts, class_shares
from ..explain.maps import Classes, as_arrays, montage, order_of, page, write_overlays
from ..explain.relevance import Relevance, relevance
from ..model.clip import HLIPModel
from ..output import check_folder, check_writable, new_figure, replacing_folder, shown_name
from ..prepare.studies import load_study_on_grids
from ..read.scan import Volume
from ..study import Study
from ..terminal import say, visible
from .shared import FILES_HELP, SHARE, SOME_LEFT_OUT, add_model, load_model, rejections, study_paths

OWN = ("relevance.json", "relevance.npz", "montage.png", "page.html", "overlays")  # what the folder holds
DESCRIPTION = """\
Say which patches of a study make its embedding like that of a text: attention times its gradient (Chefer et al. 2021).
FOLDER gets montage.png; page.html, to look through all scans in a browser; overlays/, an image for each scan to be laid
over its file in a viewer such as 3D Slicer; relevance.npz with the maps; and relevance.json with each scan's share of
the relevance, and of several classes what `hlip zeroshot` says of them. Exit status 3: some scans of a folder could
not be used; relevance.json and the page say which and why."""


def add(commands: Any) -> None:
    """Add `interpret` to the subparsers of `hlip`."""
    interpret = commands.add_parser(
        "interpret", help="show which parts of a study speak for a finding", description=DESCRIPTION
    )
    interpret.add_argument("study", nargs="+", metavar="STUDY", help=f"{FILES_HELP}. With --store: the study's uid")
    interpret.add_argument("--store", type=Path, help="take the study from this store; there are no overlays then")
    interpret.add_argument("--target", required=True, metavar="TEXT", help="the finding; with --prompts, a class of it")
    interpret.add_argument(
        "--against",
        metavar="TEXT",
        help="what the target is to be told from, such as 'no abnormality': the relevance is then of the difference "
        "between the two. Texts on one kind of image are much alike, so this often shows more",
    )
    interpret.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="another class, for shares among the classes; repeat for each",
    )
    interpret.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"sentence with {{}} for the text; repeat to average over several (default: {DEFAULT_TEMPLATE!r})",
    )
    interpret.add_argument("--prompts", type=Path, metavar="YAML", help="classes and templates, in place of both")
    interpret.add_argument(
        "--layers",
        choices=("all", "last"),
        default="all",
        help="all: carried back through all layers and levels; last: what the last layer attends to (default: all)",
    )
    interpret.add_argument(
        "--normalize",
        action="store_true",
        help="let every layer weigh the same, whatever the size of its gradients; without it, as published",
    )
    interpret.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="new, or of an earlier run")
    add_model(interpret)
    interpret.set_defaults(run=_interpret)


def _interpret(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    _check_out(args.out)
    if args.store:
        from ..store.store import Store

        if len(args.study) > 1:
            raise ValueError(f"--store: give the uid of one study, got {', '.join(args.study)}")
        store = Store(args.store)
        (number,) = store.indices(args.study).tolist()
    else:
        (paths,) = _one_study(args.study)
    model = load_model(args)
    grids: list[Volume] | None = None
    if args.store:
        study = store.study(number)
    else:
        study, grids = load_study_on_grids(paths, model.config.preprocess)
    names = list(prompts)
    texts = embed_prompts(model, prompts.values())
    against = texts[names.index(args.against)] if args.against else None
    target = texts[names.index(args.target)]
    found = relevance(model, study, target, args.layers, against, args.normalize, _bar("going back", "layer"))
    classes: Classes = {}
    if len(names) > 1:
        ((_, image),) = embed_studies(model, [study])
        image = image[None].to(texts)
        rows = class_shares(model, image, texts)[0].tolist(), (image @ texts.T)[0].tolist()
        classes = dict(zip(names, zip(*rows, strict=True), strict=True))
    with replacing_folder(args.out) as folder:
        _fill(folder, args, model, study, found, grids, classes)
    names = list(map(visible, found.names))
    width = max(map(len, names))
    say(f"{found.uid}: relevance to {_target(args)}, {args.layers} layers; cosine {found.similarity:.3f}")
    for name, (share, cosine) in sorted(classes.items(), key=lambda item: -item[1][0]):
        say(f"  share of {name} among these prompts: {share:.1%}; cosine {cosine:.3f}")
    for m in order_of(found):
        say(f"  {names[m]:<{width}}  {found.shares[m]:6.1%}  {'#' * round(40 * found.shares[m])}")
    for entry in rejections(study.left_out):
        say(f"  left out: {entry['scan']} ({entry['rule']}: {entry['reason']})")
    say(f"{args.out}: {', '.join(sorted(each.name for each in args.out.iterdir()))}")
    return SOME_LEFT_OUT if study.left_out else 0


def _prompts(args: argparse.Namespace) -> dict[str, list[str]]:
    """The classes by name, each with its sentences; target and --against among them."""
    if not args.target.strip():
        raise ValueError(f"--target {args.target!r}: expected words")
    if args.against == args.target:
        raise ValueError(f"--against {args.against!r}: the same as --target")
    if not args.prompts:
        others = [args.against, *args.prompt] if args.against else args.prompt
        classes = {text: [text] for text in dict.fromkeys([args.target, *others])}
        # One text alone will do here, and so another stands by it.
        sentences = Prompts({"": ["-"], **classes}, tuple(args.template) or (DEFAULT_TEMPLATE,)).sentences
        return {name: sentences[name] for name in classes}
    if args.prompt or args.template:
        raise ValueError("give --prompts, or --prompt and --template, not both")
    given = Prompts.read(args.prompts)
    for flag, name in (("--target", args.target), ("--against", args.against)):
        if name is not None and name not in given.classes:
            raise ValueError(f"{flag} {name!r}: not a class of {args.prompts}; there are {', '.join(given.classes)}")
    return given.sentences


def _one_study(given: list[str]) -> list[Path | list[Path]]:
    groups = study_paths([Path(each) for each in given])
    if len(groups) > 1:
        raise ValueError(f"one study at a time, got {len(groups)} folders")
    return groups


def _target(args: argparse.Namespace) -> str:
    return repr(args.target) + (f" against {args.against!r}" if args.against else "")


def _fill(
    folder: Path,
    args: argparse.Namespace,
    model: HLIPModel,
    study: Study,
    found: Relevance,
    grids: list[Volume] | None,
    classes: Classes,
) -> None:
    title = f"{found.uid}: relevance to {_target(args)}"
    with (folder / "montage.png").open("wb") as file:
        montage(study, found, file, title)
    facts = {
        "Model": shown_name(args.model),
        "Layers": ("all layers and levels" if args.layers == "all" else "the last layer")
        + ", normalized" * args.normalize,
        "Cosine of study and text": f"{found.similarity:.3f}",
    }
    if study.left_out:
        facts["Scans left out"] = "; ".join(f"{each.scan} ({each.rule}: {each.reason})" for each in study.left_out)
    content = page(study, found, title, facts, classes, _bar("drawing scans", "scan"))
    (folder / "page.html").write_text(content, encoding="utf-8")
    overlays: list[str | None] = [None] * len(found.maps)
    if grids is not None:
        (folder / "overlays").mkdir()
        overlays = write_overlays(found, grids, model.config.preprocess, folder / "overlays")
    with (folder / "relevance.npz").open("wb") as file:
        np.savez(file, **as_arrays(found))
    entries = [
        {"name": name, "share": round(float(share), 6), "overlay": overlay and f"overlays/{overlay}"}
        for name, share, overlay in zip(found.names, found.shares, overlays, strict=True)
    ]
    result = {
        "study": found.uid,
        "target": args.target,
        "against": args.against,
        "layers": args.layers,
        "normalize": args.normalize,
        "model": shown_name(args.model),
        "similarity": round(found.similarity, 6),
        SHARE: {name: round(share, 6) for name, (share, _) in classes.items()},
        "cosine": {name: round(cosine, 6) for name, (_, cosine) in classes.items()},
        "scans": entries,
        "left_out": rejections(study.left_out),
    }
    (folder / "relevance.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _bar(description: str, unit: str) -> Any:
    return functools.partial(tqdm, desc=description, unit=unit, disable=None)


def _check_out(folder: Path) -> None:
    new_figure(1, 1)  # needs matplotlib: said now, not after the work
    check_folder(folder)
    check_writable(folder.absolute().parent)  # a whole folder takes its place
    strange = [each.name for each in folder.iterdir() if each.name not in OWN] if folder.exists() else []
    if strange:
        raise ValueError(f"--out {folder}: holds something else ({min(strange)}); choose a new folder")
