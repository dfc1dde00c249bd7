"""The native library: where it is missing, older, or run under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import emulation
from conftest import use_native
from hlip_kernels import StudyLayout, available_backends, hier_attention
from hlip_kernels import native as library
from hlip_kernels.backends import choose_backend
from hlip_kernels.native import ISAS, native
from native_cases import HERE, nan_filled_memory, needs_library, same_threads  # noqa: F401
from test_attention import RAGGED, random_qkv

ROOT = Path(__file__).parents[1]


@needs_library
@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float16, 64, "needs bfloat16 or float32, got float16"),
        (torch.float64, 64, "needs bfloat16 or float32, got float64"),
        (torch.float32, 24, "needs a head dim that is a multiple of 16 and at most 128, got 24"),
        (torch.float32, 144, "needs a head dim that is a multiple of 16 and at most 128, got 144"),
    ],
)
def test_refuses(dtype: torch.dtype, head_dim: int, message: str) -> None:
    layout = StudyLayout.from_grids(RAGGED)
    qkv = random_qkv(layout, "scan", head_dim, dtype)
    with pytest.raises(ValueError, match=message):
        hier_attention(qkv, layout, "scan", backend="native")
    assert available_backends("cpu", dtype, head_dim)[0] == "cpu"


@needs_library
def test_auto_leaves_code_for_any_processor_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    use_native(monkeypatch, native()._replace(isa=ISAS[-1]))
    assert available_backends()[:2] == ["native", "cpu"]
    use_native(monkeypatch, native()._replace(isa="scalar"))
    assert available_backends()[0] == "cpu"
    assert "native" in available_backends()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "missing.so")
    missing = library.native.__wrapped__()
    monkeypatch.setattr(library, "native", lambda: missing)
    choose_backend.cache_clear()
    assert "native" not in available_backends()
    assert choose_backend("auto", "cpu", torch.float32, 64) == "cpu"
    with pytest.raises(ValueError, match="the native library is not built"):
        choose_backend("native", "cpu", torch.float32, 64)
    choose_backend.cache_clear()


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "PATH", tmp_path / "broken.so")
    assert "cannot be loaded" in library.native.__wrapped__().reason


@needs_library
def test_an_isa_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HLIP_NATIVE_ISA", "scalar")
    assert library.native.__wrapped__().isa == "scalar"
    monkeypatch.setenv("HLIP_NATIVE_ISA", "neon")
    with pytest.raises(ValueError, match=r"this processor has scalar.*got 'neon'"):
        library.native.__wrapped__()


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_openmp_runtime() -> None:
    """In a process of its own, as other packages of the tests bring theirs."""
    program = f"""
import re, torch
from hlip_kernels import StudyLayout, hier_attention
hier_attention(torch.zeros(34, 3, 2, 16), StudyLayout.from_grids({RAGGED}), "scan", backend="native")
print(len(set(re.findall(r"\\S*/lib[gi]?omp\\S*", open("/proc/self/maps").read()))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "1"


SANITIZERS = ("-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The library with AddressSanitizer and UndefinedBehaviorSanitizer, built by setup.py, run without Python."""
    flags = " ".join(SANITIZERS)
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "obj"]
    env = {**os.environ, "CXXFLAGS": flags, "LDFLAGS": flags}
    subprocess.run(build, cwd=ROOT, env=env, check=True, capture_output=True)
    (built,) = (tmp_path / "lib").rglob("*.so")
    run_sanitized(tmp_path, built, range(len(HERE)))


@pytest.mark.slow
@pytest.mark.skipif(bool(emulation.WHY_NOT), reason=emulation.WHY_NOT)
def test_sanitizers_find_nothing_on_an_emulated_processor(tmp_path: Path) -> None:
    """There they also see what instructions read and write."""
    built = emulation.sanitized(tmp_path / "lib", SANITIZERS)
    run_sanitized(tmp_path, built, [ISAS.index("amx")], "last")


def run_sanitized(folder: Path, built: Path, isas: Sequence[int], *arguments: str) -> None:
    assert b"__asan" in built.read_bytes()
    driver = build_driver(folder, *SANITIZERS)
    # the OpenMP runtime keeps its threads' memory to the end
    run = subprocess.run(
        [driver, built, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for isa in isas:
        for what in ("attention", "norm", "gradient of norm", "gelu"):
            assert f"isa {isa}, {what}" in run.stdout
    if ISAS.index("amx") in isas:
        for what in ("product", "transposed product", "two layers", "gradient of weight"):
            assert f"isa {ISAS.index('amx')}, {what}" in run.stdout


def build_driver(folder: Path, *flags: str) -> Path:
    """native_driver.cpp, linked to the OpenMP runtime that the library looks for."""
    source, driver = ROOT / "tests/native_driver.cpp", folder / "driver"
    link = ["-Wl,--no-as-needed", "-ldl"]
    subprocess.run(["g++", "-std=c++17", "-fopenmp", *flags, source, "-o", driver, *link], check=True)
    return driver


@needs_library
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(("processor", "isas"), [("Nehalem", 1), ("Haswell", 2)])
def test_on_an_older_processor(processor: str, isas: int, tmp_path: Path) -> None:
    """Emulated: any instruction that the processor lacks ends the program."""
    command = ["qemu-x86_64", "-cpu", processor, build_driver(tmp_path, "-O1"), library.PATH, "small"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {line.split(",")[0] for line in run.stdout.splitlines()}
    assert found == {f"isa {isa}" for isa in range(isas)}
