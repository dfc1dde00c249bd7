"""Mutations that know the format: what comes out still looks like a file of its kind, but for one thing.

Every function takes the content of a file and a generator of random numbers, and returns other content. One that cannot
read the content raises whatever it likes: the caller then changes plain bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import yaml
from nibabel import Nifti1Header

Mutation = Callable[[bytes, random.Random], bytes]
INTEGERS = (0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 127, 128, 255, 256, 32767, -32768, 65535, 2**24, 2**31 - 1, -(2**31),
            2**32 - 1, 2**53, 2**63 - 1, -(2**63))  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-300, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
WORDS = ("", " ", "\0", "a\0b", "..", "../../x", "/etc/passwd", "/dev/zero", "$(touch executed)", "\ud800",
         "é", "e\u0301", "%s{}%n", "-1", "nan", "1e999", "x" * 300, "x" * 5000, "null", "Infinity", "{}", "(a+)+$",
         "hf-hub:a/b", "trust_remote_code")  # fmt: skip
VRS = (b"DS", b"IS", b"US", b"SS", b"UL", b"FD", b"FL", b"UI", b"CS", b"LO", b"SQ", b"OB", b"OW", b"UN", b"AT", b"XX")
DICOM_WORDS = (
    b"",
    b"0",
    b"-1",
    b"1\\0\\0",
    b"1e400",
    b"nan",
    b"99999999999",
    b"\\\\\\",
    b"a" * 70,
    b"1\\1\\1\\1\\1\\1",
)
NIFTI_FIELDS = tuple(
    (name, *Nifti1Header.template_dtype.fields[name][:2]) for name in Nifti1Header.template_dtype.names
)


def plain(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, taken out, put in, or a number written over them."""
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 1, 2, 4, 8, 16, 64, 1024))
    match rng.randrange(6):
        case 0:
            data[at : at + length] = rng.randbytes(length)
        case 1:
            del data[at : at + length]
        case 2:
            del data[at:]
        case 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
        case 4 if data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        case _:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(INTEGERS) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))  # type: ignore[arg-type]
    return bytes(data)


def text(content: bytes, rng: random.Random) -> bytes:
    """A word put in between, or lines changed."""
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(i, rng.choice(lines))
        case 1:
            del lines[i]
        case 2:
            at = rng.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + _word(rng).encode("utf-8", "surrogatepass") + lines[i][at:]
        case _:
            return plain(content, rng)
    return b"\n".join(lines)


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def _value(rng: random.Random) -> Any:
    some: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(INTEGERS), lambda: rng.choice(FLOATS), lambda: _word(rng), lambda: None, list,
        dict, lambda: rng.random() < 0.5, lambda: [_value(rng)], lambda: {_word(rng): _value(rng)},
    )  # fmt: skip
    return rng.choice(some)()


def tree(value: Any, rng: random.Random) -> Any:
    """One node of plain values, somewhere below, replaced, left out, repeated or wrapped."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        chance = rng.random()
        if chance < 0.8:
            value[key] = tree(value[key], rng)
        elif chance < 0.9:
            del value[key]
        elif isinstance(value, list):
            value.insert(key, value[rng.choice(keys)])
        else:
            value[rng.choice((_word(rng), key))] = value[rng.choice(keys)]
        return value
    if type(value) is int and rng.random() < 0.3:
        return value + rng.choice((-1, 1))
    return _value(rng)


def json_file(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(tree(json.loads(content), rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def json_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    lines[i] = json_file(lines[i], rng)
    return b"\n".join(lines)


def yaml_file(content: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(tree(yaml.safe_load(content), rng)).encode("utf-8", "surrogatepass")


def csv_file(content: bytes, rng: random.Random) -> bytes:
    rows = tree(list(csv.reader(content.decode().splitlines())), rng)
    out = io.StringIO()
    csv.writer(out).writerows([["" if cell is None else cell for cell in row] for row in rows])
    return out.getvalue().encode("utf-8", "surrogatepass")


def nifti(content: bytes, rng: random.Random) -> bytes:
    """One number of the header."""
    data = bytearray(content)
    kind, offset = rng.choice(NIFTI_FIELDS)
    base = kind.base
    offset += base.itemsize * rng.randrange(kind.itemsize // base.itemsize)
    if base.kind == "f":
        struct.pack_into("<f", data, offset, rng.choice((*FLOATS[:6], 352.0, 1e-9, *FLOATS[7:])))
    else:
        number = rng.choice((*INTEGERS, 512, 1024, 1280, 128, 2304)) % 2 ** (8 * base.itemsize)
        data[offset : offset + base.itemsize] = number.to_bytes(base.itemsize, "little")
    return bytes(data)


def packed(inner: Mutation) -> Mutation:
    """The same within gzip."""
    return lambda content, rng: gzip.compress(inner(gzip.decompress(content), rng), 1)


def archive(content: bytes, rng: random.Random) -> bytes:
    """One member of a zip file: its content, its name, or that it is there. Checksums are right."""
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        members = [(info.filename, opened.read(info)) for info in opened.infolist()]
    i = rng.randrange(len(members))
    name, inside = members[i]
    chance = rng.random()
    if chance < 0.8:
        members[i] = name, (npy if name.endswith(".npy") else plain)(inside, rng)
    elif chance < 0.87:
        del members[i]
    elif chance < 0.94:
        members[i] = rng.choice(members)[0], inside
    else:
        members[i] = f"{name.rpartition('/')[0]}/{_word(rng)}".encode("utf-8", "replace").decode(), inside
    out = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", kind) as written:
        warnings.simplefilter("ignore")  # of two members with one name
        for name, inside in members:
            written.writestr(name, inside)
    return out.getvalue()


def npy(content: bytes, rng: random.Random) -> bytes:
    """A number or the type in the header of an array, or plain bytes."""
    start = 10 + int.from_bytes(content[8:10], "little")
    header = content[10:start].rstrip()
    old, new = rng.choice(
        ((b"<f4", b"|O"), (b"<f4", b"<c8"), (b"<f8", b"|O"), (b"<U", b"<f8\0"), (b"|i1", b"|O"), (b"False", b"True"),
         (b"(", b"(9999999999,"), (b"(", b"("), (b",)", b",0)"), (b"(", b"(-1,"), (b"shape", b"shapes"))
    )  # fmt: skip
    if old not in header or rng.random() < 0.3:
        return plain(content, rng)
    header = header.replace(old, new, 1) + b"\n"
    return content[:8] + len(header).to_bytes(2, "little") + header + content[start:]


def tensors(content: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file; of a shard also what is JSON within it."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    meta = header.get("__metadata__", {})
    if "hlip" in meta and rng.random() < 0.7:
        meta["hlip"] = json.dumps(tree(json.loads(meta["hlip"]), rng))
    else:
        header = tree(header, rng)
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + content[start:]


def dicom(content: bytes, rng: random.Random) -> bytes:
    """One element with an explicit type, also within sequences: its value, length or type, or that it is there."""
    places = list(_elements(content))
    at, head, size = rng.choice(places)
    data = bytearray(content)
    match rng.randrange(7):
        case 0:
            del data[at : at + head + size]
        case 1:
            data[at:at] = data[at : at + head + size]
        case 2:
            data[at + 4 : at + 6] = rng.choice(VRS)
        case 3:
            length = rng.choice((0, 1, 2, 0xFFFE, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF))
            width = 4 if head == 12 else 2
            data[at + head - width : at + head] = (length % 2 ** (8 * width)).to_bytes(width, "little")
        case 4:
            other, head2, size2 = rng.choice(places)
            data[at : at + head + size] = content[other : other + head2 + size2]
        case 5 if size in (1, 2, 4, 8):
            number = rng.choice(INTEGERS) % 2 ** (8 * size)
            data[at + head : at + head + size] = number.to_bytes(size, "little")
        case _:
            word = rng.choice(DICOM_WORDS)
            word += b" " * (len(word) % 2)
            data[at + head : at + head + size] = word
            width = 4 if head == 12 else 2
            data[at + head - width : at + head] = len(word).to_bytes(width, "little")
    return bytes(data)


def _elements(content: bytes) -> Any:
    """(start, bytes of tag, type and length, bytes of the value) of every element; sequences are entered."""
    at = 132
    while at + 8 <= len(content):
        tag, kind = content[at : at + 4], content[at + 4 : at + 6]
        if tag[:2] == b"\xfe\xff":  # items of sequences have no type
            at += 8
            continue
        long = kind in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR", b"OF", b"OD", b"OL")
        head, width = (12, 4) if long else (8, 2)
        size = int.from_bytes(content[at + head - width : at + head], "little")
        inside = kind == b"SQ" or size >= 0xFFFFFFF0
        yield at, head, 0 if inside else size
        at += head if inside else head + size


FORMATS: dict[str, tuple[Mutation, ...]] = {
    ".nii": (nifti,),
    ".nii.gz": (packed(nifti), packed(plain)),
    ".dcm": (dicom,),
    ".pt": (archive,),
    ".npz": (archive,),
    ".safetensors": (tensors,),
    ".json": (json_file, json_file, text),
    ".jsonl": (json_lines, text),
    ".yaml": (yaml_file, yaml_file, text),
    ".csv": (csv_file, text),
    ".txt": (text,),
}


def mutate(data: bytes, seed: int) -> bytes:
    """Another input: mostly of the same kind, changed in one to four places."""
    rng = random.Random(seed)
    name, _, content = data.partition(b"\n")
    suffix = next((s for s in sorted(FORMATS, key=len, reverse=True) if name.decode("latin-1").endswith(s)), None)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        mutation = plain if suffix is None or rng.random() < 0.15 else rng.choice(FORMATS[suffix])
        try:
            content = mutation(content, rng)
        except Exception:  # no longer of its format
            content = plain(content, rng)
    return name + b"\n" + content
