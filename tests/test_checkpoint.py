"""Published weights in and out, in every layout, with seeded weights; and everything that can be wrong with them."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hlip
from commands import run
from conftest import TINY_RECIPE, random_study, tiny_vision
from hlip.model import released
from hlip.model.config import ALIASES, TextConfig, preset
from hlip.processes import Processes
from hlip.train.checkpoints import Checkpoints, make_model
from hlip.train.config import TrainConfig
from hostile_models import put
from released_files import (
    MULTISCAN,
    NAMES,
    TRUNKS,
    Evil,
    State,
    assert_same,
    cut,
    hub_folder,
    released_json,
    seeded,
    vit,
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


def trained(model: hlip.HLIPModel, out: Path) -> Path:
    """A checkpoint as a run leaves it."""
    checkpoints = Checkpoints(TrainConfig(Path("store"), out), Processes())
    checkpoints.save(model, torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu"), 3)
    checkpoints.wait()
    return checkpoints.all()[-1]


def small_bert(bert_folder: str, folder: Path, **changes: Any) -> str:
    """A BERT's folder, without weights, of another size and another vocabulary."""
    shutil.copytree(bert_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer.json"))
    words = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([*words[:104], "mass", "a", "##s", "no"]) + "\n")
    sizes = {"vocab_size": 108, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4}
    put(folder, {"config.json": {**sizes, "intermediate_size": 24, "layer_norm_eps": 1e-5, **changes}})
    return str(folder)


VISION = tiny_vision()
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


def changed(name: str, *keys: str, value: Any) -> Callable[[dict[str, str]], None]:
    def change(files: dict[str, str]) -> None:
        content = json.loads(files[name])
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        files[name] = json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("config.json", "vision", "width", value=60), "weights do not fit: visual.head.proj.weight is"),
        (changed("config.json", "vision", "levels", value=["scan"] * 3), "weights do not fit: unexpected visual"),
        (changed("config.json", "vision", "width", value=3 * 2**20), "its configuration asks for"),
        (changed("config.json", "vision", "levels", value=["scan"] * 10**6), "its configuration asks for 1000000"),
        (changed("config.json", "embed_dim", value=2**40), "no model can be built for it|weights do not fit"),
        (changed("config.json", "embed_dim", value=float("nan")), "config.json: .*expected a finite number"),
        (changed("config.json", "auto_map", value={"AutoModel": "a/b--c.D"}), "config.json: not a readable model"),
        (changed("config.json", "text", "name", value=["x"]), "config.json: .*text.name: expected a text"),
        (changed("text/config.json", "num_hidden_layers", value=2), "unexpected text.transformer.encoder.layer.2"),
        (changed("text/config.json", "vocab_size", value=2**40), r"text, config.json|text': .*vocab_size is"),
        (lambda files: files.pop("config.json"), "config.json: not a readable model configuration"),
        (lambda files: files.pop("text/config.json"), "text, config.json: no such file"),
        (lambda files: files.update({"config.json": "[" * 10**5}), "config.json: not .*nested too deeply"),
        (lambda files: files.update({"config.json": "[]"}), "config.json: not a readable model configuration"),
        (lambda files: files.update({"text/config.json": 5}), "not readable weights .hlip_files"),
        (lambda files: files.update({5: "{}"}), "not readable weights .hlip_files"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_the_checkpoints_is_named(
    change: Callable[[dict[str, Any]], Any], message: str, bert_folder: str, tmp_path: Path
) -> None:
    text = TextConfig(small_bert(bert_folder, tmp_path / "bert"), context_length=32)
    path = trained(hlip.HLIPModel(hlip.ModelConfig(VISION, text, embed_dim=24)), tmp_path / "run")
    content = torch.load(path)
    change(content["hlip_files"])
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        hlip.HLIPModel.load(str(path))
    assert str(path) in str(error.value)


def test_a_checkpoint_is_not_another_model(bert_folder: str, tmp_path: Path) -> None:
    text = TextConfig(small_bert(bert_folder, tmp_path / "bert"), context_length=32)
    path = trained(hlip.HLIPModel(hlip.ModelConfig(VISION, text, embed_dim=24)), tmp_path / "run")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, config.json: the model is no demo: "):
        hlip.HLIPModel.from_pretrained(path, model="demo")
    other = small_bert(bert_folder, tmp_path / "other", vocab_size=200)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight is"):
        hlip.HLIPModel.from_pretrained(path, text=other)
    put(tmp_path / "other", {"config.json": {"vocab_size": 108}, "tokenizer_config.json": {"do_lower_case": False}})
    told = hlip.HLIPModel.from_pretrained(path, text=other)
    assert told.config.text.name == other
    assert told.text.tokenizer.tokenize("Mass") == ["[UNK]"]


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["state_dict"] = endless
    for content, message in [
        (endless, "a value within itself"),
        ({"a": torch.zeros(3).to(torch.float8_e4m3fn)}, "a is torch.float8_e4m3fn"),
        ({"a": torch.eye(3).to_sparse()}, "it holds more than weights, torch._utils._rebuild_sparse_tensor"),
    ]:
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=f"odd.pt: not readable weights .*{message}"):
            hlip.HLIPModel.from_pretrained(tmp_path / "odd.pt")


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for i, content in enumerate([{"state_dict": seeded(MULTISCAN), "args": Evil(mark)}, Evil(mark)]):
        for zipped in (True, False):
            path = tmp_path / f"evil{i}.pt"
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(
                ValueError, match=r"evil\d.pt: not readable weights \(it holds more than weights, posix.mkdir"
            ):
                hlip.HLIPModel.from_pretrained(path)
            assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()
    torch.save({"state_dict": seeded(MULTISCAN), "loss": np.float64(1)}, tmp_path / "numpy.pt")
    with pytest.raises(ValueError, match=r"numpy.pt: not readable weights \(it holds more than weights, numpy"):
        hlip.HLIPModel.from_pretrained(tmp_path / "numpy.pt")


@pytest.mark.parametrize("file", ["a.safetensors", "a.pt", "a.bin"])
def test_truncated_files_are_named(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    save_file(seeded(MULTISCAN), path) if path.suffix == ".safetensors" else torch.save(seeded(MULTISCAN), path)
    cut(path)
    with pytest.raises(ValueError, match=f"{file}: not readable weights"):
        hlip.HLIPModel.from_pretrained(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{file}: not readable weights"):
        hlip.HLIPModel.from_pretrained(path)


def nan(state: State) -> None:
    state["visual.trunk.blocks.3.attn.qkv.weight"][5, 7] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nan, "a.pt: 1 weights are not finite numbers: visual.trunk.blocks.3.attn.qkv.weight"),
        (lambda s: s["text.proj.weight"].fill_(float("inf")), "not finite numbers: text.proj.weight"),
        (lambda s: s.update({"logit_scale": torch.tensor(3)}), "not finite numbers: logit_scale"),
        (lambda s: s.update({"text.proj.weight": torch.zeros(7, 32)}), r"text.proj.weight is \(7, 32\), not"),
        (lambda s: s.update({"visual.extra.weight": torch.zeros(1)}), "not fit: unexpected visual.extra.weight"),
        (lambda s: s.update({"logit_bias": torch.zeros(())}), "unexpected logit_bias"),
        (lambda s: s.pop("visual.trunk.norm.bias"), "1 weights do not fit: missing visual.trunk.norm.bias"),
        (lambda s: s.pop("visual.trunk.sequential_posemb"), "missing visual.trunk.sequential_posemb"),
        (lambda s: s.pop("visual.trunk.spatial_posemb"), "another architecture: no visual.trunk.spatial_posemb"),
        (lambda s: s.update({"epoch": 3}), "'epoch' is int, not a tensor"),
        (lambda s: s.update({"module.logit_scale": torch.zeros(())}), "two keys that both mean logit_scale"),
        (lambda s: s.clear(), "it holds dict, no tensors by name"),
    ],
)  # fmt: skip
def test_wrong_weights_are_named(damage: Callable[[State], Any], message: str, tmp_path: Path) -> None:
    state = seeded(MULTISCAN)
    damage(state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as error:
        hlip.HLIPModel.from_pretrained(tmp_path / "a.pt", model=MULTISCAN)
    assert str(tmp_path / "a.pt") in str(error.value)


def test_other_architectures_and_names_that_do_not_exist(tmp_path: Path) -> None:
    torch.save(vit(), tmp_path / "mae.pth")
    with pytest.raises(ValueError, match=r"mae.pth: weights of another architecture: .*pretrained_vision"):
        hlip.HLIPModel.from_pretrained(tmp_path / "mae.pth")
    odd = {**seeded(MULTISCAN), "visual.trunk.spatial_posemb": torch.zeros(1, 4, 14, 14, 48)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd.safetensors: fits no released model: width 48, .*grid 4 x 14 x 14"):
        hlip.HLIPModel.from_pretrained(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"spatial_posemb is \(1, 4, 14, 14, 48\), not \(1, 3, 14, 14, 48\)"):
        hlip.HLIPModel.from_pretrained(tmp_path / "odd.safetensors", model=MULTISCAN)
    with pytest.raises(ValueError, match="did you mean vit_base_multiscan_h2_token588"):
        hlip.HLIPModel.from_pretrained(tmp_path / "odd.safetensors", model="vit_base_multiscan_h2_token688")
    with pytest.raises(ValueError, match=r"od.safetensors: unknown model: no such .* mean .*odd.safetensors"):
        hlip.HLIPModel.from_pretrained(tmp_path / "od.safetensors")
    with pytest.raises(ValueError, match="it is a name of an architecture: give its weights"):
        hlip.HLIPModel.from_pretrained(MULTISCAN)
    (tmp_path / "x.npz").touch()
    with pytest.raises(ValueError, match=r"x.npz: not readable weights \(weights end in .safetensors"):
        hlip.HLIPModel.from_pretrained(tmp_path / "x.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no weights: none of model.safetensors"):
        hlip.HLIPModel.from_pretrained(tmp_path / "empty")


def test_ours_names_its_own_architecture(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: the model is no demo: width is 48, not 48|patch_size is"):
        hlip.HLIPModel.from_pretrained(model_folder, model="demo")
    model = hlip.HLIPModel.from_pretrained(model_folder)
    with pytest.raises(ValueError, match="architecture of no released one"):
        model.save_open_clip(tmp_path / "out")
    with pytest.raises(ValueError, match=r"the model is no vit_base_multiscan_h2_token588: .*levels"):
        model.save_open_clip(tmp_path / "out", MULTISCAN)
    assert list(tmp_path.iterdir()) == []


def test_a_text_tower_of_another_size_has_no_place_in_the_layout(bert_folder: str, tmp_path: Path) -> None:
    model = hlip.create_model(MULTISCAN, text=replace(preset(MULTISCAN).text, name=bert_folder))
    with pytest.raises(ValueError, match="text tower of BERT's base size; this one has vocab_size 30522, not 99"):
        model.save_open_clip(tmp_path / "out")


def test_saved_without_a_tokenizer(tmp_path: Path, bert_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    model = hlip.create_model(MULTISCAN)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "model")
    assert "saved without a tokenizer, so texts will be read with that of microsoft/" in caplog.text
    assert [path.name for path in (tmp_path / "model" / "text").iterdir()] == ["config.json"]
    assert hlip.HLIPModel.from_pretrained(tmp_path / "model").text.tokenizer_source == preset(MULTISCAN).text.name


def test_push_to_hub_uploads_what_a_save_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            calls.append((repo_id, private))

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = hlip.create_model(MULTISCAN)
    model.push_to_hub("me/mine", private=True)
    model.push_to_hub("me/mine", layout="open_clip")
    ours = ["config.json", "model.safetensors", "text"]
    theirs = ["hlip", "model.safetensors", "open_clip_config.json"]
    assert calls == [("me/mine", True), ("me/mine", ours), ("me/mine", False), ("me/mine", theirs)]


def test_push_to_hub_offline_is_an_error() -> None:
    with pytest.raises(ValueError, match="me/mine: could not be uploaded"):
        hlip.create_model(MULTISCAN).push_to_hub("me/mine")


def test_convert_says_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = seeded("hlip-2025_10_08")
    torch.save({"state_dict": state}, source := tmp_path / "epoch_5.pt")
    assert run("convert", source, tmp_path / "ours") == 0
    printed = capsys.readouterr().out
    for words in ("hlip-2025_10_08, guessed from its shapes", "patch_size 6 x 16 x 16", "grid 8 x 14 x 14", "dinotxt",
                  "scan scan study", "BiomedBERT", "one per output", "written in layout hlip"):  # fmt: skip
        assert words in printed
    assert run("convert", tmp_path / "ours", tmp_path / "theirs", "--layout", "open_clip") == 0
    assert_same(load_file(tmp_path / "theirs" / "model.safetensors"), state)
    assert run("convert", tmp_path / "theirs", tmp_path / "ours") == 0  # replaces a model
    (tmp_path / "link").symlink_to("ours")
    (tmp_path / "ours" / "config.json").write_text('{"vision": "stale"}')
    assert run("convert", tmp_path / "theirs", tmp_path / "link") == 0  # what the link points to
    assert (tmp_path / "link").is_symlink() and "stale" not in (tmp_path / "ours" / "config.json").read_text()
    (tmp_path / "link").unlink()
    assert run("convert", tmp_path / "ours", tmp_path / "theirs", "--layout", "open_clip") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_5.pt", "ours", "theirs"]
    (tmp_path / "theirs" / "hlip" / "thesis.json").touch()  # not from us: the folder is somebody's work
    assert run("convert", tmp_path / "ours", tmp_path / "theirs", "--layout", "open_clip") == 2
    assert "theirs exists and is not a saved model" in capsys.readouterr().err


def test_convert_writes_nothing_when_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(seeded("vit_base_multiscan_h3_token1176"), source := tmp_path / "a.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(source.read_bytes()[:5000])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    out, name = tmp_path / "out", "vit_base_multiscan_h3_token1176"
    for args, message in [
        ([source, out], "choose with model= or --model"),
        ([source, out, "--model", name.replace("76", "67")], f"did you mean {name}"),
        ([source, out, "--model", MULTISCAN], "visual.trunk.spatial_posemb is"),
        ([broken, out], "broken.safetensors: not readable weights"),
        ([tmp_path / "none", out], "none: unknown model: no such file or folder"),
        ([source, tmp_path / "thesis", "--model", name], "thesis exists and is not a saved model"),
    ]:
        assert run("convert", *args) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "broken.safetensors", "thesis"]


def test_embed_takes_a_released_model(nifti_study: list[Path], tmp_path: Path) -> None:
    save_file(seeded(MULTISCAN), tmp_path / "a.safetensors")
    out = tmp_path / "emb.npz"
    assert run("embed", *nifti_study, "--model", tmp_path / "a.safetensors", "--out", out) == 0
    assert np.load(out)["embedding"].shape == (1, 32)


def test_a_name_that_nobody_has_in_a_process_that_has_imported_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hlip.cli", "convert", "nobody/nothing", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nobody/nothing: unknown model" in done.stderr and "Traceback" not in done.stderr


OWNERS = ["zch0414/{}", "Zch0414/{}"]
SPELLED = {
    "hlip-2025-10-08": "hlip-2025_10_08",
    "hlip-2025_10_08": "hlip-2025_10_08",
    "clip-vit_base-scan_study-dualdinotxt1568": "clip_vit_base_scan_study_dualdinotxt1568",
    "clip-vit_base-slice_scan_study-dualdinotxt1568": "clip_vit_base_slice_scan_study_dualdinotxt1568",
    "clip-vit_large-scan_study-dualdinotxt1568": "clip_vit_large_scan_study_dualdinotxt1568",
    "clip-vit_large-slice_scan_study-dualdinotxt1568": "clip_vit_large_slice_scan_study_dualdinotxt1568",
}


@pytest.mark.parametrize("name", SPELLED)
def test_names_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every spelling, of the model and of where its weights lie now."""
    import huggingface_hub

    asked: list[str] = []

    def snapshot_download(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = SPELLED[name]
    now = model if model.startswith("hlip") else next(n for n, m in SPELLED.items() if m == model)
    for owner in OWNERS:
        assert preset(owner.format(name)) == preset(name) == preset(name.replace("-", "_").upper()) == preset(model)
        with pytest.raises(ValueError, match=f"{owner.format(name)}: unknown model: .*not to be had from the hub"):
            hlip.HLIPModel.from_pretrained(owner.format(name))
        assert asked.pop() == f"zch0414/{now}"
    with pytest.raises(ValueError, match="unknown model"):
        hlip.HLIPModel.from_pretrained("Somebody/Else-Model")
    assert asked == ["Somebody/Else-Model"]
    assert hlip.create_model(owner.format(name)).config == preset(model)


@pytest.mark.parametrize("before", ["chestct_", "brainmri_", "headct_", ""])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if "h3" in name or "rope" in name or "slice_scan_study" in name]
)
def test_the_name_of_a_released_file_says_which_model(before: str, name: str, tmp_path: Path) -> None:
    """Where shapes alone do not: the levels, and whether positions are rotary."""
    torch.save({"state_dict": seeded(name)}, path := tmp_path / f"{before}{name}.pt")
    model, (_, how, guessed) = hlip.HLIPModel.load(str(path))
    assert (model.config, guessed) == (preset(name), True)
    assert how == f"{name}, as the file is called"
    assert preset(path.name) == preset(name)


def test_of_two_models_of_the_same_shapes_the_other_is_named(tmp_path: Path) -> None:
    rope = "ablate_rope_clip_vit_base_multiscan_h2_dinotxt1568"
    torch.save(seeded(rope), path := tmp_path / "a.pt")
    _, (config, how, guessed) = hlip.HLIPModel.load(str(path))
    assert (config.vision.positions, guessed) == ("tiled", True)
    assert f"{rope} fits too: name it with model= or --model if it is that" in how
    assert hlip.HLIPModel.from_pretrained(path, model=rope).config == preset(rope)
    model = hlip.HLIPModel.from_pretrained(path)
    with pytest.raises(ValueError, match=rf"the model is no {rope}: rotary positions is False, not True"):
        model.save_open_clip(tmp_path / "out", rope)
