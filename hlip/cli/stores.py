"""The commands of `hlip` that make and keep stores."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from ..output import write_text, write_whole
from ..prepare.discover import Join
from ..prepare.workers import STEP_SECONDS, Engine
from ..read.safe import finite_number
from ..terminal import say

SOME_REJECTED = 3
INTERRUPTED = 130
EXIT_STATUS = """exit status:
  0    all was prepared
  3    some scans or studies were rejected; STORE/rejected.jsonl says which and why
  2    error
  130  interrupted; the same command goes on where it stopped"""


def add(commands: Any) -> None:
    """Add `prepare` and `store` to the subparsers of `hlip`."""
    prepare = commands.add_parser(
        "prepare",
        help="prepare clinical files into a store to train from",
        description="Read every scan of every study below INPUT, and write them as a recipe says into a store.\n"
        "Running the same command again goes on where it stopped, and touches nothing finished. Only one run at a\n"
        "time may write a store; another is refused.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument(
        "input", type=Path, metavar="INPUT", help="folder of studies, study list (JSON) or table (CSV)"
    )
    prepare.add_argument("--out", required=True, type=Path, metavar="STORE", help="folder of the store, new or begun")
    prepare.add_argument(
        "--recipe",
        required=True,
        metavar="NAME",
        help="brain-mri, head-ct, chest-ct, FILE.yaml, or the folder of a model, for its own",
    )
    prepare.add_argument(
        "--root", type=Path, metavar="FOLDER", help="what paths of a list or table start from (default: its own folder)"
    )
    prepare.add_argument(
        "--reports", type=Path, metavar="FILE", help="texts of reports by study (JSON, CSV or a folder of TXT)"
    )
    prepare.add_argument(
        "--sections",
        type=Path,
        metavar="FILE.yaml",
        help="headings by which a report is cut into impression and findings",
    )
    prepare.add_argument(
        "--labels", type=Path, metavar="FILE", help="table of labels by study (CSV); may be that of --reports"
    )
    prepare.add_argument(
        "--label_columns",
        nargs="+",
        metavar="NAME",
        help="columns that are labels (default: those whose numbers all lie within -1 and 1)",
    )
    prepare.add_argument(
        "--join",
        choices=get_args(Join),
        default="uid",
        help="what reports and labels call a study: its id, or DICOM's AccessionNumber, which is not stored "
        "(default: uid)",
    )
    prepare.add_argument(
        "--engine", choices=get_args(Engine), default="local", help="who does the work (default: this machine)"
    )
    prepare.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes, Ray tasks or tasks of the Slurm job array (default: the CPUs of this machine)",
    )
    prepare.add_argument(
        "--timeout",
        type=finite_number,
        default=STEP_SECONDS,
        metavar="SECONDS",
        help="a scan that takes longer is rejected (default: %(default)g)",
    )
    prepare.add_argument(
        "--slurm",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="parameters of submitit, such as slurm_partition=cpu mem_gb=8; cluster=local does without Slurm",
    )
    prepare.add_argument(
        "--hash_ids",
        metavar="FILE",
        help="name studies by hashes salted with this file's text, number scans, drop descriptions and reasons",
    )
    prepare.set_defaults(run=_prepare)

    store = commands.add_parser(
        "store",
        help="look at, check, join and share out stores",
        description="Look at, check, join and share out stores, which `hlip prepare` writes.",
    )
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    info = action("info", "say what a store holds")
    info.set_defaults(run=_info)
    verify = action("verify", "read every byte of a store; exit status 1 if anything is wrong")
    verify.set_defaults(run=_verify)
    merge = action("merge", "join stores of one recipe into a new one; shards are linked where possible")
    merge.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="stores to join, in this order")
    merge.add_argument("--out", required=True, type=Path, metavar="STORE", help="the new store")
    merge.set_defaults(run=_merge)
    split = action("split", "copy the studies of a store into new ones, a part each")
    split.add_argument("--out", required=True, nargs="+", type=Path, metavar="STORE", help="a new store for each part")
    parts = split.add_mutually_exclusive_group(required=True)
    parts.add_argument(
        "--fractions",
        nargs="+",
        type=finite_number,
        metavar="F",
        help="shares of the studies, drawn at random; add up to 1",
    )
    parts.add_argument(
        "--list", type=Path, metavar="FILE", help="uids of the first part, one a line; the others are the second"
    )
    split.add_argument("--seed", type=int, default=0, help="of the drawing for --fractions (default: 0)")
    split.set_defaults(run=_split)
    stats = action("stats", "count scans per study, slices per scan and planes, and draw them")
    stats.add_argument(
        "--out", type=Path, metavar="FILE", help="picture to write: .png, .pdf or .svg; a .json is written beside it"
    )
    stats.set_defaults(run=_stats)
    slices = actions.add_parser(
        "slices",
        help="list the slices that show a lesion, for 2D models that are to see only these",
        description="List the slices that show a lesion, for --slices of other commands. MASKS holds "
        "STUDY/SCAN.nii.gz, named as in the store, on the voxels of the scan's own file.",
    )
    slices.add_argument("masks", type=Path, metavar="MASKS", help="folder of masks in NIfTI")
    slices.add_argument("--out", required=True, type=Path, metavar="JSON", help="file to write")
    slices.set_defaults(run=_slices)
    for each in (info, verify, split, stats):
        each.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
    slices.add_argument(
        "--store", required=True, type=Path, metavar="STORE", help="store of the studies that the masks belong to"
    )


def _prepare(args: argparse.Namespace) -> int:
    from ..prepare.discover import find_studies
    from ..prepare.job import prepare
    from ..prepare.recipe import load_recipe
    from ..prepare.reports import SectionRules
    from ..store.store import Store

    if args.slurm and args.engine != "slurm":
        raise ValueError(f"--slurm {args.slurm[0]} is for --engine slurm")
    recipe = load_recipe(args.recipe)
    try:
        found = find_studies(
            args.input,
            root=args.root,
            reports=args.reports,
            labels=args.labels,
            label_columns=args.label_columns,
            join=args.join,
            sections=SectionRules.read(args.sections) if args.sections else None,
            workers=args.workers,
            progress=tqdm,
        )
        report = prepare(
            found,
            recipe,
            args.out,
            engine=args.engine,
            workers=args.workers,
            scan_seconds=args.timeout,
            salt=None if args.hash_ids is None else _salt(args.hash_ids),
            slurm=dict(map(_setting, args.slurm)),
            progress=True,
        )
    except KeyboardInterrupt:
        kept = f"{args.out} keeps what is finished" if args.out.exists() else "nothing was written yet"
        say(f"hlip prepare: interrupted; {kept}: run this again to go on", file=sys.stderr)
        return INTERRUPTED
    say(f"{args.out}: {report.studies} studies, {report.scans} scans")
    store = Store(args.out)
    say(f"  reports: {store.has_report.sum()} of {len(store)} studies")
    if labels := store.labels[0]:
        say(f"  labels: {', '.join(labels)}")
    for rule, count in report.rejected.items():
        say(f"  rejected by {rule}: {count}")
    return SOME_REJECTED if report.rejected else 0


def _salt(given: str) -> str:
    try:
        salt = Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{given}: not a text ({error})") from error
    if len(salt.strip()) < 8:
        raise ValueError(f"{given}: a salt of {len(salt.strip())} characters can be guessed; expected at least 8")
    return salt


def _setting(text: str) -> tuple[str, str | int]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise ValueError(f"--slurm {text}: expected KEY=VALUE")
    return key, int(value) if value.isdecimal() else value


def _info(args: argparse.Namespace) -> None:
    from ..store.store import Store

    store = Store(args.store)
    scans = len(store.shapes)
    shapes = Counter(map(tuple, store.shapes.tolist())).most_common(3)
    say(f"{args.store}: {len(store)} studies, {scans} scans{'' if store.info else ' so far (not finished)'}")
    say("  common shapes (D, H, W): " + ", ".join(f"{shape} {count / scans:.0%}" for shape, count in shapes))
    say(f"  reports: {store.has_report.sum()} of {len(store)} studies")
    say(f"  labels: {', '.join(store.labels[0]) or 'none'}")
    for key in ("format", "recipe_hash", "shards", "hidden_ids"):
        if store.info:
            say(f"  {key}: {store.info[key]}")
    if store.info:
        say(f"  recipe: {json.dumps(store.info['recipe'])}")


def _verify(args: argparse.Namespace) -> int:
    from ..store.tools import verify

    problems = verify(args.store, _bar("shard"))
    for problem in problems:
        say(problem)
    found = f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "whole"
    say(f"{args.store}: {found}")
    return 1 if problems else 0


def _merge(args: argparse.Namespace) -> None:
    from ..store.tools import merge

    report = merge(args.stores, args.out)
    say(f"{args.out}: {report.studies} studies, {report.scans} scans")


def _split(args: argparse.Namespace) -> None:
    from ..prepare.tables import read_names
    from ..store.store import Store
    from ..store.tools import select, split_at_random

    store = Store(args.store)
    if args.list:
        first = store.indices(read_names(args.list)).tolist()
        parts = [sorted(first), sorted(set(range(len(store))) - set(first))]
    else:
        parts = split_at_random(store, args.fractions, args.seed)
    if len(parts) != len(args.out):
        raise ValueError(f"--out: {len(args.out)} stores for {len(parts)} parts")
    for part, out in zip(parts, args.out, strict=True):  # nothing is written unless all can be
        if not len(part):
            raise ValueError(f"{out}: would hold no study")
        if out.exists():
            raise ValueError(f"{out}: exists already")
    for part, out in zip(parts, args.out, strict=True):
        report = select(store, part, out, _bar("shard"))
        say(f"{out}: {report.studies} studies, {report.scans} scans")


def _stats(args: argparse.Namespace) -> None:
    from ..store.store import Store
    from ..store.tools import stats
    from ..train.plot import draw_stats
    from .shared import picture_format

    kind = picture_format(args.out) if args.out else ""
    found = stats(Store(args.store))
    text = json.dumps(found, indent=1) + "\n"
    if args.out:
        write_whole(args.out, lambda file: draw_stats(found, file, kind))
        write_text(args.out.with_suffix(".json"), text)
    print(text, end="")


def _slices(args: argparse.Namespace) -> None:
    from ..prepare.masks import read_masks
    from ..store.store import Store
    from .shared import report_unjoined

    found = read_masks(Store(args.store), args.masks, _bar("mask"))
    unseen = [uid for uid, scans in found.items() if not any(scans.values())]
    report_unjoined("whose lesions no prepared slice shows, to be seen whole", unseen)
    found = {uid: scans for uid, scans in found.items() if uid not in unseen}
    if not found:
        raise ValueError(f"{args.masks}: no mask has a lesion that a prepared slice shows")
    write_text(args.out, f"{json.dumps(found, indent=1)}\n")
    shown = sum(len(rows) for scans in found.values() for rows in scans.values())
    say(f"{args.out}: {shown} slices of {sum(map(len, found.values()))} scans, {len(found)} studies")


def _bar(unit: str) -> Any:
    return functools.partial(tqdm, unit=unit, disable=None)
