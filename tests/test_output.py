"""What is written whole, and what is said where that cannot be."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from commands import run
from hlip import HLIPModel
from hlip.embed.table import Embeddings
from hlip.evaluate.labels import read_labels
from hlip.model.config import MODELS
from hlip.output import shown_name, write_csv, write_whole
from hlip.prepare.tables import Table
from hlip.read.files import printable


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
        assert run(*arguments) == 0
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


FORMULAS = ["=1+1", "+1+cmd|' /C calc'!A0", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "  =1",
            "＝1", "＋1", "－1", "＠1", "'=1", "''=1", "'\t", "\u3000=1"]  # fmt: skip
HARMLESS = ["-0.5", "+3", "-1e-05", "1.2.840", "-", "a=b", "a-b", "'a", "it's", "", "né", "-.5"]


def test_no_cell_is_a_formula_and_all_are_read_again(tmp_path: Path) -> None:
    """Names of columns, ids and other texts; numbers stay numbers for whoever reads them."""
    texts = [*FORMULAS, *HARMLESS]
    rows = [["study", "=a", "-b"], *([f"{text}|{i}", text, -i / 2] for i, text in enumerate(texts))]
    write_csv(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open(newline="") as file:
        header, *written = csv.reader(file)
    assert header == ["study", "'=a", "'-b"]
    assert [row[2] for row in written] == [str(-i / 2) for i in range(len(texts))]
    assert [row[1] for row in written] == [f"'{text}" for text in FORMULAS] + HARMLESS
    for cell in (cell for row in written for cell in row[:2]):
        assert not cell.lstrip("\t\r\n \u3000").startswith(tuple("=@＝＋－＠")), cell
    table = Table.read(tmp_path / "t.csv")
    assert table.columns == ("=a", "-b")
    assert [row["=a"] for _, _, row in table.rows] == texts
    assert [uid for _, uid, _ in table.rows] == [printable(f"{text}|{i}".strip()) for i, text in enumerate(texts)]


def test_ids_that_are_formulas_join_with_what_was_written_of_them(tmp_path: Path) -> None:
    uids = ["=HYPERLINK(1)", "-5", "@x", "'=y", "plain"]
    write_csv(tmp_path / "scores.csv", [["study", "+class"], *([uid, i % 2] for i, uid in enumerate(uids))])
    assert list(read_labels(tmp_path / "scores.csv", ["+class"])) == uids


@pytest.mark.parametrize(
    ("given", "shown"),
    [("/home/ann/models/mine", "mine"), ("/home/ann/models/mine/", "mine"), ("here/..", "HERE"),
     ("them/model", "them/model"), ("open_clip:hf-hub:them/model", "open_clip:hf-hub:them/model"),
     ("open_clip:/home/ann/clip", "open_clip:clip"), (".", "HERE"), ("/data/a:b", "a:b"), ("here/model", "model")],
)  # fmt: skip
def test_results_say_what_a_model_is_called_and_not_where_it_lies(
    given: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shown_name(given) == shown.replace("HERE", tmp_path.name)
    assert shown_name(Path(given)) == shown.replace("HERE", tmp_path.name)


def test_nothing_that_is_to_be_shared_says_where_it_was_made(
    tmp_path: Path, model_folder: Path, nifti_study: list[Path]
) -> None:
    """Pages, reports, tables and pictures of all commands; also of a study that could not be read."""
    pytest.importorskip("sklearn")
    home, out = tmp_path / "home" / "ann", tmp_path / "out"
    shutil.copytree(model_folder, home / "secret-model")
    config = home / "secret-model" / "config.json"
    for other in range(4):
        shutil.copytree(nifti_study[0].parent, home / f"p{other}" / "study")
    (home / "bad" / "study").mkdir(parents=True)
    (home / "bad" / "study" / "a.nii.gz").write_text("no image")
    paths = [home / name / "study" for name in ("p0", "p1", "bad")]
    model = ["--model", home / "secret-model"]
    labels = [["study", "a", "b"], *([f"p{i}", i % 2, i // 2] for i in range(4))]
    write_csv(home / "labels.csv", labels)
    (home / "task.yaml").write_text(json.dumps({"kind": "similarity", "classes": {"a": "x", "b": "y"}}))
    (home / "list.json").write_text(
        json.dumps({f"p{i}": {"scans": [f"p{i}/study/scan_{i % 2}.nii.gz"]} for i in range(4)})
    )
    for arguments, status in (
        (["interpret", paths[0], *model, "--target", "x", "--against", "y", "--out", out / "page"], 0),
        (["embed", *paths, *model, "--out", out / "e.npz", "--workers", 0], 3),
        (["embed", *paths, *model, "--out", out / "e.parquet", "--workers", 0], 3),
        (["zeroshot", *paths[:2], *model, "--prompt", "x", "--prompt", "y", "--out", out / "z.json"], 0),
        (["eval", home / "task.yaml", "--data", home / "list.json", "--labels", home / "labels.csv", *model, "--out",
          out / "eval", "--workers", 0], 0),
    ):  # fmt: skip
        assert run(*arguments) == status
    assert config.exists()
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {"page.html", "relevance.json", "montage.png", "metrics.json", "e.npz", "z.json"} <= {
        p.name for p in written
    }
    for path, content in written.items():
        if path.suffixes[-2:] == [".nii", ".gz"]:
            content = gzip.decompress(content)
        if path.suffix in (".npz", ".parquet"):
            table = Embeddings.read(path) if path.name != "relevance.npz" else None
            content = json.dumps([table.study.tolist(), table.facts]).encode() if table else content
        for word in (str(tmp_path), "home/ann"):
            assert word.encode() not in content, (path, word)
    assert json.loads((out / "page" / "relevance.json").read_text())["model"] == "secret-model"
    assert json.loads((out / "eval" / "metrics.json").read_text())["model"] == "secret-model"
    assert set(json.loads((out / "z.json").read_text())) == {"p0/study", "p1/study"}


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
    lines = f"import sys; sys.modules[{missing!r}] = None; from hlip.output import new_figure; new_figure(1, 1)"
    shown = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False).stderr
    (error,) = [line for line in shown.splitlines() if line.startswith("ImportError: plots")]
    assert missing in error.partition("(")[2].partition(")")[0]
    assert error.endswith("pip install 'hlip-kernels[viz]'")
