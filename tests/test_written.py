"""Opens, finishes, joins and resumes what older revisions wrote: see tests/write_fixtures.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hlip
from commands import run as status
from hlip.embed.table import Embeddings
from hlip.model.config import MODELS
from hlip.prepare.discover import find_studies
from hlip.prepare.job import prepare
from hlip.prepare.recipe import Recipe
from hlip.processes import Processes
from hlip.store.store import Store
from hlip.store.tools import merge, verify
from hlip.train import pretrain
from hlip.train.checkpoints import Checkpoints
from hlip.train.config import TrainConfig
from hlip.train.step import Optimizer

pytest.importorskip("pyarrow")
WRITTEN = Path(__file__).with_name("written")
REVISIONS = sorted(path.name for path in WRITTEN.iterdir())


@pytest.fixture(params=REVISIONS)
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what a revision wrote, as the working folder: names within are relative."""
    folder = tmp_path / request.param
    shutil.copytree(WRITTEN / request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def run(*words: object) -> None:
    assert status(*words) == 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_opens_and_is_whole(old: Path) -> None:
    store = Store("store")
    assert list(store.uids) == [f"study{s}" for s in range(6)]
    assert verify(old / "store") == []
    study = store.study(1)
    assert study.impression == "glioma number 1." and [tuple(scan.shape) for scan in study.scans] == [(8, 16, 16)] * 2
    names, labels = store.labels
    assert names == ["stroke", "tumour"] and labels[:, 0].tolist() == [0, 1] * 3


def test_the_same_files_make_the_same_store_today(old: Path) -> None:
    run("prepare", "studies", "--out", "new", "--recipe", "recipe.yaml", "--reports", "reports.json", "--labels",
        "labels.csv")  # fmt: skip
    assert files_of(old / "new") == files_of(old / "store")


def test_a_finished_store_is_left_as_it_is(old: Path) -> None:
    before = files_of(old / "store")
    run("prepare", "studies", "--out", "store", "--recipe", "recipe.yaml", "--reports", "reports.json", "--labels",
        "labels.csv")  # fmt: skip
    assert files_of(old / "store") == before


def test_a_store_that_was_broken_off_is_finished(old: Path) -> None:
    done = {path.name: path.read_bytes() for path in (old / "unfinished" / "shards").glob("*.safetensors")}
    assert 0 < len(done) < 6
    recipe = hlip.load_recipe("recipe.yaml")
    report = prepare(find_studies(Path("studies")), recipe, "unfinished", shard_scans=2)
    assert report.studies == 6
    assert verify(old / "unfinished") == []
    assert {name: (old / "unfinished" / "shards" / name).read_bytes() for name in done} == done
    assert not (old / "unfinished" / "work").exists()


def test_a_store_is_joined_with_one_of_today(old: Path) -> None:
    for s in range(6):
        (old / "studies" / f"study{s}").rename(old / "studies" / f"other{s}")
    prepare(find_studies(Path("studies")), hlip.load_recipe("recipe.yaml"), "new")
    merge([old / "store", old / "new"], old / "both")
    assert len(Store("both")) == 12
    assert verify(old / "both") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("depth: nearest-exact", "recipe.depth linear, now nearest-exact"),
        ("rules: {min_slices: 4}", "recipe.rules.min_slices 5, now 4"),
    ],
)
@pytest.mark.parametrize("name", ["store", "unfinished"])
def test_a_store_of_another_recipe_is_refused_by_the_field(name: str, change: str, words: str, old: Path) -> None:
    recipe = old / "recipe.yaml"
    kept = [line for line in recipe.read_text().splitlines() if not line.startswith("rules")]
    recipe.write_text("\n".join([*kept, change]))
    before = files_of(old / name)
    with pytest.raises(ValueError, match=rf"{name}: was begun with another recipe \({words}\)"):
        prepare(find_studies(Path("studies")), "recipe.yaml", name, shard_scans=2 if name == "unfinished" else 64)
    assert {path: text for path, text in files_of(old / name).items() if path in before} == before


def test_stores_of_two_recipes_are_not_joined(old: Path) -> None:
    recipe = replace(hlip.load_recipe("recipe.yaml"), lengths="floor")
    prepare(find_studies(Path("studies")), recipe, "new")
    with pytest.raises(ValueError, match=r"new: its recipe\.lengths is floor, that of store not given"):
        merge([Path("store"), Path("new")], old / "both")
    assert not (old / "both").exists()


def test_what_was_written_before_is_linear(old: Path) -> None:
    """Fields that came later are at their defaults in a store, a model and a file that do not name them."""
    stored = Recipe.from_dict(Store("store").info["recipe"])
    modelled = hlip.HLIPModel.from_pretrained("model").config.recipe
    for recipe in (stored, modelled, hlip.load_recipe("recipe.yaml"), hlip.load_recipe("model")):
        assert recipe is not None
        ways = (recipe.depth, recipe.rounding, recipe.lengths, recipe.windowing, recipe.reorient)
        assert ways == ("linear", "round", "round", "first", True)
    assert stored.hash == Store("store").info["recipe_hash"]


def test_a_model_gives_the_same_embeddings(old: Path) -> None:
    model = hlip.HLIPModel.from_pretrained("model")
    store, written = Store("store"), Embeddings.read(old / "store.npz")
    assert np.array_equal(written.embedding, Embeddings.read(old / "store.parquet").embedding)
    with torch.no_grad():
        encoded = model.encode_image(hlip.pack([store.study(s) for s in range(6)], (4, 8, 8)))
    assert written.study.tolist() == list(store.uids)
    torch.testing.assert_close(
        encoded, torch.from_numpy(written.embedding), rtol=0, atol=1e-2
    )  # bf16, where it is fast


def test_embeddings_are_evaluated_as_they_were(old: Path) -> None:
    run("eval", "prompts.yaml", "--embeddings", "store.npz", "--labels", "labels.csv", "--model", "model", "--out",
        "eval", "--draws", 20)  # fmt: skip
    then, now = json.loads(Path("expected.json").read_text())["eval"], json.loads(Path("eval/metrics.json").read_text())
    facts = {"data", "left_out_scans"}
    for figures in ("metrics", "intervals"):  # there are more of them now
        now[figures] = {key: now[figures][key] for key in then[figures]}
    figures = [{key: side[key] for key in side.keys() - facts} for side in (now, then)]
    now, then = (json.loads(json.dumps(side), parse_float=lambda text: round(float(text), 12)) for side in figures)
    assert now == then


def test_a_probe_is_applied(old: Path) -> None:
    run("probe", "store.npz", "--labels", "labels.csv", "--out", "applied", "--apply", "store.probe.npz", "--draws", 20,
        "--minimum", 1)  # fmt: skip
    assert [row.split(",")[1] for row in Path("applied/auc.csv").read_text().splitlines()[1:3]] == ["stroke", "tumour"]


def test_a_model_is_written_as_it_was(old: Path) -> None:
    run("convert", "model", "again")
    for name in ("model.safetensors", "config.json"):
        assert (old / "again" / name).read_bytes() == (old / "model" / name).read_bytes()


def test_a_run_goes_on(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the losses that it had, had it not been killed."""
    settings = json.loads(Path("run/log.jsonl").read_text().splitlines()[0])
    flags = [
        "data",
        "init",
        "steps",
        "batch_size",
        "warmup",
        "precision",
        "workers",
        "log_every",
        "save_every",
        "lr",
        "keep",
    ]
    arguments = [f"--{name}={settings[name]}" for name in flags]
    monkeypatch.setattr("sys.argv", ["pretrain.py", *arguments, "--out=run", "--resume=auto"])
    assert pretrain.main() == 0
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == pytest.approx(json.loads(Path("expected.json").read_text())["losses"], rel=2e-3)
    assert hlip.HLIPModel.from_pretrained("run/model").config.embed_dim == 16


def test_a_run_names_how_its_held_out_scans_were_prepared_otherwise(old: Path) -> None:
    recipe = replace(hlip.load_recipe("recipe.yaml"), depth="nearest-exact")
    prepare(find_studies(Path("studies")), recipe, "other")
    run("train", "--data=store", "--init=model", "--steps=1", "--batch_size=4", "--precision=fp32", "--workers=0",
        "--val=other", "--labels=labels.csv", "--prompts=prompts.yaml", "--out=named")  # fmt: skip
    warnings = json.loads(Path("named/log.jsonl").read_text().splitlines()[1])["warnings"]
    assert "other: its recipe.depth is nearest-exact, not linear as the model has it" in warnings


def test_a_run_goes_on_with_the_settings_that_it_had(old: Path) -> None:
    """Of settings that came later, what was done before; of the model, what its checkpoint says."""
    settings = json.loads(Path("run/log.jsonl").read_text().splitlines()[0])
    fixed = {name: settings[name] for name in ("steps", "batch_size", "warmup", "precision", "lr", "keep")}

    def resumed(**changes: object) -> int:
        config = TrainConfig(Path("store"), Path("run"), init="model", resume="auto", **{**fixed, **changes})  # type: ignore[arg-type]
        checkpoints = Checkpoints(config, Processes())
        model = checkpoints.model()
        optimizer = Optimizer(model, config, 4, torch.device("cpu"))
        return checkpoints.load(model, optimizer.adamw, optimizer.scaler)

    assert resumed() == 2
    later = {"eps": 1e-6, "texts": "items", "prefix": "x", "scan_positions": "batch", "train_norms": True,
             "locked_dropout": True, "findings": "report"}  # fmt: skip
    for name, value in later.items():
        with pytest.raises(ValueError, match=f"step_00000002.pt: not a checkpoint of this run \\({name} was "):
            resumed(**{name: value})


def test_a_run_of_a_released_model_goes_on_with_what_its_name_meant(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another width, and texts as they are."""
    config = hlip.HLIPModel.from_pretrained("model").config
    today = replace(config, embed_dim=32, text=replace(config.text, clean=True))
    monkeypatch.setitem(MODELS, "of_today", (today, "tests"))
    settings = TrainConfig(Path("store"), Path("run"), model="of_today", text="bert", resume="auto")
    resumed = Checkpoints(settings, Processes()).model().config
    assert (resumed.embed_dim, resumed.text.clean) == (config.embed_dim, False)
