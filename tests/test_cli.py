from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hlip
from commands import run
from hlip import processes
from hlip.evaluate.evaluation import zeroshot


def test_embed_one_study_from_files(nifti_study: list[Path], model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "emb.npz"
    assert run("embed", *nifti_study, "--model", model_folder, "--out", out, "--dtype", "fp32") == 0
    saved = np.load(out, allow_pickle=False)
    assert saved["study"].tolist() == [nifti_study[0].parent.name]
    model = hlip.HLIPModel.from_pretrained(model_folder)
    study = hlip.load_study(nifti_study, model.config.recipe)
    with torch.no_grad():
        expected = model.encode_image(hlip.pack([study], model.config.vision.patch_size))
    np.testing.assert_array_equal(saved["embedding"], expected.numpy())
    assert [p.name for p in out.parent.iterdir()] == ["emb.npz"]


def test_interrupted_before_anything_is_written(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hlip.HLIPModel, "encode_image", interrupt)
    assert run("embed", *nifti_study, "--model", model_folder, "--out", tmp_path / "e.npz") == 130
    assert "hlip embed: interrupted; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.glob("e*"))


def test_output_is_tried_before_the_work(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(hlip.HLIPModel, "from_pretrained", None)  # nothing is read before
    assert run("embed", *nifti_study, "--model", model_folder, "--out", "/proc/x/e.npz") == 2
    assert "/proc/x/e.npz: /proc cannot be written to" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("embed", *nifti_study, "--model", model_folder, "--out", tmp_path / "e.parquet") == 2
    assert "Parquet needs pyarrow" in capsys.readouterr().err


def test_embed_folders_are_studies(nifti_study: list[Path], model_folder: Path, tmp_path: Path) -> None:
    folder = nifti_study[0].parent
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.nii.gz").write_bytes(nifti_study[0].read_bytes())
    assert run("embed", folder, other, "--model", model_folder, "--out", tmp_path / "emb.npz") == 0
    saved = np.load(tmp_path / "emb.npz")
    assert saved["study"].tolist() == [folder.name, other.name]
    assert saved["embedding"].shape == (2, 32)


def test_zeroshot(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"
    prompts = ["--prompt", "glioma", "--prompt", "no abnormality"]
    assert run("zeroshot", *nifti_study, "--model", model_folder, *prompts, "--out", out) == 0
    entry = json.loads(out.read_text())[nifti_study[0].parent.name]
    assert sorted(entry) == ["cosine", "left_out", "scans", "share_among_these_prompts"]
    table = entry["share_among_these_prompts"]
    assert sorted(table) == ["glioma", "no abnormality"]
    assert sum(table.values()) == pytest.approx(1, abs=1e-5)
    assert (entry["scans"], entry["left_out"]) == ([path.name for path in nifti_study], [])
    model = hlip.HLIPModel.from_pretrained(model_folder)
    with torch.no_grad():
        batch = hlip.pack(hlip.load_study(nifti_study, model.config.recipe), model.config.vision.patch_size)
        texts = model.encode_text([f"This study shows: {name}." for name in entry["cosine"]])
        expected = (model.encode_image(batch) @ texts.T)[0]
    assert list(entry["cosine"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    best = max(table, key=table.__getitem__)
    shown = capsys.readouterr().out
    printed = shown.splitlines()
    assert printed[0] == nifti_study[0].parent.name
    assert "share among these prompts" in printed[1] and "probab" not in shown.lower()
    assert printed[2].split("  ")[1].strip() == best
    assert f"{entry['cosine'][best]:.3f}" in printed[2]
    assert all(path.name in printed[4] for path in nifti_study)
    path = tmp_path / "prompts.yaml"
    path.write_text("classes: {a: [glioma], b: [no abnormality]}\n")
    assert run("zeroshot", *nifti_study, "--model", model_folder, "--prompts", path, "--out", out) == 0
    same = json.loads(out.read_text())[nifti_study[0].parent.name]["share_among_these_prompts"]
    assert (same["a"], same["b"]) == (table["glioma"], table["no abnormality"])


def test_zeroshot_and_interpret_take_benchmarks(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a task of pairs a finding's share is that beside its negative prompt; one by similarity has no shares."""
    out, model = tmp_path / "p.json", hlip.HLIPModel.from_pretrained(model_folder)
    study = hlip.load_study(nifti_study, model.config.recipe)
    for name, said in (
        ("rad-chestct", "share beside the negative prompt"),
        ("rsna", "cosine"),
        ("pub-brain-5", "share"),
    ):
        task = hlip.load_task(name)
        assert run("zeroshot", *nifti_study, "--model", model_folder, "--prompts", name, "--out", out) == 0
        entry = json.loads(out.read_text())[nifti_study[0].parent.name]
        assert said in capsys.readouterr().out.splitlines()[1]
        scores = dict(zip(task.names, zeroshot(model, [study], task)[1][0].tolist(), strict=True))
        key = "cosine" if task.kind == "similarity" else "share_among_these_prompts"
        assert entry[key] == pytest.approx(scores, abs=1e-5) and entry["cosine"].keys() == task.classes.keys()
    args = ["--model", model_folder, "--prompts", "ct-rate", "--templates", "organ", "--target", "Emphysema"]
    assert run("interpret", *nifti_study, *args, "--out", tmp_path / "maps") == 0
    result = json.loads((tmp_path / "maps" / "relevance.json").read_text())
    assert len(result["cosine"]) == 16 and result["similarity"] == pytest.approx(
        result["cosine"]["Emphysema"], abs=1e-5
    )


def test_zeroshot_tells_that_published_figures_are_of_another_grid(
    nifti_study: list[Path], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task, told in (("pub-brain-5", True), ("cq500", False)):
        assert run("zeroshot", *nifti_study, "--model", model_folder, "--prompts", task) == 0
        note = "note: published figures of pub-brain-5 are of scans of 144 x 224 x 224 voxels"
        assert (note in capsys.readouterr().out) == told


def test_flags_may_have_hyphens(nifti_study: list[Path], model_folder: Path, tmp_path: Path) -> None:
    args = ["embed", *nifti_study, "--model", model_folder, "--dtype", "fp32", "--out"]
    assert run(*args, tmp_path / "a.npz", "--one_scan", 1, "--max_tokens=64") == 0
    assert run(*args, tmp_path / "b.npz", "--one-scan", 1, "--max-tokens=64") == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert run("embed", "--no-such-flag") == 2


def test_scans_that_zeroshot_leaves_out_are_told(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = nifti_study[0].parent, tmp_path / "p.json"
    (folder / "cut.nii.gz").write_bytes(nifti_study[0].read_bytes()[:500])
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.nii.gz").write_bytes(nifti_study[0].read_bytes())
    args = ["--model", model_folder, "--prompt", "glioma", "--prompt", "broken arm", "--out", out]
    assert run("zeroshot", folder, other, *args) == 3
    table = json.loads(out.read_text())
    (entry,) = table[folder.name]["left_out"]
    assert (entry["scan"], entry["rule"]) == ("cut.nii.gz", "unreadable") and entry["reason"]
    assert table[folder.name]["scans"] == [path.name for path in nifti_study]
    assert (table["other"]["scans"], table["other"]["left_out"]) == (["a.nii.gz"], [])
    assert f"left out: cut.nii.gz (unreadable: {entry['reason']})" in capsys.readouterr().out
    assert run("zeroshot", other, *args) == 0
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "cut.nii.gz").write_bytes(nifti_study[0].read_bytes()[:500])
    assert run("zeroshot", bad, other, *args) == 3
    table = json.loads(out.read_text())
    assert (table["bad"]["share_among_these_prompts"], table["bad"]["scans"]) == ({}, [])
    assert table["bad"]["left_out"][0]["rule"] == "unreadable" and table["other"]["scans"] == ["a.nii.gz"]
    assert run("zeroshot", bad, *args) == 2


@pytest.mark.parametrize("command", ["embed", "zeroshot"])
def test_bad_input_is_named_and_nothing_is_written(
    command: str, nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "notes.nii.gz"
    text.write_text("hello")
    truncated = tmp_path / "cut.nii.gz"
    truncated.write_bytes(nifti_study[0].read_bytes()[:1000])
    empty_study = tmp_path / "empty"
    empty_study.mkdir()
    out = tmp_path / ("emb.npz" if command == "embed" else "p.json")
    rest = ["--out", out] + ([] if command == "embed" else ["--prompt", "a", "--prompt", "b"])
    model = ["--model", model_folder]
    cases = [
        ([text, *model], "notes.nii.gz: not a readable NIfTI file"),
        ([nifti_study[0], truncated, *model], "cut.nii.gz: truncated or corrupt"),
        ([tmp_path / "none.nii", *model], "none.nii: no such file or folder"),
        ([empty_study, *model], "empty: no scans"),
        ([nifti_study[0], nifti_study[0].parent, *model], "is not a folder"),
        ([nifti_study[0], nifti_study[0], *model], "scan_0.nii.gz is given twice"),
        ([nifti_study[0], *model, "--device", "nowhere"], "--device nowhere: cannot be used"),
        ([nifti_study[0], "--model", tmp_path / "no_model"], "no_model: unknown model"),
    ]
    for args, message in cases:
        assert run(command, *args, *rest) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.glob("*.npz")) + list(tmp_path.glob("*.json")) + list(tmp_path.glob(".*")) == []


def test_prompts_missing(nifti_study: list[Path], model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prompts in ([], ["--prompt", "only one"], ["--prompt", "a"] * 2, ["--prompt", "a", "--prompt", " "]):
        assert run("zeroshot", *nifti_study, "--model", model_folder, *prompts) == 2
        assert "prompts missing" in capsys.readouterr().err
    both = ["--prompt", "a", "--prompts", "p.yaml"]
    assert run("zeroshot", *nifti_study, "--model", model_folder, *both) == 2
    assert "not both" in capsys.readouterr().err
    template = ["--prompt", "a", "--prompt", "b", "--template", "no place"]
    assert run("zeroshot", *nifti_study, "--model", model_folder, *template) == 2
    assert "exactly one {}" in capsys.readouterr().err


def test_embed_wants_npz(nifti_study: list[Path], model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("embed", *nifti_study, "--model", model_folder, "--out", "x.csv") == 2
    assert "x.csv: expected the name of a file that ends in .npz" in capsys.readouterr().err


def test_interrupt_leaves_nothing(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    out = tmp_path / "out" / "emb.npz"
    assert run("embed", *nifti_study, "--model", model_folder, "--out", out) == 130
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("wrong", [["embed"], ["embed", "x.nii", "--model", "nowhere", "--out", "e.csv"]])
def test_another_process_than_the_first_waits_before_it_complains(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    waited: list[str] = []
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: waited.append(capsys.readouterr().err))
    assert run(*wrong) == 2
    assert waited == [""]
    assert "hlip embed: error: " in capsys.readouterr().err


def test_installed_command_and_help() -> None:
    command = Path(sys.executable).with_name("hlip")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "embed" in shown
    assert "zeroshot" in shown
    report = subprocess.run([command, "env"], capture_output=True, text=True, check=True).stdout
    assert "reference" in report
    wrong = subprocess.run([command, "embed"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
