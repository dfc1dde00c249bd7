"""The recipes of `train/recipes`, read as the command line reads them, against the published settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import run
from hlip.model.config import ModelConfig, list_models, preset
from hlip.train import config as settings
from hlip.train import pretrain
from hlip.train.checkpoints import with_changes
from hlip.train.config import RECIPES, TrainConfig
from hlip.train.flags import from_published_flags
from hlip.train.step import peak_lr

TRAIN = Path(__file__).parents[1] / "train"

FILES = sorted(RECIPES.glob("*.yaml"))

# HLIP (arXiv 2505.21862), appendix B; the released commands; the blog post of November 2025.
COMMON: dict[str, Any] = {
    "weight_decay": 0.2, "eps": 1e-6, "grad_clip": 0.0, "precision": "fp16", "grad_checkpointing": True,
    "lr_batch": None, "drop_path": 0.2, "sentence_dropout": 0.0,
}  # fmt: skip
COLUMNS = ("max_scans", "batch_size", "lr", "warmup", "patch_dropout", "betas", "epochs", "texts", "findings", "prefix")
MRI, CT, ANY = "This MRI study shows: ", "This CT study shows: ", "This study shows: "
SCANS, ONE_SCAN = "clip_vit_base_scan_study_token1176", "clip_vit_base_slice_scan_token2744"
TOKEN588, THREE_LEVELS = "vit_base_multiscan_h2_token588", "vit_base_multiscan_h3_token1176"
SIGLIP, DUAL_CHEST = "siglip_vit_base_singlescan_h2_token2744", "clip_vit_base_slice_scan_dualdinotxt2744"
DUAL, DUAL_SLICE = (f"clip_vit_base_{levels}_dualdinotxt1568" for levels in ("scan_study", "slice_scan_study"))
# The model, and its settings: an item, or all items of the whole report, of which a second side sees findings or all.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "brain_mri": (SCANS, 10, 256, 2e-4, 2000, 0.25, 0.95, 20, "items", "findings", MRI),
    "brain_mri_token588": (TOKEN588, 10, 256, 2e-4, 2000, 0.25, 0.95, 20, "items", "findings", MRI),
    "brain_mri_h3": (THREE_LEVELS, 10, 256, 2e-4, 2000, 0.25, 0.95, 20, "items", "findings", MRI),
    "head_ct": (SCANS, 10, 256, 2e-4, 2000, 0.25, 0.95, 20, "items", "findings", CT),
    "hlip-2025_10_08": ("hlip-2025_10_08", 8, 768, 4e-4, 2400, 0.5, 0.95, 25, "item", "findings", ANY),
    "hlip-2025_10_08_unmasked": ("hlip-2025_10_08", 8, 768, 5e-5, 400, 0.0, 0.95, 5, "item", "findings", ANY),
    "ablation_mri": ("hlip-2025_10_08", 8, 384, 3e-4, 1600, 0.5, 0.95, 25, "item", "findings", ANY),
    "ablation_ct": ("hlip-2025_10_08", 10, 256, 2e-4, 2500, 0.25, 0.95, 20, "item", "findings", ANY),
    "dual": (DUAL, 8, 768, 5e-4, 2400, 0.5, 0.95, 20, "item", "report", ANY),
    "dual_slice": (DUAL_SLICE, 8, 768, 5e-4, 2400, 0.5, 0.95, 20, "item", "report", ANY),
    "dual_large": (DUAL.replace("base", "large"), 8, 768, 5e-4, 2400, 0.5, 0.95, 20, "item", "report", ANY),
    "dual_large_slice": (DUAL_SLICE.replace("base", "large"), 8, 768, 5e-4, 2400, 0.5, 0.95, 20, "item", "report", ANY),
    "dual_unmasked": (DUAL, 8, 768, 5e-5, 400, 0.0, 0.95, 5, "item", "report", ANY),
    "dual_mr_rate": (DUAL, 6, 256, 2e-4, 2400, 0.0, 0.98, 40, "item", "findings", "This study shows:"),
    "chest_ct": (ONE_SCAN, 1, 512, 8e-5, 47, 0.0, 0.98, 20, "items", "findings", ""),
    "siglip_chest_ct": (SIGLIP, 1, 512, 8e-5, 47, 0.0, 0.95, 20, "items", "findings", ""),
    "dual_chest_ct": (DUAL_CHEST, 1, 512, 1e-4, 100, 0.0, 0.98, 30, "item", "report", ANY),
}  # fmt: skip


def settings_of(
    recipe: Path, *flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> TrainConfig:
    """What `train/pretrain.py --config RECIPE` takes a recipe for, by its own account."""
    arguments = ["--config", str(recipe), "--data", "STORE", "--out", "RUN", *flags, "--print_config"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        pretrain.main()
    shown = capsys.readouterr()
    assert stopped.value.code == 0, shown.err
    values = yaml.safe_load(shown.out)
    return TrainConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@pytest.mark.parametrize("recipe", FILES, ids=lambda path: path.stem)
def test_a_recipe_has_the_published_settings(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings_of(recipe, monkeypatch=monkeypatch, capsys=capsys)
    name, *values = PUBLISHED[recipe.stem]
    expected = COMMON | dict(zip(COLUMNS, values, strict=True))
    expected["betas"] = (0.9, expected["betas"])
    assert {key: getattr(config, key) for key in expected} == expected
    assert (str(config.data), str(config.out), config.model) == ("STORE", "RUN", name)
    assert peak_lr(config) == config.lr
    second = recipe.stem.endswith("_unmasked")
    assert config.seed == (42 if second else 0)
    model: ModelConfig = preset(name)
    changed = with_changes(model, config)
    chest = config.max_scans == 1
    lock = (config.lock_text, config.train_norms, config.locked_dropout)
    assert lock == ((True, True, True) if chest else (False, None, None))
    # What the recipe says of the model is what the model says of itself, but for masks and what is locked.
    masks = replace(changed.vision, patch_dropout=model.vision.patch_dropout)
    assert replace(changed, vision=masks, text=model.text) == model
    vision = f"timm/vit_{'large' if model.vision.width == 1024 else 'base'}_patch16_224.mae"
    assert config.vision == (None if second else vision)
    positions = model.vision.max_scans or recipe.stem.startswith("ablation")  # whose other models have some
    assert config.scan_positions == ("batch" if positions else "study")


def test_every_value_of_a_recipe_has_a_source() -> None:
    for path in FILES:
        for line in path.read_text().splitlines():
            assert not line or line.startswith(("#", "model: ")) or re.search(r"[^ ]  # \w", line), (path.name, line)
        assert "not published" not in path.read_text().lower()


def test_every_released_model_has_a_recipe() -> None:
    assert {path.stem for path in FILES} == PUBLISHED.keys()
    named = {values[0] for values in PUBLISHED.values()}
    ablations = {name for name in list_models() if name.startswith("ablate_") or "multiscan_h2_" in name} - named
    assert named | ablations == set(list_models()) - {"demo"}


def test_a_flag_goes_before_the_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES / "brain_mri.yaml"
    flags = ["--lr=3e-4", "--vision=null", "--max_scans=null", "--betas=[0.9,0.99]"]
    config = settings_of(recipe, *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert (config.lr, config.vision, config.max_scans, config.betas) == (3e-4, None, None, (0.9, 0.99))
    assert config.warmup == 2000


def test_a_recipe_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    """As a program, and a field that there is none of."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((RECIPES / "brain_mri.yaml").read_text() + "weight_decoy: 0.1\n")
    command = [sys.executable, TRAIN / "pretrain.py", "--config", recipe, "--data", "STORE", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "weight_decoy" in done.stderr and "did you mean weight_decay" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_recipe_is_found_by_its_name() -> None:
    there = str(RECIPES / "brain_mri.yaml")
    for given in ("brain_mri", "brain_mri.yaml", "recipes/brain_mri.yaml", "train/recipes/brain_mri.yaml", there):
        assert str(settings.find_settings(given)) == there
    with pytest.raises(ValueError, match="--config brain_mir: no such file or recipe; did you mean brain_mri"):
        settings.find_settings("brain_mir")


def test_steps_on_the_command_line_go_before_the_recipes_epochs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = from_published_flags(["--steps=20"])
    config = settings_of(RECIPES / "brain_mri.yaml", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert (config.steps, config.epochs) == (20, None)
    with pytest.raises(ValueError, match="steps 2 and epochs 3 are both given"):
        TrainConfig(Path("a"), steps=2, epochs=3)


def test_hyphens_are_taken_for_underscores() -> None:
    given = [
        "--data",
        "STORE",
        "--lr-batch=64",
        "--save-minutes",
        "2.5",
        "--lock-text",
        "false",
        "--grad-checkpointing",
    ]
    config = settings.read_arguments(given, "hlip train", "")
    assert (config.lr_batch, config.save_minutes, config.lock_text, config.grad_checkpointing) == (64, 2.5, False, True)


def test_hlip_train_is_the_same_program(capsys: pytest.CaptureFixture[str]) -> None:
    status = run("train", "--config", "head_ct", "--data", "STORE", "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (status, shown["data"], shown["warmup"], shown["resume"]) == (0, "STORE", 2000, "false")
    assert run("train", "--data", "STORE", "--lr", "nan") == 2
    assert capsys.readouterr().err == "hlip train: error: lr: expected a finite number, got 'nan'\n"


def test_what_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(ValueError, match="data: is missing; give --data"):
        settings.read_arguments(["--lr=1"], "hlip train", "")
    with pytest.raises(ValueError, match="--weight_decoy 1; did you mean weight_decay"):
        settings.read_arguments(["--weight-decoy", "1"], "hlip train", "")


@pytest.mark.parametrize(
    "changes", [{"lr": -1.0}, {"warmup": -3}, {"drop_path": 1.5}, {"patch_dropout": 1.0}, {"betas": (1.5, 2.0)}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainConfig(Path("a"), **changes)


LAUGHS = ", ".join(["&a0 [x, x]", *(f"&a{k} [{f'*a{k - 1}, ' * 9}]" for k in range(1, 30))])
HOSTILE = {
    "values of values": f"betas: [{LAUGHS}]\n",
    "values of values in a text": f'lr: "[{LAUGHS}]"\n',
    "the same in a list": f'betas: [0.9, "[{LAUGHS}]"]\n',
    "a setting of either kind": f'resume: "[{LAUGHS}]"\n',
    "one reference": "lr: &a 1.0\ngrad_clip: *a\n",
    "a list without end": "betas: [" + "1, " * 5 * 10**6 + "1]\n",
    "a long list": "betas: [" + "1, " * 50_000 + "1]\n",
    "a long text": f"wandb: {'a' * 10**5}\n",
    "nesting": f"betas: {'[' * 10**5}",
    "nesting in a text": f'lr: "{"[" * 4000}"\n',
    "no number": "lr: .nan\n",
    "no number in a list": "betas: [0.9, .inf]\n",
    "a number too large": "grad_clip: 1.0e+999\n",
    "code": "lr: !!python/object/apply:os.getcwd []\n",
    "bytes": "data: !!binary aGVsbG8=\n",
    "a set": "data: !!set {a, b}\n",
    "a file in a file": "config: other.yaml\n",
    "a class in a file": "data: {class_path: subprocess.Popen, init_args: {args: [ls]}}\n",
    "no settings": "- a\n",
    "no setting": "lrr: 1\n",
    "a wrong type": "lr: fast\n",
    "minutes and seconds": "lr: 1:30.5\n",
    "a number of base 16": "warmup: 0x10\n",
    "yes": "fsdp: yes\n",
    "a whole number beyond all": f"epochs: 1{'0' * 400}\n",
    "one of them in a list": f"betas: [1{'0' * 400}, 0.9]\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, and read by no other loader than ours."""
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE[name])
    assert refused(["--config", str(path)], monkeypatch, capsys).startswith(
        (f"hlip train: error: --config {path}: not readable settings", f"hlip train: error: {path}: ")
    )


@pytest.mark.parametrize("name", ["pipe", "gigabytes", "none"])
def test_a_file_without_an_end_is_no_config(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hostile.yaml"
    os.mkfifo(path) if name == "pipe" else path.touch()
    if name == "gigabytes":
        os.truncate(path, 2**36)
    assert f"--config {path}: not readable settings" in refused([f"--config={path}"], monkeypatch, capsys)


@pytest.mark.parametrize("flags", [
    ["--lr", f"[{LAUGHS}]"], [f"--betas=[{LAUGHS}]"], ["--lr", "nan"], ["--lr=1e999"], ["--grad_clip", ".inf"],
    ["--stall_minutes=-.inf"], ["--lr=1:30.5"], ["--lr=0x10"], ["--lr=1_0.0"], ["--warmup", "1:30"], ["--fsdp=yes"],
    [f"--lr=1{'0' * 400}"], [f"--seed=1{'0' * 30}"], ["--betas", "[0.9, .nan]"], ["--drop_path=NaN"],
])  # fmt: skip
def test_a_hostile_value_is_refused(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = flags[0].removeprefix("--").partition("=")[0]
    assert name in refused(flags, monkeypatch, capsys)


def test_a_flag_is_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A beginning of `--config` would be read by another loader."""
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 1e-4\n")
    assert "--conf" in refused(["--conf", str(path)], monkeypatch, capsys)


def refused(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", "STORE", *flags])
    monkeypatch.setattr(pretrain, "train", None)  # it does not get that far
    assert pretrain.main() == 2
    error = capsys.readouterr().err
    assert len(error) < 2000
    return error


def test_a_file_is_as_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes later counts, of a file and of flags."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "lr: 1e-4\nlock_text: true\nmax_scans: null\nbetas: [9e-1, 0.99]\nlabels: a b\nval: v\nprompts: p\n"
        "wandb: 2024-01-01\nmodel: 1e5\n"
    )
    config = settings_of(path, "--lr", "2e-4", monkeypatch=monkeypatch, capsys=capsys)
    assert (config.lr, config.lock_text, config.max_scans, config.betas) == (2e-4, True, None, (0.9, 0.99))
    given = ["--data=STORE", "--lr=1", "--seed", "4", f"--config={path}", "--seed", "3"]
    config = settings.read_arguments(given, "hlip train", "")
    assert (config.lr, config.seed) == (1e-4, 3)
    assert (str(config.labels), config.wandb, config.model) == ("a b", "2024-01-01", "1e5")
