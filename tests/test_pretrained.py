"""Towers that begin with pretrained weights: a 2D ViT inflated, and BERTs."""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import hlip
from hlip.model import weights
from hlip.model.config import preset
from hlip.model.text import TextTower
from hlip.model.tokenizer import read_tokenizer
from hostile_models import KERNEL, WAYS, put, run_job
from released_files import MULTISCAN, Evil, State, assert_same, cut, hub_folder, seeded, vit

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


@pytest.fixture
def cxr_folder(tmp_path: Path, bert_folder: str) -> tuple[Path, State]:
    """CXR-BERT as it lies on the hub: a class in code, heads beside the BERT, a tokenizer of a class in code."""
    folder = tmp_path / "cxr"
    folder.mkdir()
    sizes = {"vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 512, "layer_norm_eps": 1e-5, "projection_size": 8}
    code = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    config = {"model_type": "cxr-bert", "architectures": ["CXRBertModel"], "auto_map": code, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    for module in ("configuration_cxrbert", "modeling_cxrbert"):
        (folder / f"{module}.py").write_text("raise RuntimeError('code of a checkpoint was run')")
    shutil.copy(Path(bert_folder) / "vocab.txt", folder)
    tokenizer = {"AutoTokenizer": ["configuration_cxrbert.CXRBertTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CXRBertTokenizer", "do_lower_case": True, "auto_map": tokenizer})
    )
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    bert = BertModel(BertConfig(**{k: v for k, v in sizes.items() if k != "projection_size"})).state_dict()
    state = {f"bert.{key}": value for key, value in bert.items()}
    state["bert.embeddings.position_ids"] = torch.arange(512)[None]
    state["cls.predictions.bias"] = torch.zeros(30522)
    state["cls_projection_head.dense_to_hidden.weight"] = torch.zeros(8, 16)
    torch.save(state, folder / "pytorch_model.bin")
    return folder, bert


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


TEXTS = [
    "Acute ISCHEMIC stroke, na\u00efve caf\u00e9 12mm \u4e2d\u6587", "[MASK] no [SEP] finding", "", "a" * 150 + " b",
    "don't  stop\u2028now\u00a0x\u0000y \ufffd", "Gr\u00f6\u00dfe \ufb01ne", "##ing [UNK] [unused5]", "word " * 99,
]  # fmt: skip


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.txt", "both", "with options"])
@pytest.mark.parametrize(
    "options", [{}, {"do_lower_case": False}, {"strip_accents": False}, {"pad_token": "[unused1]"}]
)
def test_tokens_are_those_of_transformers(
    files: str, options: dict[str, Any], bert_folder: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    names = {"tokenizer.json": ["tokenizer.json"], "vocab.txt": ["vocab.txt"], "both": ["tokenizer.json", "vocab.txt"]}
    for name in ["config.json", *names.get(files, ["vocab.txt", "tokenizer_config.json", "special_tokens_map.json"])]:
        shutil.copy(Path(bert_folder) / name, tmp_path)
    if options:
        put(tmp_path, {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer", **options}})
        put(tmp_path, {"special_tokens_map.json": options})
    tower = TextTower(replace(preset("demo").text, context_length=64), 8, tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path)
    cut = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    for name, value in expected(TEXTS, **cut).items():
        assert torch.equal(tower._tokens(TEXTS)[name], value), name
    assert tower.tokenizer(TEXTS)["input_ids"] == expected(TEXTS)["input_ids"]
    tower.tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXTS, **cut)["input_ids"].equal(
        tower._tokens(TEXTS)["input_ids"]
    )


PARTS = [
    {"normalizer": None}, {"normalizer": {"type": "NFC"}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}]}},
    {"normalizer": {"type": "Lowercase"}},
    {"normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": False, "strip_accents": False,
                    "lowercase": False}},
    {"pre_tokenizer": {"type": "WhitespaceSplit"}}, {"post_processor": None},
]  # fmt: skip


@pytest.mark.parametrize("kind", [None, "BertTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("options", [{}, {"do_lower_case": False}, {"truncation_side": "left"}])
@pytest.mark.parametrize("change", PARTS)
def test_parts_of_a_tokenizer_are_used_as_transformers_uses_them(
    kind: str | None, options: dict[str, Any], change: dict[str, Any], bert_folder: str, tmp_path: Path
) -> None:
    import transformers

    if kind != "PreTrainedTokenizerFast" and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 takes a BERT's tokenizer from its file")
    shutil.copy(Path(bert_folder) / "config.json", tmp_path)
    content = json.loads((Path(bert_folder) / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    said = options | ({"tokenizer_class": kind} if kind else {}) | {"pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tower = TextTower(replace(preset("demo").text, context_length=64), 8, tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Glioma \u00e9", *TEXTS]
    ids = expected(texts, padding=True, truncation=True, max_length=64)["input_ids"]
    assert tower._tokens(texts)["input_ids"].tolist() == ids
    for name, text in tower.files().items():  # as a checkpoint keeps them
        (tmp_path / name).write_text(text)
    again = TextTower(replace(preset("demo").text, context_length=64), 8, tmp_path)
    assert again._tokens(texts)["input_ids"].tolist() == ids
    tower.tokenizer.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path)(texts)["input_ids"] == tower.tokenizer(texts)["input_ids"]


def token(text: str, **flags: bool) -> dict[str, Any]:
    return (
        {"content": text} | dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False) | flags
    )


ADDED = [
    {"tokenizer_config.json": {"added_tokens_decoder": {
        "30523": token("TheRareWord", normalized=True), "0": token("[PAD]", special=True), "30522": token("<scan>"),
    }}},
    {"tokenizer_config.json": {"added_tokens_decoder": {"2054": token("what", single_word=True)}}},
    {"added_tokens.json": {"glioblastoma multiforme": 30523, "<scan>": 30522}},
    {"added_tokens.json": {"<scan>": 30522}, "tokenizer_config.json": {"additional_special_tokens": ["<scan>"]}},
    {"tokenizer_config.json": {"additional_special_tokens": ["<scan>", "TheRareWord"]}},
    {"special_tokens_map.json": {"bos_token": "<scan>"}},
]  # fmt: skip


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("files", ADDED)
def test_added_tokens_have_the_ids_that_transformers_gives(
    file: str, files: dict[str, Any], bert_folder: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    for name in ("config.json", file):
        shutil.copy(Path(bert_folder) / name, tmp_path)
    put(tmp_path, files)
    texts = ["A <scan> of glioblastoma multiforme", "therareword TheRareWord [PAD]", "what whatever <SCAN>"]
    tokenizer, expected = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(texts)["input_ids"] == expected(texts)["input_ids"]
    if "<scan>" in str(files):
        assert tokenizer("<scan>")["input_ids"][1] == 30522
    tokenizer.save_pretrained(tmp_path / "saved")
    assert read_tokenizer(tmp_path / "saved")(texts)["input_ids"] == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "tokenizer_class", "RobertaTokenizer"),
        ("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
        ("tokenizer_config.json", "tokenizer_class", ["BertTokenizer"]),
        ("tokenizer_config.json", "never_split", ["ADC"]), ("tokenizer_config.json", "do_basic_tokenize", False),
        ("tokenizer_config.json", "added_tokens_decoder", {"-1": token("a")}),
        ("tokenizer_config.json", "added_tokens_decoder", {"9" * 99: token("a")}),
        ("tokenizer_config.json", "added_tokens_decoder", {"16777216": token("a")}),
        ("tokenizer_config.json", "added_tokens_decoder", {"30522": "a"}),
        ("tokenizer_config.json", "added_tokens_decoder", {"30522": {"content": ["a"]}}),
        ("tokenizer_config.json", "added_tokens_decoder", {"30522": {"content": "a", "lstrip": "yes"}}),
        ("tokenizer_config.json", "added_tokens_decoder", [token("a")]),
        ("tokenizer_config.json", "extra_special_tokens", "<scan>"),
        ("tokenizer_config.json", "additional_special_tokens", [1]),
        ("added_tokens.json", "<scan>", "30522"), ("added_tokens.json", "<scan>", -1),
        ("added_tokens.json", "<scan>", 1e9), ("added_tokens.json", "", 30522),
    ],
)  # fmt: skip
def test_what_a_vocabulary_does_not_give_is_refused(
    name: str, key: str, value: Any, bert_folder: str, tmp_path: Path
) -> None:
    for file in ("config.json", "vocab.txt"):
        shutil.copy(Path(bert_folder) / file, tmp_path)
    put(tmp_path, {name: {key: value}})
    named = key if name == "tokenizer_config.json" else "a token"
    with pytest.raises(ValueError, match=f"{name}: {named} is "):
        read_tokenizer(tmp_path)


def test_an_added_token_with_another_id_is_named(bert_folder: str, tmp_path: Path) -> None:
    """A number that the vocabulary has for another word, or beyond its end."""
    for file in ("config.json", "vocab.txt"):
        shutil.copy(Path(bert_folder) / file, tmp_path)
    for index in (7, 30600):
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<scan>": index}))
        with pytest.raises(ValueError, match=f"added token '<scan>' has id 30522, expected {index}"):
            read_tokenizer(tmp_path)


def test_a_bert_within_another_model_is_read(bert_folder: str, tmp_path: Path) -> None:
    """With heads beside it, in half precision, in TensorFlow's spelling; the caller's generator stays as it is."""
    flat = load_file(Path(bert_folder) / "model.safetensors")
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {"cls.predictions.bias": torch.zeros(3)}
    for key, value in flat.items():
        layer, _, end = key.rpartition("LayerNorm.")
        state[f"bert.{layer}{older[f'LayerNorm.{end}']}" if layer else f"bert.{key}"] = value.half()
    shutil.copy(Path(bert_folder) / "config.json", tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.manual_seed(0)
    tower = TextTower(preset("demo").text, 8, tmp_path, pretrained=True)
    torch.manual_seed(0)
    proj = nn.Linear(384, 8, bias=False)
    nn.init.normal_(proj.weight, std=384**-0.5)
    assert torch.equal(tower.proj.weight, proj.weight)
    assert tower.transformer.config._attn_implementation == "sdpa"
    for key, value in tower.transformer.state_dict().items():
        assert torch.equal(value, flat[key].half().float()), key


def not_finite(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["encoder.layer.0.output.dense.bias"][0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def malicious(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"encoder": Evil(folder.parent / "executed")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_finite, "1 weights are not finite numbers: encoder.layer.0.output.dense.bias"),
        (lambda folder: cut(folder / "model.safetensors"), "not a readable BERT folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable"),
        (malicious, "not a readable BERT folder"),
    ],
)
def test_damaged_bert_folders(damage: Callable[[Path], Any], message: str, bert_folder: str, tmp_path: Path) -> None:
    shutil.copytree(bert_folder, tmp_path / "bert")
    damage(tmp_path / "bert")
    with pytest.raises(ValueError, match=message) as error:
        hlip.create_model("demo", pretrained_text=tmp_path / "bert")
    assert str(tmp_path / "bert") in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_from_the_hub_come_weights_json_and_vocabulary_only(
    cxr_folder: tuple[Path, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    name = "clip_vit_base_slice_scan_token2744"
    hub = {
        "zch/released": hub_folder(tmp_path / "released", seeded(name), name, hf_tokenizer_name="microsoft/cxr"),
        "microsoft/cxr": cxr_folder[0],
        "timm/mae": tmp_path / "mae",
    }
    torch.save(seeded(name), hub["zch/released"] / "pytorch_model.bin")
    hub["timm/mae"].mkdir()
    save_file(vit(), hub["timm/mae"] / "model.safetensors")

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        for path in (each for each in hub[repo_id].rglob("*") if each.is_file()):
            relative = path.relative_to(hub[repo_id])
            if any(fnmatch.fnmatch(str(relative), pattern) for pattern in allow_patterns):
                (cache / repo_id / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / repo_id / relative)
        return str(cache / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with caplog.at_level(logging.WARNING):
        model = hlip.HLIPModel.from_pretrained("zch/released")
        assert model.text.tokenizer.tokenize("effusion")
        config = replace(preset(name).text, name="microsoft/cxr")
        begun = hlip.create_model(name, text=config, pretrained_text=True, pretrained_vision="timm/mae")
    assert begun.text.transformer.config.hidden_size == 16
    found = sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())
    assert found == [
        "microsoft/cxr/config.json",
        "microsoft/cxr/pytorch_model.bin",
        "microsoft/cxr/tokenizer_config.json",
        "microsoft/cxr/vocab.txt",
        "timm/mae/model.safetensors",
        "zch/released/config.json",
        f"zch/released/hlip/model_configs/{name}.json",
        "zch/released/model.safetensors",
    ]
    for repo in hub:
        assert f"{repo} is no folder here: asking the Hugging Face hub for it" in caplog.text
