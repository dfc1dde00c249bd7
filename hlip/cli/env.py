"""`hlip env`."""

from __future__ import annotations

import argparse
import runpy
from typing import Any

from .shared import add_command


def add(commands: Any) -> None:
    """Add `env` to the subparsers of `hlip`."""
    add_command(
        commands,
        "env",
        _env,
        "report versions, devices and attention backends",
        "Report versions, processors, memory and attention backends, as Markdown to paste into an issue. It tells no\n"
        "token, no user and no folder outside of this package.",
    )


def _env(args: argparse.Namespace) -> None:
    runpy.run_module("hlip_kernels.env", run_name="__main__")
