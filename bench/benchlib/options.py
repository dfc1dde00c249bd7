"""Options that several benchmarks have, and checks of what is given, before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def number(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return value


def written(text: str) -> Path:
    """A file to write, in a folder that there is."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {'a folder' if path.is_dir() else 'there is no such folder'}")
    return path


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", type=_device, choices=("cpu", "cuda"), default="auto", help="default: a GPU where there is one"
    )


def _device(text: str) -> str:
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU that PyTorch can use")
    return text
