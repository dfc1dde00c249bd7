from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

import hlip
from conftest import random_study, tiny_vision
from hlip.model import checkpoint
from hlip.model.clip import clip_loss
from hlip.model.config import TextConfig, preset
from hlip.model.text import TextTower


def batch_of(count: int) -> hlip.PackedBatch:
    studies = [
        hlip.Study(f"s{i}", random_study([(8, 16, 16)] * (1 + i % 3), i), text=f"report {i}") for i in range(count)
    ]
    return hlip.pack(studies, (4, 8, 8))


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(tiny_model: hlip.HLIPModel) -> None:
    batch = batch_of(3)
    image, text, scale = tiny_model(batch)
    assert image.shape == text.shape == (3, 32)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text, tiny_model.encode_text([f"report {i}" for i in range(3)]))
    assert float(scale.detach()) == pytest.approx(1 / 0.07)
    again, text_again, _ = tiny_model(batch, tiny_model.text.features(batch.texts))
    torch.testing.assert_close(again, image)
    torch.testing.assert_close(text_again, text)


def test_saved_model_gives_the_same_embeddings(tiny_model: hlip.HLIPModel, model_folder: Path) -> None:
    loaded = hlip.HLIPModel.from_pretrained(model_folder)
    assert not loaded.training
    assert loaded.config == tiny_model.config
    assert torch.equal(loaded.encode_image(batch_of(2)), tiny_model.encode_image(batch_of(2)))
    assert torch.equal(loaded.encode_text(["acute stroke"]), tiny_model.encode_text(["acute stroke"]))


def test_saving_over_a_model_replaces_it_whole(tiny_model: hlip.HLIPModel, tmp_path: Path) -> None:
    (tmp_path / "model" / "text").mkdir(parents=True)
    (tmp_path / "model" / "text" / "stale").touch()
    tiny_model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "text" / "stale").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors", "text"]


def test_saving_never_removes_what_is_not_a_model(tiny_model: hlip.HLIPModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="exists and is not a saved model"):
            tiny_model.save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_save_leaves_the_old_model(
    tiny_model: hlip.HLIPModel, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    before = {path.name: path.stat().st_size for path in folder.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_model.save_pretrained(folder)
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def edit_config(key: str, value: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["vision"][key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json: not a readable model configuration"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: not a readable model configuration"),
        (lambda f: (f / "config.json").unlink(), "config.json: not a readable model configuration"),
        (edit_config("width", "abc"), "config.json: .*width must be a positive integer, got 'abc'"),
        (edit_config("heads", 5), "config.json: .*width must be a multiple of heads, got 48 and 5"),
        (edit_config("grid", [2, 2]), "config.json: .*grid must be three positive integers"),
        (edit_config("positions", "x"), "config.json: .*positions must be one of tiled, sincos3d"),
        (edit_config("levels", ["patch"]), "config.json: .*levels must be of slice, scan, study"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 100), "model.safetensors: not readable weights"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: not readable weights"),
        (lambda f: shutil.rmtree(f / "text"), "not a saved model: it has no folder 'text'"),
    ],
)
def test_damaged_model_folders(damage: Callable, message: str, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        hlip.HLIPModel.from_pretrained(folder)


def test_weights_that_do_not_fit_are_named(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision"]["levels"] = config["vision"]["levels"] * 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model.safetensors: \d+ weights do not fit: missing visual.trunk.blocks.4"):
        hlip.HLIPModel.from_pretrained(folder)


def test_unknown_models(bert_folder: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'clip_vit_base_scan_study_token1176'"):
        hlip.create_model("clip_vit_base_scan_study_token1167", bert_folder)
    with pytest.raises(ValueError, match="no/such: unknown model"):
        hlip.HLIPModel.from_pretrained("no/such")
    with pytest.raises(ValueError, match=r"text tower 'no_such_folder'"):
        hlip.create_model("demo", "no_such_folder")


def test_every_listed_model_has_a_configuration_that_builds() -> None:
    for name in hlip.list_models():
        config = preset(name)
        trunk = hlip.model.vit.StudyEncoder(replace(config.vision, width=24, heads=2))  # type: ignore[attr-defined]
        assert config.recipe.shape == tuple(
            g * p for g, p in zip(config.vision.grid, config.vision.patch_size, strict=True)
        )
        assert len(trunk.blocks) == len(config.vision.levels)
        assert hlip.ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_locked_text_tower_stays_fixed(bert_folder: str) -> None:
    locked = TextTower(TextConfig(bert_folder, 32, locked=True), 8).train()
    assert not locked.transformer.training
    locked(["a", "b"]).sum().backward()
    assert locked.proj.weight.grad is not None
    assert all(p.grad is None for p in locked.transformer.parameters())
    free = TextTower(TextConfig(bert_folder, 32), 8).train()
    free(["a", "b"]).sum().backward()
    assert all(p.grad is not None for p in free.transformer.parameters())
    with pytest.raises(ValueError, match="reads 512 tokens, context_length is 4096"):
        TextTower(TextConfig(bert_folder, 4096), 8)


def test_text_pooling_ignores_padding(bert_folder: str) -> None:
    for pooling in ("cls", "mean"):
        tower = TextTower(TextConfig(bert_folder, 32, pooling), 8).eval()  # type: ignore[arg-type]
        together = tower(["stroke", "a much longer report with many more words in it"])
        torch.testing.assert_close(together[:1], tower(["stroke"]), rtol=1e-4, atol=1e-5)
    hidden = tower.transformer(**tower.tokenizer(["a mass"], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(tower.features(["a mass"]), hidden.mean(1))


def test_clip_loss_is_the_mean_of_both_cross_entropies() -> None:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1) for _ in range(2))
    logits = 7.0 * image @ text.T
    by_hand = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    torch.testing.assert_close(clip_loss(image, text, torch.tensor(7.0)), by_hand)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = hlip.model.vit.StudyEncoder(tiny_vision()).double().eval()  # type: ignore[attr-defined]
        self.text = nn.Linear(6, 48).double()
        self.scale = nn.Parameter(torch.tensor(10.0, dtype=torch.float64))

    def forward(self, batch: hlip.PackedBatch, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return F.normalize(self.trunk(batch)[:, 0], dim=1), F.normalize(self.text(words), dim=1), self.scale


def studies_and_words() -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    studies = [random_study([(8, 16, 16)] * (1 + i % 3), i) for i in range(4)]
    return studies, torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def one_rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    studies, words = studies_and_words()
    model = nn.parallel.DistributedDataParallel(Towers())
    mine = slice(2 * rank, 2 * rank + 2)
    loss = clip_loss(*model(hlip.pack(studies[mine], (4, 8, 8)), words[mine]))
    loss.backward()
    if rank == 1:
        torch.save(
            {name: p.grad for name, p in model.module.named_parameters()} | {"loss": loss.detach()}, f"{folder}/grads"
        )
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(one_rank, (2, str(tmp_path)), nprocs=2)
    shared = torch.load(tmp_path / "grads", weights_only=True)
    studies, words = studies_and_words()
    model = Towers()
    loss = clip_loss(*model(hlip.pack(studies, (4, 8, 8)), words))
    loss.backward()
    torch.testing.assert_close(shared.pop("loss"), loss.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(shared[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
