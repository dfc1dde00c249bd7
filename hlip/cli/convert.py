"""`hlip convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from ..arguments import argument
from ..model.checkpoint import Layout
from ..model.clip import HLIPModel
from ..model.released import describe
from ..terminal import say
from .shared import add_command


def add(commands: Any) -> None:
    """Add `convert` to the subparsers of `hlip`."""
    add_command(
        commands,
        "convert",
        _convert,
        "read a model in any layout and write it in another",
        "Read a saved or released model, or a training checkpoint; say what it is; write it anew.",
        [
            argument("source", metavar="IN", help="file of weights, folder, or name on the hub"),
            argument(
                "target",
                metavar="OUT",
                type=Path,
                help="folder to write, replaced if it holds such a model; of a link, what it points to",
            ),
            argument(
                "--layout",
                choices=get_args(Layout),
                default="hlip",
                help="hlip: config.json, model.safetensors and text/; open_clip: that of the released models "
                "(default: hlip)",
            ),
            argument("--model", metavar="NAME", help="which model it is, where neither files nor shapes can say"),
            argument(
                "--text",
                metavar="FOLDER",
                help="configuration and tokenizer of the text tower, where the hub is out of reach",
            ),
        ],
    )


def _convert(args: argparse.Namespace) -> None:
    model, (config, how, _) = HLIPModel.load(args.source, args.model, args.text)
    say(f"{args.source}: {how}", *describe(config))
    if args.layout == "hlip":
        model.save_pretrained(args.target)
    else:
        model.save_open_clip(args.target, args.model)
    say(f"{args.target}: written in layout {args.layout}")
