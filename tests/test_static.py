"""The tile table compiled ahead of time: what counts as a fault, the assembler's own warnings, versions of Triton."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hlip_kernels.tiles import ARCHITECTURES, BLOCK_D, KINDS, SAME_TILES, Row, built_in_config

pytest.importorskip("triton")
import static_versions
from benchlib import machine_code, static
from benchlib import page as pages

BENCH = Path(__file__).parents[1] / "bench"

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
COMPILING["PYTHONPATH"] = f"{BENCH.parent}{os.pathsep}{BENCH}"
SASS = """
.L_x_0:
 /*0000*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
 /*0010*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
 /*0020*/ @P0 BRA `(.L_x_0) ;
.L_x_1:
 /*0030*/ HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
 /*0040*/ @P0 BRA `(.L_x_1) ;
"""
ROW: dict[str, Any] = dict.fromkeys(static.COLUMNS) | {
    "arch": "sm_90", "dtype": "bf16", "head_dim": 64, "kernel": "dq", "rows": 128, "streamed": 64, "warps": 8,
    "stages": 2, "registers": 125, "stack_bytes": 0, "occupancy": 2, "matrix_instructions": 12, "serialised": False,
    "loop_instructions": 237, "dense_loop_instructions": 242, "dense_serialised": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_newer_architectures_use_the_tiles_of_their_like(kind: str) -> None:
    assert not SAME_TILES.keys() & set(ARCHITECTURES)
    for arch, like in SAME_TILES.items():
        for head_dim in BLOCK_D:
            assert built_in_config(Row(arch, kind, head_dim)) == built_in_config(Row(like, kind, head_dim))


def test_an_unknown_architecture_uses_the_default_tiles_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hlip_kernels.tiles"):
        for head_dim in (64, 128):
            assert built_in_config(Row("sm_777", "half", head_dim)) == built_in_config(Row("sm_80", "half", head_dim))
        built_in_config(Row("sm_103", "half", 64))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["sm_777"]


def test_the_loop_over_whole_tiles_is_read_and_must_not_be_serialised() -> None:
    facts = machine_code.read_sass(SASS)
    assert facts == {"matrix_instructions": 3, "loop_instructions": 3, "serialised": False}
    facts = machine_code.read_sass(SASS.replace("R24 ;", "R24, gsb0 ;"))
    assert facts["serialised"]
    for fault in (facts, {"warning": "C7515"}):
        row = ROW | fault
        like_dense = row | {"dense_serialised": True}
        for faulty, version in ((row, "3.3.1"), (row, "3.10.0"), (like_dense, "3.10.0")):
            (line,) = static.faults([faulty], version)
            assert line.startswith("sm_90 bf16 64 dq: every matrix instruction waits")
        assert static.faults([like_dense], "3.3.1") == []  # dense attention is serialised there with any tile
    assert static.faults([ROW], "3.9.0") == []


def test_assemblers_are_asked_for_architectures() -> None:
    assert machine_code.can_assemble("sm_90")
    assert not machine_code.can_assemble("sm_9")


@pytest.mark.slow
def test_a_tile_without_enough_registers_is_serialised_and_the_assembler_says_so() -> None:
    code = (
        "import json\nfrom benchlib import static\nfrom hlip_kernels.tiles import Tile\n"
        "tiles = Tile(128, 64, 4, 3), Tile(128, 128, 4, 2)\n"
        "print(json.dumps([static.compile_case(static.Attention('sm_90', 'bf16', 64, 'forward', x)) for x in tiles]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=COMPILING, capture_output=True, text=True, check=True)
    good, bad = json.loads(done.stdout)
    assert not good["serialised"] and good["warning"] is None
    assert bad["serialised"] and bad["warning"].startswith("C75")
    assert static.faults([good], "3.9.0") == []
    assert any("waits" in line for line in static.faults([bad], "3.9.0"))


@pytest.mark.slow
def test_architectures_with_tiles_of_their_like_compile(tmp_path: Path) -> None:
    words = ["--static", "--arch", "sm_103", "gfx950", "--dtype", "bf16", "--head-dim", "64", "--width"]
    words += ["--workers", "1", "--json", str(tmp_path / "static.json")]
    subprocess.run([sys.executable, str(BENCH / "attention.py"), *words], env=COMPILING, check=True)
    rows = json.loads((tmp_path / "static.json").read_text())
    assert [row["arch"] for row in rows] == ["sm_103"] * 3 + ["gfx950"] * 3
    assert all(row["stack_bytes"] == 0 and row["matrix_instructions"] for row in rows)


PROVENANCE = {"device": "cpu", "threads": 2, "commit": "abc", "utc": "2026-11-30T00:00:00+00:00"}


def rows_of(version: str, **changes: Any) -> dict[str, Any]:
    return ROW | {"kernels": "old", "versions": {"triton": version}, **PROVENANCE, **changes}


@pytest.mark.slow
def test_a_version_with_rows_of_the_same_kernels_is_passed_over(tmp_path: Path) -> None:
    """Nothing is installed; a fault of a committed row still fails."""
    code = "import static_versions; print(static_versions.digest())"
    kernels = subprocess.check_output([sys.executable, "-c", code], env=COMPILING, text=True).strip()
    results = tmp_path / "static.jsonl"
    for stack_bytes, status in ((0, 0), (8, 1)):
        row = rows_of("3.6.0", kernels=kernels, stack_bytes=stack_bytes)
        results.write_text(json.dumps(row) + "\n")
        words = [sys.executable, str(BENCH / "static_versions.py"), "--triton", "3.6.0", "--results", str(results)]
        words += ["--folder", str(tmp_path / "triton")]
        done = subprocess.run(words, env=COMPILING, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert ("8 bytes spill" in done.stdout) == bool(status)
    assert not (tmp_path / "triton").exists()
    assert json.loads(results.read_text()) == row


def test_rows_of_a_version_are_told_apart() -> None:
    rows = [rows_of("3.6.0"), rows_of("3.9.0"), rows_of("3.6.0", kernel="dkdv")]
    assert static_versions.split(rows, "3.6.0") == ([rows[1]], [rows[0], rows[2]])


def test_the_page_counts_spills_and_shows_loops_beside_dense_ones(tmp_path: Path) -> None:
    rows = [
        rows_of("3.6.0"),
        rows_of("3.6.0", kernel="forward", loop_instructions=300, dense_loop_instructions=250),
        rows_of("3.6.0", arch="sm_80", stack_bytes=8),
        rows_of("3.10.0", serialised=True, dense_serialised=True),
    ]
    page = pages.render({"static": rows}, tmp_path)
    for line in (
        "| 3.6.0 | sm_90 | 2 | 0 | 0 | 0 |",
        "| 3.6.0 | sm_80 | 1 | 1 | 0 | 0 |",
        "| 3.10.0 | sm_90 | 1 | 0 | 1 | 1 |",
        "| 3.6.0 | dq | 64 | 128x64, 8 warps, 2 stages | 125 | 237 | 242 | 0.98 | 0 | no | 2 |",
        "by kernel and head dim: forward 64 on sm_90 (1.20).",
    ):
        assert line in page
    assert page.index("| 3.10.0 |") < page.index("| 3.6.0 |")
