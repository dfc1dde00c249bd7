"""Names of studies, scans and classes, and links, that would lead out of a folder, through the commands that write and
those that read."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nibabel")
pytest.importorskip("pyarrow")

import hostile_files as bad
import test_store
from commands import run
from hlip import HLIPModel
from hlip.prepare.discover import find_studies
from hlip.prepare.job import prepare
from hlip.prepare.recipe import Recipe
from hlip.read.scan import ScanError
from hlip.store.store import Store
from hlip.store.tools import merge, verify
from test_hostile import Sandbox

UIDS = ["../escaped", "../../escaped", "/{root}/escaped", "a/b", "a/../../escaped", "..", ".", "C:\\x", "~", "-rf",
        "$(touch escaped)", "é\u202e", "x" * 300]  # fmt: skip
CLASSES = ["../escaped", "/{root}/escaped", "a/b"]


def test_no_name_leads_out(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    box = Sandbox.make(tmp_path)
    uids = [uid.format(root=box.root) for uid in UIDS]
    classes = [name.format(root=box.root) for name in CLASSES]
    listed = {}
    for k, uid in enumerate(uids):
        bad.save(box.root / "input" / f"{k}.nii.gz", np.roll(bad.real_volume(), k, 0))
        listed[uid] = {"scans": [f"{k}.nii.gz"], "report": ["Impression: none."]}
    (box.root / "input" / "list.json").write_text(json.dumps(listed))
    (box.root / "input" / "recipe.yaml").write_text("size: [4, 16, 16]\ncrop: null\n")
    task = {"kind": "similarity", "classes": dict.fromkeys(classes, "bleeding")}
    (box.root / "input" / "task.yaml").write_text(json.dumps(task))
    with (box.root / "input" / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["study", *classes], *([uid, k % 2, k // 2 % 2, k % 2] for k, uid in enumerate(uids))]
        )
    monkeypatch.chdir(box.root / "here")
    before = box.listing()
    out, given = tmp_path / "out", box.root / "input"

    out.mkdir()
    store = out / "store"
    assert run("prepare", given / "list.json", "--out", store, "--recipe", given / "recipe.yaml", "--workers", 1) == 0
    assert len(Store(store)) == len(uids)
    assert run("store", "split", store, "--fractions", 0.5, 0.5, "--out", out / "one", out / "two") == 0
    assert run("embed", store, "--model", model_folder, "--out", out / "table.npz", "--workers", 0, "--scans") == 0
    assert run("eval", given / "task.yaml", "--data", store, "--labels", given / "labels.csv", "--model", model_folder,
               "--out", out / "figures", "--workers", 0) == 0  # fmt: skip
    capsys.readouterr()
    assert box.listing() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box", "out"]
    assert sorted(path.name for path in out.iterdir()) == ["figures", "one", "store", "table.npz", "two"]
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Path, Path]:
    """Somebody's store, and one that is not to be read by way of it."""
    return tuple(
        test_store.make_store(tmp_path / name, studies, per_shard=1)
        for name, studies in (("theirs", test_store.STUDIES[:2]), ("mine", test_store.STUDIES[2:4]))
    )  # type: ignore[return-value]


STORE_FILES = ["shards/00001.safetensors", "shards/found.jsonl", "manifest.arrow", "store.json", "rejected.jsonl",
               "report.json", "shards"]  # fmt: skip


@pytest.mark.parametrize("name", STORE_FILES)
def test_no_link_of_a_store_leads_out(name: str, stores: tuple[Path, Path]) -> None:
    theirs, mine = stores
    for store in stores:
        (store / "shards" / "found.jsonl").touch()
    shutil.move(theirs / name, theirs / "aside")
    (theirs / name).symlink_to(mine / name)
    try:
        problems = verify(theirs)
    except ValueError as error:
        problems = [str(error)]
    assert any(problem.startswith(f"{theirs / name}") and "leads out" in problem for problem in problems)
    if name in ("shards", "shards/00001.safetensors"):
        with pytest.raises(ScanError, match=r"00001.safetensors.*leads out"):
            Store(theirs).study(1)
        (theirs / "store.json").unlink()  # not finished: opened from its shards
        with pytest.raises(ScanError, match="leads out"):
            Store(theirs)


def test_a_link_within_a_store_or_to_a_store_is_followed(stores: tuple[Path, Path], tmp_path: Path) -> None:
    theirs, _ = stores
    (theirs / "disk").mkdir()
    for name in ("shards/00001.safetensors", "manifest.arrow"):
        shutil.move(theirs / name, theirs / "disk" / Path(name).name)
        (theirs / name).symlink_to(theirs / "disk" / Path(name).name)
    (tmp_path / "link").symlink_to("theirs")
    for path in (theirs, tmp_path / "link"):
        assert verify(path) == []
        assert Store(path).study(1).uid == test_store.STUDIES[1].uid
    merge([tmp_path / "link"], tmp_path / "joined")  # holds files, no links to what may be moved
    assert not (tmp_path / "joined" / "shards" / "00001.safetensors").is_symlink()
    shutil.rmtree(theirs)
    assert verify(tmp_path / "joined") == []


def test_a_join_takes_nothing_from_outside(stores: tuple[Path, Path], tmp_path: Path) -> None:
    theirs, mine = stores
    (theirs / "shards" / "00001.safetensors").unlink()
    (theirs / "shards" / "00001.safetensors").symlink_to(mine / "shards" / "00001.safetensors")
    with pytest.raises(ScanError, match=r"theirs/shards/00001.safetensors.*leads out"):
        merge([theirs], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("name", ["work/lock", "work/plan.json", "work", "shards"])
def test_preparing_writes_through_no_link(name: str, tmp_path: Path) -> None:
    """Into a store that somebody began. The lock would be emptied, temporary files of others removed."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.tmp").write_text("dear")
    for folder in ("work", "shards"):
        (tmp_path / "out" / folder).mkdir(parents=True, exist_ok=True)
    link, target = tmp_path / "out" / name, tmp_path / "mine" / "notes.tmp"
    if link.is_dir():
        link.rmdir()
        target = target.parent
    link.symlink_to(target)
    bad.save(tmp_path / "in" / "a.nii.gz")
    recipe = Recipe(size=(4, 16, 16), crop=None)
    with pytest.raises(ValueError, match=f"out/{name}: a link leads out"):
        prepare(find_studies(tmp_path / "in"), recipe, tmp_path / "out")
    assert [(path.name, path.read_text()) for path in (tmp_path / "mine").iterdir()] == [("notes.tmp", "dear")]


@pytest.mark.parametrize("name", ["e.npz.parts/lock", "e.npz.parts/000000.npz", "e.npz.parts/job.json", "e.npz.parts"])
def test_embedding_reads_and_writes_through_no_link(
    name: str, model_folder: Path, nifti_study: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("dear")
    (tmp_path / "out").mkdir()
    link = tmp_path / "out" / name
    if name.endswith(".parts"):
        link.symlink_to(tmp_path / "mine")
    else:
        link.parent.mkdir()
        link.symlink_to(tmp_path / "mine" / "notes")
    given = [str(nifti_study[0].parent), "--model", str(model_folder), "--out", str(tmp_path / "out" / "e.npz")]
    assert run("embed", *given, "--workers", 0) == 2
    assert f"{link}: a link leads out" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in (tmp_path / "mine").iterdir()] == [("notes", "dear")]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "text/tokenizer.json", "text"])
def test_no_link_of_a_model_leads_out_but_to_the_hubs_blobs(name: str, model_folder: Path, tmp_path: Path) -> None:
    theirs, aside = tmp_path / "theirs", tmp_path / "mine"
    shutil.copytree(model_folder, theirs)
    shutil.move(theirs / name, aside)
    (theirs / name).symlink_to(aside)
    with pytest.raises(ValueError, match=f"theirs/{name}.*leads out"):
        HLIPModel.from_pretrained(theirs)
    cache = tmp_path / "models--them--model"  # as the hub's cache lays it out
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    shutil.move(theirs, cache / "snapshots" / "0123")
    shutil.move(aside, cache / "blobs" / "abcd")
    link = cache / "snapshots" / "0123" / name
    link.unlink()
    link.symlink_to(Path(os.path.relpath(cache / "blobs" / "abcd", link.parent)))
    assert HLIPModel.from_pretrained(cache / "snapshots" / "0123").encode_text(["glioma"]).shape == (1, 32)


def test_a_checkpoint_that_is_a_link_is_passed_over(
    tiny_model: HLIPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder of checkpoints may lie on another disk, but none of them elsewhere."""
    from hlip.processes import Processes
    from hlip.train.checkpoints import Checkpoints
    from hlip.train.config import TrainConfig

    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    model, scaler = copy.deepcopy(tiny_model), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    sum(weight.sum() for weight in model.parameters()).backward()
    optimizer.step()
    kept = Checkpoints(TrainConfig(tmp_path / "data", tmp_path / "run", steps=2), Processes())
    kept.save(model, optimizer, scaler, 1)
    kept.wait()
    shutil.copy(tmp_path / "disk" / "step_00000001.pt", tmp_path / "mine.pt")
    (tmp_path / "disk" / "step_00000002.pt").symlink_to(tmp_path / "mine.pt")
    assert kept.load(model, optimizer, scaler) == 1
    (tmp_path / "disk" / "step_00000001.pt").unlink()
    with pytest.raises(ValueError, match=r"step_00000002.pt: not a readable checkpoint.*leads out"):
        kept.load(model, optimizer, scaler)
