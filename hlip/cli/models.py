"""`hlip convert` and `hlip plot`: models, and the runs that train them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from ..model.checkpoint import Layout
from ..model.clip import HLIPModel
from ..model.released import describe
from ..output import write_whole
from ..terminal import say
from ..train.plot import draw, read_run
from .shared import picture_format


def add(commands: Any) -> None:
    """Add `convert` and `plot` to the subparsers of `hlip`."""
    convert = commands.add_parser(
        "convert",
        help="read a model in any layout and write it in another",
        description="Read a saved or released model, or a training checkpoint; say what it is; write it anew.",
    )
    convert.add_argument("source", metavar="IN", help="file of weights, folder, or name on the hub")
    convert.add_argument(
        "target",
        metavar="OUT",
        type=Path,
        help="folder to write, replaced if it holds such a model; of a link, what it points to",
    )
    convert.add_argument(
        "--layout",
        choices=get_args(Layout),
        default="hlip",
        help="hlip: config.json, model.safetensors and text/; open_clip: that of the released models (default: hlip)",
    )
    convert.add_argument("--model", metavar="NAME", help="which model it is, where neither files nor shapes can say")
    convert.add_argument(
        "--text", metavar="FOLDER", help="configuration and tokenizer of the text tower, where the hub is out of reach"
    )
    convert.set_defaults(run=_convert)

    plot = commands.add_parser(
        "plot",
        help="draw the curves of one or more training runs",
        description="Draw the loss, the learning rate, the speed and whatever else runs have logged, a panel each.",
    )
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train/pretrain.py")
    plot.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="picture to write: .png, .pdf or .svg (default: curves.png in the first RUN)",
    )
    plot.set_defaults(run=_plot)


def _convert(args: argparse.Namespace) -> None:
    model, how, _ = HLIPModel.load(args.source, args.model, args.text)
    say(f"{args.source}: {how}", *describe(model.config))
    if args.layout == "hlip":
        model.save_pretrained(args.target)
    else:
        model.save_open_clip(args.target, args.model)
    say(f"{args.target}: written in layout {args.layout}")


def _plot(args: argparse.Namespace) -> None:
    out = args.out or args.runs[0] / "curves.png"
    kind = picture_format(out)
    runs = [read_run(folder) for folder in args.runs]
    for run in runs:
        if run.damaged:
            say(f"{run.folder}: damaged lines of the log left out: {run.damaged}", file=sys.stderr)
    write_whole(out, lambda file: draw(runs, file, kind))
    say(f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
