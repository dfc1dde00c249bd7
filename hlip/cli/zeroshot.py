"""`hlip zeroshot`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..embed.loop import embed_studies
from ..evaluate.zeroshot import DEFAULT_TEMPLATE, Prompts, class_shares, zeroshot_classifier
from ..output import write_text
from ..read.scan import ScanError
from ..study import Study
from ..terminal import say, visible
from .shared import (
    FILES_HELP,
    SHARE,
    SOME_LEFT_OUT,
    add_model,
    load_model,
    load_studies,
    rejections,
    study_paths,
)

DESCRIPTION = """\
Compare each study with prompts. A prompt's cosine is the likeness of its embedding to the study's; its share among
these prompts is the softmax of the cosines at the model's own temperature. Shares add up to 100% whatever the prompts
are: one says how near a prompt is beside the others, not how likely it is to be true. `hlip eval` measures how often
the nearest one is, on many studies with labels."""
EPILOG = """\
The JSON file has for each study share_among_these_prompts and cosine by prompt, the scans that were used, and left_out:
scan, rule and reason, as `hlip prepare` has them.

exit status:
  0    all scans were used
  3    some scans of a folder could not be used and were left out, or all of one of several folders
  2    error, such as a scan given by its file that cannot be used, or no study of which one can
  130  interrupted; nothing was written"""


def add(commands: Any) -> None:
    """Add `zeroshot` to the subparsers of `hlip`."""
    zero = commands.add_parser(
        "zeroshot",
        help="say which of several prompts describes a study best",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    zero.add_argument("--out", type=Path, metavar="FILE", help="also write all of it to this JSON file")
    add_model(zero)
    zero.set_defaults(run=_zeroshot)


def _zeroshot(args: argparse.Namespace) -> int:
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
    classifier = zeroshot_classifier(model, prompts)
    seen: list[Study] = []

    failed: dict[str, ScanError] = {}

    def remembered() -> Iterator[Study]:
        for study in load_studies(groups, model, failed):
            seen.append(replace(study, scans=[]))
            yield study

    embeddings = torch.stack([embedding for _, embedding in embed_studies(model, remembered())]).to(classifier)
    shares, cosines = class_shares(model, embeddings, classifier).tolist(), (embeddings @ classifier.T).tolist()
    table = {
        study.uid: {
            SHARE: _rounded(prompts, shares[i]),
            "cosine": _rounded(prompts, cosines[i]),
            "scans": study.names,
            "left_out": rejections(study.left_out),
        }
        for i, study in enumerate(seen)
    }
    for uid, error in failed.items():
        lost = [{"scan": "", "rule": error.rule, "reason": error.reason}]
        table[uid] = {SHARE: {}, "cosine": {}, "scans": [], "left_out": lost}
    if args.out:
        content = json.dumps(table, indent=1) + "\n"
        write_text(args.out, content)
    for uid, entry in table.items():
        say(uid, *_lines(entry))
    return SOME_LEFT_OUT if any(entry["left_out"] for entry in table.values()) else 0


def _rounded(prompts: Prompts, values: list[float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in zip(prompts.classes, values, strict=True)}


def _lines(entry: dict[str, Any]) -> Iterator[str]:
    """A study's shares, the largest first, and its scans."""
    if entry["scans"]:
        yield "  share among these prompts, and cosine"
    width = max((len(visible(name)) for name in entry[SHARE]), default=0)
    for name, share in sorted(entry[SHARE].items(), key=lambda item: -item[1]):
        figures = f"{share:6.1%}  {entry['cosine'][name]:6.3f}"
        yield f"  {visible(name):<{width}}  {figures}  {'#' * round(40 * share)}".rstrip()
    yield f"  scans: {', '.join(entry['scans']) or 'none that can be used'}"
    for scan in entry["left_out"]:
        yield f"  left out: {scan['scan']} ({scan['rule']}: {scan['reason']})"
