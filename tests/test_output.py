"""What is written whole, and what is said where that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hlip.tasks.output import write_whole


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "1.json").write_bytes(b"old")
    (tmp_path / "latest.json").symlink_to("runs/1.json")
    (tmp_path / "next.json").symlink_to("runs/2.json")  # not there yet
    for link, target in {"latest.json": "1.json", "next.json": "2.json"}.items():
        write_whole(tmp_path / link, lambda file: file.write(b"new"))
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / "runs" / target).read_bytes() == b"new"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1.json", "2.json"]


def test_only_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match=f"{name}: not a regular file"):
            write_whole(tmp_path / name, lambda file: file.write(b"new"))
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "new", lambda file: 1 / 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("missing", ["matplotlib", "PIL"])
def test_what_plots_lack_is_named(missing: str) -> None:
    pytest.importorskip("matplotlib")
    lines = f"import sys; sys.modules[{missing!r}] = None; from hlip.tasks.output import new_figure; new_figure(1, 1)"
    shown = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False).stderr
    (error,) = [line for line in shown.splitlines() if line.startswith("ImportError: plots")]
    assert missing in error.partition("(")[2].partition(")")[0]
    assert error.endswith("pip install 'hlip-kernels[viz]'")
