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

import contextlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from benchlib.options import command, refusals
from benchlib.report import Row, columns, print_table, write
from benchlib.timing import ratio
from compare import HERE, checked_out, run, seconds_of_trees

CALLS = Path(__file__).with_name("benchlib") / "host_calls.py"
MEANS = 15  # of 100 calls each, of which the least counts


def main() -> None:
    parser = command(__doc__, "--json", "--rounds")
    parser.add_argument("--base", metavar="REV", help="a commit, tag or branch to compare with")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--launches", action="store_true", help="list what a block in training launches")
    only.add_argument("--triton", action="store_true", help="time the Triton backend's calls")
    args = parser.parse_args()
    if not (args.launches or args.triton):
        with refusals(parser):
            rows = timed(args.base, args.rounds)
    elif args.base:
        parser.error("--base compares the time of ops alone: run the others in a checkout of that revision")
    else:
        os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported
        from benchlib import host_launches

        rows = host_launches.count() if args.launches else host_launches.times()
    write(args, rows)


def timed(base: str | None, rounds: int) -> list[Row]:
    """Rows of each call: seconds in every round, and with a base, its seconds and the ratio to them."""
    with contextlib.nullcontext() if base is None else checked_out(base) as tree:
        trees = {"base": tree, "new": HERE} if tree else {"new": HERE}
        seconds = seconds_of_trees({("host", name): partial(calls, trees[name]) for name in trees}, rounds)
    rows: list[Row] = []
    shown: list[Row] = []
    for call, new in seconds["new"].items():
        rows.append({"call": call, "seconds": new})
        shown.append({"call": call, "us": f"{1e6 * min(new):.1f}"})
        if base is not None:
            before = seconds["base"][call]
            rows[-1] |= {"base": base, "base_seconds": before, "ratio": ratio(new, before)}
            shown[-1] |= {f"us at {base}": f"{1e6 * min(before):.1f}", "ratio": rows[-1]["ratio"]}
    print_table(*columns(shown, shown[0]))
    return rows


def calls(tree: Path) -> dict[Any, float]:
    """CPU seconds of every call."""
    return dict(json.loads(run(tree, [str(CALLS), str(MEANS)])))


if __name__ == "__main__":
    main()
