"""What fuzzing found, and what it begins with, once more: see tests/fuzz."""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nibabel")
pytest.importorskip("pydicom")
pytest.importorskip("SimpleITK")
pytest.importorskip("pyarrow")

import hostile_files as bad
from fuzz.guard import Guard
from fuzz.targets import TARGETS, Trial

KEPT = Path(__file__).with_name("fuzz") / "corpus"


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard()


@pytest.fixture(scope="module", params=TARGETS)
def trial(
    request: pytest.FixtureRequest, guard: Guard, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Trial]]:
    with pytest.MonkeyPatch.context() as patch:
        yield request.param, Trial(request.param, tmp_path_factory.mktemp("fuzz") / "home", patch, guard)


def test_good_files_are_read(trial: tuple[str, Trial]) -> None:
    """Else what is changed in them would show nothing."""
    outcomes = [trial[1].run(seed) for seed in trial[1].seeds()]
    assert [outcome.finding for outcome in outcomes if outcome.finding] == []
    assert sum(outcome.kind == "result" for outcome in outcomes) >= 0.8 * len(outcomes)


def test_kept_inputs(trial: tuple[str, Trial], caplog: pytest.LogCaptureFixture) -> None:
    name, under_guard = trial
    caplog.set_level(logging.CRITICAL)
    kept = sorted((KEPT / name).iterdir())
    assert kept
    findings = {path.name: under_guard.run(path.read_bytes()).finding for path in kept}
    assert {name: finding for name, finding in findings.items() if finding} == {}


def spin() -> None:
    while True:
        pass


BREACHES: dict[str, tuple[Callable[[], object], str]] = {
    "another error": (lambda: {}["x"], "KeyError"),
    "a file that is not named": (lambda: int("x"), "unnamed"),
    "a file": (lambda: Path("left").write_text("x"), "trace"),
    "a folder": (lambda: Path("left").mkdir(), "trace"),
    "a process": (lambda: subprocess.run(["true"], check=True), "trace"),
    "a pickle": (lambda: pickle.loads(pickle.dumps(np.dtype("f4"))), "trace"),
    "the network": (lambda: socket.create_connection(("127.0.0.1", 9)), "trace"),
    "memory": (lambda: mmap.mmap(-1, 2**26).write(b"x" * 2**26), "large"),  # not what malloc has kept
    "time": (spin, "slow"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_what_does_not_hold_is_seen(name: str, guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fuzz.guard.SECONDS", 0.5)
    monkeypatch.setattr("fuzz.guard.BYTES", 2**25)
    function, kind = BREACHES[name]
    outcome = guard.run(function, "file.nii")
    assert (outcome.kind, bool(outcome.finding)) == (kind, True), outcome


def test_a_pickle_in_a_scan_would_be_seen(guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by pickle itself, the files that the targets begin with do leave a trace."""
    monkeypatch.chdir(tmp_path)
    outcome = guard.run(lambda: pickle.loads(pickle.dumps(bad.Code())), "scan.pt")
    assert outcome.kind == "trace" and os.path.exists("executed")  # noqa: PTH110
