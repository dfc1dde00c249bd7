"""2D models: what they cannot do, and folders that are refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from baseline_cases import PAIRS, folders, open_clip, store  # noqa: F401
from commands import run
from hlip.embed.baselines import SliceEncoder, read_slices
from hlip.embed.open_clip import CONFIG
from hlip.store.store import Store
from hostile_models import ALL, Witness, put
from released_files import Evil


def test_what_a_2d_model_cannot_do_is_said(
    folders: dict[str, Path], store: Store, model_folder: Path, nifti_study: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    task, made, labels = tmp_path / "task.yaml", tmp_path / "e.npz", tmp_path / "labels.csv"
    task.write_text(PAIRS)
    labels.write_text("study,lesion,blood\n")
    lists = {}
    for name, content in {
        "none": {"x": {"t1": [0]}},
        "wrong": {"s0": {"t1": [3]}},
        "good": {"s0": {"t1": [0]}},
    }.items():
        lists[name] = tmp_path / f"{name}.json"
        lists[name].write_text(json.dumps(content))
    two_d, ours = ["--model", f"open_clip:{folders['clip']}"], ["--model", model_folder]
    out = ["--out", tmp_path / "out.npz"]
    for args, message in [
        (["zeroshot", *nifti_study, "--prompt", "a", "--prompt", "b", *two_d], "hlip zeroshot takes no 2D models"),
        (["interpret", *nifti_study, "--target", "a", *out, *two_d], "hlip interpret takes no 2D models"),
        (["embed", *nifti_study, *two_d, *out], "no store; a 2D model does not say how scans are prepared"),
        (["embed", store.path, *ours, *out, "--pool", "max"], "--pool and --slices are for 2D models"),
        (["embed", store.path, *two_d, *out, "--slices", lists["none"]], "holds none of the studies of which slices"),
        (["embed", store.path, *two_d, *out, "--slices", lists["wrong"]], "s0, scan t1: has no slice 3"),
        (
            ["embed", store.path, *two_d, *out, "--slices", lists["good"], "--scans"],
            "--slices does not go with scans embedded by themselves",
        ),
        (["embed", store.path, *two_d, *out, "--slices", lists["good"], "--one_scan", 0], "not go with --one_scan"),
        (["eval", task, "--embeddings", made, "--labels", labels, *two_d, *out], "give --data"),
        (["retrieve", store.path, *two_d, "--pool", "max", *out], "retrieval needs --pool mean"),
    ]:
        assert run(*args) == 2, message
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


def test_what_is_no_model_is_refused_and_no_code_is_run(
    open_clip: ModuleType, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"nowhere: has no {CONFIG}"):
        SliceEncoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"hf-hub:no/such: has no .* that can be had"):
        SliceEncoder.from_pretrained("open_clip:hf-hub:no/such")
    content = json.loads((folders["clip"] / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a model that open_clip can read"):  # no weights
        SliceEncoder.from_pretrained(tmp_path)
    weights = tmp_path / "open_clip_pytorch_model.bin"
    weights.write_bytes(pickle.dumps({"state_dict": Evil(tmp_path / "made")}))
    with pytest.raises(ValueError, match="not readable weights"):
        SliceEncoder.from_pretrained(tmp_path)
    assert not (tmp_path / "made").exists()
    content["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    for text in (json.dumps(content), json.dumps(content).replace("trust", "\\u0074rust")):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match="trust_remote_code is not a setting"):
            SliceEncoder.from_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not readable"):
        SliceEncoder.from_pretrained(tmp_path)
    for wrong in ({"pool": "median"}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SliceEncoder.from_pretrained(folders["clip"], **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vision_cfg", "timm_model_name", "hf-hub:owner/other", "timm_model_name is 'hf-hub:owner/other'"),
        ("vision_cfg", "timm_model_name", "local-dir:../other", "timm_model_name is 'local-dir"),
        ("vision_cfg", "timm_model_args", {"pretrained": True}, "timm_model_args is not a setting"),
        ("text_cfg", "tokenizer_kwargs", {"reduction_mask": "syntax"}, "reduction_mask is not a setting"),
        ("text_cfg", "tokenizer_kwargs", {"clean": [["evil"]]}, "clean is [['evil']], expected str"),
        ("text_cfg", "hf_model_config", {"_attn_implementation": "a/b"}, "hf_model_config is not a setting"),
        ("text_cfg", "act_kwargs", {"evil": [{"a": "b"}]}, "act_kwargs is"),
        ("multimodal_cfg", "hf_model_name", "owner/other", "multimodal_cfg is not a setting"),
    ],
)  # fmt: skip
def test_settings_that_fetch_something_are_refused(
    part: str, key: str, value: Any, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    content = json.loads((folders["biomed"] / CONFIG).read_text())
    content["model_cfg"].setdefault(part, {})[key] = value
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{CONFIG} is not readable .*{re.escape(message)}"):
        SliceEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vision_cfg", {"layers": 10**9}, "layers is 1000000000, expected an integer from 1 to 1000"),
        ("vision_cfg", {"width": "evil"}, "width is 'evil', expected an integer"),
        ("vision_cfg", {"image_size": 10**9}, "image_size is 1000000000"),
        ("vision_cfg", {"image_size": [32, 10**9]}, "image_size is 1000000000"),
        ("vision_cfg", {"patch_size": 0}, "patch_size is 0"), ("vision_cfg", {"width": True}, "width is True"),
        ("vision_cfg", {"pool_type": ["tok"]}, "pool_type is \\['tok'\\], expected str"),
        ("text_cfg", {"context_length": 2**20}, "context_length is"), ("text_cfg", {"heads": 2.5}, "heads is 2.5"),
        ("text_cfg", {"vocab_size": 2**40}, "vocab_size is"), ("text_cfg", {"embed_cls": 7}, "embed_cls is 7"),
        ("vision_cfg", {"image_size": 4096, "patch_size": 1}, "asks for 16777216 positions"),
        ("vision_cfg", {"width": 2**15, "layers": 900}, "asks for [0-9]{10,} numbers, the weights have"),
        ("text_cfg", {"vocab_size": 2**24, "width": 2**14}, "asks for [0-9]{10,} numbers, the weights have"),
    ],
)  # fmt: skip
def test_sizes_that_the_weights_do_not_have_take_no_memory(
    part: str, values: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["clip"], tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / CONFIG).read_text())
    content["model_cfg"][part] |= values
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        SliceEncoder.from_pretrained(tmp_path)


def test_only_the_weights_that_open_clip_takes_are_looked_at(folders: dict[str, Path], tmp_path: Path) -> None:
    """As a folder of a training run holds other files of theirs."""
    expected = SliceEncoder.from_pretrained(folders["clip"]).digest()
    for names in (["training_args.bin", "aaa.pth"], ["model.safetensors", "optimizer.bin"]):
        folder = tmp_path / names[0]
        shutil.copytree(folders["clip"], folder)
        for name in names:
            (folder / name).write_bytes(b"damaged")
        assert SliceEncoder.from_pretrained(folder).digest() == expected
    (folder / "open_clip_model.safetensors").rename(folder / "mine.safetensors")
    for name in names:
        (folder / name).unlink()
    assert SliceEncoder.from_pretrained(folder).digest() == expected
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model\.safetensors|not a model that open_clip can read"):
        SliceEncoder.from_pretrained(folder)


LINKED = [CONFIG, "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", LINKED)
def test_no_link_of_a_2d_model_leads_out(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    theirs, aside = tmp_path / "theirs", tmp_path / "mine"
    shutil.copytree(folders["biomed"], theirs)
    shutil.move(theirs / name, aside)
    (theirs / name).symlink_to(aside)
    with pytest.raises(ValueError, match=f"theirs/{name}.*leads out"):
        SliceEncoder.from_pretrained(theirs)
    (theirs / name).unlink()
    shutil.move(aside, theirs / f"{name}.real")
    (theirs / name).symlink_to(f"{name}.real")
    assert SliceEncoder.from_pretrained(theirs).encode_text(["glioma"]).shape == (1, 16)


def test_a_hostile_text_tower_asks_for_nothing(folders: dict[str, Path], bert_folder: str, tmp_path: Path) -> None:
    """Beside the weights, and where the configuration says that the text tower lies."""
    expected = SliceEncoder.from_pretrained(folders["biomed"]).encode_text(["a mass"])
    shutil.copytree(folders["biomed"], tmp_path / "model")
    shutil.copytree(bert_folder, tmp_path / "bert")
    content = json.loads((tmp_path / "model" / CONFIG).read_text())
    content["model_cfg"]["text_cfg"]["hf_model_name"] = str(tmp_path / "bert")
    (tmp_path / "model" / CONFIG).write_text(json.dumps(content))
    witness = Witness(tmp_path)
    try:
        for files in ALL.values():
            for folder in (tmp_path / "model", tmp_path / "bert"):
                put(folder, {name: text for name, text in files.items() if not name.endswith("added_tokens.json")})
            witness.watching = True
            encoder = SliceEncoder.from_pretrained(tmp_path / "model")
            assert torch.equal(encoder.encode_text(["a mass"]), expected)
            witness.watching = False
    finally:
        witness.watching = False
        sys.meta_path.remove(witness)
    assert witness.asked == []
    assert encoder.model.text.transformer.config._attn_implementation == "sdpa"


def test_the_extra_is_named_where_open_clip_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'hlip-kernels\[baselines\]'"):
        SliceEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", ["[", "[]", "{}x", '{"s": []}', '{"s": {"a": []}}', '{"s": {"a": [-1]}}', '{"s": {"a": "1"}}']
)
def test_lists_of_slices(content: str, tmp_path: Path) -> None:
    path = tmp_path / "slices.json"
    path.write_text('{"s": {"flair": [1, 2], "t1": []}}')
    assert read_slices(path) == {"s": {"flair": (1, 2), "t1": ()}}
    path.write_text(content)
    with pytest.raises(ValueError, match=r"slices.json: not a readable list of slices"):
        read_slices(path)
