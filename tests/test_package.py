"""What is shipped: the source distribution and the wheel, built here from a copy of the tree."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PACKAGES = ("hlip", "hlip_kernels")
SOURCES = "hlip_kernels/native/src"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds, as building leaves files behind."""
    tree = tmp_path_factory.mktemp("package") / "tree"
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in (*PACKAGES, "tests", "train", "bench"):
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, tree)
    return tree


def setup(tree: Path, *arguments: str, **environment: str) -> str:
    """Run setup.py as build frontends do, but in this environment; its output."""
    command = [sys.executable, "-W", "ignore", "setup.py", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True, env=environment or None)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    """The source distribution, unpacked."""
    setup(tree, "-q", "sdist")
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(tree.parent, filter="data")
    return tree.parent / archive.name.removesuffix(".tar.gz")


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_source_distribution_holds_what_builds_and_nothing_else(tree: Path, sdist: Path) -> None:
    found = files_of(sdist)
    expected = {f"{name}/{path}" for name in PACKAGES for path in files_of(tree / name)}
    expected |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "MANIFEST.in"}
    made = {path for path in found if re.match(r"PKG-INFO|setup\.cfg|hlip_kernels\.egg-info/", path)}
    assert found - made == expected
    assert {
        "attention_avx2.cpp",
        "attention_forward_amx.cpp",
        "norm_gelu_generic.cpp",
        "attention_vector.h",
    } <= files_of(sdist / SOURCES)


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> zipfile.ZipFile:
    """Built from the source distribution, with a compiler that fails: the library is optional."""
    log = setup(sdist, "bdist_wheel", CC="false", CXX="false", PATH="/nowhere")
    assert re.search(r"building extension .*libhlip_native.* failed", log)
    (path,) = (sdist / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_packages_and_needs_no_compiler(sdist: Path, wheel: zipfile.ZipFile) -> None:
    assert re.fullmatch(r"hlip_kernels-[\d.]+-py3-none-linux_\w+\.whl", Path(wheel.filename or "").name)
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    packages = {f"{name}/{path}" for name in PACKAGES for path in files_of(sdist / name)}
    assert found == {path for path in packages if not path.startswith(SOURCES)}
    assert {"hlip/explain/relevance.html", "hlip/py.typed", "hlip_kernels/py.typed"} <= found
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(path))
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# hlip-kernels")  # type: ignore[union-attr]
    accepted = SpecifierSet(metadata["Requires-Python"])
    named = re.findall(
        r"Programming Language :: Python :: (3\.\d+)$", "\n".join(metadata.get_all("Classifier", [])), re.M
    )
    assert named == [version for version in ("3.9", "3.10", "3.11", "3.12", "3.13") if version in accepted]

    extras = set(metadata.get_all("Provides-Extra", []))
    needed = [Requirement(each) for each in metadata.get_all("Requires-Dist", [])]

    def of(extra: str) -> set[str]:
        return {each.name for each in needed if each.marker and each.marker.evaluate({"extra": extra})}

    assert all(of(extra) for extra in extras)
    assert of("all") == set().union(
        *(of(extra) for extra in extras - {"all", "baselines", "dev", "docs", "fuzz", "gpu", "scale"})
    )
    said = set(
        re.findall(
            r"hlip-kernels\[(\w+)\]", "".join(p.read_text() for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
        )
    )
    assert said and said <= extras  # what messages tell people to install
    entries = wheel.read(path.replace("METADATA", "entry_points.txt")).decode()
    assert "hlip = hlip.cli.main:main" in entries
