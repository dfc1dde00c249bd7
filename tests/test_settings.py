"""Numbers that are settings are finite, wherever they come from: all settings that there are are found and tried."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import math
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hlip
from commands import run
from hlip.model.config import ModelConfig, TextConfig, VisionConfig, preset
from hlip.model.weights import read_json
from hlip.prepare.recipe import RECIPES, Recipe, Window, load_recipe
from hlip.read import safe
from hlip.read.rules import Rules
from hlip.train.config import TrainConfig
from hlip_kernels.tiles import FORMAT, read_table

ROOT = Path(__file__).parents[1]

NOT_FINITE = ("nan", "inf", "-inf", "1e999", "NaN", "Infinity")
MODEL = preset("clip_vit_base_scan_study_token1176")
SETTINGS: dict[type, Any] = {
    Window: Window(0, 1), Recipe: RECIPES["brain-mri"], Rules: Rules(), VisionConfig: MODEL.vision,
    ModelConfig: MODEL, TextConfig: MODEL.text, TrainConfig: TrainConfig(Path("store")),
}  # fmt: skip


def options(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from options(inner, f"{name} {command}")
        else:
            yield f"{name} {action.dest}", action


def every_option() -> list[tuple[str, argparse.Action]]:
    """Of `hlip` and all its commands."""
    parsers: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, _: Any) -> None:
        parsers.append(parser)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        run()
    return list(options(parsers[0], "hlip"))


def test_no_option_takes_other_than_finite_numbers() -> None:
    tried = 0
    for name, action in every_option():
        if not callable(action.type) or action.type is Path:
            continue
        for text in NOT_FINITE:
            try:
                value = action.type(text)
            except (ValueError, argparse.ArgumentTypeError):
                tried += 1
                continue
            assert not isinstance(value, float), f"{name} {text}"
    assert tried >= 6 * 15


@pytest.mark.parametrize("text", NOT_FINITE)
def test_a_command_refuses_a_number_that_is_not_finite(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["prepare", "in", "--out", "store", f"--timeout={text}"],
                    ["probe", "e.npz", "--out", "out", "--labels", "l.csv", f"--c={text}"]):  # fmt: skip
        assert run(*command) == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["hlip", "hlip_kernels", "train", "bench", "examples"])
def test_no_source_has_an_option_of_any_float(folder: str) -> None:
    """Of scripts, too, whose parsers are not to be had without running them."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = node.keywords if isinstance(node, ast.Call) else []
            assert not [word for word in words if word.arg == "type" and ast.unparse(word.value) == "float"], path


def with_numbers(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if "float" in str(field.type)]


def test_every_dataclass_of_settings_is_tried() -> None:
    """A dataclass that checks its fields holds settings."""
    modules = [importlib.import_module(module.name) for module in pkgutil.walk_packages(hlip.__path__, "hlip.")]
    kinds = {value for module in modules for value in vars(module).values()
             if isinstance(value, type) and dataclasses.is_dataclass(value)}  # fmt: skip
    checked = {kind for kind in kinds if hasattr(kind, "__post_init__") and with_numbers(kind)}
    assert checked and checked <= set(SETTINGS)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in SETTINGS for name in with_numbers(kind)],
    ids=lambda part: getattr(part, "__name__", part),
)  # fmt: skip
def test_no_setting_is_other_than_finite(kind: type, name: str) -> None:
    settings = SETTINGS[kind]
    before = getattr(settings, name)
    length = {"percentiles": 2, "spacing": 3 if kind is Recipe else 2, "betas": 2}.get(name, 0)
    for number in (math.nan, math.inf, -math.inf):
        value = (*(before or (1.0,) * length)[: length - 1], number) if length else number
        with pytest.raises(ValueError, match=rf"{number}"):
            dataclasses.replace(settings, **{name: value})


@pytest.mark.parametrize("text", [".nan", ".inf", "-.INF", "nan", "1.0e+999", "-1e999"])
def test_yaml_of_settings_has_finite_numbers(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: mine\nmodality: mri\npercentiles: [0.5, {text}]\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        load_recipe(str(path))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1E+999"])
def test_json_of_settings_has_finite_numbers(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(f'{{"vision": {{"init_std": {text}}}}}')
    with pytest.raises(ValueError, match=r"config\.json: .*expected a finite number"):
        read_json(path)
    path.write_text(f'{{"format": {FORMAT}, "rows": {{"sm_90 half 64": {{"tile_ms": {{"dq": {text}}}}}}}}}')
    with pytest.raises(ValueError, match=r"config\.json"):
        read_table(path)


def test_finite_numbers_are_read() -> None:
    assert safe.finite_number("-1.5e3") == -1500
    assert safe.parse_yaml("{a: 1.5, b: -2.0e-3, c: 10}") == {"a": 1.5, "b": -0.002, "c": 10}
    assert json.loads("[1e300]", parse_float=safe.finite_number) == [1e300]
