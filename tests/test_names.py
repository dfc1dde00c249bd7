"""Names of models in commands, on the hub and of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hlip
from commands import run
from hlip.model.config import preset
from released_files import (
    MULTISCAN,
    NAMES,
    assert_same,
    seeded,
)

pytestmark = pytest.mark.usefixtures("small_models")


def test_convert_says_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = seeded("hlip-2025_10_08")
    torch.save({"state_dict": state}, source := tmp_path / "epoch_5.pt")
    assert run("convert", source, tmp_path / "ours") == 0
    printed = capsys.readouterr().out
    for words in ("hlip-2025_10_08, guessed from its shapes", "patch_size 6 x 16 x 16", "grid 8 x 14 x 14", "dinotxt",
                  "scan scan study", "BiomedBERT", "one per output", "written in layout hlip"):  # fmt: skip
        assert words in printed
    assert run("convert", tmp_path / "ours", tmp_path / "theirs", "--layout", "open_clip") == 0
    assert_same(load_file(tmp_path / "theirs" / "model.safetensors"), state)
    assert run("convert", tmp_path / "theirs", tmp_path / "ours") == 0  # replaces a model
    (tmp_path / "link").symlink_to("ours")
    (tmp_path / "ours" / "config.json").write_text('{"vision": "stale"}')
    assert run("convert", tmp_path / "theirs", tmp_path / "link") == 0  # what the link points to
    assert (tmp_path / "link").is_symlink() and "stale" not in (tmp_path / "ours" / "config.json").read_text()
    (tmp_path / "link").unlink()
    assert run("convert", tmp_path / "ours", tmp_path / "theirs", "--layout", "open_clip") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_5.pt", "ours", "theirs"]
    (tmp_path / "theirs" / "hlip" / "thesis.json").touch()  # not from us: the folder is somebody's work
    assert run("convert", tmp_path / "ours", tmp_path / "theirs", "--layout", "open_clip") == 2
    assert "theirs exists and is not a saved model" in capsys.readouterr().err


def test_convert_writes_nothing_when_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(seeded("vit_base_multiscan_h3_token1176"), source := tmp_path / "a.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(source.read_bytes()[:5000])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    out, name = tmp_path / "out", "vit_base_multiscan_h3_token1176"
    for args, message in [
        ([source, out], "choose with model= or --model"),
        ([source, out, "--model", name.replace("76", "67")], f"did you mean {name}"),
        ([source, out, "--model", MULTISCAN], "visual.trunk.spatial_posemb is"),
        ([broken, out], "broken.safetensors: not readable weights"),
        ([tmp_path / "none", out], "none: unknown model: no such file or folder"),
        ([source, tmp_path / "thesis", "--model", name], "thesis exists and is not a saved model"),
    ]:
        assert run("convert", *args) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "broken.safetensors", "thesis"]


def test_embed_takes_a_released_model(nifti_study: list[Path], tmp_path: Path) -> None:
    save_file(seeded(MULTISCAN), tmp_path / "a.safetensors")
    out = tmp_path / "emb.npz"
    assert run("embed", *nifti_study, "--model", tmp_path / "a.safetensors", "--out", out) == 0
    assert np.load(out)["embedding"].shape == (1, 32)


def test_a_name_that_nobody_has_in_a_process_that_has_imported_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hlip.cli", "convert", "nobody/nothing", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nobody/nothing: unknown model" in done.stderr and "Traceback" not in done.stderr


OWNERS = ["zch0414/{}", "Zch0414/{}"]
SPELLED = {
    "hlip-2025-10-08": "hlip-2025_10_08",
    "hlip-2025_10_08": "hlip-2025_10_08",
    "clip-vit_base-scan_study-dualdinotxt1568": "clip_vit_base_scan_study_dualdinotxt1568",
    "clip-vit_base-slice_scan_study-dualdinotxt1568": "clip_vit_base_slice_scan_study_dualdinotxt1568",
    "clip-vit_large-scan_study-dualdinotxt1568": "clip_vit_large_scan_study_dualdinotxt1568",
    "clip-vit_large-slice_scan_study-dualdinotxt1568": "clip_vit_large_slice_scan_study_dualdinotxt1568",
}


@pytest.mark.parametrize("name", SPELLED)
def test_names_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every spelling, of the model and of where its weights lie now."""
    import huggingface_hub

    asked: list[str] = []

    def snapshot_download(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = SPELLED[name]
    now = model if model.startswith("hlip") else next(n for n, m in SPELLED.items() if m == model)
    for owner in OWNERS:
        assert preset(owner.format(name)) == preset(name) == preset(name.replace("-", "_").upper()) == preset(model)
        with pytest.raises(ValueError, match=f"{owner.format(name)}: unknown model: .*not to be had from the hub"):
            hlip.HLIPModel.from_pretrained(owner.format(name))
        assert asked.pop() == f"zch0414/{now}"
    with pytest.raises(ValueError, match="unknown model"):
        hlip.HLIPModel.from_pretrained("Somebody/Else-Model")
    assert asked == ["Somebody/Else-Model"]
    assert hlip.create_model(owner.format(name)).config == preset(model)


@pytest.mark.parametrize("before", ["chestct_", "brainmri_", "headct_", ""])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if "h3" in name or "rope" in name or "slice_scan_study" in name]
)
def test_the_name_of_a_released_file_says_which_model(before: str, name: str, tmp_path: Path) -> None:
    """Where shapes alone do not: the levels, and whether positions are rotary."""
    torch.save({"state_dict": seeded(name)}, path := tmp_path / f"{before}{name}.pt")
    model, (_, how, guessed) = hlip.HLIPModel.load(str(path))
    assert (model.config, guessed) == (preset(name), True)
    assert how == f"{name}, as the file is called"
    assert preset(path.name) == preset(name)


def test_of_two_models_of_the_same_shapes_the_other_is_named(tmp_path: Path) -> None:
    rope = "ablate_rope_clip_vit_base_multiscan_h2_dinotxt1568"
    torch.save(seeded(rope), path := tmp_path / "a.pt")
    _, (config, how, guessed) = hlip.HLIPModel.load(str(path))
    assert (config.vision.positions, guessed) == ("tiled", True)
    assert f"{rope} fits too: name it with model= or --model if it is that" in how
    assert hlip.HLIPModel.from_pretrained(path, model=rope).config == preset(rope)
    model = hlip.HLIPModel.from_pretrained(path)
    with pytest.raises(ValueError, match=rf"the model is no {rope}: rotary positions is False, not True"):
        model.save_open_clip(tmp_path / "out", rope)
