"""The cost of a call on the host, before and beside any kernel. No GPU is needed.

    python bench/host.py                       CPU time of the ops, with backends that do nothing
    python bench/host.py --base 26ff414        the same beside another revision, in turns
    python bench/host.py --launches            kernels and bytes of a block in training, one by one
    python bench/host.py --triton              CPU time of the Triton backend, and of Triton's launches in it

CPU time is that of one thread for forward and backward, `torch.autograd.grad` included, on small tensors of a CPU: the
least of several means of 100 calls. It is what a GPU waits for if its kernels are shorter.

`--launches` runs a block of width 768 with autocast to bfloat16 in the forms for GPUs, and writes down every op of
PyTorch that would launch a kernel there and every Triton kernel (`stub_driver.py`). Counted, not run. Bytes are
those of the tensors that a kernel is given and gives, each once; kernels of prefix rows, which read few rows of
theirs, count none. On CUDA, since PyTorch 2.8, products of 16-bit tensors give gradients in float32 themselves, so
that the conversion after them is left out there.

`--triton` calls the Triton backend with a driver that launches nothing. The time of its launches is that of Triton's
own Python: its C code, and the driver's, come on top.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchlib.options import number, written
from benchlib.report import print_table, write_json
from benchlib.timing import ratio
from compare import HERE, checked_out, run

CALLS = Path(__file__).with_name("benchlib") / "host_calls.py"
MEANS = 15  # of 100 calls each, of which the least counts


def main() -> int:
    args = parse()
    if args.launches:
        from benchlib import block_launches

        rows = block_launches.count()
        block_launches.show(rows)
    elif args.triton:
        from benchlib import launch_time

        rows = launch_time.measure()
        print_table(list(rows[0]), [[f"{x:.1f}" if isinstance(x, float) else x for x in row.values()] for row in rows])
    else:
        try:
            rows = timed(args.base, args.rounds)
        except (RuntimeError, ValueError) as error:
            print(f"host.py: {error}", file=sys.stderr)
            return 2
    if args.json:
        write_json(rows, args.json)
    return 0


def timed(base: str | None, rounds: int) -> list[dict[str, Any]]:
    """Rows of each call: seconds in every round, and with a base, its seconds and the ratio to them."""
    if base is None:
        seconds = in_turns({"new": HERE}, rounds)
    else:
        with checked_out(base) as tree:
            seconds = in_turns({"base": tree, "new": HERE}, rounds)
    rows: list[dict[str, Any]] = []
    for call, new in seconds["new"].items():
        row: dict[str, Any] = {"call": call, "seconds": new}
        if base is not None:
            row |= {"base": base, "base_seconds": seconds["base"][call], "ratio": ratio(new, seconds["base"][call])}
        rows.append(row)
    header = ["call", "us", *([f"us at {base}", "ratio"] if base else [])]
    lines = []
    for row in rows:
        shown = [f"{1e6 * min(row[name]):.1f}" for name in ("seconds", "base_seconds") if name in row]
        lines.append([row["call"], *shown, *([row["ratio"]] if base else [])])
    print_table(header, lines)
    return rows


def in_turns(trees: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call in each round, of each tree; every round is a fresh process."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in trees}
    turns = [name for i in range(rounds) for name in (trees if i % 2 else reversed(trees))]
    for name in tqdm(turns, "timing", unit="run", disable=None):
        for call, value in json.loads(run(trees[name], [str(CALLS), str(MEANS)])).items():
            seconds[name].setdefault(call, []).append(value)
    return seconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="REV", help="a commit, tag or branch to compare with")
    parser.add_argument("--rounds", type=number, default=5, help="runs of each revision (default: %(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--launches", action="store_true", help="list what a block in training launches")
    only.add_argument("--triton", action="store_true", help="time the Triton backend's calls")
    parser.add_argument("--json", type=written, help="also write the rows to this file")
    args = parser.parse_args()
    if args.launches or args.triton:
        if args.base:
            parser.error("--base compares the time of ops alone: run the others in a checkout of that revision")
        os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported
    return args


if __name__ == "__main__":
    sys.exit(main())
