"""The `hlip` command."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from ..processes import say_error
from ..terminal import guarded_streams, say
from . import convert, embed, env, evaluate, interpret, plot, prepare, probe, retrieve, store, train, zeroshot

COMMANDS = (prepare, store, train, embed, zeroshot, evaluate, probe, retrieve, interpret, convert, plot, env)


class _Parser(argparse.ArgumentParser):
    """Takes flags with hyphens, too, in place of the underscores that they are declared with."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        declared = {flag for action in self._actions for flag in action.option_strings}
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, sign, value = word.partition("=")
            spelled = f"--{flag[2:].replace('-', '_')}"
            words.append(spelled + sign + value if flag.startswith("--") and spelled in declared else word)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        say_error(*self.format_usage().splitlines(), f"{self.prog}: error: {message}")
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return train.run(argv[1:])
    return _main(argv)


@guarded_streams()
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
