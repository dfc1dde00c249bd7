"""`hlip prepare`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from ..arguments import Argument, argument
from ..prepare.discover import Join, find_studies
from ..prepare.job import prepare
from ..prepare.recipe import load_recipe
from ..prepare.reports import SectionRules
from ..prepare.workers import STEP_SECONDS, Engine
from ..read.safe import finite_number
from ..store.store import Store
from ..terminal import say
from .shared import add_command

SOME_REJECTED = 3
INTERRUPTED = 130
EXIT_STATUS = """exit status:
  0    all was prepared
  3    some scans or studies were rejected; STORE/rejected.jsonl says which and why
  2    error
  130  interrupted; the same command goes on where it stopped"""
INPUT = (
    argument("input", type=Path, metavar="INPUT", help="folder of studies, study list (JSON) or table (CSV)"),
    argument("--out", required=True, type=Path, metavar="STORE", help="folder of the store, new or begun"),
    argument(
        "--recipe",
        required=True,
        metavar="NAME",
        help="brain-mri, head-ct or chest-ct, each also with -linear; FILE.yaml; or the folder of a model, for its own",
    ),
    argument(
        "--root", type=Path, metavar="FOLDER", help="what paths of a list or table start from (default: its own folder)"
    ),
    argument("--reports", type=Path, metavar="FILE", help="texts of reports by study (JSON, CSV or a folder of TXT)"),
    argument(
        "--sections",
        type=Path,
        metavar="FILE.yaml",
        help="headings by which a report is cut into impression and findings",
    ),
    argument("--labels", type=Path, metavar="FILE", help="table of labels by study (CSV); may be that of --reports"),
    argument(
        "--label_columns",
        nargs="+",
        metavar="NAME",
        help="columns that are labels (default: those whose numbers all lie within -1 and 1)",
    ),
    argument(
        "--join",
        choices=get_args(Join),
        default="uid",
        help="what reports and labels call a study: its id, or DICOM's AccessionNumber, which is not stored "
        "(default: uid)",
    ),
)


def add(commands: Any) -> None:
    """Add `prepare` to the subparsers of `hlip`."""
    add_command(
        commands,
        "prepare",
        _prepare,
        "prepare clinical files into a store to train from",
        "Read every scan of every study below INPUT, and write them as a recipe says into a store.\n"
        "Running the same command again goes on where it stopped, and touches nothing finished. Only one run at a\n"
        "time may write a store; another is refused.",
        [*INPUT, *_work()],
        EXIT_STATUS,
    )


def _work() -> list[Argument]:
    """Arguments that say who does the work, and how."""
    return [
        argument(
            "--engine", choices=get_args(Engine), default="local", help="who does the work (default: this machine)"
        ),
        argument(
            "--workers",
            type=int,
            default=len(os.sched_getaffinity(0)),
            metavar="N",
            help="processes, Ray tasks or tasks of the Slurm job array (default: the CPUs of this machine)",
        ),
        argument(
            "--timeout",
            type=finite_number,
            default=STEP_SECONDS,
            metavar="SECONDS",
            help="a scan that takes longer is rejected (default: %(default)g)",
        ),
        argument(
            "--slurm",
            nargs="*",
            default=[],
            metavar="KEY=VALUE",
            help="parameters of submitit, such as slurm_partition=cpu mem_gb=8; cluster=local does without Slurm",
        ),
        argument(
            "--hash_ids",
            metavar="FILE",
            help="name studies by hashes salted with this file's text, number scans, drop descriptions and reasons",
        ),
    ]


def _prepare(args: argparse.Namespace) -> int:
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
    say(*(f"  rejected by {rule}: {count}" for rule, count in report.rejected.items()))
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
