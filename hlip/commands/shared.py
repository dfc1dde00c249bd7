"""What commands have in common: the model, studies from files, and outputs written whole."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from ..data.batch import Study
from ..data.store import Store
from ..data.studies import load_study
from ..model.clip import HLIPModel
from ..tasks.embed import MAX_TOKENS, Dtype, Options, embed, parts_of
from ..tasks.embeddings import Embeddings
from ..tasks.inputs import FileStudies, ListedStudies, StoreStudies, Studies
from ..tasks.output import write_whole as write_whole
from ..tasks.processes import Processes

FILES_HELP = "image files, which together are one study; or folders, each of which holds the scans of one study"
SOME_LEFT_OUT = 3
SHOWN = 10  # lines of a list that are printed


def add_model(command: argparse.ArgumentParser) -> None:
    """Add `--model` and `--device`."""
    command.add_argument(
        "--model", required=True, help="a saved or released model: its folder, its file, or its name on the hub"
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")


def load_model(args: argparse.Namespace) -> HLIPModel:
    """The model of `--model` on `--device`, in evaluation mode."""
    device = args.device
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model = HLIPModel.from_pretrained(args.model)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: cannot be used ({str(error).splitlines()[0]})") from error


def add_embedding(command: argparse.ArgumentParser) -> None:
    """Add what says how studies are embedded."""
    command.add_argument(
        "--max_tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help="studies run together up to so many patch tokens; more is faster on GPUs and needs more memory "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        default="auto",
        help="of products of matrices (default: bf16 on GPUs, fp32 on CPUs)",
    )
    command.add_argument(
        "--workers",
        type=int,
        default=min(4, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)),
        metavar="N",
        help="processes that read studies while the model runs; 0 for none (default: %(default)s)",
    )


def open_studies(paths: Sequence[Path], model: HLIPModel) -> Studies:
    """A store, a study list, or what `study_paths` takes."""
    if len(paths) == 1 and (paths[0] / "shards").is_dir():
        return StoreStudies(Store(paths[0]), model.config.vision.patch_size)
    if len(paths) == 1 and paths[0].suffix.lower() in (".json", ".csv") and not paths[0].is_dir():
        from ..data.sources import find_studies

        return ListedStudies(find_studies(paths[0], progress=tqdm), model.config.preprocess)
    if stores := [path for path in paths if (path / "shards").is_dir()]:
        raise ValueError(f"{stores[0]} is a store: give it alone")
    return FileStudies(study_paths(list(paths)), model.config.preprocess)


def embed_to(
    out: Path, model: HLIPModel, studies: Studies, args: argparse.Namespace, scans: bool, among: Processes
) -> Embeddings | None:
    """`embed` with the arguments of `add_embedding`; what is finished stays beside `out` if the job is interrupted."""
    if args.workers < 0:
        raise ValueError(f"--workers: expected 0 or more, got {args.workers}")
    options = Options(scans, args.max_tokens, args.dtype)
    try:
        return embed(model, studies, options, out, args.workers, among)
    except KeyboardInterrupt:
        if not parts_of(out).exists():
            raise
        raise KeyboardInterrupt(f"{parts_of(out)} keeps what is finished: run this again to go on") from None


def report_failed(table: Embeddings, command: str) -> int:
    """Say which studies were left out; the exit status."""
    failed = table.facts.get("failed", [])
    for uid, reason in failed[:SHOWN]:
        print(f"hlip {command}: left out {uid}: {reason}", file=sys.stderr)
    if len(failed) > SHOWN:
        print(f"hlip {command}: left out {len(failed) - SHOWN} more", file=sys.stderr)
    return SOME_LEFT_OUT if failed else 0


def study_paths(files: list[Path]) -> list[Path | list[Path]]:
    """One entry per study: a folder each, or all the files together."""
    if len(set(files)) < len(files):
        raise ValueError(f"{max(files, key=files.count)} is given twice")
    folders = [path for path in files if path.is_dir()]
    if folders and len(folders) < len(files):
        other = next(path for path in files if not path.is_dir())
        raise ValueError(f"{other} is not a folder but {folders[0]} is: give the files of one study, or folders")
    return list(folders) if folders else [files]


def load_studies(groups: list[Path | list[Path]], model: HLIPModel) -> Iterator[Study]:
    for paths in tqdm(groups, "reading studies", unit="study", disable=len(groups) == 1 or None):
        name = paths if isinstance(paths, Path) else min(paths)
        yield load_study(paths, model.config.preprocess, uid=str(name))
