"""`hlip store`: what a store holds, and whether it is whole; stores joined, and shared out."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..arguments import OneOf, argument
from ..output import write_json, write_whole
from ..prepare.masks import read_masks
from ..prepare.tables import read_names
from ..read.safe import finite_number
from ..store.store import Store
from ..store.tools import merge, select, split_at_random, stats, verify
from ..terminal import say
from ..train.plot import draw_stats
from .shared import add_command, bar, picture_format, report_unjoined

STORE = argument("store", type=Path, metavar="STORE", help="folder of the store")
SPLIT = (
    argument("--out", required=True, nargs="+", type=Path, metavar="STORE", help="a new store for each part"),
    OneOf(
        (
            argument(
                "--fractions",
                nargs="+",
                type=finite_number,
                metavar="F",
                help="shares of the studies, drawn at random; add up to 1",
            ),
            argument(
                "--list",
                type=Path,
                metavar="FILE",
                help="uids of the first part, one a line; the others are the second",
            ),
        ),
        required=True,
    ),
    argument("--seed", type=int, default=0, help="of the drawing for --fractions (default: 0)"),
    STORE,
)
STATS = (
    argument(
        "--out", type=Path, metavar="FILE", help="picture to write: .png, .pdf or .svg; a .json is written beside it"
    ),
    STORE,
)
MERGE = (
    argument("stores", nargs="+", type=Path, metavar="STORE", help="stores to join, in this order"),
    argument("--out", required=True, type=Path, metavar="STORE", help="the new store"),
)
SLICES = (
    argument("masks", type=Path, metavar="MASKS", help="folder of masks in NIfTI"),
    argument("--out", required=True, type=Path, metavar="JSON", help="file to write"),
    argument(
        "--store", required=True, type=Path, metavar="STORE", help="store of the studies that the masks belong to"
    ),
)
SLICES_DESCRIPTION = """\
List the slices that show a lesion, for --slices of other commands. MASKS holds STUDY/SCAN.nii.gz, named as
in the store, on the voxels of the scan's own file."""


def add(commands: Any) -> None:
    """Add `store` to the subparsers of `hlip`."""
    store = add_command(
        commands,
        "store",
        None,
        "look at, check, join and share out stores",
        "Look at, check, join and share out stores, which `hlip prepare` writes.",
    )
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, run, text, arguments in (
        ("info", _info, "say what a store holds", [STORE]),
        ("verify", _verify, "read every byte of a store; exit status 1 if anything is wrong", [STORE]),
        ("merge", _merge, "join stores of one recipe into a new one; shards are linked where possible", MERGE),
        ("stats", _stats, "count scans per study, slices per scan and planes, and draw them", STATS),
        ("split", _split, "copy the studies of a store into new ones, a part each", SPLIT),
    ):
        add_command(actions, name, run, text, f"{text[0].upper()}{text[1:]}.", arguments)
    text = "list the slices that show a lesion, for 2D models that are to see only these"
    add_command(actions, "slices", _slices, text, SLICES_DESCRIPTION, SLICES)


def _info(args: argparse.Namespace) -> None:
    store = Store(args.store)
    scans = len(store.shapes)
    shapes = Counter(map(tuple, store.shapes.tolist())).most_common(3)
    say(f"{args.store}: {len(store)} studies, {scans} scans{'' if store.info else ' so far (not finished)'}")
    say("  common shapes (D, H, W): " + ", ".join(f"{shape} {count / scans:.0%}" for shape, count in shapes))
    say(f"  reports: {store.has_report.sum()} of {len(store)} studies")
    say(f"  labels: {', '.join(store.labels[0]) or 'none'}")
    if store.info:
        say(*(f"  {key}: {store.info[key]}" for key in ("format", "recipe_hash", "shards", "hidden_ids")))
        say(f"  recipe: {json.dumps(store.info['recipe'])}")


def _verify(args: argparse.Namespace) -> int:
    problems = verify(args.store, bar("shard"))
    say(*problems)
    say(f"{args.store}: " + (f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "whole"))
    return 1 if problems else 0


def _merge(args: argparse.Namespace) -> None:
    report = merge(args.stores, args.out)
    say(f"{args.out}: {report.studies} studies, {report.scans} scans")


def _split(args: argparse.Namespace) -> None:
    store = Store(args.store)
    if args.list:
        first = store.indices(read_names(args.list)).tolist()
        parts = [sorted(first), sorted(set(range(len(store))) - set(first))]
    else:
        parts = split_at_random(store, args.fractions, args.seed)
    if len(parts) != len(args.out):
        raise ValueError(f"--out: {len(args.out)} stores for {len(parts)} parts")
    for chosen, out in zip(parts, args.out, strict=True):  # nothing is written unless all can be
        if not len(chosen):
            raise ValueError(f"{out}: would hold no study")
        if out.exists():
            raise ValueError(f"{out}: exists already")
    for chosen, out in zip(parts, args.out, strict=True):
        report = select(store, chosen, out, bar("shard"))
        say(f"{out}: {report.studies} studies, {report.scans} scans")


def _stats(args: argparse.Namespace) -> None:
    kind = picture_format(args.out) if args.out else ""
    counts = stats(Store(args.store))
    if args.out:
        write_whole(args.out, lambda file: draw_stats(counts, file, kind))
        write_json(args.out.with_suffix(".json"), counts)
    print(json.dumps(counts, indent=1))


def _slices(args: argparse.Namespace) -> None:
    masks = read_masks(Store(args.store), args.masks, bar("mask"))
    seen = {uid: scans for uid, scans in masks.items() if any(scans.values())}
    report_unjoined(
        "whose lesions no prepared slice shows, to be seen whole", [uid for uid in masks if uid not in seen]
    )
    if not seen:
        raise ValueError(f"{args.masks}: no mask has a lesion that a prepared slice shows")
    write_json(args.out, seen)
    shown = sum(len(rows) for scans in seen.values() for rows in scans.values())
    say(f"{args.out}: {shown} slices of {sum(map(len, seen.values()))} scans, {len(seen)} studies")
