from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hlip
from conftest import random_study
from hlip import cli
from hlip.data.store import PreparedStudy, StoredScan, finish, write_shard
from hlip.tasks.baselines import CONFIG, SliceEncoder, lesion_slices, read_slices, rescaled_slices
from hlip.tasks.zeroshot import Prompts, class_probabilities, zeroshot_classifier
from open_clip_beside import open_clip_imported
from released_files import Evil

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def open_clip() -> Iterator[ModuleType]:
    with open_clip_imported() as module:
        if module is None:
            pytest.skip("needs open_clip: make test")
        yield module


def save(module: ModuleType, kind: str, bert_folder: str, folder: Path) -> Path:
    """A small model with seeded weights in open_clip's hub format: CLIP's own towers, or those that BiomedCLIP has."""
    from safetensors.torch import save_file

    if kind == "clip":
        vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
        text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        build = module.CLIP
    else:
        vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
        text = {
            "hf_model_name": bert_folder,
            "hf_tokenizer_name": bert_folder,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 24,
        }
        build = module.CustomTextCLIP
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / CONFIG).write_text(json.dumps(content))
    torch.manual_seed(0)
    weights = build(**json.loads(json.dumps(config))).state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "open_clip_model.safetensors")
    if kind != "clip":
        for path in Path(bert_folder).glob("*"):
            if path.suffix in (".json", ".txt") and path.name != "config.json":
                (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def folders(open_clip: ModuleType, bert_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("open_clip")
    return {kind: save(open_clip, kind, bert_folder, root / kind) for kind in ("clip", "biomed")}


@pytest.fixture(scope="module")
def encoder(folders: dict[str, Path]) -> SliceEncoder:
    return SliceEncoder.from_pretrained(folders["clip"], batch=3)


def study(uid: str = "s", seed: int = 0) -> hlip.Study:
    """Two scans, of 5 and of 3 slices, one of them wider than high."""
    return hlip.Study(uid, random_study([(5, 40, 40), (3, 48, 64)], seed), ["flair", "t1"])


def by_hand(encoder: SliceEncoder, scan: torch.Tensor) -> torch.Tensor:
    from PIL import Image

    rows = []
    for image in scan:
        rgb = Image.fromarray(np.repeat(image.numpy()[..., None], 3, axis=2))
        with torch.no_grad():
            rows.append(encoder.model.encode_image(encoder.transform(rgb)[None])[0])
    return F.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("kind", ["clip", "biomed"])
def test_slices_are_embedded_as_pictures_of_three_equal_channels(folders: dict[str, Path], kind: str) -> None:
    encoder = SliceEncoder.from_pretrained(f"open_clip:{folders[kind]}", batch=3)
    found = encoder.encode_slices(study())
    assert [each.shape for each in found] == [(5, 16), (3, 16)]
    for scan, each in zip(study().scans, found, strict=True):
        torch.testing.assert_close(each, by_hand(encoder, scan), rtol=1e-4, atol=1e-5)
    text = encoder.encode_text(["a mass", "no finding"])
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(encoder.encode_text(["no finding"])[0], text[1], rtol=1e-4, atol=1e-5)
    assert encoder.logit_scale.item() == pytest.approx(np.log(1 / 0.07))


def test_the_models_own_size_mean_and_deviation_are_used(
    encoder: SliceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    encode = encoder.model.encode_image
    monkeypatch.setattr(encoder.model, "encode_image", lambda batch: (seen.append(batch), encode(batch))[1])
    encoder.encode_slices(hlip.Study("s", [torch.full((4, 50, 50), 51, dtype=torch.uint8)], ["a"]))
    assert [tuple(each.shape) for each in seen] == [(3, 3, 32, 32), (1, 3, 32, 32)]
    for channel in range(3):
        expected = torch.full((3, 32, 32), (0.2 - MEAN[channel]) / STD[channel])
        torch.testing.assert_close(seen[0][:, channel], expected)


def test_mean_and_maximum_over_slices(folders: dict[str, Path], encoder: SliceEncoder) -> None:
    largest = SliceEncoder.from_pretrained(folders["clip"], pool="max")
    studies = [study("a"), study("b", 1)]
    text = encoder.encode_text(["glioma", "stroke", "normal brain"])
    first, second = by_hand(encoder, studies[1].scans[0]), by_hand(encoder, studies[1].scans[1])
    mean = (first.mean(0) + second.mean(0)) / 2  # 5 and 3 slices, but each scan counts for half
    rows = torch.cat([first, second])
    embedded, pooled = dict(encoder.encode_studies(studies)), dict(encoder.similarities(studies, text))
    assert list(embedded) == list(pooled) == ["a", "b"]
    torch.testing.assert_close(embedded["b"], F.normalize(mean, dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled["b"], mean @ text.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled["b"], mean.norm() * embedded["b"] @ text.T, rtol=1e-4, atol=1e-5)
    embedded, pooled = dict(largest.encode_studies(studies)), dict(largest.similarities(studies, text))
    torch.testing.assert_close(pooled["b"], (rows @ text.T).amax(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedded["b"], F.normalize(rows.amax(0), dim=0), rtol=1e-4, atol=1e-5)


def test_only_the_slices_of_a_lesion(folders: dict[str, Path], encoder: SliceEncoder) -> None:
    some = SliceEncoder.from_pretrained(
        folders["clip"], slices={"a": {"flair": [1, 4]}, "c": {"t1": [3]}, "d": {"x": [0]}}
    )
    whole = encoder.encode_slices(study("a"))
    (seen,) = some.encode_slices(study("a"))
    torch.testing.assert_close(seen, whole[0][[1, 4]], rtol=1e-4, atol=1e-5)
    unlisted = some.encode_slices(study("b", 1))
    assert [len(each) for each in unlisted] == [5, 3]
    with pytest.raises(ValueError, match=r"c, scan t1: has no slice 3 \(there are 3\)"):
        some.encode_slices(study("c"))
    with pytest.raises(ValueError, match="d: has no scan x"):
        some.encode_slices(study("d"))
    none = SliceEncoder.from_pretrained(folders["clip"], slices={"a": {"flair": []}})
    with pytest.raises(ValueError, match="a: has no slice to see"):
        list(none.encode_studies([study("a")]))


def test_zero_shot_classification_takes_it_as_it_takes_ours(encoder: SliceEncoder) -> None:
    prompts = Prompts({"glioma": ["glioma"], "normal": ["normal brain", "no finding"]}, ("{}.",))
    classifier = zeroshot_classifier(encoder, prompts)
    assert classifier.shape == (2, 16)
    (uid, embedding), (_, similarity) = (
        next(encoder.encode_studies([study()])), next(encoder.similarities([study()], classifier))
    )  # fmt: skip
    found = class_probabilities(encoder, embedding[None], classifier)
    assert uid == "s"
    assert found.sum().item() == pytest.approx(1)
    assert found.argmax() == similarity.argmax()


def test_retrieval_by_a_2d_model(folders: dict[str, Path], encoder: SliceEncoder, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    store, out = tmp_path / "store", tmp_path / "out"
    (store / "shards").mkdir(parents=True)
    studies = []
    for i in range(4):
        scans = [
            StoredScan(name, image, (3.0, 1.0, 1.0), "axial", 5)
            for name, image in zip(study().names, study(seed=i).scans, strict=True)
        ]
        studies.append(PreparedStudy(f"s{i}", scans, f"impression {i}", "findings"))
    write_shard(store / "shards" / "00000.safetensors", studies, {}, "0", tmp_path)
    finish(store, tmp_path)
    args = ["retrieve", store, "--model", f"open_clip:{folders['clip']}", "--out", out, "--k", 1]
    assert cli.main([str(arg) for arg in args]) == 0
    text = encoder.encode_text([f"impression {i} findings" for i in range(4)])
    image = torch.stack([row for _, row in encoder.encode_studies(study(f"s{i}", i) for i in range(4))])
    similarity = image @ text.T
    expected = [(row >= row[i]).sum().item() for i, row in enumerate(similarity)]
    rows = [line.split(",") for line in (out / "ranks.csv").read_text().splitlines()[1:]]
    assert [int(row[1]) for row in rows] == expected
    assert cli.main([str(arg) for arg in [*args, "--pool", "max"]]) == 2


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
    with pytest.raises(ValueError, match="not a model that open_clip can read"):
        SliceEncoder.from_pretrained(tmp_path)
    assert not (tmp_path / "made").exists()
    content["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    for text in (json.dumps(content), json.dumps(content).replace("trust", "\\u0074rust")):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match="asks for code to be run"):
            SliceEncoder.from_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not readable"):
        SliceEncoder.from_pretrained(tmp_path)
    for wrong in ({"pool": "median"}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SliceEncoder.from_pretrained(folders["clip"], **wrong)  # type: ignore[arg-type]


def test_the_extra_is_named_where_open_clip_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'hlip-kernels\[baselines\]'"):
        SliceEncoder.from_pretrained(tmp_path)


def test_slices_of_masks() -> None:
    mask = torch.zeros(6, 4, 4, dtype=torch.bool)
    mask[2, 1, 1] = mask[5, 0, 3] = True
    assert lesion_slices(mask) == [2, 5]
    with pytest.raises(ValueError, match="must be"):
        lesion_slices(mask[0])
    assert rescaled_slices([0, 3], 4, 8) == [0, 1, 6, 7]
    assert rescaled_slices([5], 12, 4) == [1]
    assert rescaled_slices([0, 1, 2], 3, 3) == [0, 1, 2]
    assert rescaled_slices([1], 3, 4) == [1, 2]
    with pytest.raises(ValueError, match="slice 4 is not one of 4"):
        rescaled_slices([4], 4, 8)


@pytest.mark.parametrize(
    "content", ["[", "[]", "{}x", '{"s": []}', '{"s": {"a": []}}', '{"s": {"a": [-1]}}', '{"s": {"a": "1"}}']
)
def test_lists_of_slices(content: str, tmp_path: Path) -> None:
    path = tmp_path / "slices.json"
    path.write_text('{"s": {"flair": [1, 2], "t1": []}}')
    assert read_slices(path) == {"s": {"flair": [1, 2], "t1": []}}
    path.write_text(content)
    with pytest.raises(ValueError, match=r"slices.json: not a readable list of slices"):
        read_slices(path)
