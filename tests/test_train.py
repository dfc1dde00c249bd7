"""`train/pretrain.py` as a user runs it, and the parts that need no run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hlip
from hlip.data.demo import make_demo
from hlip.model.config import preset

TRAIN = Path(__file__).parents[1] / "train"
sys.path.insert(0, str(TRAIN))

from config import TrainConfig  # noqa: E402
from sampler import StepSampler  # noqa: E402


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training and ten test studies; one scan is broken, and one study has nothing else."""
    data = make_demo(tmp_path_factory.mktemp("demo") / "data", train=12, test=10, workers=1)
    studies = json.loads((data / "train.json").read_text())
    (data / studies["train-0000"]["scans"][0]).write_bytes(b"not an image")
    studies["train-0001"]["scans"] = ["studies/nowhere.nii.gz"]
    (data / "train.json").write_text(json.dumps(studies))
    return data


def command(demo: Path, folder: Path, bert_folder: str, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "data": demo / "train.json",
        "out": folder,
        "cache": demo / "cache",
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
    return [f"--{name}={value}" for name, value in (settings | changes).items()]


def pretrain(args: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, str(TRAIN / "pretrain.py"), *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_evaluate_and_leave_a_model(demo: Path, tmp_path: Path, bert_folder: str) -> None:
    out = tmp_path / "run"
    held_out = {"val": demo / "test.json", "labels": demo / "labels.csv", "prompts": demo / "prompts.yaml"}
    done = pretrain(command(demo, out, bert_folder, eval_every=2, **held_out), processes=2)
    assert done.returncode == 0, done.stderr
    log = read_log(out)
    data = next(line for line in log if line.get("event") == "data")
    assert (data["studies"], data["skipped_scans"], data["dropped_studies"]) == (11, 2, 1)
    assert any("not a readable NIfTI file" in reason for reason in data["reasons"])
    assert "dropped study train-0001" in done.stderr
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in log if "auc" in line] == [2, 4]
    assert next(line for line in log if line.get("event") == "start")["processes"] == 2
    assert list((out / "tensorboard").iterdir())
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "log.jsonl", "model", "tensorboard"]
    model = hlip.HLIPModel.from_pretrained(out / "model")
    study = hlip.load_study(next((demo / "studies").glob("test-*")), model.config.recipe)
    assert model.encode_image(hlip.pack([study], (6, 12, 12))).shape == (1, 256)

    again = pretrain(command(demo, out, bert_folder))
    assert again.returncode == 2
    assert "holds a checkpoint" in again.stderr


DIE_AFTER_FIRST_CHECKPOINT = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import pretrain
save = pretrain.save_checkpoint
pretrain.save_checkpoint = lambda *args: (save(*args), os._exit(9))
pretrain.main()
"""


@pytest.mark.slow
def test_a_resumed_run_equals_an_unbroken_one(demo: Path, tmp_path: Path, bert_folder: str) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    longer = {"steps": 8, "save_every": 3}  # two steps an epoch: the break lies within one, and others follow
    assert pretrain(command(demo, straight, bert_folder, **longer)).returncode == 0
    args = command(demo, broken, bert_folder, **longer)
    killed = subprocess.run(
        [sys.executable, "-c", DIE_AFTER_FIRST_CHECKPOINT, str(TRAIN / "pretrain.py"), *args],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == 9, killed.stderr
    assert torch.load(broken / "checkpoint.pt", weights_only=True)["step"] == 3
    with (broken / "log.jsonl").open("a") as log:  # as if the run had been killed later
        log.write(json.dumps({"step": 4, "loss": 1.0}) + "\n")

    other = pretrain(command(demo, broken, bert_folder, resume="true", **longer, lr=9))
    assert other.returncode == 2
    assert "not a checkpoint of this run (lr was 0.0002, is 9.0)" in other.stderr
    resumed = pretrain(command(demo, broken, bert_folder, resume="true", **longer, log_every=2))
    assert resumed.returncode == 0, resumed.stderr
    weights = [torch.load(out / "checkpoint.pt", weights_only=True)["model"] for out in (straight, broken)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert [line["step"] for line in read_log(broken) if "loss" in line] == [1, 2, 3, 4, 6, 8]


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_a_training_checkpoint(demo: Path, tmp_path: Path, bert_folder: str) -> None:
    torch.manual_seed(7)
    state = hlip.create_model("demo", pretrained_text=bert_folder).state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_1.pt")
    args = command(demo, tmp_path / "run", bert_folder, steps=1, lr=1e-9, init=tmp_path / "epoch_1.pt")
    done = pretrain(args)
    assert done.returncode == 0, done.stderr
    after = hlip.HLIPModel.from_pretrained(tmp_path / "run" / "checkpoint.pt", model="demo", text=bert_folder)
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
    assert done.returncode == 0, done.stderr
    after = hlip.HLIPModel.from_pretrained(tmp_path / "run" / "model")
    for name, value in before.state_dict().items():
        if name in ("logit_bias", "visual.head.proj.weight", "text.proj.weight", "visual.trunk.reg_token"):
            assert not torch.equal(value, after.state_dict()[name]), name


@pytest.mark.slow
def test_bad_input_is_named(demo: Path, tmp_path: Path, bert_folder: str) -> None:
    labels = tmp_path / "labels.csv"
    with (demo / "labels.csv").open() as source, labels.open("w", newline="") as target:
        csv.writer(target).writerows(list(csv.reader(source))[:-1])
    one_sided = tmp_path / "one_sided.csv"
    table = list(csv.reader((demo / "labels.csv").read_text().splitlines()))
    with one_sided.open("w", newline="") as target:
        csv.writer(target).writerows([table[0], *([row[0], "1", "0", "0", "0", "0"] for row in table[1:])])
    held_out = {"val": demo / "test.json", "labels": labels, "prompts": demo / "prompts.yaml"}
    cases: list[tuple[dict[str, object], str]] = [
        ({"data": tmp_path / "none.json"}, "none.json: not a readable study list"),
        ({"model": "demon"}, "unknown model 'demon'; did you mean 'demo'?"),
        ({"batch_size": 64}, "batch_size 64 is larger than the data set of 11 studies"),
        ({"val": demo / "test.json"}, "all three of val, labels and prompts"),
        ({"resume": "true"}, "no checkpoint to resume from"),
        ({"resume": "true", "init": "x.pt"}, "init and resume are both given"),
        ({"init": tmp_path / "x.pt"}, "x.pt: unknown model: no such file or folder"),
        (held_out, "labels.csv: no label for study test-0009"),
        (held_out | {"labels": one_sided}, "one_sided.csv: AUC needs positives and negatives of every class"),
        ({"out": labels / "x"}, "Not a directory"),
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, str(TRAIN / "pretrain.py"), *command(demo, tmp_path / f"run{i}", bert_folder, **changes)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for i, (changes, _) in enumerate(cases)
    ]
    for (_, message), process in zip(cases, processes, strict=True):
        errors = process.communicate()[1]
        assert process.returncode == 2, errors
        assert message in errors
    assert not (tmp_path / "run0").exists()  # what cannot start writes nothing


def test_help_names_every_setting() -> None:
    shown = pretrain(["--help"])
    assert shown.returncode == 0
    for setting in dataclasses.fields(TrainConfig):
        assert f"--{setting.name} " in shown.stdout
    assert "optimizer steps of the run" in shown.stdout


def test_sampler_shares_every_step_among_ranks_without_repeats() -> None:
    ranks = [list(StepSampler(11, 4, 6, seed=3, rank=r, world_size=2)) for r in range(2)]
    for step in range(6):
        batch = [index for rank in ranks for index, _ in rank[step]]
        assert len(batch) == len(set(batch)) == 4
    epochs = [{i for rank in ranks for step in rank[e : e + 2] for i, _ in step} for e in (0, 2, 4)]
    assert [len(epoch) for epoch in epochs] == [8, 8, 8]
    assert len(set(map(frozenset, epochs))) > 1
    assert list(StepSampler(11, 4, 6, seed=3, rank=0, world_size=2)) == ranks[0]
    assert list(StepSampler(11, 4, 6, seed=3, rank=0, world_size=2, first_step=4)) == ranks[0][4:]
    assert list(StepSampler(11, 4, 6, seed=4, rank=0, world_size=2)) != ranks[0]
    with pytest.raises(ValueError, match="multiple of the 2 processes"):
        StepSampler(11, 5, 6, 0, 0, 2)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    from pretrain import learning_rate

    config = TrainConfig(Path("a"), Path("b"), steps=100, warmup=10, lr=1.0)
    rates = np.array([learning_rate(config, step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] < 1e-3


def test_decay_spares_biases_norms_and_temperature(tiny_model: hlip.HLIPModel) -> None:
    from pretrain import make_optimizer

    decayed, spared = make_optimizer(tiny_model, TrainConfig(Path("a"), Path("b"))).param_groups
    names = {id(p): name for name, p in tiny_model.named_parameters()}
    assert decayed["weight_decay"] == 0.2
    assert spared["weight_decay"] == 0.0
    spared_names = {names[id(p)] for p in spared["params"]}
    assert "logit_scale" in spared_names
    assert all(name == "logit_scale" or ".norm" in name or name.endswith(".bias") for name in spared_names)
    assert not any(name.endswith(".bias") or "norm" in name for name in (names[id(p)] for p in decayed["params"]))
