"""Is this library right on this GPU, and how fast? Everything in one report, the most telling first.

    python bench/check.py --minutes 8
    python bench/check.py --minutes 8 --out h100.md            also h100.json, with every row
    python bench/check.py --minutes 8 --out h100.md --continue what it had no time for
    python bench/check.py --list                               the steps, with an estimate of the seconds of each
    python bench/check.py --device cpu                         the same with this processor's kernels, as a rehearsal

Needs a checkout on PYTHONPATH, torch, triton and the core requirements; nothing has to be installed or built.

    environment  versions, device, driver, clocks, backends and why others do not run
    compile      every Triton kernel that is launched later, on all cores at once; registers and spills
    attention    results and gradients against the formula in float64: slices, scans and studies, 0, 1 and 3 prefix
                 rows, half of the patches dropped; every result twice, which must be the same to the last bit
    norm         the same of residual add, regroup and LayerNorm, from every level to every other
    ceilings     a large matrix product and a large copy, beside which the rest is set
    kernels      forward, dq, dkdv and norm, each by itself
    peers        attention beside other libraries and PyTorch's own ways
    encoder      whole encoders of the paper's Table 9: time, the host's share of it, CUDA graphs
    training     gradients of a step of an encoder in bf16 against the same step in float32 on the CPU
    memory       what a training call of attention needs, which must not grow faster than the tokens
    tune         times other tile sizes and libraries for this GPU; the table goes into the report (not on a CPU)
    sanitizer    NVIDIA's compute-sanitizer, where it is installed

Before each step the time that is left is compared with its estimate: one that does not fit is left out and listed, and
shorter ones after it may still run. Steps run in a process of their own. One that raises, ends the process or takes far
longer than its estimate is reported, and the others go on. The report is written after every step. Exits with 1 if
anything of this library was wrong; mistakes of other libraries are reported only.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchlib import steps
from benchlib.checkpage import NOTHING, SKIPPED, Report, is_fault, markdown, read_check, summary
from benchlib.options import command, positive, written
from benchlib.report import kinds, print_table, provenance
from benchlib.steps import SIZES, STAGES, STEPS, Setup, Step
from benchlib.timing import synchronise
from hlip.output import write_json, write_text

STARTED = time.monotonic() - time.process_time()  # imports take seconds, too
START_SECONDS = 120.0  # that a new process may take until it can run steps
PATIENCE, GRACE = 3.0, 30.0  # times its estimate, and seconds more, that a step may take
ABSENT = 2.0  # seconds of a step that finds nothing to run
TINY = 0.2  # of the estimates on a CPU
ALIKE = ("device", "size", "commit")  # of a report that is to be continued


class Worker:
    """A process that runs steps one after another, and a new one in its place where it fails, ends or stands still.

    deadline: of all steps, on the monotonic clock.
    """

    def __init__(self, device: str, size: str, deadline: float) -> None:
        self.device, self.size, self.deadline = device, size, deadline
        self.process: Any = None

    def start(self) -> dict[str, Any]:
        """Facts of the device, once it is there.

        Raises:
            RuntimeError: it cannot be used.
        """
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.stack = tempfile.NamedTemporaryFile("r", suffix=".txt")  # noqa: SIM115 - closed as the process is stopped
        self.process = context.Process(target=work, args=(theirs, self.device, self.size, self.stack.name))
        self.process.start()
        theirs.close()
        try:
            kind, value = self.receive(time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError) as error:
            if self.is_over():
                raise RuntimeError("time was up before anything could run. Give more --minutes.") from error
            raise RuntimeError(f"the process that runs steps did not start ({type(error).__name__})") from error
        if kind == "failed":
            raise RuntimeError(value)
        return value

    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline

    def receive(self, until: float) -> tuple[str, Any]:
        if not self.connection.poll(max(0.0, min(self.deadline, until) - time.monotonic())):
            raise TimeoutError
        kind, text = self.connection.recv()
        return kind, json.loads(text)

    def run(self, step: Step, limit: float) -> Report:
        """The step's entry in the report: verdict, rows, note, and clocks of the device.

        limit: seconds, after which the step is ended.
        """
        rows: list[dict[str, Any]] = []
        try:
            if self.process is None:
                self.start()
            until = time.monotonic() + limit
            self.connection.send(step.name)
            while (message := self.receive(until))[0] == "row":
                rows.append(message[1])
            kind, value = message
            if kind == "done":
                return {"verdict": verdict(step, rows), "rows": rows, "note": "", "clocks": value}
            told, note = "failed", value
        except TimeoutError:
            told, note = "too long", f"not done after {limit:.0f} s; it was in\n{self.where()}"
            if self.is_over():
                told, note = SKIPPED, f"cut off, as time was up; it was in\n{self.where()}"
        except (EOFError, OSError):
            self.process.join(5)
            told, note = "ended", f"the process ended with {self.process.exitcode} (a negative number is a signal's)"
        except RuntimeError as error:
            told, note = SKIPPED if self.is_over() else "failed", str(error)
        self.stop()
        return {"verdict": told, "rows": rows, "note": note, "clocks": None}

    def where(self) -> str:
        """The lines that the process is in."""
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self.stack.read()

    def stop(self) -> None:
        """End it, and all processes that it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has no group of its own before it is ready
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.stack.close()
        self.process = None


def verdict(step: Step, rows: Sequence[dict[str, Any]]) -> str:
    if any("wrong" in row for row in rows):
        return "wrong"
    if all("reason" in row for row in rows):
        return NOTHING
    return "right" if step.checks else "reported"


def work(connection: Connection, device: str, size: str, stack: str) -> None:
    """Run the steps that are sent, and answer with their rows."""
    os.setpgid(0, 0)  # so that those that it starts end with it
    with Path(stack).open("w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)

        def answer(kind: str, value: Any) -> None:
            connection.send((kind, json.dumps(value)))

        if device == "cuda" and not torch.cuda.is_available():
            answer("failed", "there is no GPU that PyTorch can use; --device cpu checks this processor")
            return
        facts = provenance(torch.device(device))
        answer("ready", facts)
        by_name = {step.name: step for step in STEPS}
        while True:
            try:
                step = by_name[connection.recv()]
            except (EOFError, ConnectionError):
                return
            try:
                for row in step.rows(Setup(device, SIZES[size])):
                    answer("row", {key: value for key, value in row.items() if key not in facts})
                synchronise()
                answer("done", steps.clocks() if device == "cuda" else None)
            except (Exception, SystemExit):  # it belongs into the report; the GPU may be lost to this process
                answer("failed", traceback.format_exc())
                return
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def main() -> int:
    args = parse()
    chosen = [step for step in STEPS if step.stage in args.stages]
    if args.list:
        show_plan(chosen, args)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the process that runs steps ends, too
    worker = Worker(args.device, args.size, time.monotonic() + left(args))
    try:
        facts = worker.start() | {"size": args.size, "minutes": args.minutes}
        new: Report = {"facts": facts, "steps": []}
        report = continued(args.out.with_suffix(".json"), facts) if args.continued else new
        run(worker, report, chosen, args)
    except KeyboardInterrupt:
        print(f"interrupted: {args.out} has the steps before", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError) as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    finally:
        worker.stop()
    print(f"{args.out}: {summary(report['steps'])}")
    return int(any(map(is_fault, report["steps"])))


def run(worker: Worker, report: Report, chosen: Sequence[Step], args: argparse.Namespace) -> None:
    """Run what has no result yet, as far as there is time, and write the report after each step."""
    entries = {entry["name"]: entry for entry in report["steps"]}
    new = {step.name: record(step, args) for step in chosen if step.name not in entries}
    report["steps"] += new.values()
    entries |= new
    for step in chosen:
        entry = entries[step.name]
        if entry["verdict"] != SKIPPED:
            continue
        needed = estimate(step, args) if step.there() else ABSENT
        if needed > left(args):
            print(f"{clock()} {step.name}: skipped, needs about {needed:.0f} s, has {left(args):.0f}", flush=True)
            continue
        begin = time.monotonic()
        entry |= worker.run(step, PATIENCE * needed + GRACE)
        entry["seconds"] = round(time.monotonic() - begin, 2)
        entry["kinds"] = kinds(dict.fromkeys(key for row in entry["rows"] for key in row))
        write(report, args.out)
        print(
            f"{clock()} {step.name}: {entry['verdict']}, {entry['seconds']:.1f} s (estimate {needed:.0f})", flush=True
        )
    write(report, args.out)


def record(step: Step, args: argparse.Namespace) -> Report:
    """Make the entry of a step that has no result yet."""
    return {
        "name": step.name, "stage": step.stage, "estimate_s": estimate(step, args), "seconds": None,
        "verdict": SKIPPED, "note": "", "rows": [], "clocks": None, "foreign": step.foreign,
    }  # fmt: skip


def continued(path: Path, facts: dict[str, Any]) -> Report:
    """The report that is there.

    Raises:
        ValueError: it cannot be read, or is of another device, size or commit.
    """
    report = read_check(path)
    before, names = report["facts"], {step["name"] for step in report["steps"]}
    for key in ALIKE:
        if before.get(key) != facts[key]:
            raise ValueError(
                f"{path}: cannot be continued (expected {key} {facts[key]}, got {before.get(key)}). "
                "Run without --continue, or give another --out."
            )
    unknown = names - {step.name for step in STEPS}
    if unknown:
        raise ValueError(
            f"{path}: has steps of another version ({', '.join(sorted(unknown))}). Run without --continue."
        )
    return report


def estimate(step: Step, args: argparse.Namespace) -> float:
    card, processor = step.seconds
    return card if args.device == "cuda" else processor * (TINY if args.size == "tiny" else 1)


def left(args: argparse.Namespace) -> float:
    """Seconds; infinite without a budget."""
    return float("inf") if args.minutes is None else 60 * args.minutes - (time.monotonic() - STARTED)


def clock() -> str:
    return f"[{time.monotonic() - STARTED:5.0f} s]"


def show_plan(chosen: Sequence[Step], args: argparse.Namespace) -> None:
    """The steps in their order; with --minutes also which of them fit by their estimates."""
    total, lines = 0.0, []
    for step in chosen:
        seconds = estimate(step, args) if step.there() else ABSENT
        fits = args.minutes is None or total + seconds <= 60 * args.minutes
        total += seconds if fits else 0
        lines.append([step.stage, step.name, f"{seconds:.0f}", f"{total:.0f}" if fits else "does not fit"])
    print_table(["stage", "step", "s, estimated", "in all"], lines)
    machine = "an H200 with 16 cores" if args.device == "cuda" else "a CPU with 2 cores"
    print(f"seconds are estimates for {machine}; nobody measured them")


def write(report: Report, page: Path) -> None:
    write_json(page.with_suffix(".json"), report)
    write_text(page, markdown(report))


def parse() -> argparse.Namespace:
    parser = command(__doc__)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="what is checked (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=positive, help="that all may take (default: what it needs)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these (default: all)")
    parser.add_argument("--size", choices=SIZES, help="how much of everything (default: full, on a CPU small)")
    parser.add_argument("--list", action="store_true", help="show the steps and the estimates, and do nothing")
    parser.add_argument(
        "--continue",
        dest="continued",
        action="store_true",
        help="go on with the steps that the report has no result of",
    )
    parser.add_argument("--out", type=written, default="check.md", help="the report; its rows beside it, in .json")
    args = parser.parse_args()
    args.size = args.size or ("full" if args.device == "cuda" else "small")
    if args.out.suffix == ".json":
        parser.error(f"--out {args.out}: that is where the rows go. Name the report otherwise, such as check.md.")
    return args


if __name__ == "__main__":
    sys.exit(main())
