"""What can go wrong while a run goes on, and that nothing is lost by it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hlip
from hlip.demo import make_demo
from hlip.model.config import preset
from hlip.prepare.discover import find_studies
from hlip.prepare.job import prepare
from hlip.processes import Processes, first_host
from hlip.store.store import Store
from hlip.train.checkpoints import Checkpoints
from hlip.train.config import TrainConfig
from hlip.train.log import STALLED, Log, Watch

TRAIN = Path(__file__).parents[1] / "train"

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = make_demo(tmp_path_factory.mktemp("trouble") / "data", train=8, test=1, workers=1)
    prepare(find_studies(data / "train.json"), preset("demo").preprocess, data / "store")
    return data / "store"


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory, bert_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("init") / "model"
    hlip.create_model("demo", pretrained_text=bert_folder).save_pretrained(folder)
    return folder


def settings(store: Path, init: Path, out: Path, **changes: object) -> list[str]:
    plain = {"data": store, "out": out, "init": init, "batch_size": 4, "warmup": 1, "precision": "fp32", "workers": 0,
             "log_every": 1, "save_every": 1, "steps": 2000}  # fmt: skip
    return [f"--{name}={value}" for name, value in (plain | changes).items()]


def begin(arguments: list[str], *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(TRAIN / "pretrain.py"), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT)


def until(run: subprocess.Popen[str], path: Path) -> None:
    while not path.exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)


def test_a_loss_that_is_no_number_ends_the_run_before_the_weights_are_spoilt(
    store: Path, init: Path, tmp_path: Path
) -> None:
    model = hlip.HLIPModel.from_pretrained(init)
    with torch.no_grad():  # finite, but not once squared
        model.visual.trunk.blocks[0].mlp.fc2.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "wild")
    run = begin(settings(store, tmp_path / "wild", tmp_path / "run"))
    errors = run.communicate()[1]
    assert run.returncode == 2, errors
    assert "step 1: the loss is nan" in errors
    report = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert len(report["ranks"][0]["studies"]) == 4
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_full_disk_leaves_the_checkpoints_from_before(store: Path, init: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = settings(store, init, out, steps=2)
    run = begin(arguments)
    assert run.wait() == 0, run.communicate()[1]
    before = {path.name: path.stat().st_size for path in (out / "checkpoints").iterdir()}
    assert len(before) == 2

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = min(before.values()) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    (out / "checkpoints" / "step_00000002.pt").unlink()
    command = [sys.executable, str(TRAIN / "pretrain.py"), *arguments, "--resume=auto"]
    full = subprocess.run(
        command,
        capture_output=True, text=True, check=False, env=ENVIRONMENT, preexec_fn=small_files,
    )  # fmt: skip
    assert full.returncode == 2
    assert "the checkpoint could not be written" in full.stderr
    assert "step_00000001.pt is whole" in full.stderr
    assert {path.name: path.stat().st_size for path in (out / "checkpoints").iterdir()} == {
        "step_00000001.pt": before["step_00000001.pt"]
    }


def test_sigterm_to_all_processes_saves(store: Path, init: Path, tmp_path: Path) -> None:
    """Schedulers signal the processes that read data, too."""
    out = tmp_path / "run"
    command = [sys.executable, str(TRAIN / "pretrain.py"), *settings(store, init, out, workers=2, save_every=0)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    while not (out / "log.jsonl").exists() or '"loss"' not in (out / "log.jsonl").read_text():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 0, errors
    (saved,) = (out / "checkpoints").iterdir()
    assert "SIGTERM: saved after step" in errors and saved.suffix == ".pt"


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, store: Path, init: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert begin(settings(store, init, out, steps=3)).wait() == 0
    newest = out / "checkpoints" / "step_00000003.pt"
    content = bytearray(newest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 255 for byte in content[middle : middle + 64])
    newest.write_bytes({"cut": content[:1_000_000], "empty": b"", "flipped": content}[damage])
    run = begin(settings(store, init, out, steps=3, resume="auto"))
    errors = run.communicate()[1]
    assert run.returncode == 0, errors
    assert "step_00000003.pt: not a readable checkpoint" in errors
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3]


def test_a_resumed_run_wants_its_studies_wherever_they_are(store: Path, init: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert begin(settings(store, init, out, steps=1)).wait() == 0
    shutil.copytree(store, tmp_path / "moved")
    assert begin(settings(tmp_path / "moved", init, out, steps=1, resume="true")).wait() == 0
    info = json.loads((tmp_path / "moved" / "store.json").read_text())
    (tmp_path / "moved" / "store.json").write_text(json.dumps(info | {"source_hash": "other"}))
    run = begin(settings(tmp_path / "moved", init, out, steps=1, resume="true"))
    assert "source_hash was" in run.communicate()[1] and run.returncode == 2


def test_gradients_that_stay_not_finite_end_an_fp16_run(
    store: Path, init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hlip.train import pretrain, step

    monkeypatch.setattr(step, "clip_gradient", lambda model, most: math.nan)
    monkeypatch.setattr(step, "MOST_NOT_FINITE", 3)
    config = TrainConfig(
        store, tmp_path / "run", init=str(init), batch_size=4, steps=9, warmup=1, precision="fp16", workers=0
    )
    with pytest.raises(ValueError, match=r"step 4: the loss is .*, the gradient's norm nan"):
        pretrain.train(config)


def test_a_full_disk_costs_lines_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = Log(TrainConfig(Path("store"), tmp_path, steps=1), Processes(), 0)
    log.scalars(1, loss=1.0)
    log.file.close()
    log.file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    for step in (2, 3):
        log.scalars(step, loss=1.0)
    assert caplog.text.count("lines are lost") == 1
    log.close()
    assert [json.loads(line).get("step") for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [None, 1]


def test_evaluating_and_saving_are_no_stall(tmp_path: Path) -> None:
    watch = Watch(Processes(), 0, tmp_path)
    watch.seconds = 0.01
    for doing, late in (("computing", True), ("evaluating", False), ("reading data", True), ("saving", False)):
        watch.at(3, doing, [])
        time.sleep(0.02)
        assert watch._late() is late
    watch.every = 0.01
    assert watch._ask(lambda: 7) == 7
    assert watch._ask(lambda: time.sleep(30)) is None  # the store of a process that stands
    watch.close()


def test_processes_that_see_different_things_are_refused(tmp_path: Path) -> None:
    from hlip.train.checkpoints import check_agreement

    class Apart(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, value | {"first_step": 0}]

    checkpoints = Checkpoints(TrainConfig(Path("a"), tmp_path), Processes())
    check_agreement(Apart(), 0, checkpoints)
    with pytest.raises(ValueError, match="data and out must be shared by all"):
        check_agreement(Apart(), 5, checkpoints)


def test_text_features_are_kept_without_dropout(store: Path, init: Path, tmp_path: Path) -> None:
    from hlip.train.checkpoints import make_model
    from hlip.train.loader import locked_features

    config = TrainConfig(store, tmp_path, init=str(init), lock_text=True)
    model = make_model(config)
    impressions, findings = (Store(store).manifest.column(name).to_pylist()[:2] for name in ("impression", "findings"))
    texts = model.objective.texts(impressions, findings)
    found = [locked_features(model.train(), Store(store), Processes())(texts) for _ in range(2)]
    assert found[0].equal(found[1])
    with torch.no_grad():
        torch.testing.assert_close(found[0], model.eval().text.features(texts), rtol=1e-4, atol=1e-5)


def test_a_worker_that_dies_is_named(store: Path, init: Path, tmp_path: Path) -> None:
    run = begin(settings(store, init, tmp_path / "run", workers=1))
    until(run, tmp_path / "run" / "checkpoints" / "step_00000001.pt")
    (child,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 2, errors
    assert "DataLoader worker" in errors
    assert "--resume auto goes on" in errors


def test_a_process_that_dies_ends_the_run_and_another_goes_on(store: Path, init: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = begin(settings(store, init, out), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    until(run, out / "checkpoints" / "step_00000001.pt")
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    errors = run.communicate(timeout=300)[1]
    assert run.returncode != 0
    assert "SIGKILL" in errors
    saved = max(int(path.stem.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*.pt"))
    again = begin(settings(store, init, out, resume="auto", steps=2000), *())
    until(again, out / "checkpoints" / f"step_{saved + 1:08d}.pt")
    again.send_signal(signal.SIGTERM)
    assert again.wait() == 0


def test_a_process_that_stalls_is_named(store: Path, init: Path, tmp_path: Path) -> None:
    """One of two processes is stopped; the other waits for it, and says so."""
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = begin(settings(store, init, out, stall_minutes=0.1, save_every=0), *launcher)
    until(run, out / "log.jsonl")
    while not any('"step"' in line for line in (out / "log.jsonl").read_text().splitlines()):
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    ranks = {Path(f"/proc/{pid}/environ").read_bytes().split(b"\0RANK=")[1][:1]: int(pid) for pid in children}
    os.kill(ranks[b"1"], signal.SIGSTOP)
    until_stalled = time.monotonic() + 120
    while not (out / "stalled.json").exists() and time.monotonic() < until_stalled:
        time.sleep(0.1)
    os.kill(ranks[b"1"], signal.SIGKILL)
    errors = run.communicate(timeout=120)[1]
    assert "error: process 1 on" in errors
    assert "error: process 0 on" not in errors
    assert f"exitcode  : {STALLED}" in errors
    (behind,) = json.loads((out / "stalled.json").read_text())
    assert behind["rank"] == 1
    assert behind["pid"] == ranks[b"1"]


def test_hosts_of_slurm() -> None:
    assert first_host("gpu[03-05,9],login") == "gpu03"
    assert first_host("gpu7,gpu8") == "gpu7"
    assert first_host("node-a1") == "node-a1"
    assert first_host("rack[2,4]-x") == "rack2"


def test_slurm_starts_processes_without_torchrun(store: Path, init: Path, tmp_path: Path) -> None:
    """srun sets these; two tasks on this machine join and train."""
    arguments = settings(store, init, tmp_path / "run", steps=1)
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    runs = [
        subprocess.Popen(
            [sys.executable, str(TRAIN / "pretrain.py"), *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**ENVIRONMENT, **common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for run in runs:
        shown, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
        if run is runs[0]:
            assert "on 2 processes" in shown


def test_settings_are_frozen_plain_values() -> None:
    from hlip.train.config import FREE, TrainConfig

    assert {field.name for field in dataclasses.fields(TrainConfig)} >= FREE


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(Path("store"), tmp_path / "run")
    with Checkpoints(config, Processes()).locked():
        with (
            pytest.raises(ValueError, match=r"run: another run is training here"),
            Checkpoints(config, Processes()).locked(),
        ):
            pass
        with Checkpoints(config, Processes(rank=1, size=2)).locked():  # another process of the first
            pass
    with Checkpoints(config, Processes()).locked():
        pass
