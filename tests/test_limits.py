"""Small files that ask for much: memory, time, or an end that never comes. Each is refused, by name, at once."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nibabel")
pytest.importorskip("pydicom")
pytest.importorskip("pyarrow")

import hostile_files as bad
from hlip.prepare.reports import read_reports
from hlip.read import safe, tensors
from hlip.store.store import Store
from limits_cases import READERS, at_most
from test_store import STUDIES, make_store


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_what_has_no_end_is_not_read(name: str, kind: str, tmp_path: Path) -> None:
    """A pipe that nobody writes to, and a link to endless zeros."""
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=path.name if path.name != "log.jsonl" else str(tmp_path)):
        READERS[name](path)


@pytest.mark.parametrize("name", ["store.json", "manifest.arrow", "shards/00000.safetensors", "rejected.jsonl"])
def test_a_store_of_pipes(name: str, tmp_path: Path) -> None:
    from hlip.store.tools import verify

    store = make_store(tmp_path / "store", STUDIES[:2])
    (store / name).unlink()
    os.mkfifo(store / name)
    try:
        problems = [*verify(store), str(Store(store).study(0))]
    except ValueError as error:
        problems = [str(error)]
    assert any(name in problem for problem in problems)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith((".json", ".yaml"))])
def test_nesting_has_an_end(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{name}.*nested too deeply"):
        READERS[name](tmp_path / name)


LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{k}: &a{k} [{f'*a{k - 1}, ' * 9}]" for k in range(1, 30))])


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".yaml")])
def test_values_that_repeat_themselves(name: str, tmp_path: Path) -> None:
    """Thirty lines that stand for 10**28 words, which an error's text alone would write out."""
    (tmp_path / name).write_text(f"classes:\n  {LAUGHS.replace(chr(10), chr(10) + '  ')}\n")
    with pytest.raises(ValueError, match=f"{name}.*a reference to another value"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".yaml")])
def test_a_task_of_ten_million_classes(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"classes:\n" + b"  a: x\n" * 10**5)
    with pytest.raises(ValueError, match=f"{name}.*more than {safe.MOST_YAML} bytes"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["table.csv", "labels.csv", "uids.txt", "reports/1.txt"])
def test_a_line_of_a_gigabyte(name: str, tmp_path: Path) -> None:
    """A file that is a gigabyte of zeros to whoever reads it, and no byte on disk."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, 2**30)
    with pytest.raises(ValueError, match=f"{path.name}.* (more than {safe.MOST_TEXT}|with a hole)"), at_most(2**29):
        READERS.get(name, read_reports)(path if name in READERS else path.parent)


def zipped(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("name", ["a.npz", "probe.npz"])
def test_arrays_that_inflate(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    np.savez_compressed(path, **{key: np.zeros(2**24, np.uint8) for key in ("study", "scan", "classes", "embedding")})
    assert path.stat().st_size < 2**18
    with pytest.raises(ValueError, match=f"{name}.*inflates to more than 100 times"):
        READERS[name](path)


@pytest.mark.parametrize("name", ["scan.pt", "weights.pt"])
def test_tensors_that_inflate(name: str, tmp_path: Path) -> None:
    torch.save(torch.zeros(2**10), tmp_path / "safe.pt")
    with zipfile.ZipFile(tmp_path / "safe.pt") as archive:
        zipped(tmp_path / name, {each: archive.read(each) for each in archive.namelist()})
    with pytest.raises(ValueError, match=f"{name}.*compressed within"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["scan.pt", "weights.pt"])
def test_one_number_that_poses_as_many(name: str, tmp_path: Path) -> None:
    stretched = torch.ones(1).expand(2**10, 2**10, 2**10)
    torch.save(stretched if name == "scan.pt" else {"a": stretched}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*larger than its data"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("name", bad.PICKLES)
def test_pickles_that_ask_for_much(name: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch would do for them takes gigabytes or hours: it is not asked."""
    path, asked = tmp_path / "a.pt", list[object]()
    bad.write_pickle(path, bad.PICKLES[name], old=old)
    with at_most(2**29), monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *given, **_: asked.append(given))
        with pytest.raises(ValueError):
            tensors.load_tensors(path)
    assert asked == []


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "scan.pt"])
def test_readers_name_the_pickle_that_asks_for_much(name: str, old: bool, tmp_path: Path) -> None:
    bad.write_pickle(tmp_path / name, bad.PICKLES["bytearray of a number"], old=old)
    with pytest.raises(ValueError, match=rf"{name}: .* more than weights, builtins\.bytearray"), at_most(2**29):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_what_training_saves_is_read(old: bool, tmp_path: Path) -> None:
    """All that a checkpoint may hold comes back as it was."""
    layer, path = torch.nn.Linear(3, 3), tmp_path / "a.pt"
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tied = torch.arange(6.0).reshape(2, 3)
    saved = {
        "step": 1, "large": 2**70, "rate": 0.5, "none": None, "yes": True, "no": False, "pair": (1, (2, "b")),
        "part": tied[1:], "list": [1, [], {}], "shape": tied.shape, "dtype": torch.bfloat16, 7: "seven",
        "state_dict": layer.state_dict(),
        "optimizer": optimizer.state_dict(), "parameter": layer.weight, "tied": tied, "turned": tied.T,
        "half": tied.half(), "eight": tied.to(torch.float8_e4m3fn) if not old else 8, "empty": torch.empty(0, 5),
        "counts": Counter({3: 1}), "set": {1, 2.5, "c"}, "bytes": b"ab\xff", "device": torch.device("cuda:1"),
        "whole": tied.to(torch.complex64), "flag": tied > 2, "one": torch.tensor(3, dtype=torch.uint8),
    }  # fmt: skip
    torch.save(saved, path, _use_new_zipfile_serialization=not old)
    read = tensors.load_tensors(path)
    assert repr(read) == repr(saved)
    assert read["state_dict"]._metadata == layer.state_dict()._metadata
