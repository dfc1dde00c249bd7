"""The fenced blocks of README and docs: what they are, and how their commands are checked and run.

A comment in the line before a block says what is done with it; without one, it is run:

    <!-- not run: needs a GPU -->            only checked: Python is compiled and its imports of this project resolved,
                                             commands are parsed by the programs' own parsers
    <!-- in small: --steps 2 --train 10 -->  run with these values of its flags

A YAML or JSON block with `title="NAME"` is written to that file before what follows is run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from commands import run
from hlip.train import pretrain

ROOT = Path(__file__).parents[1]
LANGUAGES = ("bash", "json", "python", "text", "yaml")
REASONS = (
    "installs packages",
    "needs a GPU",
    "needs another library",
    "needs files of your own",
    "needs several machines",
    "needs Slurm",
    "needs the hub",
    "runs for minutes",
)
_FENCE = re.compile(r'^```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?$')
_MARK = re.compile(r"^<!-- (?P<kind>not run|in small): (?P<rest>.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    reason: why it is not run; empty if it is.
    small: flags and values in place of its own.
    """

    page: Path
    line: int
    language: str
    text: str
    title: str
    reason: str
    small: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """
    Raises:
        ValueError: a fence that is not closed or names no language, or a mark that means nothing; names the line.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    start = None
    for i, raw in enumerate(lines):
        line = raw.strip()
        if start is None and line.startswith("```"):
            start = i
        elif start is not None and line == "```":
            found.append(_block(page, lines, start, i))
            start = None
    if start is not None:
        raise ValueError(f"{page}:{start + 1}: the block is not closed")
    return found


def _block(page: Path, lines: Sequence[str], start: int, end: int) -> Block:
    where = f"{page}:{start + 1}"
    fence = _FENCE.match(lines[start].strip())
    if fence is None or fence["language"] not in LANGUAGES:
        raise ValueError(f"{where}: a block is one of {', '.join(LANGUAGES)}, got {lines[start].strip()}")
    before = lines[start - 1].strip() if start else ""
    mark = _MARK.match(before)
    if before.startswith("<!--") and mark is None:
        raise ValueError(f"{where}: no such mark: {before}")
    reason, small = "", {}
    if mark and mark["kind"] == "not run":
        reason = mark["rest"]
        if reason not in REASONS:
            raise ValueError(f"{where}: {reason!r} is no reason; there are {', '.join(REASONS)}")
    elif mark:
        words = shlex.split(mark["rest"])
        small = dict(zip(words[::2], words[1::2], strict=True))
    indent = len(lines[start]) - len(lines[start].lstrip())
    text = "\n".join(line[indent:] for line in lines[start + 1 : end]) + "\n"
    return Block(page, start + 1, fence["language"], text, fence["title"] or "", reason, small)


# ---- commands


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block as words, with its small values; of a script, all but comments."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    unused = set(block.small)
    found = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            flag = words[i - 1] if i else ""
            if flag in block.small and word != flag:
                words[i] = block.small[flag]
                unused.discard(flag)
        if words:
            found.append(words)
    if unused:
        raise ValueError(f"{block}: no command has {', '.join(sorted(unused))}")
    return found


class Parsed(BaseException):
    """Ends a program where it has understood its arguments."""


def _parse_then_stop(parse: Any) -> Any:
    @functools.wraps(parse)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        parse(*args, **kwargs)
        raise Parsed

    return wrapper


def check_command(words: Sequence[str]) -> None:
    """Have a command's own program parse it, without running it.

    Raises:
        ValueError: a program, target or extra that is not known, or arguments that its parser refuses.
    """
    words = list(words)
    while words and re.fullmatch(r"\w+=.*", words[0]):  # of the environment
        del words[0]
    if not words:
        return
    program, rest = words[0], words[1:]
    if program == "hlip":
        _check_script("hlip.cli", rest)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        arguments = _parsed(get_args_parser().parse_args, rest, words)
        start = ["-m"] * arguments.module
        check_command(["python", *start, arguments.training_script, *arguments.training_script_args])
    elif program == "srun":
        options = next(i for i, word in enumerate(rest) if not word.startswith("-"))
        check_command(rest[options:])
    elif program == "python" and rest[0] == "-m" and rest[1] in ("pip", "venv"):
        check_command(rest[1:])
    elif program == "python" and rest[0] == "-m":
        _check_script(rest[1], rest[2:])
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "<command>", "exec")
    elif program == "python":
        _check_script(str(ROOT / rest[0]), rest[1:])
    elif program == "make":
        targets = [word for word in rest if "=" not in word]
        settings = [word for word in rest if "=" in word]
        subprocess.run(["make", "-n", *targets, *settings], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        _check_extras(rest)
    elif program not in ("cd", "export", "git", "module", "sbatch", "source", "venv"):
        raise ValueError(f"{shlex.join(words)}: a program that the test of the documentation does not know")


def _parsed(parse: Any, rest: Sequence[str], words: Sequence[str]) -> Any:
    try:
        return parse(rest)
    except SystemExit as error:
        raise ValueError(f"{shlex.join(words)}: refused by its parser") from error


def _check_script(name: str, arguments: Sequence[str]) -> None:
    """`name` is a module, or the path of a script."""
    script = Path(name).suffix == ".py"
    if script and not Path(name).exists():
        raise ValueError(f"{name}: no such script")
    command = shlex.join([name, *arguments])
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, Path.cwd())
        os.chdir(ROOT)  # where recipes and scripts are named from
        stack.enter_context(mock.patch.object(sys, "argv", [name, *arguments]))
        for home, parse in ((argparse.ArgumentParser, "parse_args"), (pretrain, "read_arguments")):
            stack.enter_context(mock.patch.object(home, parse, _parse_then_stop(getattr(home, parse))))
        try:
            if name == "hlip.cli":
                sys.exit(run(*arguments))
            elif script:
                runpy.run_path(name, run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except Parsed:
            return
        except SystemExit as error:
            if not error.code:
                return
            raise ValueError(f"{command}: refused by its parser") from error


@functools.cache
def _extras() -> frozenset[str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "EXTRAS"
    )
    assert isinstance(table, ast.Dict)
    return frozenset({key.value for key in table.keys if isinstance(key, ast.Constant)} | {"all"})


def _check_extras(words: Sequence[str]) -> None:
    for word in words:
        if found := re.fullmatch(r"(?:\.|hlip-kernels)\[(.+)\]", word):
            if unknown := set(found[1].split(",")) - _extras():
                raise ValueError(f"pip {shlex.join(words)}: no extra {', '.join(sorted(unknown))}")
        elif word.endswith(".txt") and not (ROOT / word).exists():
            raise ValueError(f"pip {shlex.join(words)}: {word}: no such file")


def run_command(words: Sequence[str]) -> None:
    """Run a command in the current folder: `hlip` and examples in this process, scripts in one of their own.

    Raises:
        ValueError: it fails; says how.
    """
    words = [os.path.expandvars(word) for word in words]
    settings = {}
    while words and re.fullmatch(r"\w+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    if not words:
        os.environ.update(settings)
        return
    if words[0] == "hlip":
        status = run(*words[1:])
        if status != 0:
            raise ValueError(f"{shlex.join(words)}: exit status {status}")
        return
    if words[0] == "python" and words[1].startswith("examples/"):
        with mock.patch.object(sys, "argv", words[1:]):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        return
    if words[0] == "torchrun":
        words[:1] = ["python", "-m", "torch.distributed.run"]
    if words[0] != "python":
        raise ValueError(f"{shlex.join(words)}: not a program that is run; mark the block")
    arguments = [str(ROOT / word) if re.match(r"(train|bench)/.+\.py$", word) else word for word in words[1:]]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **settings},
    )
    if done.returncode:
        raise ValueError(f"{shlex.join(words)}: exit status {done.returncode}\n{done.stderr[-2000:]}")


# ---- Python


def check_python(block: Block) -> None:
    """Compile a block that is not run, and resolve its imports of this project.

    Raises:
        SyntaxError, ImportError: it could not run.
    """
    for node in ast.walk(ast.parse(block.text, str(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("hlip", "hlip_kernels"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    raise ImportError(f"{block}: {node.module} has no {alias.name}")


def run_blocks(page: Path) -> Iterator[Block]:
    """Run a page in the current folder, block after block; Python blocks share their names. Gives each before it is
    run."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        yield block
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            for words in commands(block):
                if block.reason:
                    check_command(words)
                else:
                    run_command(words)
        elif block.language == "python" and block.reason:
            check_python(block)
        elif block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
