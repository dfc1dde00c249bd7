"""One change, one place: what people add to the library, made in a copy of it, touches one file and works.

Each is a commit on a branch of the copy, whose files and lines are counted; then a program uses what was added.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Change(NamedTuple):
    """What someone adds.

    edits: text to put in front of another in a file; the whole file's where there is none.
    lines: how many lines a file gains at most, and by which file.
    program: Python that fails unless the addition works; its working folder is empty.
    """

    edits: dict[str, tuple[str, str]]
    lines: dict[str, int]
    program: str


TASK = """\
kind: similarity
classes:
  haemorrhage: [a haemorrhage, blood]
  normal: a normal study
templates: "This study shows: {}."
"""
BACKEND = '''\
"""Attention by another backend under another name."""

from __future__ import annotations

from .reference import Reference


class Mine(Reference):
    name = "mine"
'''
RULE = """\
    max_slices: int = later(2**31 - 1)
"""
RULE_CHECK = """\
    if slices > rules.max_slices:
        raise ScanError(str(path), f"{slices} slices, expected at most {rules.max_slices}", "many_slices")
"""
OBJECTIVE = '''\
class Cosine(Clip):
    """A study is compared with its report alone, by the angle between them."""

    def total(self, by_image: Tensor, by_text: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        return -by_image.diagonal(dim1=1, dim2=2).sum()


'''
MODEL = """\
    "vit_base_mine_token1176": _published("slice+scan", (8, 16, 16), (6, 14, 14), "a new release"),
"""
POSITIONS = '''\
class Flat(Tiled):
    """All patches of a slice have the position of their slice."""

    def table(self, grid: Grid, width: int) -> Tensor:
        return sincos(np.arange(grid[0]), width)[:, None, None].expand(*grid, width).contiguous()


'''
CONFIG = """
import torch, hlip
from hlip.model.config import ModelConfig, TextConfig, VisionConfig
vision = dict(width=24, heads=2, patch_size=(4, 8, 8), grid=(2, 2, 2), levels=("scan", "study"))
study = hlip.Study("a", [torch.zeros(8, 16, 16, dtype=torch.uint8)])
"""
CHANGES = {
    "task": Change(
        {"hlip/evaluate/benchmarks/mine.yaml": (TASK, "")},
        {"hlip/evaluate/benchmarks/mine.yaml": 5},
        "from hlip.evaluate.tasks import list_tasks, load_task\n"
        "assert 'mine' in list_tasks() and list(load_task('mine').classes) == ['haemorrhage', 'normal']\n"
        "from hlip.cli.main import main\n"
        "try: main(['eval', '--help'])\n"
        "except SystemExit as end: assert not end.code\n",
    ),
    "backend": Change(
        {"hlip_kernels/backends/mine.py": (BACKEND, ""),
         "hlip_kernels/backends/__init__.py": ('    "mine:Mine",\n', '    "reference:Reference",\n')},
        {"hlip_kernels/backends/mine.py": 9, "hlip_kernels/backends/__init__.py": 1},
        "import torch\n"
        "from hlip_kernels import StudyLayout, available_backends, hier_attention\n"
        "layout = StudyLayout.from_grids([[(2, 2, 2)]], 1)\n"
        "qkv = torch.randn(layout.num_rows('scan'), 3, 2, 8)\n"
        "assert 'mine' in available_backends()\n"
        "one, other = (hier_attention(qkv, layout, 'scan', backend=name) for name in ('mine', 'reference'))\n"
        "assert torch.equal(one, other)\n",
    ),
    "rule": Change(
        {"hlip/read/rules.py": (RULE, "\n    def __post_init__"),
         "hlip/read/rules.py#check": (RULE_CHECK, "\n\ndef check_grid")},
        {"hlip/read/rules.py": 3},
        "import json, nibabel, numpy as np, hlip\n"
        "from pathlib import Path\n"
        "from hlip.cli.main import main\n"
        "for slices in (6, 12):\n"
        "    Path(f's/{slices}').mkdir(parents=True)\n"
        "    array = np.random.default_rng(0).integers(0, 999, (20, 20, slices)).astype('int16')\n"
        "    nibabel.save(nibabel.Nifti1Image(array, np.diag([1., 1., 3., 1.])), f's/{slices}/a.nii.gz')\n"
        "Path('r.yaml').write_text('size: [8, 18, 18]\\ncrop: [16, 16]\\nrules: {max_slices: 8}\\n')\n"
        "assert main(['prepare', 's', '--out', 'store', '--recipe', 'r.yaml']) == 3\n"
        "assert json.loads(Path('store/report.json').read_text())['rejected']['many_slices'] == 1\n"
        "assert hlip.load_recipe('brain-mri').hash == '{brain_mri}'\n",
    ),
    "objective": Change(
        {"hlip/objective.py": (OBJECTIVE, "if TYPE_CHECKING:\n    ObjectiveName")},
        {"hlip/objective.py": 7},
        CONFIG + "from hlip.objective import OBJECTIVES, Outputs\n"
        "config = ModelConfig(VisionConfig(**vision), TextConfig(), embed_dim=8, objective='cosine')\n"
        "assert ModelConfig.from_dict(config.to_dict()) == config\n"
        "rows = torch.nn.functional.normalize(torch.randn(3, 1, 8), dim=-1)\n"
        "loss = OBJECTIVES['cosine'].loss(Outputs(rows, rows, torch.ones(1)))\n"
        "torch.testing.assert_close(loss, torch.tensor(-1.0))\n",
    ),
    "model": Change(
        {"hlip/model/config.py": (MODEL, '    # Small enough to train on two CPU cores')},
        {"hlip/model/config.py": 1},
        "import hlip\n"
        "assert 'vit_base_mine_token1176' in hlip.list_models()\n"
        "from hlip.model.config import preset\n"
        "assert set(preset('vit_base_mine_token1176').vision.levels) == {'slice', 'scan'}\n",
    ),
    "positional embedding": Change(
        {"hlip/model/positions.py": (POSITIONS, "if TYPE_CHECKING:\n    PositionsName")},
        {"hlip/model/positions.py": 7},
        CONFIG + "from hlip.model.encoder import StudyEncoder\n"
        "encoder = StudyEncoder(VisionConfig(**vision, positions='flat'))\n"
        "assert encoder(hlip.pack([study], (4, 8, 8))).shape[-1] == 24\n"
        "config = ModelConfig(VisionConfig(**vision, positions='flat'), embed_dim=8)\n"
        "assert ModelConfig.from_dict(config.to_dict()) == config\n",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the packages alone."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("hlip", "hlip_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "--quiet", "--initial-branch", "main")
    commit(folder, "The library as it is")
    return folder


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    return subprocess.check_output(["git", *who, *words], cwd=folder, text=True)


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", message)


def apply(change: Change, folder: Path) -> None:
    for name, (text, before) in change.edits.items():
        path = folder / name.partition("#")[0]
        whole = path.read_text(encoding="utf-8") if before else ""
        assert whole.count(before) == 1 or not before, f"{name}: {before!r} stands there {whole.count(before)} times"
        path.write_text(whole.replace(before, text + before) if before else text, encoding="utf-8")


@pytest.mark.parametrize("name", CHANGES)
def test_an_addition_is_one_change(name: str, copy: Path, tmp_path: Path, published_hash: Callable[[str], str]) -> None:
    change = CHANGES[name]
    git(copy, "checkout", "--quiet", "-B", f"add-{name.replace(' ', '-')}", "main")
    apply(change, copy)
    commit(copy, f"Add a {name}")
    rows = [line.split("\t") for line in git(copy, "diff", "--numstat", "main", "HEAD").splitlines()]
    assert {path: int(added) for added, _, path in rows} == change.lines
    assert all(removed == "0" for _, removed, _ in rows)
    program = change.program.replace("{brain_mri}", published_hash("brain-mri"))
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def published_hash() -> Callable[[str], str]:
    from hlip.prepare.recipe import load_recipe

    return lambda name: load_recipe(name).hash
