"""The emulated processor of the tests, against the instructions of this one and against their definition."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

import emulation

pytestmark = pytest.mark.skipif(bool(emulation.WHY_NOT), reason=emulation.WHY_NOT)
CPUINFO = Path("/proc/cpuinfo")
REAL_FLAGS = (
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512bf16",
    "-mamx-tile",
    "-mamx-bf16",
    "-mfma",
)
HAS_BFLOAT16 = CPUINFO.exists() and "avx512_bf16" in CPUINFO.read_text()


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("emulated") / "check", *emulation.FLAGS)


def compiled(program: Path, *flags: str) -> Path:
    source = emulation.HEADERS / "check.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", "-ffp-contract=off", *flags, source, "-o", program], check=True)
    return program


@pytest.mark.skipif(not HAS_BFLOAT16, reason="needs AVX512_BF16")
def test_every_instruction_gives_what_the_processor_gives(check: Path, tmp_path: Path) -> None:
    real = compiled(tmp_path / "check", "-Wno-psabi", *REAL_FLAGS)
    ours, theirs = (
        subprocess.run([program, "instructions"], capture_output=True, check=True) for program in (check, real)
    )
    assert len(ours.stdout) > 1e6
    assert ours.stdout == theirs.stdout


def test_a_product_of_tiles_rounds_as_its_definition_says(check: Path) -> None:
    written = subprocess.run([check, "tiles"], capture_output=True, check=True).stdout
    c, a, b, result, cleared = (
        np.frombuffer(written[at : at + 1024], np.uint32) for at in range(0, len(written), 1024)
    )
    c, result = (tile.view(np.float32).reshape(16, 16) for tile in (c, result))
    # Pairs of a row of a, and of a column of b, apart: (row, k, half)
    left, right = (np.stack([tile << 16, tile & 0xFFFF0000], -1).view(np.float32).reshape(16, 16, 2) for tile in (a, b))
    left = np.where(np.abs(left) < 2.0**-126, np.float32(0), left)
    sums = np.zeros((16, 16, 2), np.float32)  # (row, column, half)
    for k in range(16):  # in double precision products are exact, and sums round twice only where these do not
        sums = (sums + np.float64(left[:, k, None]) * right[None, k]).astype(np.float32)
    expected = np.where(np.abs(c) < 2.0**-126, np.float32(0), c) + sums.sum(-1)
    assert np.array_equal(result, expected)
    assert result[0, 0] == 2**24 + 16  # in one sum, 2^24 would take up none of the ones
    assert not result[1, 0]
    exact = c + np.einsum("rkh,kch->rc", np.float64(left), np.float64(right))
    size = np.abs(c) + np.einsum("rkh,kch->rc", np.abs(np.float64(left)), np.abs(np.float64(right)))
    assert (np.abs(result - exact) <= 18 * 2.0**-24 * size + 2.0**-126).all()
    assert not cleared.any()


@pytest.mark.parametrize("misuse", ["unconfigured", "released", "unaligned"])
def test_what_a_processor_would_refuse_ends_the_process(check: Path, misuse: str) -> None:
    run = subprocess.run([check, misuse], capture_output=True, text=True)
    assert run.returncode < 0
    assert "emulated processor" in run.stderr
