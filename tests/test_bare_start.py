"""Every benchmark starts from a checkout, with torch and triton and little else installed."""

from __future__ import annotations

import ast
import importlib.metadata
import json
from pathlib import Path

import pytest

import bare
import hlip_kernels

PROGRAMS = sorted(path.name for path in bare.BENCH.glob("*.py"))
SMALL = (
    "attention.py --cases slice-99 --dtype fp32 --heads 1 --head-dim 16 --rounds 1 --modes forward --threads 1"
    " --memory-limit 0.1 --json {rows}/attention.json",
    "encoder.py --scaling batch --sizes 1 --width 64 --rounds 1 --models hlip swin --modes inference --threads 1"
    " --json {rows}/encoder.json",
    "layer.py --scans 1 --rounds 1 --dtype fp32 --threads 1 --results {rows}/layer.json",
    "packing.py --studies=2 --rounds=1 --depth=3 --width=64 --grid 2 2 2 --patch 2 4 4 --json {rows}/packing.json",
    "relevance.py --scans 1 --grid 2 4 4 --heads 1 --json {rows}/relevance.json",
    "check.py --device cpu --size tiny --stages environment norm --out {rows}/check.md",
)
NEED_MORE = {  # and say so in a line
    f"plot.py --results {bare.BENCH}/results --out {{rows}}": "pip install 'hlip-kernels[viz]'",
    "pointing.py": "make demo makes studies and model",
    "prepare.py": "pip install 'hlip-kernels",
    "store.py --throughput": "pip install 'hlip-kernels",
    "compare.py --base none": "git worktree add",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def ended(rows: Path) -> dict[str, tuple[int, str]]:
    """Exit status and messages of each command."""
    commands = [*(f"{name} --help" for name in PROGRAMS), *SMALL, *NEED_MORE]
    return dict(zip(commands, bare.run([command.format(rows=rows).split() for command in commands]), strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_needs_nothing(name: str, ended: dict[str, tuple[int, str]]) -> None:
    status, errors = ended[f"{name} --help"]
    assert status == 0, errors


@pytest.mark.parametrize("command", SMALL, ids=lambda command: command.split()[0])
def test_a_small_run_works(command: str, rows: Path, ended: dict[str, tuple[int, str]]) -> None:
    status, errors = ended[command]
    assert status == 0, errors
    text = Path(command.split()[-1].format(rows=rows)).with_suffix(".json").read_text()
    content = json.loads(text.splitlines()[0] if command.startswith("layer.py") else text)
    row = content[0] if isinstance(content, list) else content.get("facts", content)
    assert row["versions"]["hlip-kernels"] == hlip_kernels.__version__ and row["commit"]


@pytest.mark.parametrize("command", NEED_MORE, ids=lambda command: command.split()[0])
def test_what_needs_more_says_so_in_a_line(command: str, ended: dict[str, tuple[int, str]]) -> None:
    status, errors = ended[command]
    assert status == 2 and NEED_MORE[command] in errors.splitlines()[-1] and "Traceback" not in errors, errors


def test_the_version_is_the_one_that_is_installed() -> None:
    text = (bare.ROOT / "setup.py").read_text()
    assert not [node for node in ast.walk(ast.parse(text)) if getattr(node, "value", None) == hlip_kernels.__version__]
    assert importlib.metadata.version("hlip-kernels") == hlip_kernels.__version__
    assert Path(hlip_kernels.__file__).parents[1] == bare.ROOT
