"""`train/pretrain.py` as a user runs it, and the parts that need no run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hlip
from hlip.demo import make_demo
from hlip.model.config import preset
from hlip.prepare.discover import Found, find_studies
from hlip.prepare.job import prepare
from hlip.prepare.recipe import Recipe
from hlip.train.config import TrainConfig
from hlip_kernels import available_backends
from tiny_store import make_store

TRAIN = Path(__file__).parents[1] / "train"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and ten test studies, as files and as stores."""
    data = make_demo(tmp_path_factory.mktemp("demo") / "data", train=12, test=10, workers=1)
    for split in ("train", "test"):
        prepare(find_studies(data / f"{split}.json"), preset("demo").preprocess, data / split)
    return data


def command(demo: Path, folder: Path, bert_folder: str, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "data": demo / "train",
        "out": folder,
        "model": "demo",
        "text": bert_folder,
        "steps": 4,
        "batch_size": 4,
        "warmup": 2,
        "precision": "fp32",
        "workers": 0,
        "log_every": 1,
        "save_every": 2,
    }
    return [f"--{name}={value}" for name, value in (settings | changes).items() if value is not None]


def pretrain(args: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, str(TRAIN / "pretrain.py"), *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def popen(args: list[str]) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)


def without_bars(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "step/s" not in line and "s/step" not in line)


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_evaluate_and_leave_a_model(demo: Path, tmp_path: Path, bert_folder: str) -> None:
    out = tmp_path / "run"
    held_out = {"val": demo / "test", "labels": demo / "labels.csv", "prompts": demo / "prompts.yaml"}
    done = pretrain(command(demo, out, bert_folder, eval_every=2, **held_out), processes=2)
    assert done.returncode == 0, without_bars(done.stderr)
    assert "4 steps of 4 studies on 2 processes" in done.stdout
    assert f"attention on cpu in float32 (auto: {available_backends()[0]})" in done.stdout
    log = read_log(out)
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in log if "auc" in line] == [2, 4]
    assert next(line for line in log if line.get("event") == "start")["processes"] == 2
    assert list((out / "tensorboard").iterdir())
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "lock", "log.jsonl", "model", "tensorboard"]
    model = hlip.HLIPModel.from_pretrained(out / "model")
    study = hlip.load_study(next((demo / "studies").glob("test-*")), model.config.recipe)
    assert model.encode_image(hlip.pack([study], (6, 12, 12))).shape == (1, 256)

    again = pretrain(command(demo, out, bert_folder))
    assert again.returncode == 2
    assert "holds checkpoints: pass --resume auto" in again.stderr


def test_of_two_processes_one_says_what_is_wrong(tmp_path: Path) -> None:
    done = pretrain(["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--batch_sise", "4"], processes=2)
    assert done.returncode == 1  # torchrun's
    assert done.stderr.count("did you mean batch_size") == 1, done.stderr


def weights(out: Path) -> dict[str, torch.Tensor]:
    last = max((out / "checkpoints").glob("step_*.pt"))
    return torch.load(last, weights_only=True)["model"]


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_an_unbroken_one(demo: Path, tmp_path: Path, bert_folder: str) -> None:
    """Steps in pieces, drop path, drawn scans and texts; six steps of each run are within an epoch and beyond."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    longer = {"steps": 40, "save_every": 3, "max_scans": 3, "micro_tokens": 400, "texts": "shuffled",
              "sentence_dropout": 0.3, "patch_dropout": 0.25, "drop_path": 0.2, "lr_batch": 8}  # fmt: skip
    assert pretrain(command(demo, straight, bert_folder, **longer)).returncode == 0
    seconds = next(line["seconds"] for line in read_log(straight) if line.get("event") == "end")
    random, kills = np.random.default_rng(0), 0
    args = [sys.executable, str(TRAIN / "pretrain.py"), *command(demo, broken, bert_folder, resume="auto", **longer)]
    while kills < 10:
        run = popen(args)
        before = len(steps_of(broken))
        while run.poll() is None and len(steps_of(broken)) in (0, before):
            time.sleep(0.05)  # until it makes steps
        try:
            run.wait(random.uniform(0, seconds / 12))
        except subprocess.TimeoutExpired:
            run.kill()
            kills += 1
        _, errors = run.communicate()
        assert run.returncode == -signal.SIGKILL, errors.decode()  # and not at its end before that
    assert kills == 10
    done = subprocess.run(args, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, without_bars(done.stderr)
    assert_same_weights(straight, broken)
    assert steps_of(broken) == list(range(1, 41))
    losses = [[line["loss"] for line in read_log(out) if "loss" in line] for out in (straight, broken)]
    assert losses[0] == losses[1]
    assert [path.name for path in sorted((broken / "checkpoints").iterdir())] == [
        "step_00000039.pt",
        "step_00000040.pt",
    ]


def steps_of(out: Path) -> list[int]:
    try:
        lines = (out / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line and line.endswith("}")]


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_studies(
    demo: Path, tmp_path: Path, bert_folder: str
) -> None:
    """SIGTERM saves and ends the run with status 0; two processes go on, with the losses of an unbroken run."""
    out, straight = tmp_path / "run", tmp_path / "straight"
    options = {"steps": 8, "save_every": 0, "drop_path": 0, "patch_dropout": 0}
    args = [sys.executable, str(TRAIN / "pretrain.py"), *command(demo, out, bert_folder, **options)]
    run = popen(args)
    while len(steps_of(out)) < 2 and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    errors = run.communicate()[1].decode()
    assert run.returncode == 0, errors
    assert "SIGTERM: saved after step" in errors
    saved = steps_of(out)[-1]
    assert 2 <= saved < 8
    assert not (out / "model").exists()

    other = pretrain(command(demo, out, bert_folder, resume="true", **options, lr=9))
    assert other.returncode == 2
    assert "not a checkpoint of this run (lr was 0.0002, is 9.0)" in other.stderr
    resumed = pretrain(command(demo, out, bert_folder, resume="auto", local_loss="true", **options), processes=2)
    assert resumed.returncode == 0, without_bars(resumed.stderr)
    assert pretrain(command(demo, straight, bert_folder, **options)).returncode == 0
    assert steps_of(out) == list(range(1, 9))
    for line, expected in zip(read_losses(out), read_losses(straight), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def read_losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(out) if "loss" in line]


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones(demo: Path, tmp_path: Path, bert_folder: str) -> None:
    """FSDP on two processes against DDP, and a run that changes from one to the other."""
    held_out = {"val": demo / "test", "labels": demo / "labels.csv", "prompts": demo / "prompts.yaml"}
    common = {"micro_tokens": 600, "drop_path": 0.2, "lock_text": "false", "steps": 2, "save_every": 1}
    for name, fsdp in (("ddp", "false"), ("fsdp", "true")):
        options = {"fsdp": fsdp, **common, **held_out}
        done = pretrain(command(demo, tmp_path / name, bert_folder, **options), processes=2)
        assert done.returncode == 0, without_bars(done.stderr)
    for line, expected in zip(read_losses(tmp_path / "fsdp"), read_losses(tmp_path / "ddp"), strict=True):
        assert line == pytest.approx(expected, rel=1e-6)
    areas = [[line["auc"] for line in read_log(tmp_path / name) if "auc" in line] for name in ("ddp", "fsdp")]
    assert areas[0] == pytest.approx(areas[1], abs=0.05)
    for name, value in weights(tmp_path / "ddp").items():
        torch.testing.assert_close(weights(tmp_path / "fsdp")[name], value, rtol=1e-3, atol=1e-5)
    model = hlip.HLIPModel.from_pretrained(tmp_path / "fsdp" / "model")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    (tmp_path / "fsdp" / "checkpoints" / "step_00000002.pt").unlink()
    done = pretrain(command(demo, tmp_path / "fsdp", bert_folder, resume="true", **common))
    assert done.returncode == 0, without_bars(done.stderr)
    assert steps_of(tmp_path / "fsdp") == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"precision": "bf16", "grad_checkpointing": "true", "balance": "cost", "texts": "sentence", "workers": 1},
    {"precision": "fp16", "unlocked_layers": 1, "steps": None, "epochs": 1, "max_scans": 1},
])  # fmt: skip
def test_other_settings_train(changes: dict[str, object], demo: Path, tmp_path: Path, bert_folder: str) -> None:
    done = pretrain(command(demo, tmp_path / "run", bert_folder, **changes))
    assert done.returncode == 0, without_bars(done.stderr)
    assert all(np.isfinite(read_losses(tmp_path / "run")))
    assert len(read_losses(tmp_path / "run")) == (3 if "epochs" in changes else 4)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_a_training_checkpoint(demo: Path, tmp_path: Path, bert_folder: str) -> None:
    torch.manual_seed(7)
    state = hlip.create_model("demo", pretrained_text=bert_folder).state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_1.pt")
    args = command(demo, tmp_path / "run", bert_folder, steps=1, lr=1e-9, init=tmp_path / "epoch_1.pt")
    done = pretrain(args)
    assert done.returncode == 0, without_bars(done.stderr)
    after = hlip.HLIPModel.from_pretrained(tmp_path / "run" / "checkpoints" / "step_00000001.pt")
    for name, value in after.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["siglip", "dual"])
def test_other_objectives_train(objective: str, demo: Path, tmp_path: Path, bert_folder: str) -> None:
    vision = dataclasses.replace(preset("demo").vision, num_prefix=2)
    changes = {"vision": vision, "objective": objective, "per_prefix": objective == "dual"}
    before = hlip.create_model("demo", pretrained_text=bert_folder, **changes)
    before.save_pretrained(tmp_path / "init")
    settings = {"init": tmp_path / "init", "model": "null", "steps": 2, "max_scans": "null"}
    args = command(demo, tmp_path / "run", bert_folder, **settings)
    done = pretrain(args)
    assert done.returncode == 0, without_bars(done.stderr)
    after = hlip.HLIPModel.from_pretrained(tmp_path / "run" / "model")
    for name, value in before.state_dict().items():
        if name in ("logit_bias", "visual.head.proj.weight", "text.proj.weight", "visual.trunk.reg_token"):
            assert not torch.equal(value, after.state_dict()[name]), name


@pytest.mark.slow
def test_bad_input_is_named(
    demo: Path, tmp_path: Path, bert_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hlip.train.pretrain import main

    labels = tmp_path / "labels.csv"
    with (demo / "labels.csv").open() as source, labels.open("w", newline="") as target:
        csv.writer(target).writerows(list(csv.reader(source))[:-1])
    one_sided = tmp_path / "one_sided.csv"
    table = list(csv.reader((demo / "labels.csv").read_text().splitlines()))
    with one_sided.open("w", newline="") as target:
        csv.writer(target).writerows([table[0], *([row[0], "1", "0", "0", "0", "0"] for row in table[1:])])
    held_out = {"val": demo / "test", "labels": labels, "prompts": demo / "prompts.yaml"}
    unfinished = tmp_path / "unfinished"
    shutil.copytree(demo / "train", unfinished)
    (unfinished / "store.json").unlink()
    odd = tmp_path / "odd"
    found = find_studies(demo / "train.json")
    prepare(Found(found.studies[:1], []), Recipe(size=(8, 20, 20), crop=None), odd)
    make_store(tmp_path / "silent", [1] * 6, size=(24, 48, 48), reports=[("", "")] * 6)
    protocol = "Images were obtained with the usual protocol and reviewed. " * 9
    make_store(tmp_path / "alike", [1] * 6, size=(24, 48, 48), reports=[("", f"{protocol}{i}.") for i in range(6)])
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    cases: list[tuple[dict[str, object], str]] = [
        ({"data": tmp_path / "none", "text": tmp_path / "none"}, "none: not a store"),  # before any model is fetched
        ({"data": unfinished}, "unfinished: the store is not finished: run hlip prepare again"),
        ({"model": "vit_base_multiscan_h2_token588"}, "not a whole number of the model's patches of (16, 16, 16)"),
        ({"model": "demon"}, "unknown model 'demon'; did you mean demo?"),
        ({"batch_size": 64}, "batch_size 64 is larger than the data set of 12 studies"),
        ({"val": demo / "test"}, f"evaluation needs both val and prompts, got val {demo / 'test'}, prompts None"),
        ({"resume": "true"}, "no checkpoint to resume from"),
        ({"vision": "y.pt", "init": "x.pt"}, "init x.pt and vision y.pt are both given"),
        ({"init": tmp_path / "x.pt"}, "x.pt: unknown model: no such file or folder"),
        ({"fsdp": "true", "balance": "cost"}, "fsdp needs balance 'studies'"),
        ({"wandb": "project"}, "wandb is asked for and not installed"),
        ({"json-root": "x"}, "--json-root: hlip prepare makes a store of"),
        (held_out, "labels.csv: no label for study test-0009"),
        (held_out | {"labels": one_sided}, "one_sided.csv: AUC needs positives and negatives of every class"),
        (held_out | {"labels": None}, "test: the store has no labels for "),
        ({"val": odd, "prompts": demo / "prompts.yaml"}, "odd: study train-0000 has a scan of"),
        ({"fsdp": "true"}, "fsdp needs processes: start this with torchrun or srun"),
        ({"batch_size": 1}, "batch_size 1: a study is told from the others of its batch"),
        ({"data": tmp_path / "silent", "text": tmp_path / "none"}, "silent: none of its 6 studies has a report"),
        ({"data": tmp_path / "alike"}, "alike: 6 reports looked at: their first 64 tokens are all equal"),
        ({"out": blocked / "x"}, "Not a directory"),
    ]
    for i, (changes, message) in enumerate(cases):
        arguments = command(demo, tmp_path / f"run{i}", bert_folder, **changes)
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
        assert main() == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / f"run{i}").exists()  # what cannot start writes nothing


def test_help_names_every_setting() -> None:
    shown = pretrain(["--help"])
    assert shown.returncode == 0
    for setting in dataclasses.fields(TrainConfig):
        assert f"--{setting.name} " in shown.stdout
    assert "optimizer steps of the run" in shown.stdout


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    from hlip.train.step import learning_rate

    config = TrainConfig(Path("a"), Path("b"), steps=100, warmup=10, lr=1.0)
    rates = np.array([learning_rate(config, step, 100) for step in range(100)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] < 1e-3


def test_decay_spares_biases_norms_and_temperature(tiny_model: hlip.HLIPModel) -> None:
    from hlip.train.step import make_optimizer

    decayed, spared, scalars = make_optimizer(tiny_model, TrainConfig(Path("a"), Path("b"))).param_groups
    names = {id(p): name for name, p in tiny_model.named_parameters()}
    assert decayed["weight_decay"] == 0.2
    assert spared["weight_decay"] == scalars["weight_decay"] == 0.0
    spared_names = {names[id(p)] for p in spared["params"] + scalars["params"]}
    assert "logit_scale" in spared_names
    assert all(name == "logit_scale" or ".norm" in name or name.endswith(".bias") for name in spared_names)
    assert not any(name.endswith(".bias") or "norm" in name for name in (names[id(p)] for p in decayed["params"]))
