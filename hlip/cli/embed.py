"""`hlip embed`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..arguments import argument
from ..embed.loop import embed
from ..embed.table import SUFFIXES, need_pyarrow
from ..output import check_writable
from ..processes import processes
from ..terminal import say
from .shared import (
    ENCODER,
    FILES_HELP,
    add_command,
    embedding_arguments,
    embedding_options,
    keeping_parts,
    load_encoder,
    open_studies,
    report_failed,
)

DESCRIPTION = """\
Embed every study. What is finished is kept in FILE.parts until all is: whatever ends the job, the same command goes on
where it stopped."""
EPILOG = """\
Columns: study, scan (empty where a row is of the whole study), head (which of the model's embeddings; 0 is for
zero-shot classification) and embedding, (N, E) float32 of unit length.

A 2D model reads stores, and shows all slices of a study. With --pool max, its embedding holds the largest value of
every feature, from which a probe can learn; it is not to be compared with texts, for which `hlip eval` goes by slices.

Several processes share the work, and change no bit of the result:
  torchrun --nproc_per_node 8 -m hlip.cli embed stores/brain --model MODEL --out brain.parquet

exit status:
  0    all was embedded
  3    some studies or scans could not be used and were left out; `failed` (studies) and `left_out` (scans) in the
       file's facts say which and why
  2    error
  130  interrupted; the same command goes on where it stopped"""


def add(commands: Any) -> None:
    """Add `embed` to the subparsers of `hlip`."""
    add_command(
        commands,
        "embed",
        _embed,
        "write the embeddings of studies to a file",
        DESCRIPTION,
        [
            argument(
                "files",
                nargs="+",
                type=Path,
                metavar="INPUT",
                help=f"a store that `hlip prepare` wrote; a study list (.json, .csv); {FILES_HELP}",
            ),
            argument("--out", required=True, type=Path, metavar="FILE", help=f"file to write: {' or '.join(SUFFIXES)}"),
            argument("--scans", action="store_true", help="embed each scan as a study of its own, too"),
            *ENCODER,
            *embedding_arguments(),
        ],
        EPILOG,
    )


def _embed(args: argparse.Namespace) -> int:
    if args.out.suffix not in SUFFIXES or args.out.is_dir():
        raise ValueError(f"{args.out}: expected the name of a file that ends in {' or '.join(reversed(SUFFIXES))}")
    check_writable(args.out)
    if args.out.suffix == ".parquet":
        need_pyarrow()  # said now, not after hours
    options = embedding_options(args, "both" if args.scans else "study")
    with processes() as among, keeping_parts(args.out):
        model = load_encoder(args)
        if among.first:
            say(f"hlip embed: on {model.device}, products in {options.on(model.device).dtype}", file=sys.stderr)
        made = embed(model, open_studies(args.files, model), options, args.out, args.workers, among)
    if made is None:
        return 0
    count, width = len(set(made.study.tolist())), made.embedding.shape[1]
    rows = f" in {len(made)} rows" if len(made) > count else ""
    say(f"{args.out}: {count} {'study' if count == 1 else 'studies'} x {width}{rows}")
    return report_failed(made, "embed")
