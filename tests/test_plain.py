from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hlip.model.config import ModelConfig, TextConfig, VisionConfig
from hlip.prepare.recipe import Recipe, Window, load_recipe
from hlip.read.rules import Rules
from hlip.read.safe import as_texts, check_keys, finite_number, parse_json, parse_yaml, read_json, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True), ("False", False), ("3", 3), ("-2", -2), ("1e-4", 1e-4), ("2E3", 2000.0), (".5", 0.5),
        ("5.", 5.0),
        ("null", None), ("~", None), ("", None), ("yes", "yes"), ("no", "no"), ("on", "on"), ("Off", "Off"), ("y", "y"),
        ("tRUE", "tRUE"), ("012", "012"), ("-00.5", "-00.5"), ("1_000", "1_000"), ("0x1F", "0x1F"), ("0o17", "0o17"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), (".inf", ".inf"), (".nan", ".nan"), ("=", "="), ("<<", "<<"),
        ("'1'", "1"), ('"true"', "true"), ("e3", "e3"), (".", "."), ("1e", "1e"),
    ],
)  # fmt: skip
def test_values_of_yaml(text: str, value: Any) -> None:
    for content in (parse_yaml(f"a: {text}")["a"], parse_yaml(f"- {text}")[0]):
        assert (type(content), content) == (type(value), value)
    assert parse_yaml(f"a: {text}", texts=True) == {"a": None if value is None else text.strip("'\"")}


@pytest.mark.parametrize(
    "name", ["yes", "no", "on", "n", "true", "null", "~", "1e3", "012", "1:30", "2024-01-01", "<<"]
)
def test_names_of_yaml_are_what_is_written(name: str) -> None:
    assert parse_yaml(f"{name}: 1\nb: {{{name}: x}}") == {name: 1, "b": {name: "x"}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' occurs twice, first on line 1"),
        ("- {x: {no: 1}}\n- {x: {no: 1, 'no': 2}}", "line 2: 'no' occurs twice"),
        ("1: x\n'1': y", "line 2: '1' occurs twice"),
        ("a: 1\nb: 1e999", "line 2: expected a finite number, got '1e999'"),
        ("a:\n  - !!int '3'", "line 2: a tag"),
        ("a: !own x", "line 1: a tag"),
        ("a: &x 1\nb: *x", "line 2: a reference"),
        ("b: 1\n? [a]\n: 1", "line 2: expected a name"),
        ("a: 1\n---\na: 2", "single document"),
    ],
)
def test_yaml_that_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    for texts in (False, True) if "1e999" not in text else (False,):
        with pytest.raises(ValueError, match=reason):
            read_yaml(path, texts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 1}', "line 1: 'a' occurs twice, first on line 1"),
        ('{"a": [{"b": 1}],\n "c":\n  {"b": 1, "d": {},\n "b": 2}}', "line 4: 'b' occurs twice, first on line 3"),
    ],
)
def test_names_that_occur_twice_in_json(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match=reason):
        parse_json(text.encode())
    assert parse_json('{"a": {"a": 1}, "b": [{"a": 2}]}') == {"a": {"a": 1}, "b": [{"a": 2}]}


def test_settings_of_a_recipe_are_typed_and_none_is_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("percentiles: null\nwindows: [{low: -1e3, high: 1e3, name: no}]\n")
    window = load_recipe(str(path)).windows[0]
    assert (window.low, window.high, window.name) == (-1000.0, 1000.0, "no")
    path.write_text("percentiles: null\nwindows: []\npercentiles: [1, 99]\n")
    with pytest.raises(ValueError, match="line 3: 'percentiles' occurs twice"):
        load_recipe(str(path))


def test_unknown_names_and_those_that_are_like_one() -> None:
    check_keys(["scans"], ["scans", "report"])
    with pytest.raises(ValueError, match=r"unknown field 'reprot'; did you mean report\?"):
        check_keys(["reprot"], ["scans", "report"])
    with pytest.raises(ValueError, match="unknown field 'xyz'; there are scans, report"):
        check_keys(["xyz"], ["scans", "report"])
    check_keys(["age", "site", "report_id", "reported", "Report_2"], ["scans", "report"], also=True)
    with pytest.raises(ValueError, match="did you mean scans"):
        check_keys(["age", "Scan"], ["scans", "report"], also=True)


def test_half_a_character_is_no_text() -> None:
    for wrong in ("\ud800", ["a", "b\udc80"]):
        with pytest.raises(ValueError, match="half of a character"):
            as_texts(wrong)


def test_a_text_alone_is_a_list_of_one() -> None:
    assert as_texts("ab") == as_texts(["ab"]) == as_texts(iter(("ab",))) == as_texts(np.array(["ab"])) == ["ab"]
    assert as_texts([], least=0) == []
    for wrong in (
        None, 1, b"ab", [], [1], ["a", None], {"a": "b"}, {"a"}, np.array([1.0]), np.array("a"), np.array([["a"]]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="names: expected a text"):
            as_texts(wrong, "names")


@pytest.mark.parametrize("digits", [f"{2**63}", f"{-(2**63) - 1}", "1" + "0" * 30, "1" + "0" * 400, "1" + "0" * 5000])
def test_whole_numbers_are_of_64_bits(digits: str) -> None:
    """Others are no settings: they become no float, and NumPy and PyTorch take none."""
    for read in (parse_yaml, lambda text: parse_json(text, finite=True)):
        for text in (digits, f"[{digits}]"):
            with pytest.raises(ValueError, match="64 bits") as caught:
                read(text)
            assert len(str(caught.value)) < 200
    assert parse_yaml(f"[{2**63 - 1}, {-(2**63)}]") == [2**63 - 1, -(2**63)]
    assert parse_json(f"{10**30}") == 10**30  # as the longest text in tokenizers' files


@pytest.mark.parametrize("value", ["9" * 200_000, "1" * 200_000 + ".0e5", "a" * 200_000], ids=["9", "1", "a"])
def test_errors_show_80_characters_of_a_value(value: str) -> None:
    calls: list[Any] = [
        lambda: finite_number(value + "x"),
        lambda: parse_yaml(f"{value}: 1\n{value}: 2"),
        lambda: parse_yaml(f"&a{value} 1\n") if value[0] == "a" else parse_yaml("1" * 200_000),
        lambda: parse_json(f'{{"{value}": 1, "{value}": 2}}'),
        lambda: check_keys([value], ["lr"]),
        lambda: as_texts({value: 1}),
        lambda: Recipe.from_dict({"size": value}),
        lambda: Recipe.from_dict({value: 1}),
        lambda: TextConfig(pooling=value),  # type: ignore[arg-type]
        lambda: TextConfig(locked=value),  # type: ignore[arg-type]
    ]
    for call in calls:
        try:
            call()
        except ValueError as error:
            assert len(str(error)) < 400


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**30, 10**5000], ids=["400", "minus", "30", "5000"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mlp_ratio", lambda n: VisionConfig(mlp_ratio=n)),
        ("init_std", lambda n: VisionConfig(init_std=n)),
        ("max_scans", lambda n: VisionConfig(max_scans=n)),
        ("grid", lambda n: VisionConfig(grid=(n, 1, 1))),
        ("patch_size", lambda n: VisionConfig(patch_size=(1, n, n))),
        ("unlocked_layers", lambda n: TextConfig(unlocked_layers=n)),
        ("context_length", lambda n: TextConfig(context_length=n)),
        ("embed_dim", lambda n: ModelConfig(embed_dim=n)),
        ("spacing", lambda n: Recipe(spacing=(n, n, n))),
        ("size", lambda n: Recipe(size=(n, n, n), crop=None)),
        ("crop", lambda n: Recipe(crop=(n, n))),
        ("high", lambda n: Window(0, abs(n))),
        ("max_voxels", lambda n: Rules(max_voxels=n)),
        ("spacing", lambda n: Rules(spacing=(1, n))),
        (r"recipe\.spacing\[0\]", lambda n: Recipe.from_dict({"spacing": [n, n, n]})),
        (r"recipe\.size\[0\]", lambda n: Recipe.from_dict({"size": [n, n, n]})),
        (r"recipe\.rules\.max_shear", lambda n: Recipe.from_dict({"rules": {"max_shear": n}})),
    ],
)
def test_a_setting_beyond_a_float_is_named(name: str, make: Any, number: int) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        make(number)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("content", ["lr: 1{0}", "size: [1{0}, 1{0}, 1{0}]", "spacing: [1{0}, 1, 1]"])
def test_a_file_with_a_number_beyond_a_float_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content.format("0" * 400))
    for read in (read_yaml, lambda path: load_recipe(str(path))):
        with pytest.raises(ValueError, match="64 bits") as caught:
            read(path)
    assert str(path) in str(caught.value)
    (tmp_path / "config.json").write_text('{"recipe": {"spacing": [1' + "0" * 400 + ", 1, 1]}}")
    with pytest.raises(ValueError, match=r"config\.json.*64 bits"):
        load_recipe(str(tmp_path))
