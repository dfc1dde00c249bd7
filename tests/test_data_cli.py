"""`hlip prepare` and `hlip store` as a user runs them, on real images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nibabel")
pytest.importorskip("pydicom")
pytest.importorskip("pyarrow")

import nibabel as nib
from nibabel.tests import __file__ as NIBABEL_TESTS

from commands import run
from dicom_files import write_series
from hlip.prepare.recipe import Recipe, load_recipe
from hlip.store.store import Store
from store_recipe import digests

RECIPE = "size: [8, 24, 24]\ncrop: null\n"
ANATOMICAL = Path(NIBABEL_TESTS).parent / "data" / "anatomical.nii"


def write_input(folder: Path, studies: int = 6) -> Path:
    """NIfTI studies of one and two scans, a DICOM study, a scout, a recipe, reports and labels."""
    image = nib.load(ANATOMICAL)
    data = np.asarray(image.dataobj).astype(np.int16)
    for s in range(studies):
        (folder / "input" / f"p{s}").mkdir(parents=True)
        for m in range(1 + s % 2):
            nib.save(nib.Nifti1Image(np.roll(data, 3 * s + m, 0), image.affine), folder / "input" / f"p{s}/{m}.nii.gz")
    nib.save(nib.Nifti1Image(data[..., :3], image.affine), folder / "input" / "p0" / "9.nii")
    affine = np.diag([2.0, 2.0, 4.0, 1.0])
    write_series(folder / "input" / "dcm", data[:20, :20, :8], affine, study_uid="1.2.3", description="Doe^Jane T1")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "befund.yaml").write_text("findings: [befund]\nimpression: [beurteilung]\n")
    reports = {"p1": "BEFUND: Klein.\nBEURTEILUNG: Normal.", "1.2.3": {"impression": "A stroke.", "findings": "Dark."}}
    (folder / "reports.json").write_text(json.dumps(reports))
    (folder / "labels.csv").write_text("study,stroke,age,patient_name\np1,0,41.5,Doe\n1.2.3,1,,Roe\n")
    return folder


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_input(tmp_path_factory.mktemp("cli"))


def options(box: Path, *more: object) -> list[object]:
    names = {"--recipe": "recipe.yaml", "--reports": "reports.json", "--labels": "labels.csv"}
    given = [part for option, name in names.items() for part in (option, box / name)]
    labels = ["--label_columns", "stroke", "age"]
    return [*given, *labels, "--sections", box / "befund.yaml", "--workers", 1, *more]


@pytest.fixture(scope="module")
def store(box: Path) -> Path:
    assert run("prepare", box / "input", "--out", box / "store", *options(box)) == 3
    return box / "store"


def test_prepare_says_what_it_made(box: Path, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("prepare", box / "input", "--out", tmp_path / "store", *options(box)) == 3
    printed = capfd.readouterr()
    first, *rest = printed.out.splitlines()
    assert first == f"{tmp_path / 'store'}: 7 studies, 10 scans"
    assert rest == ["  reports: 2 of 7 studies", "  labels: age, stroke", "  rejected by few_slices: 1"]
    for words in ("reading headers", "comparing scans", "preparing"):  # bars for finding, too
        assert words in printed.err
    assert digests(tmp_path / "store") == digests(store)


def test_the_manifest_has_what_is_known(box: Path, store: Path) -> None:
    opened = Store(store)
    rows = {row["uid"]: row for row in opened.manifest.to_pylist()}
    assert list(rows) == ["1.2.3", "p0", "p1", "p2", "p3", "p4", "p5"]
    dicom = rows["1.2.3"]
    assert (dicom["impression"], dicom["findings"], dicom["modality"]) == ("A stroke.", "Dark.", ["MR"])
    assert (dicom["name"], dicom["description"]) == (["0001-Doe^Jane_T1"], ["Doe^Jane T1"])
    assert dicom["plane"] == ["axial"] and dicom["shape"] == [[8, 24, 24]]
    np.testing.assert_allclose(dicom["spacing"], [[4.0, 2 * 20 / 24, 2 * 20 / 24]], rtol=1e-6)
    assert dict(dicom["labels"]) == {"stroke": 1.0}
    assert (rows["p1"]["impression"], rows["p1"]["findings"]) == ("Normal.", "Klein.")
    assert dict(rows["p1"]["labels"]) == {"stroke": 0.0, "age": 41.5}
    recipe = load_recipe(str(box / "recipe.yaml"))
    assert opened.info["recipe_hash"] == recipe.hash and Recipe.from_dict(opened.info["recipe"]) == recipe
    content = b"".join(file.read_bytes() for file in store.rglob("*") if file.is_file())
    for secret in (b"19500101", b"ACC1", b"Roe", bytes(box)):  # birth date, accession number, label's name, path
        assert secret not in content


def test_hashed_ids(box: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "salt").write_text("a grain of salt\n")
    (tmp_path / "same").write_text("a grain of salt")
    out = tmp_path / "hidden"
    assert run("prepare", box / "input", "--out", out, *options(box, "--hash_ids", tmp_path / "salt")) == 3
    again = tmp_path / "again"
    assert run("prepare", box / "input", "--out", again, *options(box, "--hash_ids", tmp_path / "same")) == 3
    assert digests(again) == digests(out)
    hidden, named = Store(out), Store(store)
    assert sorted(hidden.num_scans) == sorted(named.num_scans)
    assert sorted(hidden.manifest.column("impression").to_pylist()) == sorted(
        named.manifest.column("impression").to_pylist()
    )
    content = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    for secret in (b"1.2.3", b"Jane", b"p1", b".nii", b"grain"):
        assert secret not in content


def test_info_and_verify(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("store", "info", store) == 0
    printed = capsys.readouterr().out
    assert f"{store}: 7 studies, 10 scans\n" in printed
    assert "(8, 24, 24) 100%" in printed and "labels: age, stroke" in printed
    assert load_recipe(str(store.parent / "recipe.yaml")).hash in printed
    assert run("store", "verify", store) == 0
    assert f"{store}: whole" in capsys.readouterr().out
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "shards").mkdir()
    for file in filter(Path.is_file, store.rglob("*")):
        (copy / file.relative_to(store)).write_bytes(file.read_bytes())
    shard = next((copy / "shards").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run("store", "verify", copy) == 1
    assert "is damaged (its checksum differs)" in capsys.readouterr().out
    assert run("store", "info", tmp_path) == 2
    assert "not a store" in capsys.readouterr().err


def test_split_and_merge(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [tmp_path / "train", tmp_path / "test"]
    assert run("store", "split", store, "--out", *parts, "--fractions", 0.7, 0.3, "--seed", 3) == 0
    sizes = [len(Store(part)) for part in parts]
    assert sizes == [5, 2]
    whole = tmp_path / "whole"
    assert run("store", "merge", *parts, "--out", whole) == 0
    assert run("store", "verify", whole) == 0
    merged, named = Store(whole), Store(store)
    assert sorted(merged.uids) == sorted(named.uids)
    for i, uid in enumerate(merged.uids):
        study, other = merged.study(i), named.study(int(named.indices([uid])[0]))
        assert (study.names, study.impression) == (other.names, other.impression)
        assert all((a == b).all() for a, b in zip(study.scans, other.scans, strict=True))
    (tmp_path / "uids.txt").write_text("p3\n\np1\n")
    listed = [tmp_path / "some", tmp_path / "rest"]
    assert run("store", "split", store, "--out", *listed, "--list", tmp_path / "uids.txt") == 0
    assert Store(listed[0]).uids.tolist() == ["p1", "p3"] and len(Store(listed[1])) == 5
    capsys.readouterr()
    assert run("store", "merge", store, listed[0], "--out", tmp_path / "none") == 2
    assert "study p1 is in" in capsys.readouterr().err
    assert run("store", "split", store, "--out", whole, tmp_path / "x", "--fractions", 0.5, 0.5) == 2
    assert "exists already" in capsys.readouterr().err
    assert run("store", "split", store, "--out", tmp_path / "x", "--fractions", 0.5, 0.5) == 2
    assert "1 stores for 2 parts" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not (tmp_path / "none").exists()


def test_stats(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run("store", "stats", store, "--out", tmp_path / "stats.png") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "stats.json").read_text())
    assert found["scans_per_study"]["counts"] == {"1": 4, "2": 3} and found["slices_per_scan"]["counts"] == {
        "8": 1,
        "25": 9,
    }
    assert found["modalities"] == {"MR": 1, "unknown": 9}
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_a_list_with_a_root(box: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"one": {"scans": ["p0/0.nii.gz", "dcm"]}}))
    arguments = ["--out", tmp_path / "store", "--recipe", box / "recipe.yaml", "--workers", 1, "--root", box / "input"]
    assert run("prepare", tmp_path / "list.json", *arguments) == 0
    assert Store(tmp_path / "store").study(0).names == ["0001-Doe^Jane_T1", "p0 0.nii.gz"]


def test_interrupted_and_gone_on_with(tmp_path: Path) -> None:
    """Ctrl-C to all processes, as a terminal sends it: status 130, a partial store, and the next run finishes it."""
    box = write_input(tmp_path, studies=150)
    command = [sys.executable, "-m", "hlip.cli", "prepare", box / "input", "--out", box / "store", *options(box)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        list(map(str, command)), env=env, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list((box / "store" / "shards").glob("*.safetensors")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert "keeps what is finished: run this again to go on" in errors
    partial = Store(box / "store")
    assert not partial.info and 0 < len(partial) < 151
    before = {file: file.stat().st_mtime_ns for file in (box / "store" / "shards").iterdir()}
    assert run("prepare", box / "input", "--out", box / "store", *options(box)) == 3
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(Store(box / "store")) == 151 and not (box / "store" / "work").exists()
