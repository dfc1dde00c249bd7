"""Builds the native library for an emulated processor, which has every instruction set: see emulated/immintrin.h."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from hlip_kernels.native.interface import ABI

ROOT = Path(__file__).parents[1]
HEADERS = ROOT / "tests/emulated"
SOURCES = ROOT / "hlip_kernels/native/src"
HERE = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64") and shutil.which("g++") is not None
WHY_NOT = "" if HERE else "needs g++, Linux and an x86-64 processor"
FLAGS = ["-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wno-psabi", "-DHLIP_EMULATED", f"-DHLIP_ABI={ABI}", f"-I{HEADERS}"]
NAME = "libhlip_native.so"
# What the sources ask for. Nothing is said of AVX2: code for it is in the compiler's vectors.
ISA_FLAGS = {"avx512": ("-D__AVX512F__",), "amx": ("-D__AVX512F__", "-D__AVX512BF16__")}


def build(folder: Path, flags: Sequence[str], sources: Iterable[Path], rest: Iterable[Path] = ()) -> Path:
    """The library of these sources, compiled with these flags for any x86-64 processor, and objects of the rest."""

    def compiled(source: Path) -> Path:
        isa, to = ISA_FLAGS.get(isa_of(source), ()), folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *isa, *flags, "-c", source, "-o", to], check=True)
        return to

    folder.mkdir(parents=True, exist_ok=True)
    library = folder / NAME
    with ThreadPoolExecutor(2) as pool:
        objects = [*pool.map(compiled, sources), *rest]
    subprocess.run(["g++", "-shared", *flags, *objects, "-o", library], check=True)
    return library


def isa_of(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def cached() -> Path:
    """The library in build/, where it stays until a source changes."""
    files = sorted([*SOURCES.iterdir(), *HEADERS.iterdir(), Path(__file__)])
    key = hashlib.sha256(repr(FLAGS).encode() + b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    folder = ROOT / "build/emulated"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # of processes that run the tests together
        if not (folder / key).exists():
            for old in folder.glob("*/"):
                shutil.rmtree(old)
            build(folder / "new", ["-O1"], SOURCES.glob("*.cpp")).parent.rename(folder / key)
    return folder / key / NAME


def sanitized(folder: Path, flags: Sequence[str]) -> Path:
    """The same with other flags, but for the code of other instruction sets than AMX."""
    others = ("generic", "avx2", "avx512")
    sources = [path for path in SOURCES.glob("*.cpp") if isa_of(path) not in others]
    return build(folder, flags, sources, [path for path in cached().parent.glob("*.o") if isa_of(path) in others])
