"""Texts, the locked tower, the optimizer and positions as released training code has them; a step of each recipe."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hlip
from conftest import TINY_RECIPE, random_study, tiny_vision
from hlip import HLIPModel, ModelConfig
from hlip.model.config import MODELS, TextConfig, preset
from hlip.model.encoder import StudyEncoder
from hlip.model.plan import plan
from hlip.model.text import TextTower, clean_text
from hlip.objective import OBJECTIVES, Wording
from hlip.prepare.reports import SectionRules, report_of
from hlip.processes import Processes
from hlip.read.texts import split_items
from hlip.train.checkpoints import with_changes
from hlip.train.config import RECIPES, TrainConfig, read_arguments
from hlip.train.loader import MicroBatches
from hlip.train.sampler import Cost, Item, StepSampler
from hlip.train.step import Optimizer, backward, make_optimizer
from tiny_store import make_store

REPORT = ("", "1. A mass. It is large\n2. No bleed.\n\nOld infarct")
ITEMS = ["1. A mass. It is large", "2. No bleed.", "Old infarct"]


def drawn(objective: str, wording: Wording, report: tuple[str, str] = REPORT, count: int = 200) -> set[tuple[str, ...]]:
    """The texts of a study, one for each side, over many draws."""
    made = set()
    for seed in range(count):
        impression, findings = OBJECTIVES[objective].draw_text(report, wording, np.random.default_rng(seed))
        made.add(tuple(OBJECTIVES[objective].texts([impression], [findings], wording)))
    return made


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("T2 &amp;amp; FLAIR  x", "T2 & FLAIR x"),
        (" No\n\nmass \t", "No mass"),
        ("the patientâ€™s", "the patient's"),
        ("", ""),
    ],
)
def test_texts_are_cleaned_as_in_the_release(given: str, cleaned: str) -> None:
    assert clean_text(given) == cleaned


def test_without_ftfy_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"pip install 'hlip-kernels\[text\]'"):
        clean_text("x")


def test_published_towers_clean_texts_and_older_models_do_not(bert_folder: str) -> None:
    assert all(config.text.clean for name, (config, _) in MODELS.items() if name != "demo")
    kept = ModelConfig(tiny_vision(), TextConfig(bert_folder), TINY_RECIPE)
    assert "clean" not in kept.to_dict()["text"]
    assert not ModelConfig.from_dict(kept.to_dict()).text.clean
    cleaning = replace(kept, text=replace(kept.text, clean=True))
    assert ModelConfig.from_dict(cleaning.to_dict()) == cleaning
    plain = TextTower(TextConfig(bert_folder, context_length=32), 8)
    tower = TextTower(TextConfig(bert_folder, context_length=32, clean=True), 8)
    given, meant = ["T2 &amp;amp; FLAIR  x"], ["T2 & FLAIR x"]
    assert torch.equal(tower._tokens(given)["input_ids"], plain._tokens(meant)["input_ids"])
    assert not torch.equal(plain._tokens(given)["input_ids"], plain._tokens(meant)["input_ids"])


def test_an_item_is_an_entry_of_the_list_and_not_cut_at_full_stops() -> None:
    assert split_items(REPORT[1]) == ITEMS
    assert split_items("A mass. No bleed.") == ["A mass.", "No bleed."]
    entry = {"report": ["A mass. It is large.", "No bleed."]}
    assert report_of(entry, SectionRules()).findings == "A mass. It is large. No bleed."
    kept = report_of(entry, SectionRules(entries="paragraphs"))
    assert split_items(kept.findings) == entry["report"]


def test_one_item_and_shuffled_items() -> None:
    assert drawn("clip", Wording("item", prefix="This study shows: ")) == {
        (f"This study shows: {item}",) for item in ITEMS
    }
    whole = drawn("clip", Wording("items"))
    assert whole == {(" ".join(order),) for order in itertools.permutations(ITEMS)}


def test_two_sides_have_an_item_and_the_whole_report_or_the_findings() -> None:
    made = drawn("dual", Wording("item", findings="report", prefix="X: "))
    assert {first for first, _ in made} == {f"X: {item}" for item in ITEMS}
    assert len({second for _, second in made}) == 6 and all(second.startswith("X: ") for _, second in made)
    wording = Wording("item", prefix="This study shows:", findings_prefix="This study looks like:")
    made = drawn("dual", wording, ("Glioma. Grade 4.\n\nOedema", "A mass. Shift."))
    assert {first for first, _ in made} == {"This study shows:Glioma. Grade 4.", "This study shows:Oedema"}
    assert {second for _, second in made} == {"This study looks like:A mass. Shift."}


def test_draws_of_before_are_the_same() -> None:
    """By seed, so that runs go on as they began."""
    clip, report = OBJECTIVES["clip"], ("A mass. B mass.", "C mass. D mass. E mass.")
    expected = {}
    for seed in range(5):
        random = np.random.default_rng(seed)
        sentences = ["A mass.", "B mass.", "C mass.", "D mass.", "E mass."]
        keep = random.random(5) >= 0.3
        keep[random.integers(5)] = True
        sentences = [sentence for sentence, kept in zip(sentences, keep, strict=True) if kept]
        random.shuffle(sentences)
        expected[seed] = (" ".join(sentences), "")
    wording = Wording("shuffled", 0.3)
    assert {seed: clip.draw_text(report, wording, np.random.default_rng(seed)) for seed in range(5)} == expected


def locked(bert_folder: str, **changes: bool | int) -> TextTower:
    text = TextConfig(bert_folder, context_length=16, locked=True, **changes)  # type: ignore[arg-type]
    return TextTower(text, 8, pretrained=True).train()


def trained(tower: TextTower) -> set[str]:
    return {name for name, parameter in tower.transformer.named_parameters() if parameter.requires_grad}


def test_a_locked_tower_trains_its_norms_and_drops_out_as_released(bert_folder: str) -> None:
    text = ["a mass in the left frontal lobe"]
    strict, released = locked(bert_folder), locked(bert_folder, train_norms=True, locked_dropout=True)
    assert trained(strict) == set() and strict.fixed and not released.fixed
    assert torch.equal(strict(text), strict(text))
    assert all("LayerNorm" in name for name in trained(released))
    assert len(trained(released)) == 2 * (2 * len(released.transformer.encoder.layer) + 1)
    assert not torch.equal(released(text), released(text))
    frozen = locked(bert_folder, locked_dropout=True)  # --lock-text-freeze-layer-norm
    assert trained(frozen) == set() and not torch.equal(frozen(text), frozen(text))
    released.eval()
    assert torch.equal(released(text), released(text))


def test_fifty_tensors_of_twelve_layers_are_trained() -> None:
    config = TextConfig("no such folder", locked=True, train_norms=True)
    with torch.device("meta"):
        tower = TextTower(config, 8)
    assert len(trained(tower)) == 50


def test_the_last_of_embeddings_and_layers_are_unlocked(bert_folder: str) -> None:
    parts = len(locked(bert_folder).transformer.encoder.layer) + 1
    one = trained(locked(bert_folder, unlocked_layers=1))
    assert {name.split(".")[2] for name in one} == {str(parts - 2)}
    assert not any(name.startswith("embeddings") for name in trained(locked(bert_folder, unlocked_layers=parts - 1)))
    tower = locked(bert_folder, unlocked_layers=parts)
    assert trained(tower) == {name for name, _ in tower.transformer.named_parameters()}
    with pytest.raises(ValueError, match="unlocked_layers is 99"):
        locked(bert_folder, unlocked_layers=99)


@pytest.mark.parametrize(("eps", "share"), [(1e-6, 0.50), (1e-8, 0.99)])
def test_a_constant_gradient_of_a_millionth_moves_by_a_share_of_the_rate(eps: float, share: float) -> None:
    module = nn.Linear(1, 1, bias=False).double()
    config = TrainConfig(Path("a"), weight_decay=0.0, lr=0.1, eps=eps)
    optimizer = make_optimizer(module, config)  # type: ignore[arg-type]
    for _ in range(3):
        before = module.weight.detach().clone()
        module.weight.grad = torch.full_like(module.weight, 1e-6)
        optimizer.step()
        assert round(float((before - module.weight.detach()) / 0.1), 2) == share


def test_two_copies_of_a_study_are_alike_if_a_batch_draws_positions_once() -> None:
    torch.manual_seed(0)
    encoder = StudyEncoder(tiny_vision(max_scans=40)).train()
    scans = random_study([(8, 16, 16)] * 3)
    batch = hlip.pack([scans, scans], (4, 8, 8))
    one, other = encoder(plan(batch, encoder.config, True, [1, 2], positions_seed=7)).detach()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    one, other = encoder(plan(batch, encoder.config, True, [1, 2])).detach()
    assert (one - other).abs().max() > 1e-3
    again, _ = encoder(plan(batch, encoder.config, True, [3, 4], positions_seed=8)).detach()
    assert (again - one).abs().max() > 1e-3


def test_a_micro_batch_draws_positions_once_if_told(tmp_path: Path, bert_folder: str) -> None:
    store = make_store(tmp_path / "store", [3, 3])
    model = ModelConfig(tiny_vision(max_scans=40), TextConfig(bert_folder), TINY_RECIPE)
    items = [Item(0, (0, 1, 2), 5), Item(1, (0, 1, 2), 6)]
    for same in (True, False):
        batch = MicroBatches(store, model, same_positions=same)[items]
        one, other = batch.tokens.places.chunk(2)
        assert torch.equal(one, other) is same
        assert torch.equal(MicroBatches(store, model, same_positions=same)[items].tokens.places, batch.tokens.places)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_step_of_a_recipe(name: str, bert_folder: str, tmp_path: Path) -> None:
    """On a small model with the recipe's objective and head."""
    given = [f"--config={name}", "--data=STORE", "--batch_size=4", "--precision=fp32", "--warmup=0"]
    config = read_arguments(given, "hlip train", "")
    released = preset(config.model or "")
    torch.manual_seed(0)
    vision = tiny_vision(
        num_prefix=released.vision.num_prefix, head=released.vision.head, max_scans=released.vision.max_scans
    )
    small = ModelConfig(
        vision, replace(released.text, name=bert_folder, context_length=32), TINY_RECIPE,
        embed_dim=32 if released.projection else 48, projection=released.projection,
        per_prefix=released.per_prefix, objective=released.objective,
    )  # fmt: skip
    model = HLIPModel(with_changes(small, config), pretrained_text=True).train()
    store = make_store(tmp_path / "store", [1, 2, 3, 1])
    scan_tokens = np.split(store.scan_tokens((4, 8, 8)), store.first[1:-1])
    sampler = StepSampler(scan_tokens, Cost(model.config.vision), 4, 10, config.seed, max_scans=config.max_scans)
    batches = MicroBatches(store, model.config, config.wording, config.scan_positions == "batch")
    (items,) = sampler.plan(0).ranks[0]
    optimizer = Optimizer(model, config, 10, torch.device("cpu"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer.begin(0)
    piece = batches[items]
    assert all(text.startswith(config.prefix) or config.findings_prefix for text in piece.texts)
    loss, _ = backward(model, model.objective.loss, [piece], torch.device("cpu"))
    assert not optimizer.is_spoilt(loss, optimizer.limit(Processes()))
    optimizer.update()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"logit_scale", "text.proj.weight", "visual.trunk.cls_token"} <= moved
    texts = {key for key in moved if key.startswith("text.transformer")}
    assert texts and (not config.lock_text or all("LayerNorm" in key for key in texts))
