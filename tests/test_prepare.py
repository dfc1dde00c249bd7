"""Preparing a store: the same bytes however it is done, and whatever ends it on the way."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY_RECIPE
from hlip.prepare.discover import Found
from hlip.prepare.job import _for_the_store, prepare, prepare_study
from hlip.prepare.plan import hash_ids
from hlip.read.scan import Rejection, ScanError, ScanSource
from hlip.store.format import shard_files, write_shard
from hlip.store.store import Store
from hlip.store.tools import merge, verify
from hlip.study import PreparedScan, Study, StudyRecord
from store_recipe import EverySlice, digests, write_studies

pytest.importorskip("nibabel")
pytest.importorskip("pyarrow")
TESTS = Path(__file__).parent
SCRIPT = """
import sys
from pathlib import Path
from hlip.prepare.job import prepare
from store_recipe import EverySlice, write_studies
root, out, workers = sys.argv[1:]
prepare(write_studies(Path(root)), EverySlice(slow=".nii"), out, workers=int(workers), shard_scans=2)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("input")


@pytest.fixture(scope="module")
def found(root: Path) -> Found:
    return write_studies(root)


@pytest.fixture(scope="module")
def store(found: Found, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an unbroken run with one worker makes."""
    path = tmp_path_factory.mktemp("stores") / "store"
    prepare(found, EverySlice(slow=".nii"), path, shard_scans=2)
    return path


def start(root: Path, out: Path, workers: int) -> subprocess.Popen:
    """A run of its own process group, as a user would start it. It writes the same input again: the same bytes."""
    arguments = [sys.executable, "-c", SCRIPT, root, out, workers]
    env = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, arguments)), env=env, start_new_session=True, stderr=subprocess.PIPE)


def wait_for_workers(process: subprocess.Popen) -> None:
    while process.poll() is None and not children(process.pid):
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Worker processes: of the children, those that multiprocessing spawned."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_store_holds_what_the_recipe_makes(found: Found, store: Path) -> None:
    assert verify(store) == []
    assert sorted(path.name for path in store.iterdir()) == [
        "manifest.arrow",
        "rejected.jsonl",
        "report.json",
        "shards",
        "store.json",
    ]
    opened = Store(store)
    assert opened.uids.tolist() == [study.uid for study in found.studies]
    for i, source in enumerate(found.studies):
        study: Study = opened.study(i)
        assert (study.impression, study.findings) == (source.impression, source.findings)
        expected = {}
        for scan in source.scans:
            try:
                expected[scan.name] = EverySlice().prepare(scan)[0].image
            except ScanError:
                continue
        assert study.names == list(expected)
        assert all(map(torch.equal, study.scans, expected.values()))
    assert opened.labels[0] == ["stroke"]
    assert [json.loads(line) for line in (store / "rejected.jsonl").read_text().splitlines()] == [
        {
            "study": "study01",
            "scan": "1.nii.gz",
            "rule": "unreadable",
            "reason": "not a readable NIfTI file (Error -3 while decompressing data: incorrect header check)",
        },
        {"study": "study02", "scan": "1.nii.gz", "rule": "few-slices", "reason": "4 slices in 1.nii.gz"},
    ]
    report = json.loads((store / "report.json").read_text())
    assert report == {"studies": 6, "scans": 10, "rejected": {"few-slices": 1, "unreadable": 1}}


def test_no_path_and_no_time_is_kept(root: Path, store: Path) -> None:
    for file in filter(Path.is_file, store.rglob("*")):
        assert str(root).encode() not in file.read_bytes()
        assert str(store).encode() not in file.read_bytes()


def test_workers_and_order_do_not_matter(found: Found, store: Path, tmp_path: Path) -> None:
    shuffled = [replace(study, scans=study.scans[::-1]) for study in found.studies[::-1]]
    prepare(Found(shuffled, []), EverySlice(slow=".nii"), tmp_path / "two", workers=2, shard_scans=2)
    assert digests(tmp_path / "two") == digests(store)


def test_a_copy_of_the_input_makes_the_same_store(store: Path, tmp_path: Path) -> None:
    prepare(write_studies(tmp_path / "elsewhere"), EverySlice(slow=".nii"), tmp_path / "out", shard_scans=2)
    assert digests(tmp_path / "out") == digests(store)


def test_a_finished_store_is_not_touched(found: Found, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [store, *store.rglob("*")]}
    report = prepare(found, EverySlice(slow=".nii"), store, workers=2, shard_scans=2)
    assert (report.studies, report.scans) == (6, 10)
    assert {path: path.stat().st_mtime_ns for path in [store, *store.rglob("*")]} == before


def test_a_store_on_other_terms_is_refused(found: Found, store: Path, tmp_path: Path) -> None:
    before = digests(store)
    fewer = Found(found.studies[:-1], [])
    other_report = Found([replace(found.studies[0], impression="Other."), *found.studies[1:]], [])
    with pytest.raises(ValueError, match="store: was begun with another recipe"):
        prepare(found, EverySlice(step=2), store, shard_scans=2)
    for other in (fewer, other_report, Found(found.studies, [Rejection("x", "", "r", "")])):
        with pytest.raises(ValueError, match="store: was begun from other studies, reports or labels"):
            prepare(other, EverySlice(), store, shard_scans=2)
    with pytest.raises(ValueError, match="store: was begun with another shard_scans"):
        prepare(found, EverySlice(), store)
    assert digests(store) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a store"):
        prepare(found, EverySlice(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="no study was found"):
        prepare(Found([], []), EverySlice(), tmp_path / "out")
    with pytest.raises(ValueError, match="two studies are named study00"):
        prepare(Found([found.studies[0]] * 2, []), EverySlice(), tmp_path / "out")


def test_a_changed_file_is_noticed(store: Path, tmp_path: Path) -> None:
    changed = write_studies(tmp_path)
    changed.studies[0].scans[0].files[0].write_bytes(b"another size")
    with pytest.raises(ValueError, match="from other studies"):
        prepare(changed, EverySlice(), store, shard_scans=2)


def run_in_a_session(root: Path, out: Path, workers: int) -> None:
    os.setsid()
    prepare(write_studies(root, 12), EverySlice(slow=".nii"), out, workers=workers, shard_scans=2)


@pytest.mark.slow
def test_killed_ten_times(tmp_path: Path) -> None:
    """SIGKILL of the whole run, of its leader or of a worker, with one worker and two; then an unbroken one.

    The leader is forked, which spares it the imports.
    """
    rng, root, out = random.Random(0), tmp_path / "input", tmp_path / "out"
    prepare(write_studies(root, 12), EverySlice(slow=".nii"), tmp_path / "unbroken", workers=2, shard_scans=2)
    finished: dict[Path, int] = {}
    while_writing = 0
    for k in range(10):
        arguments = (root, out, 2 if k % 4 == 1 else 1)
        leader = multiprocessing.get_context("fork").Process(target=run_in_a_session, args=arguments)
        leader.start()
        assert leader.pid is not None
        while k and leader.is_alive() and not children(leader.pid):  # the first is killed while it starts
            time.sleep(0.01)
        while k % 4 and leader.is_alive() and not list((out / "work").glob("*.tmp")):
            time.sleep(0.005)
        while k in (3, 7) and leader.is_alive() and len(shard_files(out)) <= len(finished):
            time.sleep(0.005)  # so that there is something to be left alone
        time.sleep(rng.uniform(0.0, 0.2))
        assert leader.is_alive(), "it was to be killed before its end"
        workers = children(leader.pid)
        while_writing += bool(list((out / "work").glob("*.tmp")))
        if k % 3 == 1 and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)  # it is replaced
            time.sleep(rng.uniform(0, 0.2))
        if k % 3 or os.getpgid(leader.pid) != leader.pid:
            leader.kill()
        else:
            os.killpg(leader.pid, signal.SIGKILL)
        leader.join()
        deadline = time.monotonic() + 10
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, workers)), "a worker outlives its leader"
        if (out / "shards").exists():
            Store(out)  # a partial store is valid
            for path, changed in finished.items():
                assert path.stat().st_mtime_ns == changed, f"{path} was finished, and is written again"
            finished = {path: path.stat().st_mtime_ns for _, path in shard_files(out)}
    assert while_writing >= 5 and finished
    prepare(write_studies(root, 12), EverySlice(slow=".nii"), out, workers=2, shard_scans=2)
    assert digests(out) == digests(tmp_path / "unbroken")


def test_interrupt_leaves_a_partial_store(root: Path, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(root, out, workers=2)
    while process.poll() is None and not any((out / "shards").glob("*.safetensors")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    error = process.communicate()[1].decode()
    assert process.returncode != 0 and error.count("Traceback") == 1 and error.rstrip().endswith("KeyboardInterrupt")
    assert not list((out / "work").glob("*.tmp"))
    partial = Store(out)
    assert 0 < len(partial) < 6 and not partial.info
    assert digests(out / "shards").items() <= digests(store / "shards").items()


def test_a_second_run_is_refused(root: Path, found: Found, tmp_path: Path) -> None:
    process = start(root, tmp_path / "out", workers=1)
    try:
        wait_for_workers(process)
        with pytest.raises(ValueError, match="out: another run is writing this store"):
            prepare(found, EverySlice(slow=".nii"), tmp_path / "out", shard_scans=2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_scan_that_ends_the_process_is_left_out(found: Found, tmp_path: Path) -> None:
    recipe = EverySlice(abort="2.nii")
    report = prepare(Found(found.studies[3:], []), recipe, tmp_path / "out", shard_scans=3)
    assert (report.studies, report.scans, report.rejected) == (3, 5, {"crash": 1})
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text()) == {
        "study": "study05",
        "scan": "2.nii.gz",
        "rule": "crash",
        "reason": "it ended the process 3 times (SIGABRT)",
    }


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow past 10 kB, as on a full disk; worker processes inherit it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(root: Path, found: Found, store: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match=r"no space left .* the finished shards stay") as raised:
        prepare(found, EverySlice(step=1), tmp_path / "out", shard_scans=1)
    assert raised.value.filename == str(tmp_path / "out")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not Store(tmp_path / "out").info
    prepare(found, EverySlice(step=1), tmp_path / "out", shard_scans=1)
    prepare(found, EverySlice(step=1), tmp_path / "fresh", shard_scans=1)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_a_disk_that_fills_while_a_shard_is_put_together(tmp_path: Path) -> None:
    study = StudyRecord("s", [PreparedScan("a", torch.zeros(5, 50, 50, dtype=torch.uint8), (1, 1, 1), "axial", 5)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 50 * 50, before[1]))  # room for the voxels, none for the header
    try:
        with pytest.raises(OSError) as raised:
            write_shard(tmp_path / "00000.safetensors", [study], {}, "", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_hidden_ids(found: Found, root: Path, tmp_path: Path) -> None:
    named = Found(found.studies, [Rejection("Jane Doe", "scout", "localiser", "Jane's scout")])
    prepare(named, EverySlice(), tmp_path / "out", salt="secret\n")
    for file in filter(Path.is_file, (tmp_path / "out").rglob("*")):
        for word in (b"study0", b".nii", b"series", b"Jane", b"secret", str(root).encode()):
            assert word not in file.read_bytes()
    store = Store(tmp_path / "out")
    assert len(store) == 6 and all(len(uid) == 32 for uid in store.uids)
    uids = {
        study.uid: hidden.uid for study, hidden in zip(found.studies, hash_ids(found, "secret").studies, strict=True)
    }
    study = store.study(int(store.indices([uids["study02"]])[0]))
    assert (study.impression, study.names) == ("Impression 2.", ["000", "002"])
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {"study": uids["study02"], "scan": "001", "rule": "few-slices", "reason": ""} in rejected
    assert len(rejected) == 3
    assert hash_ids(found, "other").studies[0].uid != hash_ids(found, "secret").studies[0].uid
    with pytest.raises(ValueError, match="salt"):
        hash_ids(found, " ")
    with pytest.raises(ValueError, match="ids hidden otherwise"):
        prepare(named, EverySlice(), tmp_path / "out", salt="another secret")
    prepare(named, EverySlice(), tmp_path / "again", salt="another secret")
    with pytest.raises(ValueError, match="its hidden_ids is"):
        merge([tmp_path / "out", tmp_path / "again"], tmp_path / "both")


def test_hidden_names_are_judged_before_they_are_hidden(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    scans = []
    for name, description in (("scout", ""), ("t1", ""), ("t2", "3-plane localizer")):
        array = np.random.default_rng(len(scans)).integers(0, 900, (9, 9, 9)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii")
        scans.append(ScanSource(name, "nifti", (tmp_path / f"{name}.nii",), description=description))
    report = prepare(Found([StudyRecord("s", tuple(scans))], []), TINY_RECIPE, tmp_path / "out", salt="secret")
    assert (report.scans, report.rejected) == (1, {"localiser": 2})
    assert Store(tmp_path / "out").study(0).names == ["001"]
    content = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "scout" not in content and "plane" not in content


def test_several_images_of_a_scan_are_told_apart(found: Found) -> None:
    study = prepare_study(found.studies[0], EverySlice(windows=("brain", "bone")))
    assert [scan.name for scan in study.scans] == ["0.nii.gz:brain", "0.nii.gz:bone"]


def test_a_study_without_usable_scans_is_rejected(found: Found, tmp_path: Path) -> None:
    missing = ScanSource("b\udcff", "nifti", (tmp_path / "none.nii",))
    studies = [StudyRecord("gone", (missing,)), StudyRecord("bare", ()), found.studies[0]]
    report = prepare(Found(studies, []), EverySlice(), tmp_path / "out")
    assert report.studies == 1 and report.rejected == {"no_scans": 2, "missing": 1}
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"study": "bare", "scan": "", "rule": "no_scans", "reason": "it has no scans"},
        {"study": "gone", "scan": "", "rule": "no_scans", "reason": "none of its 1 scans can be used"},
        {"study": "gone", "scan": "b\\udcff", "rule": "missing", "reason": "no such file"},
    ]
    assert verify(tmp_path / "out") == []
    nothing = prepare(Found(studies[:2], []), EverySlice(), tmp_path / "nothing")
    assert nothing.studies == 0 and len(Store(tmp_path / "nothing")) == 0 and verify(tmp_path / "nothing") == []


class Broken(EverySlice):
    def prepare(self, source: ScanSource) -> list:
        if "1.nii" in source.name:
            raise ImportError("install something")
        raise ZeroDivisionError(f"in {source.files[0]} of {object()}")


def test_unforeseen_errors_reject_the_scan_but_missing_libraries_end_the_job(found: Found, tmp_path: Path) -> None:
    study = prepare_study(found.studies[0], Broken())
    assert study.rejected[0].rule == "error"
    assert study.rejected[0].reason == "ZeroDivisionError: in 0.nii.gz of <object object at 0x...>"
    with pytest.raises(ImportError, match="install something"):
        prepare(found, Broken(), tmp_path / "out")


def test_a_million_rejections_before_there_are_studies(tmp_path: Path) -> None:
    """They are more than the header of a shard could hold."""
    found = write_studies(tmp_path / "in", 2)
    many = [
        Rejection(
            "",
            f"dose report {i:07d} of an examination of the head.dcm",
            "no_image",
            "Structured report: it holds no image",
        )
        for i in range(600_000)
    ]
    report = prepare(Found(found.studies, many), EverySlice(), tmp_path / "store")
    assert report.rejected["no_image"] == len(many)
    assert sum(1 for _ in (tmp_path / "store" / "rejected.jsonl").open()) == sum(report.rejected.values())
    assert verify(tmp_path / "store") == []
    assert max(file.stat().st_size for file in (tmp_path / "store" / "shards").glob("*.safetensors")) < 2**24


def test_addresses_in_memory_are_not_for_the_store() -> None:
    scan = ScanSource("a", "dicom", (Path("/data/in/a.dcm"),))
    assert _for_the_store("/data/in/a.dcm: GDCMImageIO(0x556f8da8a180): bad", scan) == "a.dcm: GDCMImageIO(0x...): bad"
