"""Towers that begin with pretrained weights: a 2D ViT inflated, and BERTs."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import hlip
from hlip.model import weights
from hlip.model.config import preset
from hlip.model.text import TextTower
from hostile_models import KERNEL, WAYS, put, run_job
from pretrained_cases import cxr_folder  # noqa: F401
from released_files import MULTISCAN, State, assert_same, seeded, vit

pytestmark = pytest.mark.usefixtures("small_models")


def test_average_inflation_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flat = vit()
    classifier = {"head.weight": torch.zeros(3, 48), "head.bias": torch.zeros(3)}
    decoder = {"mask_token": torch.zeros(1, 1, 9), "decoder_pos_embed": torch.zeros(1, 197, 9),
               "decoder_blocks.0.norm1.weight": torch.zeros(9)}  # fmt: skip
    torch.save({"model": flat | classifier | decoder}, tmp_path / "mae.pth")
    torch.manual_seed(0)
    plain = hlip.create_model("clip_vit_base_scan_study_dualdinotxt1568").state_dict()
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        model = hlip.create_model("clip_vit_base_scan_study_dualdinotxt1568", pretrained_vision=tmp_path / "mae.pth")
    assert "5 weights of a classifier or decoder left aside: decoder_blocks.0.norm1.weight" in caplog.text
    trunk = model.visual.trunk
    patch = trunk.patch_embed.proj.weight
    for z in range(6):
        torch.testing.assert_close(patch[:, 0, z], flat["patch_embed.proj.weight"].sum(1) / 6)
    assert torch.equal(trunk.cls_token, flat["cls_token"] + flat["pos_embed"][:, :1])
    assert torch.equal(trunk.reg_token, plain["visual.trunk.reg_token"])
    for z, y, x in ((0, 0, 0), (3, 2, 5), (7, 13, 13)):
        frequency = 10000.0 ** -(torch.arange(24, dtype=torch.float64) / 24)
        depth = torch.cat([(z * frequency).sin(), (z * frequency).cos()])
        expected = flat["pos_embed"][0, 1 + 14 * y + x] + depth.float()
        torch.testing.assert_close(trunk.spatial_posemb[0, z, y, x], expected)
    assert torch.equal(trunk.blocks[11].mlp.fc2.weight, flat["blocks.11.mlp.fc2.weight"])
    # A constant image gives what the 2D projection gives: the average over depth of its response.
    torch.testing.assert_close(
        patch.sum((1, 2, 3, 4)), flat["patch_embed.proj.weight"].sum((1, 2, 3)), rtol=1e-4, atol=1e-3
    )


def test_inflation_resizes_patches_and_positions(tmp_path: Path) -> None:
    flat = vit(side=7)
    save_file(flat, tmp_path / "model.safetensors")
    trunk = hlip.create_model("clip_vit_base_slice_scan_token2744", pretrained_vision=tmp_path).visual.trunk
    resized = F.interpolate(flat["patch_embed.proj.weight"], (24, 24), mode="bicubic").sum(1) / 8
    torch.testing.assert_close(trunk.patch_embed.proj.weight[:, 0, 5], resized)
    plane = flat["pos_embed"][:, 1:].reshape(1, 7, 7, 48).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, (14, 14), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    first = torch.cat([torch.zeros(24), torch.ones(24)])  # sines and cosines of depth 0
    torch.testing.assert_close(trunk.spatial_posemb[0, 0], plane + first)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (vit(width=32), "its width is 32, the encoder's 48"),
        (vit(depth=2), "weights do not fit: missing blocks.10.attn.proj.bias"),
        (vit(**{"blocks.0.ls1.gamma": torch.ones(48)}), "1 weights do not fit: unexpected blocks.0.ls1.gamma"),
        ({k: v for k, v in vit().items() if k != "pos_embed"}, "not a 2D vision transformer: no pos_embed"),
        (vit(pos_embed=torch.full((1, 197, 48), float("nan"))), "pos_embed is not of finite numbers"),
        (vit(pos_embed=torch.zeros(1, 199, 48)), "pos_embed has 199 rows"),
        (vit(**{"norm.weight": torch.full((48,), float("nan"))}), "not finite numbers: norm.weight"),
    ],
)
def test_wrong_2d_weights_are_named(flat: State, message: str, tmp_path: Path) -> None:
    torch.save(flat, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=f"vit.pth: .*{message}"):
        hlip.create_model(MULTISCAN, pretrained_vision=tmp_path / "vit.pth")


def test_2d_weights_that_cannot_be_had_offline() -> None:
    with pytest.raises(ValueError, match=r"pretrained vision 'timm/vit_base_patch16_224.mae': .*not to be had"):
        hlip.create_model(MULTISCAN, pretrained_vision="timm/vit_base_patch16_224.mae")


def test_cxr_bert_is_read_without_its_code(cxr_folder: tuple[Path, State], tmp_path: Path) -> None:
    folder, bert = cxr_folder
    model = hlip.create_model("clip_vit_base_slice_scan_token2744", pretrained_text=folder)
    got = model.text.transformer.state_dict()
    assert_same(got, {key: value for key, value in bert.items() if not key.startswith("pooler.")})
    assert model.text.transformer.config.layer_norm_eps == 1e-5
    assert model.text.tokenizer.tokenize("Pleural effusion.")[-1] == "."
    assert model.encode_text(["pleural effusion"]).shape == (1, 32)
    model.eval().save_pretrained(tmp_path / "ours")
    again = hlip.HLIPModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.encode_text(["pleural effusion"]), model.encode_text(["pleural effusion"]))
    save_file(seeded("clip_vit_base_slice_scan_token2744"), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=re.escape("text.proj.weight is (32, 32), not (32, 16)")):
        hlip.HLIPModel.from_pretrained(tmp_path / "w.safetensors", text=folder)


def test_wrong_cxr_weights_are_named(cxr_folder: tuple[Path, State]) -> None:
    folder, bert = cxr_folder
    state = {f"bert.{key}": value for key, value in bert.items()}
    del state["bert.encoder.layer.1.output.dense.bias"]
    torch.save(state | {"extra.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing encoder.layer.1.output.dense.bias; unexpected extra.weight"):
        hlip.create_model(MULTISCAN, pretrained_text=folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights: none of"):
        hlip.create_model(MULTISCAN, pretrained_text=folder)


def test_a_bert_that_lacks_weights_is_refused(bert_folder: str, tmp_path: Path) -> None:
    shutil.copytree(bert_folder, tmp_path / "bert")
    path = weights.find_weights(tmp_path / "bert")
    state = load_file(path)
    del state["encoder.layer.1.output.dense.bias"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights do not fit: missing encoder.layer.1.output.dense.bias"):
        hlip.create_model("demo", pretrained_text=tmp_path / "bert")


def test_hostile_folders_ask_for_nothing(tmp_path: Path) -> None:
    """No key and no file makes a library fetch or import something: the models are what they are without it."""
    found = run_job(tmp_path)
    assert f"get_kernel {KERNEL}" in found.pop("transformers")
    assert list(found) == list(WAYS)
    for way, results in found.items():
        assert re.fullmatch(r"[0-9a-f]{64}", results["good"]), (way, results["good"])
        assert list(results["cases"]) == list(WAYS[way])
        wrong = {case: found for case, found in results["cases"].items() if found != [results["good"], []]}
        assert not wrong, way


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 2**40), ("vocab_size", "99"), ("hidden_size", 0), ("num_hidden_layers", 10**9),
        ("num_attention_heads", True), ("intermediate_size", 4.0), ("max_position_embeddings", -1),
        ("type_vocab_size", [2]), ("layer_norm_eps", float("nan")), ("hidden_dropout_prob", float("inf")),
        ("attention_probs_dropout_prob", 1.5), ("initializer_range", "evil" * 99), ("pad_token_id", {}),
        ("hidden_act", "xielu"), ("hidden_act", ["gelu"]), ("model_type", "roberta"), ("model_type", ["bert"]),
        ("position_embedding_type", "relative_key"), ("is_decoder", True), ("add_cross_attention", True),
    ],
)  # fmt: skip
def test_values_that_no_bert_has_are_named(key: str, value: Any, bert_folder: str, tmp_path: Path) -> None:
    shutil.copytree(bert_folder, tmp_path / "bert")
    put(tmp_path / "bert", {"config.json": {key: value}})
    for pretrained in (True, False):
        with pytest.raises(ValueError, match=rf"bert': .*{key} is ") as error:
            TextTower(preset("demo").text, 8, tmp_path / "bert", pretrained)
        assert len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("step", [
    {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000} for _ in range(3)]}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "^(([a-z])+.)+[A-Z]([a-z])+$"}, "behavior": "Isolated",
                       "invert": False}},
], ids=["replace", "prepend", "split"])  # fmt: skip
def test_steps_that_grow_a_text_are_refused(step: dict[str, Any], bert_folder: str, tmp_path: Path) -> None:
    shutil.copytree(bert_folder, tmp_path / "bert")
    put(tmp_path / "bert", {"tokenizer.json": step})
    with pytest.raises(ValueError, match=r"tokenizer\.json: a step (Replace|Prepend|Split)"):
        _ = TextTower(preset("demo").text, 8, tmp_path / "bert").tokenizer


@pytest.mark.parametrize(("key", "value"), [("do_lower_case", "yes"), ("model_max_length", 1.5), ("pad_token", ["a"])])
def test_options_of_another_type_are_named(key: str, value: Any, bert_folder: str, tmp_path: Path) -> None:
    shutil.copytree(bert_folder, tmp_path / "bert")
    put(tmp_path / "bert", {"tokenizer_config.json": {key: value}, "special_tokens_map.json": "{}"})
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {key} is "):
        _ = TextTower(preset("demo").text, 8, tmp_path / "bert").tokenizer
