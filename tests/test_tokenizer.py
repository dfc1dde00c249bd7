"""Tokenizers read without code: tokens, added tokens, vocabularies."""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hlip
from hlip.model.config import preset
from hlip.model.text import TextTower
from hlip.model.tokenizer import read_tokenizer
from hostile_models import put
from pretrained_cases import cxr_folder  # noqa: F401
from released_files import Evil, State, cut, hub_folder, seeded, vit

pytestmark = pytest.mark.usefixtures("small_models")
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
