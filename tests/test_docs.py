"""README and docs are true: their blocks run, their commands parse, their messages are those of the code."""

from __future__ import annotations

import ast
import csv
import dataclasses
import functools
import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import doc_blocks
from commands import run
from doc_blocks import ROOT, Block, blocks, check_command, check_python, commands, pages, run_blocks
from hlip import HLIPModel, load_recipe
from hlip.embed.inputs import StoreStudies
from hlip.embed.loop import Options, embed
from hlip.evaluate.tasks import load_task
from hlip.prepare.discover import find_studies
from hlip.prepare.reports import SectionRules
from hlip.train.config import RECIPES, TrainConfig
from hlip.train.flags import FLAGS
from released_files import seeded
from tiny_store import make_store

TUTORIAL = ROOT / "docs" / "tutorial.md"
STUDIES = 500  # so many that a random tenth has five of each class
CLASSES = load_task("pub-brain-5").classes


def every_block() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- the world that the pages speak of


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with what README and docs name: models, stores, files of studies, tables."""
    import nibabel
    import numpy as np

    folder = tmp_path_factory.mktemp("world")
    for name in ("runs/demo/model", "runs/mine/model"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(model_folder)
    labels = [{name: float(i % len(CLASSES) == k) for k, name in enumerate(CLASSES)} for i in range(STUDIES)]
    store = make_store(tmp_path_factory.mktemp("stores") / "STORE", [4 - i % 4 for i in range(STUDIES)], labels)
    for name in ("STORE", "stores/test", "stores/pub-brain-5", "runs/demo/stores/test", "store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(store.path)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = [[uid, *(int(each[name]) for name in CLASSES)] for uid, each in zip(store.uids, labels, strict=True)]
        csv.writer(file).writerows([["study", *CLASSES], *rows])
    for name in ("mine", "other", "plain_vit"):
        model = HLIPModel.from_pretrained(model_folder)
        embed(model, StoreStudies(store, model.config.vision.patch_size), out=folder / f"{name}.parquet")
    rng = np.random.default_rng(0)
    names = [f"studies/s{i:03d}/{scan}.nii.gz" for i in range(3) for scan in ("t1", "flair")]
    for name in [*names, "t1.nii.gz", "flair.nii.gz", "dwi.nii.gz", "path/to/study/t1.nii.gz",
                 "data/demo-0/studies/test-0003/t1.nii.gz"]:  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(rng.integers(0, 1000, (18, 18, 8), dtype=np.int16), np.diag([1.0, 1.0, 3.0, 1.0]))
        nibabel.save(image, folder / name)
    text = (folder / "labels.csv").read_text()
    (folder / "data/demo-0/labels.csv").write_text(text.lower().replace("metastasis", "metastases"))
    prompts = {"classes": {name: [name] for name in ("normal", "stroke", "glioma", "meningioma", "metastases")}}
    (folder / "data/demo-0/prompts.yaml").write_text(yaml.safe_dump(prompts), encoding="utf-8")
    (folder / "reports.csv").write_text("study,report\ns000,Normal brain.\ns001,Glioma.\n", encoding="utf-8")
    return folder


@pytest.fixture
def in_world(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_models: None) -> None:
    """Current folder: a copy of the world, as links. Models as published, but narrow; what is compiled keeps its graph
    and is not made faster."""
    shutil.copytree(world, tmp_path / "here", symlinks=True)
    name = "clip_vit_base_scan_study_token1176"  # a checkpoint of the released training code
    state = {f"module.{key}": value for key, value in seeded(name).items()}
    for path in ("epoch_20.pt", "logs/mine/checkpoints/epoch_20.pt"):
        (tmp_path / "here" / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"epoch": 20, "name": name, "state_dict": state}, tmp_path / "here" / path)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("page", [page for page in pages() if page != TUTORIAL], ids=page_id)
def test_blocks_of_the_page_run(page: Path, in_world: None) -> None:
    torch.manual_seed(0)
    for block in run_blocks(page):
        print(block)  # where it stopped, if it does


def test_the_tutorial_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in run_blocks(TUTORIAL):
        print(block)


# ---- marks


def test_most_blocks_are_run() -> None:
    programs = [block for block in every_block() if block.language in ("bash", "python")]
    for language, most in (("python", 0.2), ("bash", 0.6)):
        these = [block for block in programs if block.language == language]
        left = [block for block in these if block.reason]
        assert len(left) <= most * len(these), f"{len(left)} of {len(these)} {language} blocks are not run: {left}"


def made(tmp_path: Path, text: str) -> list[Block]:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return blocks(page)


def test_blocks_are_found_with_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc_blocks, "ROOT", tmp_path)
    text = (
        "one\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n```bash\nhlip env\n```\n- item\n\n"
        '    ```yaml title="a.yaml"\n'
        "    a: 1\n    ```\n<!-- in small: --steps 2 -->\n```bash\npython a.py \\\n  --steps 300 # as published\n```\n"
    )
    first, second, third, fourth = made(tmp_path, text)
    assert (first.language, first.text, first.reason) == ("python", "x = 1\n", "")
    assert (second.line, second.reason) == (6, "needs a GPU")
    assert (third.title, third.text) == ("a.yaml", "a: 1\n")
    assert commands(fourth) == [["python", "a.py", "--steps", "2"]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```\nhlip env\n```\n", "a block is one of bash"),
        ("```perl\n```\n", "a block is one of bash"),
        ("```bash\nhlip env\n", "the block is not closed"),
        ("<!-- not run: it fails -->\n```bash\n```\n", "'it fails' is no reason"),
        ("<!-- notrun -->\n```bash\n```\n", "no such mark"),
    ],
)
def test_a_block_that_is_not_as_it_should_be_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        made(tmp_path, text)


def test_small_values_must_be_those_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc_blocks, "ROOT", tmp_path)
    (block,) = made(tmp_path, "<!-- in small: --stepz 2 -->\n```bash\npython a.py --steps 300\n```\n")
    with pytest.raises(ValueError, match="no command has --stepz"):
        commands(block)


@pytest.mark.parametrize(
    "command",
    [
        "hlip embed a.nii.gz --model m",
        "hlip eval rsna --data s --model m --out o --no_such_flag 1",
        "hlip prepair studies --out s --recipe brain-mri",
        "torchrun --processes 8 train/pretrain.py --data s",
        "torchrun --nproc_per_node 8 train/pretrain.py --data s --learning_rate 1",
        "srun --kill-on-bad-exit=1 python train/pretrain.py --config no_such_recipe --data s",
        "python bench/attention.py --fast",
        "python bench/no_such.py",
        "pip install 'hlip-kernels[everything]'",
        "curl example.org",
    ],
)
def test_a_command_that_is_wrong_is_refused(command: str) -> None:
    import shlex

    with pytest.raises(ValueError):
        check_command(shlex.split(command))


def test_a_python_block_that_is_not_run_must_import_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doc_blocks, "ROOT", tmp_path)
    mark = "<!-- not run: needs a GPU -->\n```python\n"
    good, bad = made(tmp_path, f"{mark}from hlip import pack\n```\n{mark}from hlip import unpack\n```\n")
    check_python(good)
    with pytest.raises(ImportError, match="unpack"):
        check_python(bad)


# ---- pages


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).exists()] == []


def untitled(page: str, language: str) -> list[str]:
    return [block.text for block in blocks(ROOT / "docs" / page) if block.language == language and not block.title]


def test_files_that_pages_show_can_be_read(tmp_path: Path) -> None:
    sections, recipe = untitled("input.md", "yaml")
    (prompts,) = untitled("training.md", "yaml")
    (slices,) = untitled("published.md", "yaml")
    (studies,) = untitled("input.md", "json")
    texts = {"s.yaml": sections, "r.yaml": recipe, "p.yaml": prompts, "t.yaml": slices, "l.json": studies}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert SectionRules.read(tmp_path / "s.yaml").impression == ("beurteilung",)
    assert load_recipe(str(tmp_path / "r.yaml")).native == (8, 16, 16)
    assert load_recipe(str(tmp_path / "t.yaml")).shape == load_task("pub-brain-5").shape
    assert list(load_task(tmp_path / "p.yaml").classes) == ["stroke", "normal"]
    found = find_studies(tmp_path / "l.json")  # the list is understood; its files are not there
    listed = {each.study for each in found.rejected} | {study.uid for study in found.studies}
    assert listed == {"p7", "p8", "valid_1_a"}
    shown = {(block.page.name, block.language) for block in every_block() if block.language in ("json", "yaml")}
    assert shown == {
        ("input.md", "json"),
        *((f"{name}.md", "yaml") for name in ("input", "published", "recipes", "training", "tutorial")),
    }


# ---- examples


def test_every_example_is_run_by_its_page() -> None:
    run = {word for block in blocks(ROOT / "docs" / "examples.md") for words in commands(block) for word in words}
    assert {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} <= run


def test_the_notebook_runs(in_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads((ROOT / "examples" / "relevance.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)  # kept without
    names: dict[str, Any] = {}
    for i, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"relevance.ipynb, cell {i}", "exec"), names)
    maps = [found.maps for found in (names["found"], names["last"])]
    assert all(float(torch.cat([each.flatten() for each in part]).sum()) > 0 for part in maps)
    assert len(names["figure"].axes) == 2 * len(names["study"].scans)


# ---- pictures


def test_the_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    """Whoever changes what is drawn draws it anew: python docs/draw.py"""
    drawn = runpy.run_path(str(ROOT / "docs" / "draw.py"))["PICTURES"]
    kept = ROOT / "docs" / "pictures"
    for name, draw in drawn.items():
        draw(tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").read_bytes() == (kept / f"{name}.svg").read_bytes(), name
    assert sorted(path.stem for path in kept.iterdir()) == sorted(drawn)


# ---- messages


def texts_of_the_code() -> set[str]:
    """What the programs say, with `...` where something is filled in."""
    found = set()
    for path in sorted(path for top in ("hlip_kernels", "hlip", "train") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values))
    return {text for text in found if len(text.replace("...", "")) > 12 and "\n" not in text}


def is_said(message: str, texts: set[str]) -> bool:
    """Whether the message is a part of a text of the code; or such a text, with things filled in, a good part of it."""
    needed = 0.5 * len(message.replace("...", ""))
    part = _pattern(message.removeprefix("...: "))
    return any(
        re.search(part, text)
        or (len(text.replace("...", "")) >= needed and re.search(_pattern(text), f"...: {message}"))
        for text in texts
    )


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, text.split("..."))))


def messages(page: Path) -> list[str]:
    cells = [line.split("|")[1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize(("name", "least"), [("troubleshooting.md", 50), ("training.md", 15)])
def test_messages_are_those_of_the_code(name: str, least: int) -> None:
    page = ROOT / "docs" / name
    text = page.read_text(encoding="utf-8").partition("## 7. When it stops")
    found = messages(page) if name == "troubleshooting.md" else re.findall(r"^\| `([^`]+)`", text[2], re.MULTILINE)
    texts = texts_of_the_code()
    assert len(found) >= least
    assert [message for message in found if not is_said(message, texts)] == []


def test_a_message_that_nothing_says_is_found() -> None:
    texts = texts_of_the_code()
    assert is_said("...: not a store (it has no folder 'shards')", texts)
    assert not is_said("...: not a store (it has no folder 'pieces')", texts)
    assert not is_said("the flux capacitor is out of plutonium", texts)


# ---- names in the text


def spans() -> list[tuple[str, str]]:
    """Inline code of all pages, each with its page."""
    found = []
    for page in pages():
        text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        found += [(page_id(page), span) for span in re.findall(r"`([^`]+)`", text)]
    return found


FOREIGN = {
    "--shutdown-timeout", "--max_restarts", "--nproc_per_node",  # torchrun
    "--gpus-per-task", "--requeue", "--signal",  # Slurm
    "--no-build-isolation", "--force-reinstall", "--no-deps", "--no-cache-dir",  # pip
    "--strict", "--exclude",  # mypy, auditwheel
}  # fmt: skip


def test_flags_in_the_text_are_those_of_a_program() -> None:
    sources = [path for top in ("hlip", "train", "bench", "examples") for path in (ROOT / top).rglob("*.py")]
    known = {flag for path in sources for flag in re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8"))}
    known |= {f"--{field.name}" for kind in (TrainConfig, Options) for field in dataclasses.fields(kind)}
    known |= {"--config", "--help", *(f"--{name}" for name in FLAGS)} | FOREIGN
    named = [(page, flag) for page, span in spans() for flag in re.findall(r"(?<!\S)(--[A-Za-z][\w-]*)", span)]
    assert len(named) > 80
    assert [each for each in named if each[1] not in known] == []


def test_commands_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    known = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))
    named = {(page, word) for page, span in spans() for word in re.findall(r"^hlip ([a-z]+)", span)}
    assert len({word for _, word in named}) >= 8
    assert [each for each in sorted(named) if each[1] not in known] == []


def test_files_in_the_text_exist() -> None:
    pattern = r"(?:tests|bench|train|hlip|hlip_kernels|docs|examples)/[\w./-]+\.(?:py|md|yaml|html|ipynb)"
    made = {"docs/benchmarks.md"}
    named = {(page, file) for page, span in spans() for file in re.findall(rf"(?<!\S){pattern}(?!\S)", span)}
    assert len(named) > 30
    assert [each for each in sorted(named) if not (ROOT / each[1]).exists() and each[1] not in made] == []


def test_every_recipe_is_on_its_page_with_its_model() -> None:
    lines = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    for path in RECIPES.glob("*.yaml"):
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        (row,) = [row for row in rows if f"`{path.stem}`" in row]
        assert f"`{model}`" in row, path.stem
