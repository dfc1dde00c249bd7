"""`hlip plot`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..arguments import argument
from ..output import write_whole
from ..terminal import say
from ..train.plot import draw, read_run
from .shared import add_command, picture_format


def add(commands: Any) -> None:
    """Add `plot` to the subparsers of `hlip`."""
    add_command(
        commands,
        "plot",
        _plot,
        "draw the curves of one or more training runs",
        "Draw the loss, the learning rate, the speed and whatever else runs have logged, a panel each.",
        [
            argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train/pretrain.py"),
            argument(
                "--out",
                type=Path,
                metavar="FILE",
                help="picture to write: .png, .pdf or .svg (default: curves.png in the first RUN)",
            ),
        ],
    )


def _plot(args: argparse.Namespace) -> None:
    out = args.out or args.runs[0] / "curves.png"
    kind = picture_format(out)
    runs = [read_run(folder) for folder in args.runs]
    for run in runs:
        if run.damaged:
            say(f"{run.folder}: damaged lines of the log left out: {run.damaged}", file=sys.stderr)
    write_whole(out, lambda file: draw(runs, file, kind))
    say(f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
