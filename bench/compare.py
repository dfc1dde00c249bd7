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

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchlib.options import number, written
from benchlib.report import print_table, write_json
from benchlib.timing import Ratio, ratio

HERE = Path(__file__).resolve().parents[1]
DEFAULT_BACKEND = """
import torch
from hlip_kernels.backends import choose_backend
device = "cuda" if torch.cuda.is_available() else "cpu"
print(choose_backend("auto", device, torch.bfloat16, 64))
"""
KEY = ("benchmark", "case", "mode", "dtype", "heads", "head_dim")  # that tells rows apart, as far as a row has it
Key = tuple[Any, ...]


def attention(tree: Path, extra: Sequence[str]) -> list[str]:
    backend = run(tree, ["-c", DEFAULT_BACKEND]).strip()
    return ["bench/attention.py", "--quick", "--rounds", "1", "--backends", f"hlip-{backend}", *extra]


def encoder(tree: Path, extra: Sequence[str]) -> list[str]:
    return ["bench/encoder.py", "--table9", "--models", "hlip", "--rounds", "1", "--no-memory", *extra]


BENCHMARKS = {"attention": attention, "encoder": encoder}


def main() -> int:
    args = parse()
    try:
        with checked_out(args.base) as base:
            seconds = in_turns({"base": base, "new": HERE}, args.only, args.rounds, args.options)
    except (RuntimeError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    rows = [
        {**dict(zip(KEY, key, strict=True)), "base_s": old, "new_s": seconds["new"][key],
         "times_as_fast": ratio(old, seconds["new"][key])}
        for key, old in seconds["base"].items() if key in seconds["new"]
    ]  # fmt: skip
    shown = [[*(row[name] for name in KEY[:4]), row["times_as_fast"], verdict(row["times_as_fast"])] for row in rows]
    print_table([*KEY[:4], "times as fast", ""], shown)
    for only, other in (("base", "new"), ("new", "base")):
        if alone := [key for key in seconds[only] if key not in seconds[other]]:
            print(f"only {'this folder' if only == 'new' else args.base} has: {'; '.join(map(named, alone))}")
    if args.json:
        write_json(rows, args.json)
    return 0


def verdict(found: Ratio) -> str:
    return "faster" if found.low > 1 else "slower" if found.high < 1 else ""


def named(key: Key) -> str:
    return ", ".join(str(part) for part in key if part is not None)


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with a revision of this repository, as long as it is needed.

    Raises:
        ValueError: no such revision, or no repository.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git("worktree", "add", "--detach", str(tree), revision)
        try:
            if (tree / "hlip_kernels" / "native").is_dir():
                build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
                subprocess.run(build, cwd=tree, stdout=sys.stderr, check=False)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments[:2])}: {done.stderr.strip()}")


def in_turns(
    trees: dict[str, Path], names: Sequence[str], rounds: int, extra: Sequence[str]
) -> dict[str, dict[Key, list[float]]]:
    """Seconds of every row in each round, of each tree; rows that are not in all rounds are left out."""
    commands = {(way, name): BENCHMARKS[name](tree, extra) for way, tree in trees.items() for name in names}
    found: dict[str, dict[Key, list[float]]] = {way: {} for way in trees}
    jobs = [(way, name) for i in range(rounds) for name in names for way in (trees if i % 2 else reversed(trees))]
    for way, name in tqdm(jobs, "comparing", unit="run", disable=None):
        for row in measured(trees[way], commands[way, name]):
            key = tuple(name if part == "benchmark" else row.get(part) for part in KEY)
            found[way].setdefault(key, []).append(row["p50_s"])
    return {way: {key: each for key, each in rows.items() if len(each) == rounds} for way, rows in found.items()}


def measured(tree: Path, command: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that a benchmark times."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.json"
        run(tree, [*command, "--json", str(results)])
        return [row for row in json.loads(results.read_text()) if "p50_s" in row]


def run(tree: Path, command: Sequence[str]) -> str:
    """What a Python program prints, run with the packages of a tree.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    environment.pop("TRITON_INTERPRET", None)  # compiled kernels are what is timed
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{tree}: {' '.join(command[:2])} failed: {done.stderr[-2000:]}")
    return done.stdout


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options] [-- ...]"
    )
    parser.add_argument("--base", required=True, metavar="REV", help="a commit, tag or branch to compare with")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        help="one of the two benchmarks (default: both)",
    )
    parser.add_argument("--rounds", type=number, default=5, help="runs of each revision (default: %(default)s)")
    parser.add_argument("--json", type=written, help="also write the rows to this file")
    parser.add_argument("options", nargs="*", help="after --, options for all benchmarks, such as --threads 1")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
