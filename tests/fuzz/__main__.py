"""Fuzz one target for a given time: `PYTHONPATH=tests python -m fuzz readers --minutes 20`.

Needs atheris, which follows which lines each input reaches. In `build/fuzz/TARGET` are the inputs that reached new
lines (`corpus`, from which the next run goes on), the first of those after which something did not hold, with what did
not (`findings`), and what was tried (`stats.json`). Where the interpreter crashes, that is a finding, and the run goes
on. `--keep` then copies one small input for each way that a run may end to where the tests replay them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fuzz.guard import Guard

KEPT = Path(__file__).with_name("corpus")
WORK = Path("build", "fuzz").absolute()
CONTENT = 100_000  # bytes of an input
KEPT_CONTENT = 28_000  # bytes of one that is kept
ADDRESSES = 8 * 2**30  # bytes; for more the system has none
EMPTY = {"seconds": 0.0, "cpu_seconds": 0.0, "inputs": 0, "findings": {}}
EVERY = 500  # inputs between two notes of how many there were


def fuzz(name: str, seconds: float) -> None:
    """Try inputs for so long of the process's own time, and end the process."""
    import atheris

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    logging.disable()
    with atheris.instrument_imports(include=["hlip", "nibabel", "pydicom", "train", "torch._weights_only_unpickler"]):
        from fuzz.mutate import mutate
        from fuzz.targets import Trial

        trial = Trial(name, Path(tempfile.mkdtemp()), pytest.MonkeyPatch(), Guard())
    folder = WORK / name
    stats = read_stats(name)
    found: Counter[str] = Counter(stats["findings"])
    start, start_cpu, tried = time.monotonic(), time.process_time(), 0

    def note() -> None:
        used, cpu = time.monotonic() - start, time.process_time() - start_cpu
        content = {"seconds": stats["seconds"] + used, "cpu_seconds": stats["cpu_seconds"] + cpu,
                   "inputs": stats["inputs"] + tried, "findings": found}  # fmt: skip
        (folder / "stats.json").write_text(json.dumps(content, indent=1))

    def one(data: bytes) -> None:
        nonlocal tried
        if b"\n" not in data[:100]:
            return
        outcome = trial.run(data)
        tried += 1
        if outcome.finding:
            key = f"{outcome.kind} {outcome.place}"
            found[key] += 1
            if found[key] == 1:
                file = folder / "findings" / re.sub(r"[^\w.]+", "-", key)
                file.with_name(f"{file.name}.input").write_bytes(data)
                file.with_name(f"{file.name}.txt").write_text(outcome.finding)
                print(f"{name}: {key}", flush=True)
        if tried % EVERY == 0:
            note()
        if time.process_time() - start_cpu > seconds:
            note()
            os._exit(0)

    for seed in (*trial.seeds(), *(path.read_bytes() for path in sorted((KEPT / name).glob("*")))):
        if len(seed) <= CONTENT:
            (folder / "corpus" / _hash(seed)).write_bytes(seed)
    options = [f"-max_len={CONTENT}", "-timeout=600", "-rss_limit_mb=6000", "-verbosity=0", "-detect_leaks=0"]
    options += [f"-artifact_prefix={folder / 'findings'}/", str(folder / "corpus")]
    atheris.Setup(["fuzz", *options], one, custom_mutator=lambda data, most, seed: mutate(data, seed)[:most])
    atheris.Fuzz()


def read_stats(name: str) -> dict[str, Any]:
    path = WORK / name / "stats.json"
    return json.loads(path.read_text()) if path.exists() else dict(EMPTY)


def keep(name: str) -> None:
    """Keep what once failed, and of all inputs that end alike the smallest."""
    from fuzz.targets import Trial

    logging.disable()
    work, kept = WORK / name, KEPT / name
    kept.mkdir(parents=True, exist_ok=True)
    failed = {path.read_bytes() for path in (*(work / "findings").glob("*.input"), *kept.glob("failed-*"))}
    others = {path.read_bytes() for path in (*(work / "corpus").iterdir(), *kept.iterdir())} - failed
    chosen = {each: f"failed-{_hash(each)}" for each in failed if len(each) <= KEPT_CONTENT}
    alike: set[tuple[bytes, str, str]] = set()
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        trial = Trial(name, Path(home) / "home", patch, Guard())
        for each in sorted(others, key=lambda each: (len(each), each)):
            outcome = trial.run(each)
            key = (each.partition(b"\n")[0], outcome.kind, outcome.place)
            if key not in alike and len(each) <= KEPT_CONTENT:
                chosen[each] = _hash(each)
            alike.add(key)
    for path in kept.iterdir():
        path.unlink()
    for each, called in chosen.items():
        (kept / called).write_bytes(each)
    print(f"{name}: kept {len(chosen)} of {len(failed) + len(others)} inputs, {sum(map(len, chosen))} bytes")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(prog="PYTHONPATH=tests python -m fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=("readers", "lists", "checkpoints", "stores", "tasks"))
    parser.add_argument("--minutes", type=float, default=20, help="of processor time (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="fuzz no more; keep inputs for the tests")
    args = parser.parse_args()
    for part in ("corpus", "findings"):
        (WORK / args.target / part).mkdir(parents=True, exist_ok=True)
    if args.keep:
        keep(args.target)
        return
    left = 60 * args.minutes
    while left > 0:
        child = os.fork()
        if not child:
            fuzz(args.target, left)
        _, status, used = os.wait4(child, 0)
        left -= used.ru_utime + used.ru_stime
        if status:
            print(f"{args.target}: the process ended with {status}", flush=True)
    print(json.dumps(read_stats(args.target)))


if __name__ == "__main__":
    main()
