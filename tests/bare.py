"""Runs benchmarks given as JSON, as on a machine that has little installed: each in a fork of this process, in which
packages are missing and nothing says that this library is installed.

Prints, as JSON, the exit status of each and what it wrote to stderr. Processes that a benchmark starts lack the same,
as `sitecustomize.py` in a folder of PYTHONPATH runs `hide` in all of them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
MISSING = (
    "nibabel", "matplotlib", "pydicom", "sklearn", "monai", "scipy", "SimpleITK", "pyarrow", "ray", "submitit", "PIL",
    "tensorboard", "nilearn", "pandas", "timm", "transformers", "xformers", "torchvision",
)  # fmt: skip


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name: str, *rest: Any) -> ModuleSpec | None:
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, *rest)


def hide() -> None:
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
    distribution = importlib.metadata.distribution

    def of_others(name: str) -> importlib.metadata.Distribution:
        if name.lower().replace("_", "-") in ("hlip-kernels", "scikit-learn", *map(str.lower, MISSING)):
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    importlib.metadata.distribution = of_others


def run(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and stderr of benchmarks, each a file's name and its options."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text("import bare\n\nbare.hide()\n")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT), str(ROOT / "tests"), str(BENCH)]),
        }
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(commands)],
            env=environment, capture_output=True, text=True, check=False, cwd=folder,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(status, errors) for status, errors in json.loads(done.stdout)]


def start(name: str, *options: str) -> int:
    sys.argv = [name, *options]
    runpy.run_path(str(BENCH / name), run_name="__main__")
    return 0


if __name__ == "__main__":
    import functools

    from without import in_fork

    print(json.dumps([in_fork(functools.partial(start, *command)) for command in json.loads(sys.argv[1])]))
