"""What commands have in common: the model, studies from files, and outputs written whole."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from ..data.batch import Study
from ..data.studies import load_study
from ..model.clip import HLIPModel

FILES_HELP = "image files, which together are one study; or folders, each of which holds the scans of one study"


def add_model(command: argparse.ArgumentParser) -> None:
    """Add `--model` and `--device`."""
    command.add_argument(
        "--model", required=True, help="a saved or released model: its folder, its file, or its name on the hub"
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")


def load_model(args: argparse.Namespace) -> HLIPModel:
    """The model of `--model` on `--device`, in evaluation mode."""
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model = HLIPModel.from_pretrained(args.model)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: cannot be used ({str(error).splitlines()[0]})") from error


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


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
