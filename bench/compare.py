"""Two revisions side by side: what has become faster, and what slower.

    python bench/compare.py --base HEAD~1
    python bench/compare.py --base HEAD~20 --rounds 9 --only attention

Checks the base out into a temporary folder, and lets it and this folder, as it lies, run the same benchmarks by turns,
each time in a fresh process: attention (`attention.py --quick`) with the backend that each revision chooses by itself,
and our encoder of Table 9 (`encoder.py`). Every run checks its results before it times anything.

A ratio says how many times as fast this folder is as the base: the median over the rounds, with the interval that holds
95% of bootstrap draws of the rounds. One that lies wholly on one side of 1 is called faster or slower.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchlib.options import command, refusals
from benchlib.report import print_table, write
from benchlib.timing import Ratio, ratio, turns

HERE = Path(__file__).resolve().parents[1]
LIBRARY = Path("hlip_kernels/native/libhlip_native.so")
DEFAULT_BACKEND = """
import torch
from hlip_kernels.backends import choose_backend
device = "cuda" if torch.cuda.is_available() else "cpu"
print(choose_backend("auto", device, torch.bfloat16, 64))
"""
KEY = ("benchmark", "case", "mode", "dtype", "heads", "head_dim")  # that tells rows apart, as far as a row has it
Key = tuple[Any, ...]


def attention(tree: Path, extra: Sequence[str]) -> list[str]:
    ours = f"hlip-{run(tree, ['-c', DEFAULT_BACKEND]).strip()}"
    return ["bench/attention.py", "--quick", "--rounds", "1", "--backends", ours, *extra]


def encoder(tree: Path, extra: Sequence[str]) -> list[str]:
    return ["bench/encoder.py", "--table9", "--models", "hlip", "--rounds", "1", "--no-memory", *extra]


BENCHMARKS = {"attention": attention, "encoder": encoder}


def main() -> None:
    parser = command(__doc__, "--json", "--rounds")
    parser.usage = "%(prog)s [options] [-- ...]"
    parser.add_argument("--base", required=True, metavar="REV", help="a commit, tag or branch to compare with")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="default: both")
    parser.add_argument("options", nargs="*", help="after --, options for all benchmarks, such as --threads 1")
    args = parser.parse_args()
    with refusals(parser), checked_out(args.base) as base:
        trees = {"base": base, "new": HERE}
        runs = {(name, tree): partial(measured, name, trees[tree], args.options)
                for name in args.only for tree in trees}  # fmt: skip
        seconds = seconds_of_trees(runs, args.rounds)
    rows = [
        {**dict(zip(KEY, key, strict=True)), "base_s": old, "new_s": seconds["new"][key],
         "times_as_fast": ratio(old, seconds["new"][key])}
        for key, old in seconds["base"].items() if key in seconds["new"]
    ]  # fmt: skip
    shown = [[*map(row.get, KEY[:4]), row["times_as_fast"], verdict(row["times_as_fast"])] for row in rows]
    print_table([*KEY[:4], "times as fast", ""], shown)
    for only, other in (("base", "new"), ("new", "base")):
        if alone := [key for key in seconds[only] if key not in seconds[other]]:
            names = "; ".join(", ".join(str(value) for value in key if value is not None) for key in alone)
            print(f"only {'this folder' if only == 'new' else args.base} has: {names}")
    write(args, rows)


def verdict(times: Ratio) -> str:
    return "faster" if times.low > 1 else "slower" if times.high < 1 else ""


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with a revision of this repository, as long as it is needed.

    Raises:
        ValueError: no such revision, or no repository.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        printed(["git", "worktree", "add", "--detach", str(tree), revision], HERE)
        try:
            if (tree / LIBRARY).parent.is_dir() and not copied(revision, tree):
                build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
                subprocess.run(build, cwd=tree, stdout=sys.stderr, check=False)
            yield tree
        finally:
            printed(["git", "worktree", "remove", "--force", str(tree)], HERE)


def copied(revision: str, tree: Path) -> bool:
    """Copy this folder's native library into the tree, if the revision has the same sources of it."""
    sources = ["git", "diff", "--quiet", revision, "--", "setup.py", "hlip_kernels/native/src"]
    if not (HERE / LIBRARY).exists() or subprocess.run(sources, cwd=HERE, check=False).returncode:
        return False
    shutil.copy(HERE / LIBRARY, tree / LIBRARY)
    return True


def seconds_of_trees(
    runs: Mapping[tuple[str, str], Callable[[], Mapping[Key, float]]], rounds: int
) -> dict[str, dict[Key, list[float]]]:
    """Seconds of everything that is measured in each round, of each tree; what is not in all rounds is left out.

    Args:
        runs: by the names of a benchmark and a tree; what measures it, in a fresh process.
    """
    seconds: dict[str, dict[Key, list[float]]] = {tree: defaultdict(list) for _, tree in runs}
    for name, tree in tqdm(list(turns(runs, rounds)), "timing", unit="run", disable=None):
        for key, spent in runs[name, tree]().items():
            seconds[tree][key].append(spent)
    return {tree: {key: spent for key, spent in of.items() if len(spent) == rounds} for tree, of in seconds.items()}


def measured(name: str, tree: Path, extra: Sequence[str]) -> dict[Key, float]:
    """The seconds of the rows that a benchmark times."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.json"
        run(tree, [*BENCHMARKS[name](tree, extra), "--json", str(results)])
        rows = [row for row in json.loads(results.read_text()) if "p50_s" in row]
    return {(name, *map(row.get, KEY[1:])): row["p50_s"] for row in rows}


def run(tree: Path, command: Sequence[str]) -> str:
    """Returns what a Python program prints, run with the packages of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    environment.pop("TRITON_INTERPRET", None)  # compiled kernels are what is timed
    return printed([sys.executable, *command], tree, environment)


def printed(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Returns what a program prints.

    Raises:
        ValueError: it failed; with the end of what it said.
    """
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{folder}: {' '.join(command[:3])} failed: {done.stderr[-2000:].strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
