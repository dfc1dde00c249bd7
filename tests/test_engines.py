"""Every engine makes the same store; failures of their tasks are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hlip.prepare.discover import Found
from hlip.prepare.job import prepare
from hlip.prepare.workers import TRIES, run_local, run_slurm
from store_recipe import EverySlice, digests, write_studies
from toy_job import Toy

pytest.importorskip("nibabel")
pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return write_studies(tmp_path_factory.mktemp("input"))


@pytest.fixture(scope="module")
def expected(found: Found, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("stores") / "store"
    prepare(found, EverySlice(), path, shard_scans=8)
    return digests(path)


@pytest.fixture(autouse=True)
def _workers_find_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{tests.parent}{os.pathsep}{tests}")


def test_slurm_by_its_local_executor(found: Found, expected: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    options = {"cluster": "local"}
    prepare(found, EverySlice(), tmp_path / "out", engine="slurm", workers=2, shard_scans=8, slurm=options)
    assert digests(tmp_path / "out") == expected


@pytest.mark.slow
def test_ray_on_a_cluster_of_its_own(found: Found, expected: dict[str, str], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    prepare(found, EverySlice(), tmp_path / "out", engine="ray", workers=1, shard_scans=8)
    assert digests(tmp_path / "out") == expected
    assert not ray.is_initialized()  # what was started is stopped


@pytest.mark.slow
def test_ray_on_a_cluster_that_runs(found: Found, expected: dict[str, str], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        prepare(found, EverySlice(), tmp_path / "out", engine="ray", workers=2, shard_scans=8)
        assert digests(tmp_path / "out") == expected
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def run_toy(job: Toy, units: int = 4, workers: int = 2) -> tuple[int, int]:
    """Studies and scans that were reported as done."""
    ticks: list[tuple[int, int]] = []
    run_local(job, range(units), workers, lambda *tick: ticks.append(tick))
    assert all(job.is_done(unit) for unit in range(units))
    return sum(tick[0] for tick in ticks), sum(tick[1] for tick in ticks)


def test_a_step_that_always_kills_is_blamed(tmp_path: Path) -> None:
    assert run_toy(Toy(tmp_path, kill=(2, 1))) == (4, 12)
    assert (tmp_path / "blamed").read_text() == f"2 (0, 1) crash it ended the process {TRIES} times (SIGKILL)"


def test_who_is_killed_once_or_twice_is_forgiven(tmp_path: Path) -> None:
    assert run_toy(Toy(tmp_path, kill=(2, 1), times=TRIES - 1)) == (4, 12)
    assert not (tmp_path / "blamed").exists()


def test_a_step_that_hangs_is_blamed_at_once(tmp_path: Path) -> None:
    assert run_toy(Toy(tmp_path, hang=(2, 1), step_seconds=2.0)) == (4, 12)
    assert (tmp_path / "blamed").read_text() == "2 (0, 1) timeout it took more than 2 s"


def test_more_workers_than_units(tmp_path: Path) -> None:
    assert run_toy(Toy(tmp_path), units=1, workers=3) == (1, 3)


def test_processes_that_cannot_start_end_the_job(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended 3 times outside of all scans \(exit status 7\)"):
        run_toy(Toy(tmp_path, before_steps=True), workers=1)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(28, "No space left"), OSError), (ImportError("no x"), ImportError), (KeyError("bug"), RuntimeError)],
)
def test_errors_of_a_worker_end_the_job(tmp_path: Path, error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"No space left|no x|KeyError: 'bug'"):
        run_toy(Toy(tmp_path, error=error), workers=1)


def test_a_failed_slurm_task_is_told(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    job = Toy(tmp_path, error=OSError(28, "No space left"))
    with pytest.raises(OSError, match=r"(?s)Slurm task .* failed .*No space left"):
        run_slurm(job, range(2), 1, lambda studies, scans: None, tmp_path / "slurm", {"cluster": "local"})
