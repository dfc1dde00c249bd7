"""Archives and tensors that ask for much: memory, time, or other files. Each is refused, by name, at once."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nibabel")
pytest.importorskip("pydicom")
pytest.importorskip("pyarrow")

import hostile_files as bad
from hlip.model.clip import HLIPModel
from hlip.model.weights import read_weights
from hlip.prepare.discover import find_study
from hlip.prepare.recipe import load_recipe
from hlip.prepare.reports import read_reports
from hlip.read import tensors
from hlip.read.readers import read_scan
from hlip.read.rules import Rules
from hlip.read.safe import MOST_SETTINGS
from hlip.store.format import read_info, read_rejections, read_shard
from limits_cases import READERS, Read, at_most


def saved(path: Path, value: float) -> bytes:
    torch.save(torch.full((4,), value), path)
    return path.read_bytes()


def two_directories(path: Path) -> bytes:
    """zipfile takes the directory before its locator, PyTorch the one where the locator points."""
    one, other = saved(path, 1.0), saved(path, 2.0)
    return one[:-42] + other[:-34] + struct.pack("<QI", len(one) - 98, 1) + other[-22:]


def two_names(path: Path) -> bytes:
    """PyTorch takes either, as it does not look at the case of a name."""
    saved(path, 1.0)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/DATA.PKL", archive.read(f"{path.stem}/data.pkl"))
    return path.read_bytes()


def no_end(path: Path) -> bytes:
    """No archive to zipfile, but to PyTorch, which goes by the first bytes."""
    return saved(path, 1.0) + b"PK\5\6"


@pytest.mark.parametrize("make", [two_directories, two_names, no_end])
def test_archives_that_readers_see_differently(make: Callable[[Path], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    saved(path, 1.0)
    assert tensors.load_tensors(path).tolist() == [1.0] * 4
    path.write_bytes(make(path))
    assert torch.load(path, weights_only=True).tolist() == [1.0] * 4
    with pytest.raises(ValueError, match=r"directory|of one name"):
        tensors.load_tensors(path)


def write_header(path: Path, tensors: dict[str, Any], size: int = 0) -> None:
    """A safetensors file of holes."""
    header = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)


@pytest.mark.parametrize("read", [read_weights, read_shard])
def test_a_million_empty_tensors(read: Read, tmp_path: Path) -> None:
    """They take no data, and minutes."""
    path = tmp_path / "a.safetensors"
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(path, {str(k): empty for k in range(200_000)})
    with pytest.raises(ValueError, match=r"a\.safetensors.*a header of 200001 entries"):
        read(path)


@pytest.mark.parametrize("read", [read_weights, read_shard])
@pytest.mark.parametrize("length", [0, 2**30, 2**40, 2**64 - 1])
def test_a_header_of_any_length(length: int, read: Read, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, 2**31)
    with pytest.raises(ValueError, match=r"a\.safetensors"), at_most(2**29):
        read(path)


@pytest.mark.parametrize("size", [2**33, 2**40], ids=["8 GB", "1 TB"])
@pytest.mark.parametrize("kind", ["weights.safetensors", "weights.pt", "scan.pt", "a.npz", "a.parquet", "shard"])
def test_a_file_of_holes(kind: str, size: int, tmp_path: Path) -> None:
    """It says that it holds more than there is memory, and it does hold it: nothing, on no place of the disk."""
    path = tmp_path / (kind if kind != "shard" else "shard.safetensors")
    if path.suffix == ".safetensors":
        tensors = {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
        write_header(path, tensors, size)
    else:
        if path.suffix == ".pt":
            count = size // 4
            bad.write_pickle(path, bad.rebuilt(count, [count // 2**10, 2**5, 2**5], [2**10, 2**5, 1]), old=True)
        os.truncate(path, path.stat().st_size + size if path.exists() else path.touch() or size)
    with pytest.raises(ValueError, match=path.name), at_most(2**30):
        (read_shard if kind == "shard" else READERS[kind])(path)


def patch_directory(path: Path, change: Callable[[bytearray, int, str], None]) -> None:
    """Change the entries of a zip archive's directory: `change` gets the bytes, an entry's place and its name."""
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
    content = bytearray(path.read_bytes())
    while content[place : place + 4] == b"PK\1\2":
        name, extra, comment = struct.unpack_from("<HHH", content, place + 28)
        change(content, place, content[place + 46 : place + 46 + name].decode())
        place += 46 + name + extra + comment
    path.write_bytes(content)


def tensor_of(key: str, count: int) -> bytes:
    return bad.rebuilt(count, [count], [1], key=key)


@pytest.mark.parametrize("shift", [0, -1], ids=["at one place", "one within the other"])
@pytest.mark.parametrize("name", ["weights.pt", "scan.pt", "a.npz"])
def test_files_of_an_archive_that_share_bytes(name: str, shift: int, tmp_path: Path) -> None:
    """Entries of the directory that all lead to one file: two thousand of a megabyte, in a megabyte."""
    path, size = tmp_path / name, 2**12
    keys = [f"{k}.npy" for k in range(3)] if path.suffix == ".npz" else [f"a/data/{k}" for k in range(3)]
    with zipfile.ZipFile(path, "w") as archive:
        if path.suffix == ".pt":
            pickle = b"](" + b"".join(tensor_of(str(k), size // 4) for k in range(3)) + b"e"
            archive.writestr("a/data.pkl", b"\x80\x02" + pickle + b".")
        for key in keys:
            archive.writestr(key, bytes(size))
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
    first, second = members[keys[0]], members[keys[1]]

    def overlap(content: bytearray, place: int, entry: str) -> None:
        if shift and entry == keys[0]:  # reaches into the next
            struct.pack_into("<II", content, place + 20, size + 1, size + 1)
        elif not shift and entry == keys[1]:
            struct.pack_into("<I", content, place + 42, first.header_offset)

    patch_directory(path, overlap)
    assert second.header_offset > first.header_offset
    with pytest.raises(ValueError, match=f"{name}.*{keys[0]}"):
        READERS[name](path)


@pytest.mark.parametrize(("reader", "size"), [("weights.pt", 16), ("scan.pt", 2**20)])
def test_a_stored_file_is_as_large_as_its_bytes(reader: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / reader
    bad.write_pickle(path, tensor_of("0", 4), data=bytes(16))

    def enlarge(content: bytearray, place: int, entry: str) -> None:
        if entry == "a/data/0":
            struct.pack_into("<I", content, place + 24, 4 * size)

    patch_directory(path, enlarge)
    with pytest.raises(ValueError, match=f"{reader}.*a/data/0"):
        READERS[reader](path)


@pytest.mark.parametrize("decoy", ["a/zz/data/0", "a/data/zz/0", "b/data/1/0"])
@pytest.mark.parametrize("name", ["weights.pt", "scan.pt"])
def test_no_other_file_stands_for_the_data_of_a_tensor(name: str, decoy: str, tmp_path: Path) -> None:
    """What is larger lies elsewhere: the tensor would hold the bytes beside its own."""
    path = tmp_path / name
    bad.write_pickle(path, b"}" + bad.word("x") + tensor_of("0", 1000) + b"s", data=bytes(16))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(decoy, bytes(4000))
    with pytest.raises(ValueError, match=f"{name}.*(storage 0 is larger than its data|b/data/1/0)"):
        READERS[name](path)


TEXTS: dict[str, Read] = {
    **{name: read for name, read in READERS.items() if name.endswith((".json", ".yaml", ".txt", ".csv", ".jsonl"))},
    "report.txt": lambda path: read_reports(path.parent),
    "config.json": lambda path: load_recipe(str(path.parent)),
    "text/config.json": lambda path: HLIPModel.load(str(path.parents[1])),
    "store.json": lambda path: read_info(path.parent),
    "rejected.jsonl": lambda path: read_rejections(path, path.parent),
}


@pytest.mark.parametrize("begin", [b"", b'{"a": "', b"a" * 5000], ids=["nothing", "a text", "a block"])
@pytest.mark.parametrize("size", [2**33, 2**40], ids=["8 GB", "1 TB"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_of_holes(name: str, size: int, begin: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text("{}")
    path.write_bytes(begin)
    os.truncate(path, size)
    where = path.name if name != "text/config.json" else tmp_path.name
    with pytest.raises(ValueError, match=where), at_most(2**30):
        TEXTS[name](path)


@pytest.mark.parametrize("name", ["config.json", "store.json"])
def test_a_configuration_of_any_length(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'{"format": 1, "recipe": {"size": [' + b" " * MOST_SETTINGS + b"1]}}")
    with pytest.raises(ValueError, match=f"{name}.*more than {MOST_SETTINGS} bytes"):
        TEXTS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["a.npz", "probe.npz"])
def test_arrays_of_objects_are_refused_in_our_words(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / name, study=np.array([{}, None], dtype=object), classes=np.array([1, "a"], dtype=object))
    with pytest.raises(ValueError, match=f"{name}.*holds objects") as caught:
        READERS[name](tmp_path / name)
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize(
    ("descr", "shape", "reason"),
    [
        ("<U0", (2**28,), "no array of numbers or texts"),
        ("<f4", (2**28, 0), "is empty"),
        ("<U4", (0, 2**40), "is empty"),
    ],
)
@pytest.mark.parametrize("name", ["a.npz", "probe.npz"])
def test_arrays_of_nothing(name: str, descr: str, shape: tuple[int, ...], reason: str, tmp_path: Path) -> None:
    """Texts of no characters, or lists of nothing, of which 300 bytes hold any number."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for array in ("study", "scan", "facts", "classes", "weight"):
            archive.writestr(f"{array}.npy", content.getvalue())
    with pytest.raises(ValueError, match=rf"{name}.*{reason}"), at_most(2**29):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["a.npz", "probe.npz", "weights.pt", "scan.pt"])
def test_an_archive_of_empty_files(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for k in range(tensors.MOST_MEMBERS + 1):
            archive.writestr(f"a/data/{k}", b"")
    with pytest.raises(ValueError, match=rf"{name}.*an archive of more than {tensors.MOST_MEMBERS} files"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize(
    ("file", "part", "field", "value"),
    [
        ("config.json", "vision", "width", 3 * 2**20),
        ("config.json", "vision", "grid", [2**10, 2**10, 2**10]),
        ("config.json", "vision", "levels", ["scan"] * 10**6),
        ("config.json", "vision", "mlp_ratio", 1e300),
        ("config.json", "vision", "max_scans", 2**40),
        ("config.json", "vision", "num_prefix", 2**40),
        ("config.json", None, "embed_dim", 2**40),
        ("text/config.json", None, "num_hidden_layers", 10**9),
        ("text/config.json", None, "vocab_size", 2**40),
    ],
)
def test_a_model_is_no_larger_than_its_weights(
    file: str, part: str | None, field: str, value: Any, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "text").mkdir(parents=True)
    for path in model_folder.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(model_folder)).hardlink_to(path)
    content = json.loads((folder / file).read_text())
    (content if part is None else content[part])[field] = value
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=str(folder)):
        HLIPModel.load(str(folder))


def test_compressed_pixels_are_no_larger_than_the_slice(tmp_path: Path) -> None:
    """JPEG says in its own header how large it is, which decoders go by."""

    def widen(files: list[Path]) -> None:
        for path in files:
            content = bytearray(path.read_bytes())
            struct.pack_into(">2H", content, content.index(b"\xff\xc3") + 5, 65500, 65500)
            path.write_bytes(content)

    bad.series(widen, transfer_syntax="jpeg_lossless")(tmp_path / "1.2")
    with pytest.raises(ValueError, match=r"0000.dcm: corrupt pixels .*\(65500, 65500, 1\), expected \(24, 20, 1\)"):
        read_scan(find_study(tmp_path / "1.2").scans[0], Rules())
