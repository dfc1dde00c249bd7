"""`train/precheck.py`: what cannot learn is refused at the start, what learns poorly is said with counts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hlip
from conftest import TINY_RECIPE, random_study, tiny_vision
from hlip.model.config import TextConfig
from hlip.read.rules import Rules
from hlip.store.store import Store
from hlip.train.config import TrainConfig
from hlip.train.precheck import check_data, check_texts, take_recipe
from tiny_store import make_store

SIZE = (8, 16, 16)
DATED = (
    "Technique: images were obtained with the usual protocol, and reviewed by two readers on a workstation of the ward "
)


def blank(value: int) -> list[torch.Tensor]:
    return [torch.full(SIZE, value, dtype=torch.uint8)]


def check(path: Path, steps: int = 100, **changes: Any) -> list[str]:
    """Warnings on the store at `path`."""
    config = TrainConfig(path, path / "run", **{"batch_size": 4, "warmup": 10, **changes})
    return check_data(config, Store(path), steps)


def read(path: Path, model: hlip.HLIPModel, **changes: Any) -> list[str]:
    """Warnings on what a model reads of it."""
    config = TrainConfig(path, path / "run", **{"batch_size": 4, **changes})
    return check_texts(config, Store(path), model)


def reports(*findings: str) -> dict[str, Any]:
    return {"reports": [("", each) for each in findings]}


def test_a_model_keeps_the_recipe_of_the_scans_that_it_learns_from(tmp_path: Path, tiny_model: hlip.HLIPModel) -> None:
    store, own = make_store(tmp_path / "a", [1] * 4), Rules(min_slices=7)
    before = tiny_model.config
    for recipe, said in (
        (replace(TINY_RECIPE, rules=own), []),
        (replace(TINY_RECIPE, size=(16, 18, 18)), []),  # scans of another shape: not what the store holds
        (None, []),
        (
            replace(TINY_RECIPE, depth="nearest-exact", percentiles=(1, 99), rules=own),
            ["recipe.depth is linear, not nearest-exact", "recipe.percentiles is [0.5, 99.5], not [1, 99]"],
        ),
    ):
        tiny_model.config = replace(before, recipe=recipe)
        warnings = take_recipe(tiny_model, store)
        assert warnings == [
            f"{store.path}: its {words} as the model has it; the model takes the store's" for words in said
        ]
        assert tiny_model.config.recipe == (replace(TINY_RECIPE, rules=own) if said else recipe)
    tiny_model.config = before


@pytest.fixture
def dual(bert_folder: str) -> hlip.HLIPModel:
    text = TextConfig(bert_folder, context_length=32)
    vision = tiny_vision(num_prefix=2)
    return hlip.HLIPModel(hlip.ModelConfig(vision, text, None, 32, per_prefix=True, objective="dual")).eval()


def test_a_store_to_learn_from_is_not_talked_about(tmp_path: Path, tiny_model: hlip.HLIPModel) -> None:
    make_store(tmp_path / "a", [2] * 8)
    make_store(tmp_path / "other", [1, 1], name="v{}", images=[random_study([SIZE], 100), random_study([SIZE], 101)])
    assert check(tmp_path / "a", val=tmp_path / "other", prompts=tmp_path / "p") == []
    assert read(tmp_path / "a", tiny_model) == []


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (reports(*[""] * 6), "none of its 6 studies has a report"),
        (reports(*[" \n\t"] * 6), "none of its 6 studies has a report"),
        (reports("A mass.", *[""] * 5), "1 of its 6 studies has a report"),
        (reports(*["No acute finding."] * 6), "its 6 reports are all equal"),
        (reports("No  acute finding.", "No acute\nfinding. ", "", "", "", ""), "its 2 reports are all equal"),
        ({"reports": [("No acute", "finding.")] * 3 + [("", "No acute finding.")] * 3}, "its 6 reports are all equal"),
        ({"images": [random_study([SIZE], 0)] * 6}, "all 6 studies hold the same scans"),
        ({"images": [blank(0)] * 6}, "all 6 studies hold the same scans"),
        ({"images": [blank(i) for i in range(6)]}, "6 of 6 scans looked at hold one value only"),
    ],
)
def test_what_cannot_learn_is_refused(store: dict[str, Any], words: str, tmp_path: Path) -> None:
    make_store(tmp_path / "a", [1] * 6, **store)
    with pytest.raises(ValueError, match=words) as error:
        check(tmp_path / "a")
    assert str(error.value).startswith(f"{tmp_path / 'a'}: ")


def test_a_batch_of_one_study_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "a", [1] * 6)
    with pytest.raises(ValueError, match="batch_size 1: "):
        check(tmp_path / "a", batch_size=1)
    assert check(tmp_path / "a", batch_size=2) == []


def test_settings_of_nothing_are_refused() -> None:
    for name in ("lr", "steps", "epochs", "lr_batch", "max_scans", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be "):
            TrainConfig(Path("a"), **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "store", "words"),
    [
        (6, reports("A mass.", "A bleed.", *[""] * 4), ["4 of 6 studies have no report", "2 of 2 reports are"]),
        (40, reports(*(f"Mass {i}." for i in range(39)), ""), ["1 of 40 studies have no report"]),
        # Of 3 others, 4/9 have the same text: a study of one of two groups of five.
        (10, reports(*["A mass."] * 5, *["A bleed."] * 5), ["2 of 10 reports are different. Of the 3 .*, 1.3 on"]),
        (40, reports(*[f"Mass {i // 2}." for i in range(40)]), ["20 of 40 reports are different. Of the 3 .*, 0.1 on"]),
        (40, reports(*["Normal."] * 10, *(f"Mass {i}." for i in range(30))), ["31 of 40 reports are different"]),
        (6, {"images": [blank(7), blank(9), *(random_study([SIZE], i) for i in range(4))]}, ["2 of 6 scans looked at"]),
        (6, {"images": [random_study([SIZE], i // 2) for i in range(6)]}, ["3 of 6 studies hold the same scans"]),
    ],
)  # fmt: skip
def test_what_learns_poorly_is_counted(count: int, store: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    make_store(tmp_path / "a", [1] * count, **store)
    warnings = check(tmp_path / "a")
    assert len(warnings) == len(words)
    for line, expected in zip(warnings, words, strict=True):
        assert re.match(f"{tmp_path / 'a'}: {expected}", line), line


@pytest.mark.parametrize("texts", ["item", "items"])
def test_items_that_were_lost_are_told(texts: str, tmp_path: Path) -> None:
    make_store(tmp_path / "joined", [1] * 4, **reports(*(f"Mass {i}. No bleed." for i in range(4))))
    make_store(tmp_path / "kept", [1] * 4, **reports(*(f"Mass {i}.\n\nNo bleed." for i in range(4))))
    (line,) = check(tmp_path / "joined", texts=texts)
    assert f"texts '{texts}' takes sentences" in line and "entries: paragraphs" in line
    assert check(tmp_path / "joined", texts="sentence") == check(tmp_path / "kept", texts=texts) == []


@pytest.mark.parametrize(("steps", "warmup", "words"), [(3, 12, "after 3 steps, at 25% of"), (12, 12, "at 100% of")])
def test_a_warmup_longer_than_the_run(steps: int, warmup: int, words: str, tmp_path: Path) -> None:
    make_store(tmp_path / "a", [1] * 6)
    (line,) = check(tmp_path / "a", steps=steps, warmup=warmup)
    assert f"warmup {warmup}: " in line and words in line
    assert check(tmp_path / "a", steps=steps, warmup=steps - 1) == []


def test_studies_to_evaluate_on_that_are_trained_on(tmp_path: Path) -> None:
    """The same store; some of the ids; and the same scans under other ids, in two of three."""
    make_store(tmp_path / "a", [1] * 6)
    make_store(tmp_path / "ids", [1] * 4, name="s{:03d}", images=[random_study([SIZE], 50 + i) for i in range(4)])
    images = [random_study([SIZE], 2), random_study([SIZE], 3), random_study([SIZE], 99)]
    make_store(tmp_path / "copies", [1] * 3, name="hidden{}", images=images)
    for name, count in (("a", "6 of its 6"), ("ids", "4 of its 4"), ("copies", "2 of its 3")):
        (line,) = check(tmp_path / "a", val=tmp_path / name, prompts=tmp_path / "p")
        assert line.startswith(f"{tmp_path / name}: {count} studies are trained on, too")


@pytest.mark.parametrize(
    ("findings", "words"),
    [
        ([f"{DATED * 2}{i}." for i in range(6)], "6 reports looked at: their first 32 tokens are all equal"),
        (["A mass.", "a MASS."] * 3, "reports looked at: their first 32 tokens are all equal"),
        (["\U00012000 " * (3 + i) for i in range(6)], "6 reports looked at: 100% of their tokens are unknown"),
    ],
)
def test_texts_that_are_alike_to_the_text_tower(
    findings: list[str], words: str, tmp_path: Path, tiny_model: hlip.HLIPModel
) -> None:
    make_store(tmp_path / "a", [1] * 6, **reports(*findings))
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "a", tiny_model)


def test_texts_that_lose_what_differs(tmp_path: Path, tiny_model: hlip.HLIPModel) -> None:
    """A long beginning that half of the reports have, and words that a third of the tokens are unknown."""
    long = [f"{DATED * 2}{i}." for i in range(5)]
    make_store(tmp_path / "half", [1] * 10, **reports(*long, *(f"Mass {i}." for i in range(5))))
    (line,) = read(tmp_path / "half", tiny_model)
    assert line == f"{tmp_path / 'half'}: 10 reports looked at: 10 are different, and 6 in their first 32 tokens"
    make_store(tmp_path / "words", [1] * 6, **reports(*(f"mass \U00012000 {i}" for i in range(6))))
    (line,) = read(tmp_path / "words", tiny_model)
    assert "words: 6 reports looked at: 33% of their tokens are unknown" in line
    make_store(tmp_path / "sentences", [1] * 6, **reports(*(f"{DATED * 2}. Mass {i}." for i in range(6))))
    with pytest.raises(ValueError, match="all equal"):
        read(tmp_path / "sentences", tiny_model)
    assert read(tmp_path / "sentences", tiny_model, texts="sentence") == []  # a step may draw what differs


def test_a_sample_is_read_of_many_texts(
    tmp_path: Path, tiny_model: hlip.HLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hlip.train.precheck.TEXTS", 4)
    make_store(tmp_path / "a", [1] * 9, **reports(*(f"{DATED * 2}{i}." for i in range(9))))
    with pytest.raises(ValueError, match="4 reports looked at: their first 32 tokens are all equal"):
        read(tmp_path / "a", tiny_model)


def test_two_outputs_and_one_section(tmp_path: Path, dual: hlip.HLIPModel) -> None:
    make_store(tmp_path / "a", [1] * 6, reports=[(f"Mass {i}.", "") for i in range(6)])
    (line,) = read(tmp_path / "a", dual)
    assert line.startswith(f"{tmp_path / 'a'}: 6 of 6 different reports have no findings, so that both embeddings")
    mixed = [("", f"Mass {i}.") if i % 2 else (f"Bleed {i}.", f"Blood {i}.") for i in range(6)]
    make_store(tmp_path / "b", [1] * 6, reports=mixed)
    (line,) = read(tmp_path / "b", dual)
    assert "3 of 6 different reports have no impression" in line
    make_store(tmp_path / "c", [1] * 6, reports=[("Abnormal study.", f"Mass {i}.") for i in range(6)])
    with pytest.raises(ValueError, match="6 impressions looked at: their first 32 tokens are all equal"):
        read(tmp_path / "c", dual)


def test_settings_without_effect(tmp_path: Path, tiny_model: hlip.HLIPModel, dual: hlip.HLIPModel) -> None:
    make_store(tmp_path / "a", [2] * 8)
    unlocked = {"train_norms": True, "locked_dropout": True, "unlocked_layers": 1}
    paired = {"findings": "report", "findings_prefix": "x "}
    before = tiny_model.config
    for locked, names in ((False, [*unlocked, *paired]), (True, [*paired])):
        tiny_model.config = replace(before, text=replace(before.text, locked=locked))
        told = read(tmp_path / "a", tiny_model, **unlocked, **paired)
        assert [line.partition(" ")[0] for line in told if "changes nothing" in line] == names
    tiny_model.config = before
    assert not any("changes nothing" in line for line in read(tmp_path / "a", dual, **paired))


@pytest.mark.parametrize(("level", "most"), [("slice", 4), ("scan", 8), ("study", 16)])
def test_patch_dropout_that_leaves_one_patch(level: Any, most: int, tmp_path: Path, tiny_model: hlip.HLIPModel) -> None:
    make_store(tmp_path / "a", [2] * 6)
    config = tiny_model.config
    for rate, few in ((0.96, True), (1 - 1.5 / most, True), (1 - 2 / most, False)):
        vision = replace(config.vision, levels=(level, level), patch_dropout=rate)
        warnings = read(tmp_path / "a", hlip.HLIPModel(replace(config, vision=vision)))
        assert [f"leaves 1 of the {most} patches of a {level}" in line for line in warnings] == [True] * few


def test_a_recipe_of_a_later_version_is_told(tmp_path: Path, tiny_model: hlip.HLIPModel) -> None:
    store = make_store(tmp_path / "a", [1] * 4)
    store.info["recipe"] = {**TINY_RECIPE.to_dict(), "sharpen": 2}
    tiny_model.config = replace(tiny_model.config, recipe=TINY_RECIPE)
    (line,) = take_recipe(tiny_model, store)
    assert str(store.path) in line and "sharpen" in line and line.endswith("the model keeps its own")
    assert tiny_model.config.recipe == TINY_RECIPE
