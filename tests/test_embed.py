from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hlip
from commands import run
from conftest import TINY_RECIPE, random_study, tiny_vision
from hlip.embed.encoders import model_digest
from hlip.embed.inputs import FileStudies, OneScan, StoreStudies, drawn_place, study_names
from hlip.embed.loop import Options, embed
from hlip.embed.parts import parts_of
from hlip.embed.table import Embeddings
from hlip.store.store import Store
from tiny_store import make_store

PATCH = (4, 8, 8)


@pytest.mark.parametrize("able", [False, True])
def test_bf16_by_default_where_there_are_instructions_for_it(
    store: Store, tiny_model: hlip.HLIPModel, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], able: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: able)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    out, dtype = tmp_path / "e.npz", "bf16" if able else "fp32"
    assert run("embed", store.path, "--model", model_folder, "--out", out) == 0
    assert f"on cpu, products in {dtype}" in capsys.readouterr().err
    table = Embeddings.read(out)
    assert table.facts["job"]["dtype"] == dtype
    named = embed(tiny_model, StoreStudies(store, PATCH), Options(dtype=dtype))  # type: ignore[arg-type]
    np.testing.assert_array_equal(table.embedding, named.embedding)


def test_a_store_of_another_recipe_is_named(
    store: Store, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{store.path}: its recipe.depth is linear, not nearest-exact as the model has it"
    shutil.copytree(model_folder, tmp_path / "model")
    for changes in ({}, {"depth": "nearest-exact"}):
        recipe = replace(TINY_RECIPE, **changes)
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "recipe": recipe.to_dict()}))
        assert run("embed", store.path, "--model", tmp_path / "model", "--out", tmp_path / f"{len(changes)}.npz") == 0
        assert (words in capsys.readouterr().err) == bool(changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("embed") / "store", [1, 3, 2, 1, 5, 2, 1, 1, 4, 2, 1, 1])


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """The number of threads may change the last bits of products of matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_store_by_the_command(
    store: Store, tiny_model: hlip.HLIPModel, model_folder: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"e{suffix}"
    args = ["embed", store.path, "--model", model_folder, "--out", out, "--dtype", "fp32"]
    assert run(*args, "--max_tokens", 32, "--workers", 2) == 0
    table = Embeddings.read(out)
    assert table.study.tolist() == store.uids.tolist()
    assert set(table.scan.tolist()) == {""}
    assert table.facts["failed"] == []
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    for i, embedding in enumerate(table.embedding):
        with torch.no_grad():
            alone = tiny_model.encode_image(hlip.pack([store.study(i)], PATCH))[0]
        np.testing.assert_allclose(embedding, alone.numpy(), rtol=1e-4, atol=1e-5)


def test_rows_of_scans_and_heads(store: Store) -> None:
    torch.manual_seed(0)
    config = hlip.ModelConfig(tiny_vision(num_prefix=2, head="token"), embed_dim=16, per_prefix=True)
    model = hlip.HLIPModel(replace(config, vision=replace(config.vision, head="dinotxt"))).eval()
    with torch.no_grad():
        heads = model.encode_image(hlip.pack([store.study(1)], PATCH))[0].numpy()
        scan = model.encode_image(hlip.pack([[store.scan(1, 2)]], PATCH))[0].numpy()
    table = embed(model, StoreStudies(store, PATCH), Options(unit="both", max_tokens=48, dtype="fp32"))
    assert table is not None
    count = len(heads)
    assert count == 2
    assert len(table) == count * (len(store) + len(store.shapes))
    of_second = table.study == "s001"
    assert table.scan[of_second].tolist() == [name for name in ("", "scan 0", "scan 1", "scan 2") for _ in range(2)]
    assert table.head[of_second].tolist() == [0, 1] * 4
    np.testing.assert_allclose(table.embedding[of_second][:2], heads, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table.embedding[of_second][-2:], scan, rtol=1e-4, atol=1e-5)
    assert table.of_studies(0)[0] == store.uids.tolist()
    assert dict.fromkeys(table.study.tolist()) == dict.fromkeys(store.uids.tolist())


def test_workers_and_modes_change_nothing(store: Store, tiny_model: hlip.HLIPModel) -> None:
    studies = StoreStudies(store, PATCH)
    plain = embed(tiny_model, studies, Options(max_tokens=32, dtype="fp32"))
    with_workers = embed(tiny_model.train(), studies, Options(max_tokens=32, dtype="fp32"), workers=2)
    assert tiny_model.training
    tiny_model.eval()
    np.testing.assert_array_equal(plain.embedding, with_workers.embedding)
    coarse = embed(tiny_model, studies, Options(dtype="bf16"))
    assert coarse.embedding.dtype == np.float32
    assert 1e-4 < np.abs(coarse.embedding - plain.embedding).max() < 0.1
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        Options(max_tokens=0)


def test_one_scan_of_each_study(store: Store, tiny_model: hlip.HLIPModel) -> None:
    studies = StoreStudies(store, PATCH)
    found = {seed: OneScan(studies, seed) for seed in range(40)}
    assert (found[0].tokens == 8).all()
    counted = list(zip(store.uids.tolist(), store.num_scans.tolist(), strict=True))
    places = {seed: [drawn_place(uid, n, seed) for uid, n in counted] for seed in found}
    drawn = np.array(list(places.values()))
    assert (drawn >= 0).all()
    assert (drawn < store.num_scans).all()
    for i, n in enumerate(store.num_scans):
        assert set(drawn[:, i]) == set(range(n))  # every scan of a study has its turn
    assert len({each.digest() for each in found.values()} | {studies.digest()}) == 41
    table = embed(tiny_model, studies, Options(max_tokens=24, one_scan=3, dtype="fp32"))
    assert table.facts["job"]["one_scan"] == 3
    assert table.study.tolist() == store.uids.tolist()
    for i, embedding in enumerate(table.embedding):
        with torch.no_grad():
            alone = tiny_model.encode_image(hlip.pack([[store.scan(i, places[3][i])]], PATCH))[0]
        np.testing.assert_allclose(embedding, alone.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not both"):
        Options(unit="both", one_scan=0)


def test_the_scan_that_is_shown_depends_on_its_study_alone(
    store: Store, nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Studies on a list, whose scans are counted by reading, in two orders.
    files = [str(path.relative_to(tmp_path)) for path in nifti_study]
    for name, uids in (("there", "ABCDEF"), ("back", "FEDCBA")):
        (tmp_path / f"{name}.json").write_text(json.dumps({uid: {"scans": files} for uid in uids}))
        args = ["embed", tmp_path / f"{name}.json", "--model", model_folder, "--workers", 0]
        assert run(*args, "--one_scan", 7, "--out", tmp_path / f"{name}.npz") == 0
    tables = [Embeddings.read(tmp_path / f"{name}.npz") for name in ("there", "back")]
    rows = [dict(zip(table.study.tolist(), map(tuple, table.embedding.tolist()), strict=True)) for table in tables]
    assert rows[0] == rows[1]
    assert len(set(rows[0].values())) == 3  # the studies hold the same three scans, and each of these is shown
    args = ["embed", store.path, "--model", model_folder, "--out", tmp_path / "e.npz", "--scans", "--one_scan", 0]
    assert run(*args) == 2
    assert "--scans embeds every scan, --one_scan sees only one" in capsys.readouterr().err


def test_bad_studies_are_left_out_and_told(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import nibabel

    good = nifti_study[0].parent
    one_slice, text = tmp_path / "one_slice", tmp_path / "text"
    for folder in (one_slice, text):
        folder.mkdir()
    nibabel.save(
        nibabel.Nifti1Image(np.arange(196, dtype=np.int16).reshape(14, 14, 1), np.eye(4)), one_slice / "a.nii.gz"
    )
    (text / "a.nii.gz").write_text("hello")
    out = tmp_path / "e.npz"
    assert run("embed", one_slice, good, text, "--model", model_folder, "--out", out) == 3
    table = Embeddings.read(out)
    assert table.study.tolist() == [good.name]
    assert [uid for uid, _ in table.facts["failed"]] == ["one_slice", "text"]
    told = capsys.readouterr().err
    assert "left out text: " in told
    assert "a.nii.gz: not a readable NIfTI file" in told
    assert "1 slices, expected at least 5" in table.facts["failed"][0][1]
    assert run("embed", one_slice, text, "--model", model_folder, "--out", tmp_path / "none.npz") == 2
    assert "none of 2 studies could be embedded; the first: " in capsys.readouterr().err
    assert not list(tmp_path.glob("none*"))


def test_study_lists(nifti_study: list[Path], model_folder: Path, tmp_path: Path) -> None:
    files = [str(path.relative_to(tmp_path)) for path in nifti_study]
    (tmp_path / "cut.nii.gz").write_bytes(nifti_study[0].read_bytes()[:500])
    listed = {"A": {"scans": files[:2]}, "B": {"scans": [*files[2:], "cut.nii.gz"]}, "C": {"scans": ["cut.nii.gz"]}}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    out = tmp_path / "e.npz"
    assert run("embed", tmp_path / "list.json", "--model", model_folder, "--out", out, "--workers", 0) == 3
    table = Embeddings.read(out)
    assert table.study.tolist() == ["A", "B"]
    assert [uid for uid, _ in table.facts["failed"]] == ["C"]
    assert [entry[:3] for entry in table.facts["left_out"]] == [["B", "cut.nii.gz", "unreadable"]]
    assert run("embed", *nifti_study[:2], "--model", model_folder, "--out", tmp_path / "a.npz") == 0
    np.testing.assert_array_equal(Embeddings.read(tmp_path / "a.npz").embedding, table.embedding[:1])


def test_stores_that_do_not_suit(
    store: Store, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_store(tmp_path / "other", [1, 2], size=(8, 12, 16))
    rest = ["--model", model_folder, "--out", tmp_path / "e.npz"]
    for inputs, message in [
        ([other.path], "study s000 has a scan of (8, 12, 16) voxels, not a whole number of the model's patches"),
        ([store.path, tmp_path], "is a store: give it alone"),
        ([store.path, "--workers", -1], "--workers: expected 0 or more"),
    ]:
        assert run("embed", *inputs, *rest) == 2
        assert message in capsys.readouterr().err
    (other.path / "store.json").unlink()
    assert run("embed", other.path, *rest) == 2
    assert "not finished" in capsys.readouterr().err


def test_an_embedding_that_is_not_finite_is_left_out(store: Store, tiny_model: hlip.HLIPModel) -> None:
    class Broken(hlip.HLIPModel):
        def encode_image(self, batch: object) -> torch.Tensor:
            embeddings = super().encode_image(batch)
            embeddings[-1] = float("nan")
            return embeddings

    model = Broken(tiny_model.config)
    table = embed(model.eval(), StoreStudies(store, PATCH), Options(max_tokens=48))
    lost = [uid for uid, _ in table.facts["failed"]]
    assert 0 < len(lost) < len(store)
    assert sorted([*table.study.tolist(), *lost]) == store.uids.tolist()
    assert "the study is not finite" in table.facts["failed"][0][1]


def test_parts_of_another_job_or_run_are_refused(
    store: Store, tiny_model: hlip.HLIPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, studies = tmp_path / "e.npz", StoreStudies(store, PATCH)
    encode, calls = hlip.HLIPModel.encode_image, []

    def interrupt(model: hlip.HLIPModel, batch: object) -> torch.Tensor:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(batch)
        return encode(model, batch)

    monkeypatch.setattr(hlip.HLIPModel, "encode_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        embed(tiny_model, studies, Options(max_tokens=32), out)
    monkeypatch.undo()
    parts = parts_of(out)
    assert sorted(path.name for path in parts.glob("*.npz")) == ["000000.npz", "000001.npz"]
    with pytest.raises(ValueError, match=r"e.npz.parts holds parts of another job \(max_tokens differs\)"):
        embed(tiny_model, studies, Options(max_tokens=40), out)
    with pytest.raises(ValueError, match=r"another job \(model differs\)"):
        embed(hlip.HLIPModel(tiny_model.config).eval(), studies, Options(max_tokens=32), out)
    with (parts / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is at work"):
            embed(tiny_model, studies, Options(max_tokens=32), out)
    assert len(list(parts.glob("*.npz"))) == 2
    whole = embed(tiny_model, studies, Options(max_tokens=32), out)
    np.testing.assert_array_equal(whole.embedding, embed(tiny_model, studies, Options(max_tokens=32)).embedding)
    assert not parts.exists()
    monkeypatch.setattr(hlip.HLIPModel, "encode_image", None)  # what is finished is not done again
    np.testing.assert_array_equal(embed(tiny_model, studies, Options(max_tokens=32), out).embedding, whole.embedding)


def test_digests_tell_models_and_files_apart(
    tiny_model: hlip.HLIPModel, nifti_study: list[Path], model_folder: Path
) -> None:
    assert model_digest(tiny_model) == model_digest(hlip.HLIPModel.from_pretrained(model_folder))
    with torch.no_grad():
        bias = tiny_model.visual.trunk.blocks[0].attn.proj.bias
        bias[0] += 1
        changed = model_digest(tiny_model)
        bias[0] -= 1
    assert changed != model_digest(tiny_model)
    recipe = tiny_model.config.preprocess
    before = FileStudies([nifti_study], recipe).digest()
    assert before == FileStudies([nifti_study], recipe).digest()
    os.utime(nifti_study[0], (1, 1))
    assert before != FileStudies([nifti_study], recipe).digest()


def test_a_killed_job_goes_on(
    tiny_model: hlip.HLIPModel, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store = make_store(tmp_path / "store", [2] * 250)
    out = tmp_path / "e.npz"
    args = ["embed", store.path, "--model", model_folder, "--out", out, "--max_tokens", 16, "--workers", 0]
    job = subprocess.Popen(
        [sys.executable, "-m", "hlip.cli", *map(str, args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while job.poll() is None and len(list(parts_of(out).glob("[0-9]*.npz"))) < 5:
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert not out.exists()
    there = len(list(parts_of(out).glob("[0-9]*.npz")))
    assert 5 <= there < 250
    encoded = []
    encode = hlip.HLIPModel.encode_image
    monkeypatch.setattr(
        hlip.HLIPModel, "encode_image", lambda model, batch: (encoded.append(1), encode(model, batch))[1]
    )
    assert run(*args) == 0
    assert f"going on: {there} of 250 studies are there" in capsys.readouterr().err
    assert len(encoded) == 250 - there
    expected = embed(tiny_model, StoreStudies(store, PATCH), Options(max_tokens=16))
    table = Embeddings.read(out)
    assert table.study.tolist() == store.uids.tolist()
    np.testing.assert_array_equal(table.embedding, expected.embedding)
    assert not parts_of(out).exists()


def test_a_study_of_one_slice_of_patches(tiny_model: hlip.HLIPModel, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [1, 2], size=(4, 16, 16))
    table = embed(tiny_model, StoreStudies(store, PATCH), Options(dtype="fp32"))
    with torch.no_grad():
        alone = tiny_model.encode_image(hlip.pack([random_study([(4, 16, 16)], 0)], PATCH))
    np.testing.assert_allclose(table.embedding[:1], alone.numpy(), rtol=1e-4, atol=1e-5)


def test_names_that_are_no_unicode(nifti_study: list[Path], model_folder: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/study\xff"))
    folder.mkdir()
    (folder / os.fsdecode(b"t1\xff.nii.gz")).write_bytes(nifti_study[0].read_bytes())
    out = tmp_path / "e.npz"
    for more in ([], ["--one_scan", 0]):
        assert run("embed", folder, "--model", model_folder, "--out", out, "--workers", 0, *more) == 0
        assert Embeddings.read(out).study.tolist() == ["study\\udcff"]
        out.unlink()


def test_names_of_studies_are_those_of_their_folders() -> None:
    assert study_names([Path("a/one"), Path("/b/two/")]) == ["one", "two"]
    assert study_names([[Path("a/t2.nii"), Path("a/t1.nii")], [Path("b/t1.nii")]]) == ["a", "t1.nii"]
    assert study_names([[Path("a/t2.nii"), Path("b/t1.nii")]]) == ["t2.nii"]
    assert study_names([Path("a/one"), Path("b/one")]) == ["a/one", "b/one"]


def test_scans_that_are_left_out_are_told(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that cannot be read, and those of a list that are not read at all."""
    folder, cut = nifti_study[0].parent, nifti_study[0].parent / "cut.nii.gz"
    cut.write_bytes(nifti_study[0].read_bytes()[:500])
    rest = ["--model", model_folder, "--workers", 0, "--dtype", "fp32", "--out"]
    for out in (tmp_path / "e.npz", tmp_path / "e.parquet"):
        assert run("embed", folder, *rest, out) == 3
        assert [entry[:3] for entry in Embeddings.read(out).facts["left_out"]] == [
            [folder.name, "cut.nii.gz", "unreadable"]
        ]
        assert Embeddings.read(out).facts["failed"] == []
        assert f"left out {folder.name}, scan cut.nii.gz: unreadable: " in capsys.readouterr().err
    scans = [path.name for path in nifti_study]
    (folder / "again.nii.gz").write_bytes(nifti_study[0].read_bytes())
    (folder / "list.json").write_text(json.dumps({"A": {"scans": [*scans, "none.nii.gz", "again.nii.gz"]}}))
    assert run("embed", folder / "list.json", *rest, tmp_path / "l.npz") == 3
    lost = Embeddings.read(tmp_path / "l.npz").facts["left_out"]
    assert sorted(entry[2] for entry in lost) == ["duplicate", "missing"]
    assert all(entry[0] == "A" for entry in lost)
