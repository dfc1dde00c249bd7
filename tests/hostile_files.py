"""Damaged and hostile files: each function writes one kind into the folder of a study, beside a good scan."""

from __future__ import annotations

import functools
import gzip
import os
import pickle
import socket
import stat
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import torch
from nibabel.tests import __file__ as NIBABEL_TESTS
from pydicom.uid import RTStructureSetStorage

from dicom_files import write_series

Make = Callable[[Path], None]
SPACING = np.diag([-2.0, -2.0, 4.0, 1.0])
MEMBER = 2**26  # bytes that a small gzip member of zeros inflates to


def real_volume() -> np.ndarray:
    """(20, 24, 12) int16, a piece of nibabel's anatomical image."""
    image = nib.load(Path(NIBABEL_TESTS).parent / "data" / "anatomical.nii")
    return np.asarray(image.dataobj)[5:25, 8:32, 6:18].astype(np.int16)


def save(path: Path, array: np.ndarray | None = None, affine: np.ndarray = SPACING) -> bytes:
    """Write a NIfTI file, the real volume if none is given. Returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(real_volume() if array is None else array, affine), path)
    return path.read_bytes()


def plain(folder: Path) -> bytearray:
    """The bytes of a good uncompressed file."""
    content = bytearray(save(folder / "bad.nii"))
    (folder / "bad.nii").unlink()
    return content


def volume(array: np.ndarray, affine: np.ndarray = SPACING) -> Make:
    return lambda folder: void(save(folder / "bad.nii.gz", array, affine))


def void(_: Any) -> None:
    return None


def named(name: str, content: bytes) -> Make:
    return lambda folder: void((folder / name).write_bytes(content))


def patched(offset: int, layout: str, *values: Any) -> Make:
    """Overwrites a part of a good header."""

    def make(folder: Path) -> None:
        content = plain(folder)
        struct.pack_into(layout, content, offset, *values)
        (folder / "bad.nii.gz").write_bytes(gzip.compress(content, 1))

    return make


def spacing(*values: float) -> Make:
    """A header whose only word on spacing is pixdim."""

    def make(folder: Path) -> None:
        content = plain(folder)
        struct.pack_into("<3f", content, 80, *values)
        struct.pack_into("<2h", content, 252, 0, 0)  # neither qform nor sform
        (folder / "bad.nii").write_bytes(content)

    return make


def cut(name: str, share: float) -> Make:
    def make(folder: Path) -> None:
        content = save(folder / name)
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return make


@functools.lru_cache
def zeros() -> bytes:
    return gzip.compress(bytes(MEMBER), 6)


def bomb(*, shape: Sequence[int] = (), extension: bool = False) -> Make:
    """A file of 9 MB that inflates to 8.4 GB: as its header says (shape), within the header, or behind the voxels."""

    def make(folder: Path) -> None:
        content = plain(folder)
        if shape:
            struct.pack_into("<4h", content, 40, 3, *shape)
        if extension:
            struct.pack_into("<f", content, 108, 2.0**31)
            content = content[:348] + struct.pack("<4B2i", 1, 0, 0, 0, 2**31 - 16, 6)
        (folder / "bad.nii.gz").write_bytes(gzip.compress(content) + zeros() * (2**33 // MEMBER))

    return make


def wrong_checksum(folder: Path) -> None:
    content = bytearray(save(folder / "bad.nii.gz"))
    content[-8] ^= 1
    (folder / "bad.nii.gz").write_bytes(content)


# What is no regular file


def directory(folder: Path) -> None:
    (folder / "bad.nii.gz").mkdir()


def link(target: str) -> Make:
    return lambda folder: (folder / "bad.nii.gz").symlink_to(target)


def link_outside(folder: Path) -> None:
    save(folder.parents[1] / "elsewhere" / "scan.nii.gz")
    (folder / "bad.nii.gz").symlink_to(folder.parents[1] / "elsewhere" / "scan.nii.gz")


def link_ring(folder: Path) -> None:
    (folder / "bad").symlink_to(folder)


def pipe(name: str) -> Make:
    return lambda folder: os.mkfifo(folder / name)


def socket_file(folder: Path) -> None:
    before = Path.cwd()
    os.chdir(folder)  # a socket's path has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("bad.nii.gz")
    finally:
        os.chdir(before)


def device(folder: Path) -> None:
    """/dev/zero under the name of a scan. Where that is not allowed, a pipe."""
    try:
        os.mknod(folder / "bad.nii.gz", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        os.mkfifo(folder / "bad.nii.gz")


def too_deep(folder: Path) -> None:
    """Folders whose path is too long to be opened, by root too."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def odd_names(*names: bytes) -> Make:
    """Good scans, each another image."""

    def make(folder: Path) -> None:
        for k, name in enumerate(names):
            save(folder / os.fsdecode(name), np.roll(real_volume(), k + 1, axis=0))

    return make


def copied(folder: Path) -> None:
    content = (folder / "good.nii.gz").read_bytes()
    (folder / "other.nii.gz").write_bytes(content)


def derivative(folder: Path) -> None:
    save(folder / "derivatives" / "bad.nii.gz")


# Tensors


class Code:
    """Pickled, it asks whoever reads it to make a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def tensor(content: Any, *, old: bool = False) -> Make:
    return lambda folder: torch.save(content, folder / "bad.pt", _use_new_zipfile_serialization=not old)


def cut_tensor(folder: Path) -> None:
    torch.save(torch.arange(4000).reshape(10, 20, 20), folder / "bad.pt")
    (folder / "bad.pt").write_bytes((folder / "bad.pt").read_bytes()[:-500])


# Pickles, opcode by opcode


def name_of(name: str) -> bytes:
    """Opcodes that push what `module.name` is."""
    return b"c" + "\n".join([*name.rsplit(".", 1), ""]).encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def call(name: str, *arguments: bytes) -> bytes:
    return name_of(name) + b"(" + b"".join(arguments) + b"tR"


def storage(count: int, kind: str = "Float", key: str = "0") -> bytes:
    named = name_of(f"torch.{kind}Storage" if kind != "Untyped" else "torch.storage.UntypedStorage")
    return b"(" + word("storage") + named + word(key) + word("cpu") + number(count) + b"tQ"


def rebuilt(count: int, shape: Sequence[int], strides: Sequence[int], offset: int = 0, **options: str) -> bytes:
    """A tensor of a storage of `count` numbers."""
    sizes, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    given = (storage(count, **options), number(offset), sizes, steps, b"\x89", call("collections.OrderedDict"))
    return call("torch._utils._rebuild_tensor_v2", *given)


def doubled(first: bytes, times: int) -> bytes:
    """A pair of a pair of a pair ... of one thing, each of its halves the same."""
    return first + b"".join(b"q\x00h\x00\x86" for _ in range(times))


TEN = b"(" + b"K\x01" * 10_000 + b"t"
ONES = b"](" + b"".join(map(number, range(10_000))) + b"e"
PAIRS = b"](" + b"K\x01K\x02\x86" * 10_000 + b"e"
MANY = b"(" + b"".join(number(k) + b"K\x00" for k in range(10_000)) + b"u"
# Each asks whoever reads it for gigabytes, or for hours.
PICKLES = {
    "bytearray of a number": call("builtins.bytearray", number(2**31 - 1)),
    "bytearray as Python 2 calls it": call("__builtin__.bytearray", number(2**31 - 1)),
    "text encoded again and again": b"](" + call("_codecs.encode", word("a" * 9), word("utf-7")) * 9 + b"e",
    "set of a list": PAIRS + b"q\x010](" + call("builtins.set", b"h\x01") * 10_000 + b"e",
    "counter of a list": PAIRS + b"q\x010](" + call("collections.Counter", b"h\x01") * 10_000 + b"e",
    "set of a list of numbers": ONES + b"q\x010](" + call("__builtin__.set", b"h\x01") * 10_000 + b"e",
    "counter of a dict": b"}" + MANY + b"q\x010](" + call("collections.Counter", b"h\x01") * 10_000 + b"e",
    "bytes of a text": b"](" + word("a" * 2**16) + b"q\x01"
    + call("_codecs.encode", b"h\x01", word("latin1")) * 10_000 + b"e",
    "set of what has no hash": b"](" + call("__builtin__.set", b"]]a") + b"e",
    "dict of a list": PAIRS + b"q\x010](" + call("collections.OrderedDict", b"h\x01") * 10_000 + b"e",
    "size of a tuple": TEN + b"q\x010](" + call("torch.Size", b"h\x01") * 10_000 + b"e",
    "attributes of a dict": b"}" + MANY + b"q\x010](" + (call("collections.OrderedDict") + b"h\x01b") * 10_000 + b"e",
    "storage larger than its data": storage(2**31, "Byte"),
    "storage without a type": storage(2**31, "Untyped"),
    "storage in two sizes": b"](" + storage(4) + storage(2**29) + b"e",
    "shape larger than its storage": rebuilt(4, [2**29], [1]),
    "steps larger than its storage": rebuilt(4, [2, 2], [2**29, 1]),
    "offset larger than its storage": rebuilt(4, [1], [1], 2**29),
    "one number stretched": rebuilt(4, [2**20, 2**11], [0, 0]),
    "one storage as many tensors": b"](" + rebuilt(2**16, [2**16], [1]) * 4_000 + b"e",
    "no storage": call("torch._utils._rebuild_meta_tensor_no_storage", name_of("torch.float32"), TEN, TEN, b"\x89"),
    "tensor class": call("torch.FloatTensor", number(2**31)),
    "storage class": call("torch.FloatStorage", number(2**31)),
    "new object": name_of("torch.storage.UntypedStorage") + b"(" + number(2**31) + b"t\x81",
    "pair of pairs": doubled(b"K\x01", 40),
    "pair of pairs as a key": b"}" + doubled(b"K\x01", 40) + b"K\x01s",
    "list within itself": b"]q\x00h\x00a",
    "dict within a list within it": b"}q\x00K\x01](h\x00h\x00es",
    "tuple in tuple without end": b")" + b"\x85" * 100_000,
    "keys of one hash": b"}(" + b"".join(
        b"\x8a\x20" + (k * (2**61 - 1)).to_bytes(32, "little") + b"K\x00" for k in range(20_000)) + b"u",
    "million lists": b"](" + b"]" * 2**20 + b"e",
    "million marks": b"(" * 2**20 + b"N",
    "million tensors": rebuilt(1, [1], [1]) + b"q\x00" + b"".join(
        [name_of("torch.Size"), b"q\x01", b")\x85q\x02", b"](", b"h\x01h\x02R" * 2**18, b"e"]),
    "opcode of a later version": b"\x8e" + struct.pack("<Q", 2**40),
    "opcode of a huge number": b"\x8b" + struct.pack("<I", 2**31 - 1),
    "text longer than the file": b"X" + struct.pack("<I", 2**32 - 1),
}  # fmt: skip


def write_pickle(path: Path, pickle: bytes, *, old: bool = False, data: bytes = bytes(2**18)) -> None:
    """A file as of `torch.save`, with these opcodes, and one storage."""
    pickle = b"\x80\x02" + pickle + b"."
    if not old:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {"data.pkl": pickle, "byteorder": b"little", "data/0": data, "version": b"3"}.items():
                archive.writestr(f"a/{name}", content)
        return
    start = [0x1950A86A20F9469CFC6C.to_bytes(10, "little"), struct.pack("<H", 1001)]
    head = b"\x80\x02\x8a\x0a" + start[0] + b".\x80\x02M" + start[1] + b".\x80\x02}."
    path.write_bytes(head + pickle + b"\x80\x02](" + word("0") + b"e." + struct.pack("<Q", len(data) // 4) + data)


# DICOM


def series(change: Callable[[list[Path]], None] = void, **settings: Any) -> Make:
    """A series of the folder's study, each a little different from the good scan, and then changed."""

    def make(folder: Path) -> None:
        array = settings.pop("array", real_volume())
        settings.setdefault("description", "bad")
        change(write_series(folder / "bad", array, SPACING, study_uid=folder.name, **settings))

    return make


def each_file(change: Callable[[pydicom.Dataset], None]) -> Callable[[list[Path]], None]:
    """Change the data set of every file."""

    def make(files: list[Path]) -> None:
        for path in files:
            data = pydicom.dcmread(path)
            change(data)
            data.save_as(path)

    return make


def one_file(change: Callable[[pydicom.Dataset], None]) -> Callable[[list[Path]], None]:
    return lambda files: each_file(change)(files[3:4])


def with_values(**values: Any) -> Callable[[pydicom.Dataset], None]:
    """Set elements to what pydicom would not write by itself; None takes one away."""

    def change(data: pydicom.Dataset) -> None:
        for keyword, value in values.items():
            if value is None:
                del data[keyword]
            else:
                with pydicom.config.disable_value_validation():
                    setattr(data, keyword, value)

    return change


def shorter_rows(data: pydicom.Dataset) -> None:
    data.Rows -= 2
    data.PixelData = data.PixelData[: data.Rows * data.Columns * 2]


def mixed_sizes(files: list[Path]) -> None:
    each_file(shorter_rows)(files[:6])


def cut_files(files: list[Path]) -> None:
    for path in files:
        path.write_bytes(path.read_bytes()[:-100])


def cut_headers(files: list[Path]) -> None:
    for path in files[1:]:
        path.unlink()
    files[0].write_bytes(files[0].read_bytes()[:200])


def again(files: list[Path]) -> None:
    (files[0].parent / "again.dcm").write_bytes(files[0].read_bytes())


def scrambled_pixels(files: list[Path]) -> None:
    """Noise over the beginning of every slice's code stream. (Further on, no decoder could tell.)"""
    noise = np.random.default_rng(0).bytes(120)
    for path in files:
        content = path.read_bytes()
        at = 40 + max(content.find(b"\xff\x4f\xff\x51"), content.find(b"\xff\xd8\xff"))
        path.write_bytes(content[:at] + noise + content[at + len(noise) :])


def huge_code_stream(files: list[Path]) -> None:
    """A JPEG 2000 code stream that claims 60000 x 60000 pixels under a header of 24 x 20."""
    for path in files:
        content = bytearray(path.read_bytes())
        at = content.index(b"\xff\x4f\xff\x51") + 8
        struct.pack_into(">2I", content, at, 60000, 60000)
        struct.pack_into(">2I", content, at + 16, 60000, 60000)  # of a tile
        path.write_bytes(content)


def deep_sequences(files: list[Path]) -> None:
    """Three thousand sequences within each other, before the pixels."""
    for path in files[1:]:
        path.unlink()
    data = pydicom.dcmread(files[0])
    del data.PixelData
    data.save_as(files[0])
    opened = struct.pack("<HH2sHIHHI", 0x0040, 0x0275, b"SQ", 0, 2**32 - 1, 0xFFFE, 0xE000, 2**32 - 1)
    with files[0].open("ab") as file:
        file.write(opened * 3000)


def structure_set(files: list[Path]) -> None:
    """Contours, in a series of their own."""
    for path in files[1:]:
        path.unlink()
    data = pydicom.dcmread(files[0])
    for keyword in ("PixelData", "Rows", "Columns"):
        del data[keyword]
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    data.Modality = "RTSTRUCT"
    data.save_as(files[0])


def other_syntax(uid: str) -> Callable[[list[Path]], None]:
    def make(files: list[Path]) -> None:
        for path in files:
            data = pydicom.dcmread(path)
            content = path.read_bytes()
            old, new = str(data.file_meta.TransferSyntaxUID).encode(), uid.encode()
            old += b"\0" * (len(old) % 2)
            assert content.count(old) == 1 and len(new) <= len(old)
            path.write_bytes(content.replace(old, new.ljust(len(old), b"\0")))

    return make


def two_series(folder: Path) -> None:
    for k in (1, 2):
        array = np.roll(real_volume(), 3 * k, axis=1)
        files = write_series(
            folder / f"{k}", array, SPACING, study_uid=folder.name, description=f"series {k}", SeriesNumber=k
        )
        (folder / "mixed").mkdir(exist_ok=True)
        for path in files:
            path.rename(folder / "mixed" / f"{k}{path.name}")


def head(*, air: int = -1000, scale: float = 1.0) -> np.ndarray:
    """The real volume as if it were a CT of a head: numbers that are Hounsfield units times `scale`."""
    real = real_volume().astype(np.float64)
    share = (real - real.min()) / (real.max() - real.min())
    units = np.where(share < 0.2, air, share * 120 - 20)
    return (units * scale).astype(np.int16)


def rescaled_twice(folder: Path) -> None:
    """Hounsfield units under a header that asks to convert them once more, as in some of CT-RATE's files."""
    image = nib.Nifti1Image(np.roll(head(), 2, axis=1), SPACING)
    image.header.set_slope_inter(1, 0)
    nib.save(image, folder / "more.nii")
    content = bytearray((folder / "more.nii").read_bytes())
    struct.pack_into("<2f", content, 112, 1.0, -8192.0)
    (folder / "more.nii").write_bytes(content)


def pickled(folder: Path) -> None:
    """A pickle as it is, without torch's wrapping."""
    (folder / "bad.pt").write_bytes(pickle.dumps(Code()))
