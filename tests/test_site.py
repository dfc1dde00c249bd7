"""The documentation builds as a site, with warnings as errors, and its reference names what there is."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def build(out: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(out),
    ]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("index", "tutorial/index", "reference/kernels/index"):
        assert (tmp_path / f"{page}.html").exists()
    reference = (tmp_path / "reference" / "kernels" / "index.html").read_text(encoding="utf-8")
    assert 'id="hlip_kernels.hier_attention"' in reference and "its P prefix rows" in reference
    models = (tmp_path / "reference" / "model" / "index.html").read_text(encoding="utf-8")
    assert "<li><code>num_prefix</code>: prefix rows of a group" in models  # fields of docstrings are lists
    assert sorted(path.suffix for path in (tmp_path / "pictures").iterdir()) == [".svg"] * 4
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize("there", [False, True])
def test_the_page_of_results_is_shown_where_there_is_one(tmp_path: Path, there: bool) -> None:
    pytest.importorskip("mkdocs")
    pages = {"index.md": "# One", "measuring.md": "# Measuring"} | ({"benchmarks.md": "# Benchmarks"} if there else {})
    (tmp_path / "docs").mkdir()
    for name, text in pages.items():
        (tmp_path / "docs" / name).write_text(text, encoding="utf-8")
    nav = ["index.md", {"Build on it": [{"Measuring": "measuring.md"}]}]
    settings = {"site_name": "x", "nav": nav, "hooks": [str(ROOT / "docs" / "hooks.py")]}
    settings["validation"] = {"omitted_files": "warn"}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "benchmarks" / "index.html").exists() is there


def test_a_broken_link_stops_the_build(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("docs", "hlip", "hlip_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", copy)
    page = copy / "docs" / "log.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[gone](nowhere.md)\n", encoding="utf-8")
    done = build(tmp_path / "site", copy / "mkdocs.yml")
    assert done.returncode != 0 and "nowhere.md" in done.stderr


def test_the_reference_names_what_there_is() -> None:
    """mkdocstrings leaves out silently those of a list of members that do not exist."""
    found = []
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name, members in re.findall(
            r"^::: (\S+)\n(?:    options:\n      members: \[(.+)\]\n)?", text, re.MULTILINE
        ):
            home, _, last = name.rpartition(".")
            thing = importlib.import_module(name) if members else getattr(importlib.import_module(home), last, None)
            if thing is None:  # a module without members
                thing = importlib.import_module(name)
            found += [(name, member) for member in members.split(", ") if member]
            assert [each for each in members.split(", ") if each and not hasattr(thing, each)] == [], name
    assert len(found) > 40


def test_every_public_name_is_in_the_reference() -> None:
    import hlip
    import hlip_kernels

    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    aliases = {"Grid", "Level"}  # of types
    names = {*hlip.__all__, *hlip_kernels.__all__} - aliases
    assert [name for name in sorted(names) if not re.search(rf"^::: \S+\.{name}$", text, re.MULTILINE)] == []
