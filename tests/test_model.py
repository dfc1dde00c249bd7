from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import hlip
from conftest import random_study, tiny_vision
from hlip.model import checkpoint
from hlip.model.config import ALIASES, MODELS, TextConfig, preset
from hlip.model.text import TextTower
from published import FACTS


def batch_of(count: int) -> hlip.PackedBatch:
    studies = [
        hlip.Study(f"s{i}", random_study([(8, 16, 16)] * (1 + i % 3), i), [], f"report {i}") for i in range(count)
    ]
    return hlip.pack(studies, (4, 8, 8))


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(tiny_model: hlip.HLIPModel) -> None:
    batch = batch_of(3)
    image, text, scale, bias = tiny_model(batch, batch.impressions)
    assert image.shape == text.shape == (3, 1, 32)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3, 1))
    torch.testing.assert_close(text[:, 0], tiny_model.encode_text([f"report {i}" for i in range(3)]))
    assert (scale.tolist(), bias) == ([pytest.approx(1 / 0.07)], None)
    again, text_again, *_ = tiny_model(batch, tiny_model.text.features(batch.impressions))
    torch.testing.assert_close(again, image)
    torch.testing.assert_close(text_again, text)


def test_saved_model_gives_the_same_embeddings(tiny_model: hlip.HLIPModel, model_folder: Path) -> None:
    loaded = hlip.HLIPModel.from_pretrained(model_folder)
    assert not loaded.training
    bert = Path(tiny_model.config.text.name)
    assert loaded.config == replace(tiny_model.config, text=replace(tiny_model.config.text, name=bert.name))
    assert not [path for path in model_folder.rglob("*.json") if str(bert.parent) in path.read_text()]
    assert torch.equal(loaded.encode_image(batch_of(2)), tiny_model.encode_image(batch_of(2)))
    assert torch.equal(loaded.encode_text(["acute stroke"]), tiny_model.encode_text(["acute stroke"]))


def test_saving_over_a_model_replaces_it_whole(tiny_model: hlip.HLIPModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "text" / "config.json").write_text("stale")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for name in ("model", "link"):
        tiny_model.save_pretrained(tmp_path / name)
        assert (tmp_path / "model" / "text" / "config.json").read_text() != "stale"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model"]
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors", "text"]


def test_saving_never_removes_what_is_not_a_model(tiny_model: hlip.HLIPModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "reports" / "text").mkdir(parents=True)
    (tmp_path / "reports" / "text" / "report.txt").write_text("of a patient")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.json").write_text('{"colour": "red"}')
    tiny_model.save_pretrained(tmp_path / "with_more")
    (tmp_path / "with_more" / "text" / "notes.txt").write_text("to keep")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for target in (".", "thesis.txt", "reports", "settings", "with_more"):
        with pytest.raises(ValueError, match="exists and is not a saved model"):
            tiny_model.save_pretrained(tmp_path / target)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


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


def repeat_width(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"width": 48', '"width": 48, "width": 48', 1))


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
        (repeat_width, "config.json: .*line .*: 'width' occurs twice"),
        (edit_config("width", "abc"), "config.json: .*vision.width: expected a whole number, got 'abc'"),
        (edit_config("heads", 5), "config.json: .*width must be a multiple of heads, got 48 and 5"),
        (edit_config("grid", [2, 2]), "config.json: .*vision.grid: expected a list of 3 values"),
        (edit_config("positions", "x"), "config.json: .*vision.positions: expected one of tiled, sincos3d"),
        (edit_config("levels", ["patch"]), r"config.json: .*vision.levels\[0\]: expected one of slice, scan, study"),
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


def test_unknown_models() -> None:
    with pytest.raises(ValueError, match="did you mean clip_vit_base_scan_study_token1176"):
        hlip.create_model("clip_vit_base_scan_study_token1167")
    with pytest.raises(ValueError, match="no/such: unknown model"):
        hlip.HLIPModel.from_pretrained("no/such")
    with pytest.raises(ValueError, match=r"text tower 'no_such_folder'"):
        hlip.create_model("demo", pretrained_text="no_such_folder")


@pytest.mark.parametrize("name", [*MODELS, *ALIASES])
def test_every_listed_model_has_a_configuration_that_builds(name: str) -> None:
    config = preset(name)
    assert hlip.ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    small = replace(config.vision, width=24, heads=2)
    changes = {"vision": small, "embed_dim": small.num_features}
    with torch.device("meta"):
        model = hlip.create_model(name, **changes)
    assert len(model.visual.trunk.blocks) == len(config.vision.levels)
    if config.recipe is None:
        with pytest.raises(ValueError, match="no recipe makes scans"):
            _ = config.preprocess
    else:
        shape = tuple(g * p for g, p in zip(config.vision.grid, config.vision.patch_size, strict=True))
        assert config.preprocess.shape == shape


BLOCK = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
         "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")  # fmt: skip
BERT_LAYER = {"attention.self.query": (768, 768), "attention.self.key": (768, 768), "attention.self.value": (768, 768),
              "attention.output.dense": (768, 768), "attention.output.LayerNorm": (768,),
              "intermediate.dense": (3072, 768), "output.dense": (768, 3072), "output.LayerNorm": (768,)}  # fmt: skip


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Every key of a released model and its shape, from the rules of the release."""
    facts = FACTS[name]
    width, patch, grid, prefix, scans = facts.width, facts.patch, facts.grid, facts.prefix, facts.max_scans
    features, embedding, objective = facts.features, facts.embed_dim, facts.objective
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    trunk = {"cls_token": (1, 1, width), "spatial_posemb": (1, *grid, width), "norm.weight": (width,),
             "norm.bias": (width,), "patch_embed.proj.weight": (width, 1, *patch),
             "patch_embed.proj.bias": (width,)}  # fmt: skip
    if prefix == 2:
        trunk["reg_token"] = (1, 1, width)
    if scans:
        trunk["sequential_posemb"] = (1, scans, width)
    rows = {"attn.qkv": 3, "mlp.fc1": 4}
    columns = {"attn.qkv": 1, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 4}
    for i in range(len(facts.levels)):
        for key in BLOCK:
            part, kind = key.rsplit(".", 1)
            size = (rows.get(part, 1) * width,)
            trunk[f"blocks.{i}.{key}"] = (
                (*size, columns[part] * width) if kind == "weight" and part in columns else size
            )
    if objective == "siglip":
        trunk["attn_pool.latent"] = (1, 1, width)
        sizes = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width), "norm": (width,),
                 "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}  # fmt: skip
        for part, shape in sizes.items():
            trunk |= {f"attn_pool.{part}.weight": shape, f"attn_pool.{part}.bias": shape[:1]}
    shapes |= {f"visual.trunk.{key}": shape for key, shape in trunk.items()}
    if features:
        shapes["visual.head.proj.weight"] = (embedding, features)
    if objective != "clip":
        shapes["logit_bias"] = ()
    bert = {"embeddings.word_embeddings.weight": (30522, 768), "embeddings.position_embeddings.weight": (512, 768),
            "embeddings.token_type_embeddings.weight": (2, 768), "embeddings.LayerNorm.weight": (768,),
            "embeddings.LayerNorm.bias": (768,)}  # fmt: skip
    for i in range(12):
        for part, shape in BERT_LAYER.items():
            bert |= {f"encoder.layer.{i}.{part}.weight": shape, f"encoder.layer.{i}.{part}.bias": shape[:1]}
    shapes |= {f"text.transformer.{key}": shape for key, shape in bert.items()}
    return shapes | {"text.proj.weight": (embedding, 768)}


@pytest.mark.parametrize("name", FACTS)
def test_keys_and_shapes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = hlip.create_model(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == published_shapes(name)


def test_old_names_give_one_embedding_a_study() -> None:
    assert not preset("vit_base_multiscan_h2_token1176").per_prefix
    assert preset("clip_vit_base_scan_study_token1176").per_prefix


def test_one_embedding_for_each_prefix_row() -> None:
    vision = tiny_vision(num_prefix=2, head="dinotxt")
    text = TextConfig("unread", context_length=32)
    config = hlip.ModelConfig(vision, text, None, 32, per_prefix=True, objective="dual")
    torch.manual_seed(0)
    model = hlip.HLIPModel(config).eval()
    batch = batch_of(3)
    embeddings = model.encode_image(batch)
    assert embeddings.shape == (3, 2, 32)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3, 2))
    expected = F.normalize(model.visual.trunk(batch) @ model.visual.head.proj.weight.T, dim=-1)
    torch.testing.assert_close(embeddings, expected)
    assert math.isclose(float(model.logit_bias.detach()), 2.65926, abs_tol=1e-5)
    for change, message in [
        ({"per_prefix": False}, "needs per_prefix"),
        ({"objective": "moco"}, "objective: expected one of clip, siglip, dual, got 'moco'"),
        ({"per_prefix": "false"}, "per_prefix: expected true or false, got 'false'"),
        ({"embed_dim": 32.0}, "embed_dim: expected a whole number, got 32.0"),
        ({"embed_dim": 0}, "embed_dim must be above 0, got 0"),
        ({"projection": False}, "embed_dim must be the encoder's 96, got 32"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(config, **change)


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


def test_what_is_no_batch_is_refused(tiny_model: hlip.HLIPModel) -> None:
    study = hlip.Study("s", random_study([(8, 16, 16)], 0))
    for wrong in (study, [study], study.scans[0], "s.nii.gz", None):
        with pytest.raises(ValueError, match="expected a batch of"):
            tiny_model.encode_image(wrong)
