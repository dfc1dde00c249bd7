"""Runs commands given as JSON, each in a fork of this process from which one package is hidden.

Prints, as JSON, the exit status of each and what it wrote to stderr.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hlip.cli import main as cli

HIDDEN = "hidden"  # a folder that PYTHONPATH begins with
TRAIN = Path(__file__).parents[1] / "train"


def run(hidden: str, program: str, *arguments: str) -> tuple[int, str]:
    def without() -> int:
        assert hidden not in sys.modules, f"{hidden} is imported by hlip.cli"
        hide(hidden)
        return start(program, list(arguments))

    try:
        return in_fork(without)
    finally:
        Path(HIDDEN, f"{hidden}.py").unlink(missing_ok=True)


def in_fork(call: Callable[[], int]) -> tuple[int, str]:
    """Exit status of a call in a fork of this process, and what it wrote to stderr."""
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if not child:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = 70  # of an exception that nobody caught
            try:
                status = call()
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
                status = 1 if isinstance(end.code, str) else int(end.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read().decode()


def hide(package: str) -> None:
    """Here, and in processes that this one starts."""
    sys.modules[package] = None  # type: ignore[assignment]
    Path(HIDDEN, f"{package}.py").write_text(f"raise ModuleNotFoundError({package!r})")


def start(program: str, arguments: list[str]) -> int:
    if program == "hlip":
        return cli.main(arguments)
    sys.argv = [program, *arguments]
    runpy.run_path(str(TRAIN / program), run_name="__main__")
    return 0


if __name__ == "__main__":
    print(json.dumps([run(*command) for command in json.loads(sys.argv[1])]))
