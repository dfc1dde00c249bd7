"""The main job in small: every step of `make demo`, with as few studies as its figures allow."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hlip.model.clip import HLIPModel

DEMO = Path(__file__).parents[1] / "train" / "demo.py"


def demo(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), *map(str, options)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_the_demo_trains_evaluates_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = ["--train", 20, "--test", 20, "--steps", 2, "--processes", 1]
    done = demo("--data", tmp_path / "data", "--out", out, "--one_scan", *sizes)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    areas = {key: value for key, value in results.items() if key.startswith("auc_")}
    assert areas.keys() == {
        "auc_untrained", "auc_trained", "auc_shuffled_reports", "auc_one_scan", "auc_scan_types",
        "auc_trained_on_one_scan", "auc_trained_on_one_scan_shown_one",
    }  # fmt: skip
    assert all(0 <= value <= 1 for value in areas.values())
    assert results["studies"] == {"train": 20, "test": 20}
    for name in ("loss.png", "roc.png", "study.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    models = [HLIPModel.from_pretrained(run / "model") for run in (out, out / "shuffled_reports", out / "one_scan")]
    last = HLIPModel.from_pretrained(out / "checkpoints" / "step_00000002.pt")
    assert replace(last.config, text=models[0].config.text) == models[0].config  # which says where its BERT came from
    assert last.encode_text(["a mass"]).equal(models[0].encode_text(["a mass"]))
    weights = [model.visual.head.proj.weight for model in models]
    assert not any(weights[i].equal(weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert re.search(rf"trained on one random scan +{results['auc_trained_on_one_scan']:.3f}", done.stdout)


def test_a_demo_that_cannot_be_says_so(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    done = demo("--data", tmp_path / "data", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "demo.py: error: " in done.stderr and str(tmp_path / "data") in done.stderr
    done = demo("--data", tmp_path / "new", "--processes", 0)
    assert done.returncode == 2
    assert "--processes must be at least 1, got 0" in done.stderr
    assert not (tmp_path / "new").exists()
