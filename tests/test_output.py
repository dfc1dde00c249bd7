"""What is written whole, and what is said where that cannot be."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hlip import HLIPModel, cli
from hlip.model.config import MODELS
from hlip.tasks.output import write_csv, write_whole


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "1.json").write_bytes(b"old")
    (tmp_path / "latest.json").symlink_to("runs/1.json")
    (tmp_path / "next.json").symlink_to("runs/2.json")  # not there yet
    for link, target in {"latest.json": "1.json", "next.json": "2.json"}.items():
        write_whole(tmp_path / link, lambda file: file.write(b"new"))
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / "runs" / target).read_bytes() == b"new"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1.json", "2.json"]


@pytest.mark.parametrize("there", [True, False])
def test_the_file_takes_the_place_of_a_link_that_leads_out(there: bool, tmp_path: Path) -> None:
    """Of one to a file, to nothing yet, and by way of another link."""
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/out")  # the folder itself may be a link
    if there:
        (tmp_path / "mine.json").write_bytes(b"dear")
    (tmp_path / "out" / "results.json").symlink_to(tmp_path / "mine.json")
    (tmp_path / "out" / "again.json").symlink_to("results.json")
    for name in ("again.json", "results.json"):
        write_whole(tmp_path / "out" / name, lambda file: file.write(b"new"))
        assert (tmp_path / "disk" / "out" / name).read_bytes() == b"new"
        assert not (tmp_path / "out" / name).is_symlink()
    assert (tmp_path / "mine.json").exists() == there
    assert not there or (tmp_path / "mine.json").read_bytes() == b"dear"


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_says_who_may_read(
    umask: int, tiny_model: HLIPModel, nifti_study: list[Path], tmp_path: Path
) -> None:
    """Models in both layouts, a store and a part of it, embeddings, a table, a page."""
    pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_model.config.preprocess.to_dict()))
    tiny_model.save_pretrained(out / "model")
    store, study = out / "store", nifti_study[0].parent
    for arguments in (
        ["prepare", study, "--out", store, "--recipe", recipe, "--workers", 1],
        ["store", "merge", store, "--out", out / "merged"],
        ["store", "split", store, "--fractions", 1, "--out", out / "split"],
        ["embed", store, "--model", out / "model", "--out", out / "e.npz", "--workers", 0],
        ["embed", store, "--model", out / "model", "--out", out / "e.parquet", "--workers", 0],
        ["interpret", study, "--model", out / "model", "--target", "a tumour", "--out", out / "page"],
    ):
        assert cli.main(list(map(str, arguments))) == 0
    write_csv(out / "table.csv", [["study"], ["a"]])
    paths = sorted(out.rglob("*"))
    modes = {str(path.relative_to(out)): stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert {"model/model.safetensors", "store/shards/00000.safetensors", "split/manifest.arrow", "merged/store.json",
            "page/page.html", "page/relevance.npz", "e.npz", "e.parquet"} <= modes.keys()  # fmt: skip
    assert modes == {str(path.relative_to(out)): (0o777 if path.is_dir() else 0o666) & ~umask for path in paths}


def test_the_umask_says_who_may_read_a_model_in_the_released_layout(
    umask: int, small_models: None, tmp_path: Path
) -> None:
    model = HLIPModel(MODELS["hlip-2025_10_08"][0])
    model.save_open_clip(tmp_path / "out")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~umask}


def test_only_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match=f"{name}: not a regular file"):
            write_whole(tmp_path / name, lambda file: file.write(b"new"))
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "new", lambda file: 1 / 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("missing", ["matplotlib", "PIL"])
def test_what_plots_lack_is_named(missing: str) -> None:
    pytest.importorskip("matplotlib")
    lines = f"import sys; sys.modules[{missing!r}] = None; from hlip.tasks.output import new_figure; new_figure(1, 1)"
    shown = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False).stderr
    (error,) = [line for line in shown.splitlines() if line.startswith("ImportError: plots")]
    assert missing in error.partition("(")[2].partition(")")[0]
    assert error.endswith("pip install 'hlip-kernels[viz]'")
