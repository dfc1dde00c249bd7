"""`hlip zeroshot`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..tasks.zeroshot import DEFAULT_TEMPLATE, Prompts, zeroshot
from .shared import FILES_HELP, add_model, load_model, load_studies, study_paths, write_whole


def add(commands: Any) -> None:
    """Add `zeroshot` to the subparsers of `hlip`."""
    zero = commands.add_parser(
        "zeroshot",
        help="say which of several prompts describes a study best",
        description="Compare each study with prompts, and print the probability of each: softmax at the model's own "
        "temperature. `hlip eval` does so for many studies, with labels.",
    )
    zero.add_argument("files", nargs="+", type=Path, metavar="FILE", help=FILES_HELP)
    zero.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a class in words; repeat for each")
    zero.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"sentence with {{}} for the prompt; repeat to average over several (default: {DEFAULT_TEMPLATE!r})",
    )
    zero.add_argument("--prompts", type=Path, metavar="YAML", help="file with classes and templates, in place of both")
    zero.add_argument("--out", type=Path, metavar="FILE", help="also write the probabilities to this JSON file")
    add_model(zero)
    zero.set_defaults(run=_zeroshot)


def _zeroshot(args: argparse.Namespace) -> None:
    if args.prompts and (args.prompt or args.template):
        raise ValueError("give --prompts, or --prompt and --template, not both")
    if args.prompts:
        prompts = Prompts.read(args.prompts)
    elif len(args.prompt) == len(set(args.prompt)) >= 2:
        prompts = Prompts({text: [text] for text in args.prompt}, tuple(args.template) or (DEFAULT_TEMPLATE,))
    else:
        raise ValueError(f"prompts missing: give at least two different --prompt, or --prompts; got {args.prompt}")
    groups = study_paths(args.files)
    model = load_model(args)
    uids, probabilities = zeroshot(model, load_studies(groups, model), prompts)
    names = list(prompts.classes)
    table = [dict(zip(names, (round(p, 6) for p in row), strict=True)) for row in probabilities.tolist()]
    if args.out:
        content = json.dumps(dict(zip(uids, table, strict=True)), indent=1) + "\n"
        write_whole(args.out, lambda file: file.write(content.encode()))
    width = max(len(name) for name in names)
    for uid, row in zip(uids, table, strict=True):
        print(uid)
        for name, probability in sorted(row.items(), key=lambda item: -item[1]):
            print(f"  {name:<{width}}  {probability:6.1%}  {'#' * round(40 * probability)}")
