"""`hlip train`."""

from __future__ import annotations

from typing import Any


def add(commands: Any) -> None:
    """Add `train` to the subparsers of `hlip`, for help alone."""
    commands.add_parser("train", help="pre-train a model on a store, on any number of processes", add_help=False)


def run(arguments: list[str]) -> int:
    """Train, with a parser of its own: settings come from files and flags in the order in which they are given."""
    from ..train.pretrain import main  # takes a second, which other commands need not wait for

    return main(arguments)
