"""`hlip embed`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from ..tasks.embed import embed_studies
from .shared import FILES_HELP, add_model, load_model, load_studies, study_paths, write_whole


def add(commands: Any) -> None:
    embed = commands.add_parser("embed", help="write the embeddings of studies to an .npz file")
    embed.add_argument("files", nargs="+", type=Path, metavar="FILE", help=FILES_HELP)
    embed.add_argument("--out", required=True, type=Path, help=".npz with `study` (N) and `embedding` (N, E) float32")
    add_model(embed)
    embed.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> None:
    if args.out.suffix != ".npz":
        raise ValueError(f"{args.out}: expected a name that ends in .npz")
    groups = study_paths(args.files)
    model = load_model(args)
    uids, embeddings = zip(*embed_studies(model, load_studies(groups, model)), strict=True)
    write_whole(
        args.out,
        lambda file: np.savez(file, study=np.array(uids), embedding=np.stack([e.numpy() for e in embeddings])),
    )
    print(f"{args.out}: {len(uids)} {'study' if len(uids) == 1 else 'studies'} x {len(embeddings[0])}")
