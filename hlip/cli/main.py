"""The `hlip` command."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from typing import NoReturn

from ..processes import say_error
from ..terminal import guarded_streams, say
from . import embed, evaluate, interpret, models, probe, retrieve, stores, train, zeroshot

COMMANDS = (stores, train, embed, zeroshot, evaluate, probe, retrieve, interpret, models)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say_error(*self.format_usage().splitlines(), f"{self.prog}: error: {message}")
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return train.run(argv[1:])
    with guarded_streams():
        return _main(argv)


def _main(argv: list[str]) -> int:
    parser = _Parser(
        prog="hlip",
        usage="hlip [-h] COMMAND ...",
        description="Prepare, learn from, embed, classify, find and look into 3D medical studies of many scans.",
        epilog="hlip COMMAND --help says more of each.",
    )
    # With the dots it is as wide as the longest command, which argparse would give a line of its own.
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND ...", prog="hlip")
    for module in COMMANDS:
        module.add(commands)
    env = commands.add_parser(
        "env",
        help="report versions, devices and attention backends",
        description="Report versions, processors, memory and attention backends, as Markdown to paste into an issue. "
        "It tells no token, no user and no folder outside of this package.",
    )
    env.set_defaults(run=_env)

    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # whoever reads what is printed, as `head` does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        say_error(f"hlip {args.command}: error: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        say(f"hlip {args.command}: interrupted; {str(interrupt) or 'nothing was written'}", file=sys.stderr)
        return 130


def _env(args: argparse.Namespace) -> None:
    runpy.run_module("hlip_kernels.env", run_name="__main__")
