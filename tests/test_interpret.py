from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hlip
from commands import run
from conftest import TINY_RECIPE
from hlip.cli import interpret
from hlip.evaluate.evaluation import zeroshot
from hlip.evaluate.tasks import TEMPLATE, Task
from hlip.explain.relevance import relevance
from hlip.store.format import shard_file, write_shard
from hlip.store.tools import finish
from hlip.study import PreparedScan, StudyRecord

FILES = ["montage.png", "overlays", "page.html", "relevance.json", "relevance.npz"]


def test_interpret_files(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "maps"
    flags = ["--model", model_folder, "--target", "glioma", "--against", "normal", "--prompt", "stroke", "--out", out]
    assert run("interpret", *nifti_study, *flags) == 0
    assert sorted(each.name for each in out.iterdir()) == FILES
    assert [each.name for each in out.parent.iterdir()] == ["maps"]
    result = json.loads((out / "relevance.json").read_text())
    names = [path.name for path in nifti_study]
    assert [entry["name"] for entry in result["scans"]] == names
    assert [entry["overlay"] for entry in result["scans"]] == [f"overlays/{name}" for name in names]

    model = hlip.HLIPModel.from_pretrained(model_folder)
    study = hlip.load_study(nifti_study, model.config.recipe)
    classes = Task({name: [name] for name in ("glioma", "normal", "stroke")}, TEMPLATE)
    expected = zeroshot(model, [study], classes)[1][0].tolist()
    assert list(result["share_among_these_prompts"]) == list(result["cosine"]) == list(classes.classes)
    assert list(result["share_among_these_prompts"].values()) == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        image = model.encode_image(hlip.pack(study, model.config.vision.patch_size))[0]
        cosines = (model.encode_text([text for (text,) in classes.sentences().values()]) @ image).tolist()
    assert list(result["cosine"].values()) == pytest.approx(cosines, abs=1e-5)
    assert result["left_out"] == []
    texts = ["This study shows: glioma.", "This study shows: normal."]
    found = relevance(model, study, texts[0], "all", texts[1])
    saved = np.load(out / "relevance.npz", allow_pickle=False)
    assert saved["names"].tolist() == names
    for m, values in enumerate(found.maps):
        np.testing.assert_allclose(saved[f"map_{m:03d}"], values.numpy(), rtol=1e-4, atol=1e-7)
    assert [entry["share"] for entry in result["scans"]] == pytest.approx(found.shares.tolist(), abs=1e-4)
    assert result["similarity"] == pytest.approx(found.similarity, abs=1e-5)
    for path, entry in zip(nifti_study, result["scans"], strict=True):
        assert nibabel.load(out / entry["overlay"]).shape == nibabel.load(path).shape
    printed = capsys.readouterr().out
    assert "relevance to 'glioma' against 'normal'" in printed and "scan_2.nii.gz" in printed
    shown = (out / "page.html").read_text()
    assert "glioma" in shown and "Share among these prompts" in shown and f"{cosines[0]:.3f}" in shown
    assert "probab" not in (printed + shown + (out / "relevance.json").read_text()).lower()


def test_scans_that_are_left_out_are_told(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = nifti_study[0].parent, tmp_path / "out"
    (folder / "cut.nii.gz").write_bytes(nifti_study[0].read_bytes()[:500])
    assert run("interpret", folder, "--model", model_folder, "--target", "glioma", "--out", out) == 3
    (entry,) = json.loads((out / "relevance.json").read_text())["left_out"]
    assert (entry["scan"], entry["rule"]) == ("cut.nii.gz", "unreadable")
    assert "left out: cut.nii.gz" in capsys.readouterr().out
    assert "Scans left out" in (out / "page.html").read_text()


def test_a_folder_and_a_prompts_file_again_into_the_same_folder(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("classes: {tumor: [glioma, mass], none: [normal]}\ntemplates: ['{}.', 'It is {}.']\n")
    out = tmp_path / "out"
    base = [nifti_study[0].parent, "--model", model_folder, "--prompts", prompts, "--out", out]
    shares = {}
    for target, *more in (("tumor",), ("tumor", "--layers", "last"), ("none", "--normalize")):
        assert run("interpret", *base, "--target", target, *more) == 0
        result = json.loads((out / "relevance.json").read_text())
        assert sorted(each.name for each in out.iterdir()) == FILES
        shares[tuple(more)] = [entry["share"] for entry in result["scans"]]
        assert (result["target"], result["layers"]) == (target, "last" if "last" in more else "all")
        assert result["normalize"] == ("--normalize" in more)
    assert len({tuple(each) for each in shares.values()}) == 3
    model = hlip.HLIPModel.from_pretrained(model_folder)
    with torch.no_grad():
        text = F.normalize(model.encode_text(["glioma.", "It is glioma.", "mass.", "It is mass."]).mean(0), dim=0)
    study = hlip.load_study(nifti_study, model.config.recipe)
    assert shares[()] == pytest.approx(relevance(model, study, text).shares.tolist(), abs=1e-4)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "prompts.yaml", "study"]


def test_a_study_of_a_store(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    for name in ("shards", "work"):
        (store / name).mkdir(parents=True)
    image = torch.randint(0, 256, (8, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scans = [PreparedScan(name, image.roll(m), (1.0, 1.0, 1.0), "axial", 8) for m, name in enumerate("ab")]
    studies = [StudyRecord(uid, scans) for uid in ("p1", "p2")]
    write_shard(shard_file(store, 0), studies, TINY_RECIPE.to_dict(), TINY_RECIPE.hash, store / "work")
    finish(store, store / "work", source_hash="", shard_scans=0, hidden_ids=False)
    flags = ["--model", model_folder, "--target", "glioma", "--out", tmp_path / "out"]
    assert run("interpret", "p2", "--store", store, *flags) == 0
    result = json.loads((tmp_path / "out" / "relevance.json").read_text())
    assert result["study"] == "p2" and [entry["overlay"] for entry in result["scans"]] == [None, None]
    assert result["share_among_these_prompts"] == result["cosine"] == {}
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [f for f in FILES if f != "overlays"]
    assert "recipe" not in capsys.readouterr().err
    other = shutil.copytree(model_folder, tmp_path / "model") / "config.json"
    config = json.loads(other.read_text())
    other.write_text(json.dumps({**config, "recipe": {**config["recipe"], "depth": "nearest-exact"}}))
    assert run("interpret", "p2", "--store", store, "--model", other.parent, *flags[2:]) == 0
    words = f"{store}: its recipe.depth is linear, not nearest-exact as the model has it"
    assert words in capsys.readouterr().err
    for args, message in ((["p3"], "holds no study p3"), (["p1", "p2"], "the uid of one study, got p1, p2")):
        assert run("interpret", *args, "--store", store, *flags) == 2
        assert message in capsys.readouterr().err


def test_bad_input_is_named_and_nothing_is_written(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("classes: {a: [x], b: [y]}\n")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("")
    thin = tmp_path / "thin.nii"
    nibabel.save(nibabel.Nifti1Image(np.arange(14 * 14, dtype=np.int16).reshape(14, 14, 1), np.eye(4)), thin)
    other = tmp_path / "other"
    other.mkdir()
    study, target = nifti_study, ["--target", "glioma"]
    cases = [
        ([*study, "--target", "glioma", "--prompts", prompts], "'glioma': not a class of"),
        ([*study, "--target", "word " * 40], "tokens, the model's text tower reads 32"),
        ([*study, "--target", "a", "--against", "z", "--prompts", prompts], "--against 'z': not a class of"),
        ([*study, "--target", "a", "--prompt", "b", "--prompts", prompts], "not both"),
        ([*study, *target, "--against", "glioma"], "the same as --target"),
        ([*study, "--target", " "], "--target ' ': expected words"),
        ([*study, *target, "--out", "/proc/maps"], "/proc cannot be written to"),
        ([*study, *target, "--template", "no place"], "exactly one {}"),
        ([*study, *target, "--out", taken], "holds something else (thesis.tex)"),
        ([*study, *target, "--out", prompts], "expected a folder"),
        ([other, study[0].parent, *target], "one study at a time, got 2 folders"),
        ([thin, *target], "thin.nii: 1 slices, expected at least"),
        ([tmp_path / "none.nii", *target], "none.nii: no such file"),
        (["uid", *target, "--store", tmp_path], "not a store"),
    ]
    for args, message in cases:
        out = [] if "--out" in args else ["--out", tmp_path / "out"]
        assert run("interpret", *args, "--model", model_folder, *out) == 2
        assert message in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other", "prompts.yaml", "study", "taken", "thin.nii"]


def test_interrupt_keeps_what_was_there(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    flags = [*nifti_study, "--model", model_folder, "--target", "glioma", "--out", out]
    assert run("interpret", *flags) == 0
    before = {each.name: each.read_bytes() for each in out.iterdir() if each.is_file()}

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(interpret, "write_overlays", interrupt)
    assert run("interpret", *flags, "--layers", "last") == 130
    assert {each.name: each.read_bytes() for each in out.iterdir() if each.is_file()} == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "study"]
