"""Published weights in and out, in every layout, with seeded weights; and everything that can be wrong with them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hlip
from checkpoint_cases import VISION, small_bert, trained
from commands import run
from conftest import TINY_RECIPE, random_study, tiny_vision
from hlip.model import released
from hlip.model.config import ALIASES, TextConfig, preset
from hlip.processes import Processes
from hlip.train.checkpoints import Checkpoints, make_model
from hlip.train.config import TrainConfig
from released_files import (
    MULTISCAN,
    NAMES,
    TRUNKS,
    State,
    assert_same,
    hub_folder,
    released_json,
    seeded,
)

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.mark.parametrize("name", NAMES)
def test_published_to_ours_and_back_is_the_same_bits(name: str, tmp_path: Path) -> None:
    state = seeded(name)
    path = tmp_path / "epoch_20.pt"
    torch.save({"epoch": 20, "name": "mine", "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    model = hlip.HLIPModel.from_pretrained(path, model=name)
    assert model.config == preset(name)
    model.save_pretrained(tmp_path / "ours")
    ours = hlip.HLIPModel.from_pretrained(tmp_path / "ours")
    assert ours.config == preset(name)
    ours.save_open_clip(tmp_path / "theirs")
    assert_same(load_file(tmp_path / "theirs" / "model.safetensors"), state)
    again = hlip.HLIPModel.from_pretrained(tmp_path / "theirs")
    assert again.config == preset(name)
    assert_same(again.state_dict(), state)
    files = sorted(str(p.relative_to(tmp_path / "theirs")) for p in (tmp_path / "theirs").rglob("*") if p.is_file())
    plain = released.published_name(preset(name))
    registered = released.REGISTERED.get(plain, plain)
    assert files == [f"hlip/model_configs/{registered}.json", "model.safetensors", "open_clip_config.json"]
    for each in ("ours", "theirs"):  # the folder's file stands for the folder
        assert hlip.HLIPModel.from_pretrained(tmp_path / each / "model.safetensors").config == preset(name)
    (tmp_path / "theirs" / "hlip").rename(tmp_path / "aside")
    assert hlip.HLIPModel.from_pretrained(tmp_path / "theirs").config.vision == preset(name).vision


@pytest.mark.parametrize("name", TRUNKS)
def test_json_files_are_the_released_ones(name: str) -> None:
    registered, written = released.open_clip_json(preset(name), name)
    expected = released_json(name)
    assert registered == name
    assert (
        written["vision_cfg"].pop("timm_model_pretrained"),
        expected["vision_cfg"].pop("timm_model_pretrained"),
    ) == (
        False,  # the release begins with a MAE; whoever loads these weights need not download it
        True,
    )
    if preset(name).objective == "dual":
        assert written.pop("init_logit_bias") == pytest.approx(2.659260036932778)
    assert written == expected


def layouts() -> dict[str, Callable[[State, Path], Path]]:
    def file(name: str, change: Callable[[State], Any] = dict, **options: Any) -> Callable[[State, Path], Path]:
        def write(state: State, folder: Path) -> Path:
            torch.save(change(state), folder / name, **options)
            return folder / name

        return write

    def safetensors(state: State, folder: Path) -> Path:
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"

    def renamed(rule: Callable[[str], str]) -> Callable[[State], State]:
        return lambda state: {rule(key): value for key, value in state.items()}

    def training(state: State) -> dict[str, Any]:
        inner = renamed(lambda key: f"module.{key}")(state)
        return {"epoch": 3, "name": "x", "state_dict": inner, "optimizer": {"state": {}}, "scaler": {"scale": 65536.0}}

    unused = {"text.transformer.pooler.dense.weight": torch.zeros(2, 2),
              "text.transformer.pooler.dense.bias": torch.ones(2),
              "text.transformer.embeddings.position_ids": torch.arange(512)[None]}  # fmt: skip
    return {
        "flat safetensors": safetensors,
        "flat .bin": file("pytorch_model.bin"),
        "before torch 1.6": file("old.pth", _use_new_zipfile_serialization=False),
        "training": file("epoch_3.pt", training),
        "no module": file("epoch_3.pt", lambda state: {"state_dict": state}),
        "compiled": file("a.pt", renamed(lambda key: f"_orig_mod.module.{key}")),
        "trunk compiled": file("a.pt", renamed(lambda key: key.replace("trunk.", "trunk._orig_mod."))),
        "old position name": file("a.pt", renamed(lambda key: key.replace("sequential_", "series_"))),
        "pooler": file("a.pt", lambda state: state | unused),
        "our trainer's": file("checkpoint.pt", lambda state: {"step": 4, "config": {"lr": 0.1}, "model": state}),
    }


@pytest.mark.parametrize("layout", layouts())
def test_every_layout_is_read(layout: str, tmp_path: Path) -> None:
    state = seeded(MULTISCAN)
    path = layouts()[layout](state, tmp_path)
    assert_same(hlip.HLIPModel.from_pretrained(path, model=MULTISCAN).state_dict(), state)


def test_hub_folder_is_read_from_its_json_and_no_code_of_it_runs(bert_folder: str, tmp_path: Path) -> None:
    name = "clip_vit_base_scan_study_token1176"
    folder = hub_folder(tmp_path / "hub", seeded(name), name, context_length=77, hf_tokenizer_name="some/tokenizer")
    loaded, identity = hlip.HLIPModel.load(str(folder))
    assert str(folder / "hlip" / "model_configs" / f"{name}.json") in identity.how
    assert loaded.config == replace(
        preset(name), text=replace(preset(name).text, name="some/tokenizer", context_length=77)
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(Path(bert_folder) / file, folder)
    assert hlip.HLIPModel.from_pretrained(folder).text.tokenizer.tokenize("acute mass") == ["acute", "mass"]
    (folder / "model.safetensors").rename(tmp_path / "away")
    torch.save(seeded(name), folder / "pytorch_model.bin")
    assert_same(hlip.HLIPModel.from_pretrained(folder).state_dict(), seeded(name))


def test_among_several_json_files_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    name, other = "clip_vit_base_slice_scan_dualdinotxt2744", "clip_vit_base_scan_study_token1176"
    folder = hub_folder(tmp_path / "hub", seeded(name), name, other)
    assert hlip.HLIPModel.from_pretrained(folder).config == preset(name)


@pytest.mark.parametrize(
    "trunk", ["ablate_seqposemb_vit_base_multiscan_h2_dinotxt1568", "vit_base_singlescan_h2_token2744"]
)
def test_trunks_of_old_spelling(trunk: str, tmp_path: Path) -> None:
    content = released_json("clip_vit_base_scan_study_token1176")
    content["vision_cfg"]["timm_model_name"] = trunk
    found = released.config_of_json(tmp_path / "open_clip_config.json", {"model_cfg": content})
    wanted = "hlip-2025_10_08" if "1568" in trunk else trunk
    assert found.vision == preset(wanted).vision
    assert found.per_prefix == preset(wanted).per_prefix
    content["vision_cfg"]["timm_model_name"] = "vit_base_scan_study_token1177"
    with pytest.raises(ValueError, match=r"open_clip_config.json: unknown model .*did you mean .*token1176"):
        released.config_of_json(tmp_path / "open_clip_config.json", content)
    bad = {**content, "embed_dim": "wide", "vision_cfg": {"timm_model_name": "vit_base_scan_study_token1176"}}
    with pytest.raises(ValueError, match=r"open_clip_config.json: not a configuration of open_clip \(ValueError"):
        released.config_of_json(tmp_path / "open_clip_config.json", bad)
    bad["vision_cfg"] = {"timm_model_name": "vit_base_singlescan_h2_token2744", "timm_pool": "map"}
    with pytest.raises(ValueError, match=r"open_clip_config.json: without a projection embed_dim must be"):
        released.config_of_json(tmp_path / "open_clip_config.json", bad | {"embed_dim": 7})
    with pytest.raises(ValueError, match=r"open_clip_config.json: not a configuration of open_clip .*'text_cfg'"):
        released.config_of_json(tmp_path / "open_clip_config.json", {"vision_cfg": content["vision_cfg"]})


@pytest.mark.parametrize("name", sorted(name for name in set(NAMES) - set(ALIASES) if "rope" not in name))
def test_what_shapes_tell(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(seeded(name), path := tmp_path / "weights.safetensors")
    if "token1176" in name or "study_dual" in name:
        with pytest.raises(ValueError, match="differ in what weights do not tell") as error:
            hlip.HLIPModel.from_pretrained(path)
        assert name in str(error.value)
        assert str(path) in str(error.value)
    else:
        with caplog.at_level(logging.WARNING):
            assert hlip.HLIPModel.from_pretrained(path).config == preset(name)
        assert f"{path}: {name}, guessed from its shapes" in caplog.text
        assert f"levels: {' '.join(preset(name).vision.levels)}" in caplog.text


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("vit_base_multiscan_h3_token1176", "vit_base_multiscan_h3_token1176"),
        ("vit_base_multiscan_h3_dualdinotxt1568", "clip_vit_base_slice_scan_study_dualdinotxt1568"),
        ("clip_vit_base_scan_study_token1176-lr_1e-4", "clip_vit_base_scan_study_token1176"),
    ],
)
def test_the_name_of_the_training_run_says_which_model(called: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "epoch_5.pt"
    torch.save({"name": f"DATE_2025_05_01-MODEL_{called}", "state_dict": seeded(name)}, path)
    loaded, identity = hlip.HLIPModel.load(str(path))
    assert loaded.config == preset(name)
    assert "as the training run was called" in identity.how
    path = tmp_path / "more.pt"  # a part of another name says nothing
    torch.save({"name": f"x{called}8", "state_dict": seeded(name)}, path)
    with pytest.raises(ValueError, match="differ in what weights do not tell"):
        hlip.HLIPModel.load(str(path))


def test_one_scan_position_is_added_to_every_token(tmp_path: Path) -> None:
    name = "clip_vit_base_slice_scan_token2744"
    state = seeded(name)
    row = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(1))
    save_file({**state, "visual.trunk.sequential_posemb": row}, tmp_path / "old.safetensors")
    loaded, identity = hlip.HLIPModel.load(str(tmp_path / "old.safetensors"))
    assert "its one scan position is added" in identity.how
    assert loaded.config.vision.max_scans == 1
    state["visual.trunk.spatial_posemb"] = state["visual.trunk.spatial_posemb"] + row[:, :, None, None]
    save_file(state, tmp_path / "summed.safetensors")
    summed = hlip.HLIPModel.from_pretrained(tmp_path / "summed.safetensors")
    batch = hlip.pack([random_study([(16, 48, 48)]), random_study([(16, 48, 48)] * 2)], (8, 24, 24))
    with torch.no_grad():
        torch.testing.assert_close(loaded.visual.trunk(batch), summed.visual.trunk(batch), rtol=1e-3, atol=1e-4)
    loaded.save_open_clip(tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")["visual.trunk.sequential_posemb"], row)
    assert hlip.HLIPModel.from_pretrained(tmp_path / "back").config == loaded.config


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip_vit_base_slice_scan_dualdinotxt2744", 2.65926), ("siglip_vit_base_singlescan_h2_token2744", -10.0)],
)
def test_absent_logit_bias_begins_anew(name: str, value: float, tmp_path: Path) -> None:
    state = seeded(name)
    del state["logit_bias"]
    save_file(state, tmp_path / "weights.safetensors")
    model, (_, how, _) = hlip.HLIPModel.load(str(tmp_path / "weights.safetensors"))
    assert float(model.logit_bias.detach()) == pytest.approx(value, abs=1e-5)
    assert "no logit_bias" in how


def test_another_width_of_the_embedding_is_the_same_model(tmp_path: Path) -> None:
    """Releases of one model differ in it, so it says nothing of the levels."""
    name = "clip_vit_base_slice_scan_dualdinotxt2744"
    state = seeded(name)
    for key in ("visual.head.proj.weight", "text.proj.weight"):
        state[key] = state[key][:24].clone()
    save_file(state, tmp_path / "weights.safetensors")
    for model in (None, name):
        config = hlip.HLIPModel.from_pretrained(tmp_path / "weights.safetensors", model=model).config
        assert config == replace(preset(name), embed_dim=24)


def test_a_checkpoint_of_our_trainer_says_which_model(tmp_path: Path) -> None:
    name = "vit_base_multiscan_h3_token1176"
    torch.save({"config": {"model": name}, "step": 3, "model": seeded(name)}, tmp_path / "checkpoint.pt")
    loaded, identity = hlip.HLIPModel.load(str(tmp_path / "checkpoint.pt"))
    assert loaded.config == preset(name)
    assert not identity.guessed


OWN = {
    "width and levels": ({"vision": replace(VISION, width=36, levels=("slice", "study", "scan", "study"))}, {}),
    "patches and objective": (
        {"vision": tiny_vision(num_prefix=2, grid=(3, 2, 1), max_scans=0), "per_prefix": True, "objective": "dual",
         "recipe": None},
        {"num_hidden_layers": 1, "hidden_act": "relu"},
    ),
    "head": ({"vision": replace(VISION, head="average", num_prefix=0, positions="sincos3d"), "embed_dim": 48,
              "projection": False}, {"max_position_embeddings": 33, "type_vocab_size": 3}),
}  # fmt: skip


@pytest.mark.parametrize("own", OWN)
def test_a_checkpoint_of_a_model_of_its_own_is_read_without_flags(own: str, bert_folder: str, tmp_path: Path) -> None:
    """After the folder of its BERT has gone; by the command too; and a run begins with it."""
    changes, bert = OWN[own]
    text = TextConfig(small_bert(bert_folder, tmp_path / "bert", **bert), 32, pooling="mean", locked=True)
    config = hlip.ModelConfig(**{"vision": VISION, "text": text, "recipe": TINY_RECIPE, "embed_dim": 24, **changes})
    model = hlip.HLIPModel(config).eval()
    texts = ["a mass", "no masses [SEP]", "Mass x"]
    expected = model.encode_text(texts)
    path = trained(model, tmp_path / "run")
    shutil.rmtree(tmp_path / "bert")
    loaded, identity = hlip.HLIPModel.load(str(path))
    assert not identity.guessed
    assert str(path) in identity.how
    assert run("convert", path, tmp_path / "converted") == 0
    begun = make_model(TrainConfig(tmp_path, init=str(path), lock_text=False))
    assert begun.config == replace(config, text=replace(text, locked=False))
    for again in (loaded, hlip.HLIPModel.from_pretrained(tmp_path / "converted"), begun.eval()):
        assert again.config.vision == config.vision
        assert again.config.recipe == config.recipe
        assert_same(again.state_dict(), model.state_dict())
        assert torch.equal(again.encode_text(texts), expected)


def test_a_checkpoint_from_before_says_no_more_than_its_shapes(bert_folder: str, tmp_path: Path) -> None:
    """And a run goes on with it."""
    name = "vit_base_multiscan_h3_token1176"
    text = replace(preset(name).text, name=small_bert(bert_folder, tmp_path / "bert"))
    model = hlip.create_model(name, text=text)
    path = trained(model, tmp_path / "run")
    content = torch.load(path)
    del content["hlip_files"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="differ in what weights do not tell"):
        hlip.HLIPModel.load(str(path))
    loaded, _ = hlip.HLIPModel.load(str(path), name, tmp_path / "bert")
    assert loaded.config == model.config
    assert_same(loaded.state_dict(), model.state_dict())
    checkpoints = Checkpoints(TrainConfig(Path("store"), tmp_path / "run"), Processes())
    again = hlip.create_model(name, text=text)
    assert checkpoints.load(again, torch.optim.AdamW(again.parameters()), torch.amp.GradScaler("cpu")) == 3
    assert_same(again.state_dict(), model.state_dict())
