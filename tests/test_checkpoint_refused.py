"""Checkpoints that are damaged, of another model, or want to run something, are refused by name."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hlip
from checkpoint_cases import VISION, small_bert, trained
from hlip.model.config import TextConfig, preset
from hostile_models import put
from released_files import (
    MULTISCAN,
    Evil,
    State,
    cut,
    seeded,
    vit,
)

pytestmark = pytest.mark.usefixtures("small_models")


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
