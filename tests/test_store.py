"""The store: what goes in comes out, from one process or many; damage is named."""

from __future__ import annotations

import functools
import json
import multiprocessing
import pickle
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from commands import run as command
from hlip.read.scan import Rejection, ScanError
from hlip.store.format import INFO, read_rejections, read_shard, shard_file, write_shard
from hlip.store.store import Store, StudyDataset
from hlip.store.tools import cut, finish, merge, select, split_at_random, stats, verify
from hlip.study import PreparedScan, StudyRecord, pack

pytest.importorskip("pyarrow")
RECIPE = {"kind": "random", "size": [8, 16, 16]}


def make_study(i: int, num_scans: int) -> StudyRecord[PreparedScan]:
    rng = np.random.default_rng(i)
    scans = []
    for m in range(num_scans):
        image = torch.from_numpy(rng.integers(0, 256, (4 + 4 * (m % 2), 8, 8 * (1 + i % 3)), dtype=np.uint8))
        plane = ("axial", "coronal", "sagittal")[m % 3]
        scans.append(PreparedScan(f"scan{m}", image, (5.0, 0.5 + m, 0.25), plane, 20 + m, "MR", f"T{m} ä\n"))
    labels = {"stroke": float(i % 2), f"only{i}": 0.5} if i % 3 else {}
    rejected = [Rejection(f"s{i:03d}", "x", "few-slices", "3 slices")] if i % 4 == 0 else []
    return StudyRecord(f"s{i:03d}", scans, f'Impression "{i}" – é.', "", labels, rejected)


def make_store(
    path: Path, studies: list[StudyRecord[PreparedScan]], per_shard: int = 3, recipe_hash: str = "abc"
) -> Path:
    for folder in ("shards", "work"):
        (path / folder).mkdir(parents=True)
    for k, first in enumerate(range(0, len(studies), per_shard)):
        part = studies[first : first + per_shard]
        write_shard(shard_file(path, k), part, RECIPE, recipe_hash, path / "work")
    finish(path, path / "work", source_hash=str(path.name), shard_scans=6, hidden_ids=False)
    (path / "work").rmdir()
    return path


STUDIES = [make_study(i, 1 + i % 5) for i in range(10)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "store", STUDIES)


@pytest.fixture
def damaged(path: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(path, tmp_path / "copy"))


def check_studies(store: Store, studies: list[StudyRecord[PreparedScan]]) -> None:
    assert store.uids.tolist() == [study.uid for study in studies]
    assert store.num_scans.tolist() == [len(study.scans) for study in studies]
    for i, expected in enumerate(studies):
        study = store.study(i)
        assert (study.uid, study.impression, study.findings) == (
            expected.uid,
            expected.impression,
            expected.findings,
        )
        assert study.names == [scan.name for scan in expected.scans]
        for m, scan in enumerate(expected.scans):
            row = store.first[i] + m
            assert torch.equal(study.scans[m], scan.image)
            assert store.shapes[row].tolist() == list(scan.image.shape)
            assert store.spacing[row].tolist() == list(scan.spacing)
            assert store.manifest.column("description")[i][m].as_py() == scan.description
            assert store.manifest.column("plane")[i][m].as_py() == scan.plane


def test_what_goes_in_comes_out(path: Path) -> None:
    store = Store(path)
    check_studies(store, STUDIES)
    names, table = store.labels
    assert names == sorted({name for study in STUDIES for name in study.labels})
    for row, study in zip(table, STUDIES, strict=True):
        assert {name: value for name, value in zip(names, row, strict=True) if not np.isnan(value)} == study.labels
    assert store.info["recipe"] == RECIPE
    assert store.indices(["s007", "s002"]).tolist() == [7, 2]
    some = store.study(4, [3, 0])
    assert some.names == ["scan3", "scan0"] and torch.equal(some.scans[0], STUDIES[4].scans[3].image)


def test_a_shard_is_read_by_hand(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path / "shards" / "00001.safetensors", "pt") as shard:
        study = json.loads(shard.metadata()["hlip"])["studies"][2]
        scan = shard.get_tensor("000002/000")
    assert (study["uid"], study["scans"][0]["name"]) == ("s005", "scan0")
    assert torch.equal(scan, STUDIES[5].scans[0].image)


@pytest.mark.parametrize("counts", [[], [1], [2, 1002, 3]], ids=["none", "one", "many"])
def test_a_shard_has_the_bytes_that_safetensors_writes(counts: list[int], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    studies = [make_study(i, count) for i, count in enumerate(counts)]
    path = tmp_path / "00000.safetensors"
    write_shard(path, studies, RECIPE, "abc", tmp_path)
    content = path.read_bytes()
    with safe_open(path, "np") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        save_file(tensors, tmp_path / "theirs", shard.metadata())
    assert content == (tmp_path / "theirs").read_bytes()
    for s, study in enumerate(studies):
        for m, scan in enumerate(study.scans):
            assert np.array_equal(tensors[f"{s:06d}/{m:03d}"], scan.image.numpy())
    assert len(list(tmp_path.iterdir())) == 2


def test_whoever_may_read_the_manifest_may_read_the_shards(path: Path) -> None:
    assert shard_file(path, 0).stat().st_mode == (path / "manifest.arrow").stat().st_mode


def test_pandas_reads_the_manifest(path: Path) -> None:
    table = pytest.importorskip("pandas").read_feather(path / "manifest.arrow")
    assert table["uid"].tolist() == [study.uid for study in STUDIES]
    assert [list(shape) for shape in table["shape"][4]] == [list(scan.image.shape) for scan in STUDIES[4].scans]


def test_scans_of_a_study_lie_side_by_side(path: Path) -> None:
    shard = read_shard(shard_file(path, 1))
    end = None
    for study in shard.studies:
        for scan in study["scans"]:
            assert end is None or scan["offset"] == end
            end = scan["offset"] + int(np.prod(scan["shape"]))
    assert end == shard_file(path, 1).stat().st_size


def test_scans_are_not_copied_and_writing_leaves_the_file(path: Path) -> None:
    store = Store(path)
    before = shard_file(path, 1).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan, again, other = store.scan(4, 2), store.scan(4, 2), store.scan(4, 3)
    assert scan.data_ptr() == again.data_ptr()
    assert other.data_ptr() - scan.data_ptr() == scan.numel()  # neighbours in the file, neighbours in memory
    assert scan.untyped_storage().nbytes() == scan.numel()  # so that sending it to a process sends nothing else
    bounds = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "00001.s" in line
    ]
    assert any(int(first, 16) <= scan.data_ptr() < int(last, 16) for first, last in bounds)
    scan.zero_()
    assert shard_file(path, 1).read_bytes() == before
    assert torch.equal(Store(path).scan(4, 2), STUDIES[4].scans[2].image)


def test_open_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hlip.store.store.OPEN_SHARDS", 4)
    store = Store(make_store(tmp_path / "many", [make_study(i, 1) for i in range(12)], per_shard=1))
    held = store.scan(0, 0)
    for i in range(12):
        store.scan(i, 0)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "many/shards" in line}) <= 4 + 1  # and the one that is held
    assert torch.equal(held, make_study(0, 1).scans[0].image)


def total(store: Store, i: int) -> int:
    return sum(int(scan.sum()) for scan in store.study(i).scans)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes_read(path: Path, method: str) -> None:
    store = Store(path)
    expected = [total(store, i) for i in range(len(store))]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        assert list(pool.map(functools.partial(total, store), range(len(store)))) == expected


def test_pickling_sends_the_path_only(path: Path) -> None:
    content = pickle.dumps(Store(path))
    assert len(content) < 1000
    check_studies(pickle.loads(content), STUDIES)


def test_an_unfinished_store_opens_from_its_shards(damaged: Path) -> None:
    for name in ("manifest.arrow", "store.json"):
        (damaged / name).unlink()
    check_studies(Store(damaged), STUDIES)
    shard_file(damaged, 1).unlink()
    check_studies(Store(damaged), STUDIES[:3] + STUDIES[6:])
    assert not Store(damaged).info
    for file in (damaged / "shards").iterdir():
        file.unlink()
    assert len(Store(damaged)) == 0 and Store(damaged).labels[1].shape == (0, 0)


def test_no_store(tmp_path: Path) -> None:
    for name in ("", "none"):
        with pytest.raises(ValueError, match="not a store"):
            Store(tmp_path / name)


@pytest.mark.parametrize("file", ["manifest.arrow", "store.json", "shards/00001.safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"x" * len(raw)], ids=["cut", "none", "x"]
)
def test_damage_is_named(damaged: Path, file: str, damage) -> None:
    (damaged / file).write_bytes(damage((damaged / file).read_bytes()))
    if "shards" in file:
        assert any(file in problem for problem in verify(damaged))
    else:
        with pytest.raises(ScanError, match=file):
            Store(damaged)


def test_a_shard_that_was_cut_or_lost_is_named_when_it_is_read(damaged: Path) -> None:
    store = Store(damaged)
    shard_file(damaged, 1).write_bytes(shard_file(damaged, 1).read_bytes()[:-100])
    with pytest.raises(ScanError, match=r"00001.safetensors: cut short"):
        store.study(5)
    shard_file(damaged, 2).unlink()
    with pytest.raises(ScanError, match=r"00002.safetensors: cannot be mapped"):
        store.study(6)
    assert total(store, 0) > 0
    for i, m in ((-1, 0), (10, 0), (0, 1), (0, -1)):
        with pytest.raises(IndexError):
            store.scan(i, m)


def test_another_format_is_refused(damaged: Path) -> None:
    info = json.loads((damaged / "store.json").read_text())
    (damaged / "store.json").write_text(json.dumps({**info, "format": 99}))
    with pytest.raises(ValueError, match="format 99; this version reads format 1: update hlip-kernels"):
        Store(damaged)


@pytest.mark.parametrize("key", INFO)
def test_a_store_that_lacks_a_fact_is_named(damaged: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = damaged / "store.json"
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))
    with pytest.raises(ScanError, match=rf"store\.json: .*lacks {key}\b"):
        Store(damaged)
    assert command("store", "info", damaged) == 2
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize("target", ["store.json", "nowhere"])
def test_a_link_without_an_end_is_no_unfinished_store(damaged: Path, target: str) -> None:
    for name in ("store.json", "shards/found.jsonl"):
        (damaged / name).unlink(missing_ok=True)
    (damaged / "store.json").symlink_to(target)
    with pytest.raises(ScanError, match=r"store\.json: damaged"):
        Store(damaged)
    (damaged / "shards" / "found.jsonl").symlink_to(target.replace("store.json", "found.jsonl"))
    with pytest.raises(ScanError, match=r"found\.jsonl: damaged"):
        read_rejections(damaged / "shards" / "found.jsonl", damaged)


def test_verify_finds_a_flipped_bit_a_lost_shard_and_a_wrong_manifest(damaged: Path, path: Path) -> None:
    assert verify(path) == []
    good = shard_file(damaged, 1).read_bytes()
    shard_file(damaged, 1).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert verify(damaged) == [f"{shard_file(damaged, 1)}: scan 0 of s005 is damaged (its checksum differs)"]
    shard_file(damaged, 1).write_bytes(good.replace(b"s004", b"s00X"))
    # A rejection of that study is in the header too.
    assert set(verify(damaged)) == {
        f"{damaged / file}: does not say what the shards say" for file in ("manifest.arrow", "rejected.jsonl")
    }
    shard_file(damaged, 1).unlink()
    assert verify(damaged) == [f"{shard_file(damaged, 1)}: missing"]


def test_the_manifest_follows_from_the_shards(damaged: Path) -> None:
    names = ("manifest.arrow", "store.json", "rejected.jsonl", "report.json")
    before = {name: (damaged / name).read_bytes() for name in names}
    for name in names:
        (damaged / name).unlink()
    (damaged / "work").mkdir()
    finish(damaged, damaged / "work", source_hash="store", shard_scans=6, hidden_ids=False)
    assert {name: (damaged / name).read_bytes() for name in names} == before
    assert list((damaged / "work").iterdir()) == []


def test_merge_and_split(path: Path, tmp_path: Path) -> None:
    store = Store(path)
    parts = split_at_random(store, [0.7, 0.3], seed=1)
    assert sorted(parts[0] + parts[1]) == list(range(10)) and len(parts[0]) == 7
    assert parts == split_at_random(store, [0.7, 0.3], seed=1) != split_at_random(store, [0.7, 0.3], seed=2)
    for name, part in zip("ab", parts, strict=True):
        select(store, part, tmp_path / name)
        assert verify(tmp_path / name) == []
        check_studies(Store(tmp_path / name), [STUDIES[i] for i in part])
    rejected = (tmp_path / "a" / "rejected.jsonl").read_text() + (tmp_path / "b" / "rejected.jsonl").read_text()
    assert sorted(rejected.splitlines()) == (path / "rejected.jsonl").read_text().splitlines()
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert verify(tmp_path / "c") == []
    check_studies(Store(tmp_path / "c"), [STUDIES[i] for i in parts[0] + parts[1]])
    assert shard_file(tmp_path / "c", 0).samefile(shard_file(tmp_path / "a", 0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    again = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "d")
    assert again.studies == 10
    assert (tmp_path / "c" / "manifest.arrow").read_bytes() == (tmp_path / "d" / "manifest.arrow").read_bytes()


def test_merge_and_split_refuse(path: Path, damaged: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", [make_study(20, 1)], recipe_hash="xyz")
    with pytest.raises(ValueError, match=r"other: its recipe_hash is xyz"):
        merge([path, other], tmp_path / "c")
    with pytest.raises(ValueError, match=r"copy: study s000 is in .*store too"):
        merge([path, damaged], tmp_path / "c")
    with pytest.raises(ValueError, match="other: exists already"):
        merge([path], other)
    with pytest.raises(ValueError, match="add up to 1"):
        split_at_random(Store(path), [0.5, 0.4], seed=0)
    with pytest.raises(ValueError, match="holds no study s999"):
        Store(path).indices(["s999"])
    (damaged / "store.json").unlink()
    with pytest.raises(ValueError, match="copy: the store is not finished"):
        merge([damaged], tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "other"]


def test_stats(path: Path, tmp_path: Path) -> None:
    found = stats(Store(path))
    scans = [len(study.scans) for study in STUDIES]
    slices = [scan.slices for study in STUDIES for scan in study.scans]
    assert found["scans_per_study"]["mean"] == np.mean(scans) and found["scans_per_study"]["max"] == 5
    assert found["scans_per_study"]["counts"] == {str(n): scans.count(n) for n in range(1, 6)}
    assert found["slices_per_scan"]["counts"] == {str(n): slices.count(n) for n in set(slices)}
    assert sum(found["planes"].values()) == found["scans"] == sum(scans)


def test_store_commands(path: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: object) -> int:
        return command("store", *args)

    assert run("info", path) == 0
    assert "10 studies, 30 scans" in capsys.readouterr().out
    assert run("verify", path) == 0
    (tmp_path / "uids.txt").write_text("s003\ns001\n")
    assert run("split", path, "--list", tmp_path / "uids.txt", "--out", tmp_path / "a", tmp_path / "b") == 0
    assert Store(tmp_path / "a").uids.tolist() == ["s001", "s003"] and len(Store(tmp_path / "b")) == 8
    assert run("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c") == 0
    assert run("split", path, "--fractions", 0.5, 0.5, "--out", tmp_path / "d") == 2
    assert run("stats", path, "--out", tmp_path / "s.png") == 0
    assert json.loads((tmp_path / "s.json").read_text())["studies"] == 10
    shard_file(damaged, 0).unlink()
    capsys.readouterr()
    assert run("verify", damaged) == 1
    assert "00000.safetensors: missing" in capsys.readouterr().out
    assert run("info", tmp_path) == 2
    assert "not a store" in capsys.readouterr().err


def test_dataset_draws_scans_without_replacement(path: Path) -> None:
    data = StudyDataset(path, max_scans=2)
    assert len(data) == 10
    assert data[4].names == ["scan0", "scan1"]
    drawn = [data[4, seed].names for seed in range(50)]
    assert drawn == [data[4, seed].names for seed in range(50)]
    assert all(names == sorted(set(names)) and len(names) == 2 for names in drawn)
    assert {name for names in drawn for name in names} == {f"scan{m}" for m in range(5)}
    assert data[0, 7].names == ["scan0"]
    assert StudyDataset(path)[4, 3].names == [f"scan{m}" for m in range(5)]
    for index in (10, -1):
        with pytest.raises(IndexError):
            data[index]
    with pytest.raises(ValueError, match="max_scans"):
        StudyDataset(path, 0)


def test_dataset_reads_only_the_scans_that_were_drawn(damaged: Path) -> None:
    data = StudyDataset(damaged, max_scans=2)
    raw = shard_file(damaged, 1).read_bytes()  # studies 3, 4, 5; what follows study 4's first two scans is cut off
    offset = read_shard(shard_file(damaged, 1)).studies[1]["scans"][2]["offset"]
    shard_file(damaged, 1).write_bytes(raw[:offset])
    assert len(data[4].scans) == 2
    with pytest.raises(ScanError, match="cut short"):
        data.store.study(4)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_pack(path: Path, method: str) -> None:
    items = [(i, i) for i in range(10)]
    collate = functools.partial(pack, patch_size=(4, 8, 8))
    batches = list(
        DataLoader(
            StudyDataset(path, 3),
            batch_size=4,
            sampler=items,
            num_workers=2,
            collate_fn=collate,
            multiprocessing_context=method,
        )
    )
    data = StudyDataset(path, 3)
    for k, batch in enumerate(batches):
        expected = collate([data[item] for item in items[4 * k : 4 * k + 4]])
        assert torch.equal(batch.patches, expected.patches) and batch.uids == expected.uids
        assert batch.impressions == expected.impressions


def test_cut_closes_before_too_much() -> None:
    assert list(cut([3, 1, 2, 9, 1, 1], lambda n: n, 4)) == [[3, 1], [2], [9], [1, 1]]
    assert list(cut([], lambda n: n, 4)) == []


def test_a_large_store_opens_from_its_manifest_alone(tmp_path: Path) -> None:
    """5,000 studies; bench/store.py does 250,000."""
    rng = np.random.default_rng(0)
    image = torch.arange(32, dtype=torch.uint8).reshape(2, 4, 4)
    studies = [
        StudyRecord(f"u{i:06d}", [PreparedScan("s", image + i % 200, (1, 1, 1), "axial", 5)] * rng.integers(1, 20))
        for i in range(5000)
    ]
    path = make_store(tmp_path / "large", studies, per_shard=500)
    store = Store(path)
    assert len(store) == 5000 and store._map.cache_info().currsize == 0
    for i in rng.integers(0, 5000, 200).tolist():
        study = store.study(i, [len(studies[i].scans) - 1])
        assert study.uid == f"u{i:06d}" and torch.equal(study.scans[0], image + i % 200)
