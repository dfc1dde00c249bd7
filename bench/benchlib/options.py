"""Options that several benchmarks have, and checks of what is given, before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def device(text: str) -> str:
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU that PyTorch can use")
    return text


COMMON: dict[str, dict[str, Any]] = {
    "--device": {
        "type": device, "choices": ("cpu", "cuda"), "default": "auto", "help": "default: a GPU where there is one",
    },
    "--json": {"type": written, "help": "also write the rows to this file"},
    "--results": {"type": Path, "metavar": "JSONL", "help": "also append the rows to this file"},
    "--rounds": {"type": number, "default": 5, "help": "measurements of each way (default: %(default)s)"},
    "--threads": {"type": number, "default": torch.get_num_threads(), "help": "of the CPU (default: %(default)s)"},
}  # fmt: skip


def command(description: str | None, *common: str) -> argparse.ArgumentParser:
    """The parser of a benchmark with some of the options that several have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in common:
        parser.add_argument(name, **COMMON[name])
    return parser
