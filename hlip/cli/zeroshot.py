"""`hlip zeroshot`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import argument
from ..evaluate.evaluation import compare, scale_of, zeroshot_classifier
from ..output import write_json
from ..read.scan import ScanError
from ..study import Study
from ..terminal import say
from .shared import (
    FILES_HELP,
    MODEL,
    SOME_LEFT_OUT,
    add_command,
    as_json,
    load_model,
    load_studies,
    prompt_arguments,
    read_prompts,
    rejected_lines,
    rejections,
    said_lines,
    said_of,
    study_paths,
)

DESCRIPTION = """\
Compare each study with prompts. A prompt's cosine is the likeness of its embedding to the study's; its share among
these prompts is the softmax of the cosines at the model's own temperature. Shares add up to 100% whatever the prompts
are: one says how near a prompt is beside the others, not how likely it is to be true. In a task of pairs, a finding's
share is that of its prompt beside its negative prompt. `hlip eval` measures how often the nearest one is, on many
studies with labels."""
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
    add_command(
        commands,
        "zeroshot",
        _zeroshot,
        "say which of several prompts describes a study best",
        DESCRIPTION,
        [
            argument("files", nargs="+", type=Path, metavar="FILE", help=FILES_HELP),
            *prompt_arguments("a class in words; repeat for each"),
            argument("--out", type=Path, metavar="FILE", help="also write all of it to this JSON file"),
            *MODEL,
        ],
        EPILOG,
    )


def _zeroshot(args: argparse.Namespace) -> int:
    if not args.prompts and not (len(args.prompt) == len(set(args.prompt)) >= 2 and all(map(str.strip, args.prompt))):
        raise ValueError(f"prompts missing: give at least two different --prompt, or --prompts; got {args.prompt}")
    task = read_prompts(args, args.prompt)
    groups = study_paths(args.files)
    model = load_model(args)
    texts = zeroshot_classifier(model, task, args.templates)
    seen: list[Study] = []
    failed: dict[str, ScanError] = {}

    def remembered() -> Iterator[Study]:
        for study in load_studies(groups, model, failed):
            seen.append(replace(study, scans=[]))
            yield study

    _, similarities = compare(model, remembered(), texts)
    said = {study.uid: said_of(task, row, scale_of(model)) for study, row in zip(seen, similarities, strict=True)}
    entries: dict[str, dict[str, Any]] = {
        study.uid: as_json(said[study.uid]) | {"scans": study.names, "left_out": rejections(study.left_out)}
        for study in seen
    }
    for uid, error in failed.items():
        entries[uid] = as_json({}) | {"scans": [], "left_out": rejections([error.of(uid, "")])}
    if args.out:
        write_json(args.out, entries)
    for uid, entry in entries.items():
        say(uid, *(said_lines(task, said[uid]) if uid in said else ()))
        say(f"  scans: {', '.join(entry['scans']) or 'none that can be used'}", *rejected_lines(entry["left_out"]))
    say(*(f"note: {note}" for note in task.notes_on_shapes([model.config.preprocess.shape])))
    return SOME_LEFT_OUT if any(entry["left_out"] for entry in entries.values()) else 0
