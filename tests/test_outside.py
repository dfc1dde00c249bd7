"""Names of studies, scans and classes that would lead out of the output folder, through the commands that write."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nibabel")
pytest.importorskip("pyarrow")

import hostile_files as bad
from hlip import cli
from hlip.data.store import Store
from test_hostile import Sandbox

UIDS = ["../escaped", "../../escaped", "/{root}/escaped", "a/b", "a/../../escaped", "..", ".", "C:\\x", "~", "-rf",
        "$(touch escaped)", "é\u202e", "x" * 300]  # fmt: skip
CLASSES = ["../escaped", "/{root}/escaped", "a/b"]


def test_no_name_leads_out(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    box = Sandbox.make(tmp_path)
    uids = [uid.format(root=box.root) for uid in UIDS]
    classes = [name.format(root=box.root) for name in CLASSES]
    listed = {}
    for k, uid in enumerate(uids):
        bad.save(box.root / "input" / f"{k}.nii.gz", np.roll(bad.real_volume(), k, 0))
        listed[uid] = {"scans": [f"{k}.nii.gz"], "report": ["Impression: none."]}
    (box.root / "input" / "list.json").write_text(json.dumps(listed))
    (box.root / "input" / "recipe.yaml").write_text("size: [4, 16, 16]\ncrop: null\n")
    task = {"kind": "similarity", "classes": dict.fromkeys(classes, "bleeding")}
    (box.root / "input" / "task.yaml").write_text(json.dumps(task))
    with (box.root / "input" / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["study", *classes], *([uid, k % 2, k // 2 % 2, k % 2] for k, uid in enumerate(uids))]
        )
    monkeypatch.chdir(box.root / "here")
    before = box.listing()
    out, given = tmp_path / "out", box.root / "input"

    def run(*arguments: object) -> int:
        return cli.main(list(map(str, arguments)))

    out.mkdir()
    store = out / "store"
    assert run("prepare", given / "list.json", "--out", store, "--recipe", given / "recipe.yaml", "--workers", 1) == 0
    assert len(Store(store)) == len(uids)
    assert run("store", "split", store, "--fractions", 0.5, 0.5, "--out", out / "one", out / "two") == 0
    assert run("embed", store, "--model", model_folder, "--out", out / "table.npz", "--workers", 0, "--scans") == 0
    assert run("eval", given / "task.yaml", "--data", store, "--labels", given / "labels.csv", "--model", model_folder,
               "--out", out / "figures", "--workers", 0) == 0  # fmt: skip
    capsys.readouterr()
    assert box.listing() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box", "out"]
    assert sorted(path.name for path in out.iterdir()) == ["figures", "one", "store", "table.npz", "two"]
    assert not list(tmp_path.rglob("*escaped*"))
