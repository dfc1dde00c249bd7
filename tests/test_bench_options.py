"""Options of the benchmarks: bad ones are refused before anything is measured, and each says what it is."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchlib import options

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_numbers_are_at_least_one(text: str) -> None:
    assert options.number("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match=f"integer of at least 1, got '{text}'"):
        options.number(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "1e999"])
def test_amounts_are_finite_and_above_zero(text: str) -> None:
    assert options.positive("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match=f"a finite number above 0, got '{text}'"):
        options.positive(text)


def test_files_need_a_folder(tmp_path: Path) -> None:
    assert options.written(str(tmp_path / "rows.json")) == tmp_path / "rows.json"
    with pytest.raises(argparse.ArgumentTypeError, match=r"none/rows\.json: there is no such folder"):
        options.written(str(tmp_path / "none" / "rows.json"))
    with pytest.raises(argparse.ArgumentTypeError, match="a folder"):
        options.written(str(tmp_path))


def test_a_device_is_one_that_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parser = options.command(None, "--device")
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert parser.parse_args([]).device == ("cuda" if there else "cpu")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--device", "cuda"])
    assert "--device: there is no GPU that PyTorch can use" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.py")), ids=lambda path: path.stem)
def test_every_option_says_what_it_is(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [node for node in calls if node.args and isinstance(node.args[0], ast.Constant)]
    for call in (node for node in names if str(node.args[0].value).startswith("--")):  # type: ignore[attr-defined]
        if ast.unparse(call.func).split(".")[-1] in ("add", "add_argument"):
            assert "help" in {word.arg for word in call.keywords}, ast.unparse(call)


def test_no_demo_studies_are_named(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "pointing.py"), "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "prompts.yaml: not a readable task" in done.stderr and "make demo" in done.stderr
