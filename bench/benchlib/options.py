"""Options that several benchmarks have, and checks of what is given, before anything is measured."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def number(text: str, factor: int = 1) -> int:
    """A multiple of `factor`, of at least 1."""
    if not text.isdecimal() or int(text) < 1 or int(text) % factor:
        what = f"a multiple of {factor}" if factor > 1 else "an integer of at least 1"
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
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
    "--width": {"type": partial(number, factor=64), "help": "a multiple of 64 (default: as said above)"},
    "--depth": {"type": partial(number, factor=3), "help": "layers, a multiple of 3 (default: as said above)"},
    "--grid": {"type": number, "nargs": 3, "metavar": "N", "help": "tokens of a scan (default: as said above)"},
    "--heads": {"type": number, "default": 12, "help": "of attention (default: %(default)s)"},
    "--scans": {"type": number, "default": 4, "help": "of a study (default: %(default)s)"},
    "--seed": {"type": int, "default": 0, "help": "of all that is drawn at random (default: %(default)s)"},
    "--workers": {"type": number, "default": os.cpu_count(), "help": "compiler processes (default: %(default)s)"},
    "--json": {"type": written, "help": "also write the rows to this file"},
    "--results": {"type": Path, "metavar": "JSONL", "help": "also append the rows to this file"},
    "--rounds": {"type": number, "default": 5, "help": "measurements of each way (default: %(default)s)"},
    "--threads": {"type": number, "default": torch.get_num_threads(), "help": "of the CPU (default: %(default)s)"},
}  # fmt: skip


def add_common(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add some of the options that several benchmarks have to a parser, or a group of its options."""
    for name in names:
        parser.add_argument(name, **COMMON[name])


@contextlib.contextmanager
def refusals(parser: argparse.ArgumentParser, extras: str = "io,demo", hint: str = "") -> Iterator[None]:
    """End the program in one line where a package or something that it is given is not there.

    extras: of this library, which bring the packages that it needs.
    """
    try:
        yield
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: {error}: pip install 'hlip-kernels[{extras}]'\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}{hint}\n")


def command(description: str | None, *common: str, **defaults: Any) -> argparse.ArgumentParser:
    """The parser of a benchmark with some of the options that several have, and its own defaults of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, *common)
    parser.set_defaults(**defaults)
    return parser
