from __future__ import annotations

import csv
import json
import multiprocessing
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

import hlip
import rank_job
from commands import run
from conftest import random_study
from hlip.embed.baselines import Pool, SliceEncoder, read_slices
from hlip.embed.open_clip import CONFIG
from hlip.embed.table import Embeddings
from hlip.embed.texts import embed_prompts
from hlip.evaluate.evaluation import scale_of, similarities_of, zeroshot_classifier
from hlip.evaluate.tasks import Task
from hlip.store.format import write_shard
from hlip.store.store import Store
from hlip.store.tools import finish
from hlip.study import PreparedScan, StudyRecord
from hostile_models import ALL, Witness, put
from open_clip_beside import open_clip_imported
from rank_job import free_port
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
    embedded = {each.uid: encoder.encode_study(each) for each in studies}
    pooled = {each.uid: encoder.similarities(each, text) for each in studies}
    assert list(embedded) == list(pooled) == ["a", "b"]
    torch.testing.assert_close(embedded["b"], F.normalize(mean, dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled["b"], mean @ text.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled["b"], mean.norm() * embedded["b"] @ text.T, rtol=1e-4, atol=1e-5)
    embedded = {each.uid: largest.encode_study(each) for each in studies}
    pooled = {each.uid: largest.similarities(each, text) for each in studies}
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
        none.encode_study(study("a"))


def test_prompts_that_are_too_long_are_named(folders: dict[str, Path]) -> None:
    """The tokenizers of open_clip would cut them without a word."""
    for kind, most in (("clip", 20), ("biomed", 24)):
        encoder = SliceEncoder.from_pretrained(folders[kind])
        texts = ["brain", "", "a " * (most - 2), "a " * (most - 1), "a " * 300]
        assert encoder.count_tokens(texts) == ([3, 2, most, most + 1, 302], most)
        embed_prompts(encoder, [texts[:3]])
        with pytest.raises(ValueError, match=f"has {most + 1} tokens, the model's text tower reads {most}"):
            embed_prompts(encoder, [texts[:4]])


def test_zero_shot_classification_takes_it_as_it_takes_ours(encoder: SliceEncoder) -> None:
    task = Task({"glioma": ["glioma"], "normal": ["normal brain", "no finding"]}, ("{}.",))
    classifier = zeroshot_classifier(encoder, task)
    assert classifier.shape == (2, 16)
    embedding, similarity = encoder.encode_study(study()), encoder.similarities(study(), classifier)
    found = task.scores(similarities_of(embedding[None].numpy(), classifier), scale_of(encoder))
    assert found.sum().item() == pytest.approx(1)
    assert found.argmax() == similarity.numpy().argmax()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six studies of `study`, whose scans are no whole number of anyone's patches, with reports and labels."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("store")
    (folder / "shards").mkdir()
    studies = []
    for i in range(6):
        scans = [
            PreparedScan(name, image, (3.0, 1.0, 1.0), "axial", 5)
            for name, image in zip(study().names, study(seed=i).scans, strict=True)
        ]
        labels = {"lesion": float(i % 2), "blood": float(i < 2)}
        studies.append(StudyRecord(f"s{i}", scans, f"impression {i}", "findings", labels))
    write_shard(folder / "shards" / "00000.safetensors", studies, {}, "0", folder)
    finish(folder, folder)
    return Store(folder)


def test_retrieval_by_a_2d_model(folders: dict[str, Path], encoder: SliceEncoder, store: Store, tmp_path: Path) -> None:
    out, model = tmp_path / "out", ["--model", f"open_clip:{folders['clip']}"]
    assert run("retrieve", store.path, *model, "--out", out, "--k", 1) == 0
    text = encoder.encode_text([f"impression {i} findings" for i in range(6)])
    image = torch.stack([encoder.encode_study(study(f"s{i}", i)) for i in range(6)])
    similarity = image @ text.T
    expected = [(row >= row[i]).sum().item() for i, row in enumerate(similarity)]
    rows = [line.split(",") for line in (out / "ranks.csv").read_text().splitlines()[1:]]
    assert [int(row[1]) for row in rows] == expected
    made = ["--embeddings", out / "embeddings.npz"]
    assert run("retrieve", store.path, *model, *made, "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "ranks.csv").read_bytes() == (out / "ranks.csv").read_bytes()


PAIRS = """kind: pairs
classes:
  lesion: {positive: [a lesion, a mass], negative: no lesion}
  blood: {positive: blood, negative: no blood}
metrics: [auc, recall]
"""


def evaluated(out: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What `hlip eval` found, and the scores of its classes: (6, 2)."""
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["study"] for row in rows] == [f"s{i}" for i in range(6)]
    return json.loads((out / "metrics.json").read_text()), np.array(
        [[float(row[name]) for name in ("lesion", "blood")] for row in rows]
    )


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_evaluation_of_a_2d_model(folders: dict[str, Path], store: Store, tmp_path: Path, pool: Pool) -> None:
    task, slices, out = tmp_path / "task.yaml", tmp_path / "slices.json", tmp_path / "out"
    task.write_text(PAIRS)
    seen = {"s1": {"flair": [1, 4]}}
    slices.write_text(json.dumps(seen))
    args = ["eval", task, "--data", store.path, "--model", f"open_clip:{folders['clip']}", "--draws", 5]
    args += ["--pool", pool, "--slices", slices, "--dtype", "fp32"]
    assert run(*args, "--out", out) == 0
    found, scores = evaluated(out)
    assert (found["pool"], found["one_scan"], found["left_out"]) == (pool, None, [])
    # By hand, slice by slice; of the prompts those of two sentences are means of unit vectors.
    encoder = SliceEncoder.from_pretrained(folders["clip"])
    sentences = [["a lesion", "a mass"], ["blood"], ["no lesion"], ["no blood"]]
    texts = torch.stack(
        [
            F.normalize(
                torch.cat([encoder.encode_text([f"This study shows: {each}."]) for each in words]).mean(0), dim=0
            )
            for words in sentences
        ]
    )
    for i, row in enumerate(scores):
        scans = [by_hand(encoder, scan) @ texts.T for scan in study(seed=i).scans]
        if i == 1:
            scans = [scans[0][[1, 4]]]
        mean = torch.stack([scan.mean(0) for scan in scans]).mean(0)
        logits = (torch.cat(scans).amax(0) if pool == "max" else mean) / 0.07
        expected = torch.stack([logits[2:], logits[:2]], dim=1).softmax(1)[:, 1]
        np.testing.assert_allclose(row, expected.numpy(), rtol=1e-3)
    for name, column, labels in (("lesion", 0, [0, 1] * 3), ("blood", 1, [1, 1, 0, 0, 0, 0])):
        assert found["metrics"][f"{name}_auc"] == pytest.approx(roc_auc_score(labels, scores[:, column]))
    # The similarities that are there are not taken for those of other slices, nor lost.
    slices.write_text("{}")
    before = (out / "scores.csv").read_bytes()
    assert run(*args, "--out", out) == 2
    assert (out / "scores.csv").read_bytes() == before
    (out / "similarities.npz").unlink()
    assert run(*args, "--out", out) == 0
    assert (out / "scores.csv").read_bytes() != before
    table = Embeddings.read(out / "similarities.npz")
    assert table.embedding.shape == (6, 4)


def test_an_interrupted_evaluation_goes_on(
    folders: dict[str, Path], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    task = tmp_path / "task.yaml"
    task.write_text(PAIRS)
    args = ["eval", task, "--data", store.path, "--model", f"open_clip:{folders['clip']}", "--pool", "max"]
    args += ["--workers", 0, "--draws", 5]
    assert run(*args, "--out", tmp_path / "whole") == 0
    encode, seen = SliceEncoder.encode_slices, []

    def interrupt(encoder: SliceEncoder, study: hlip.Study) -> list[torch.Tensor]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(study.uid)
        return encode(encoder, study)

    monkeypatch.setattr(SliceEncoder, "encode_slices", interrupt)
    assert run(*args, "--out", tmp_path / "out") == 130
    assert "similarities.npz.parts keeps what is finished" in capsys.readouterr().err
    monkeypatch.setattr(
        SliceEncoder, "encode_slices", lambda encoder, study: (seen.append(study.uid), encode(encoder, study))[1]
    )
    assert run(*args, "--out", tmp_path / "out") == 0
    assert seen == [f"s{i}" for i in range(6)]
    assert "going on: 2 of 6" in capsys.readouterr().err
    for name in ("scores.csv", "table.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_find_the_same(folders: dict[str, Path], store: Store, tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(PAIRS)
    args = ["eval", task, "--data", store.path, "--model", f"open_clip:{folders['clip']}", "--pool", "max"]
    args += ["--workers", 0, "--draws", 5]
    context = multiprocessing.get_context("fork")  # where open_clip is imported from beside the environment
    found = {}
    for ranks in (1, 2):
        each, meet = [str(arg) for arg in [*args, "--out", tmp_path / str(ranks)]], free_port()
        started = [context.Process(target=rank_job.run, args=(rank, ranks, meet, each)) for rank in range(ranks)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        assert [process.exitcode for process in started] == [0] * ranks
        found[ranks] = [(tmp_path / str(ranks) / name).read_bytes() for name in ("scores.csv", "similarities.npz")]
    assert found[1] == found[2]


def test_embeddings_of_a_2d_model(
    folders: dict[str, Path], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", f"open_clip:{folders['clip']}"]
    digests = set()
    for pool in ("mean", "max"):
        encoder = SliceEncoder.from_pretrained(folders["clip"], pool)  # type: ignore[arg-type]
        out = tmp_path / f"{pool}.npz"
        assert run("embed", store.path, *model, "--pool", pool, "--out", out, "--dtype", "fp32") == 0
        table = Embeddings.read(out)
        expected = torch.stack([encoder.encode_study(study(f"s{i}", i)) for i in range(6)])
        np.testing.assert_allclose(table.embedding, expected.numpy(), rtol=1e-4, atol=1e-5)
        assert table.facts["job"]["model"] == encoder.digest()
        digests.add(encoder.digest())
    assert len(digests) == 2
    assert run("embed", store.path, *model, "--scans", "--out", tmp_path / "scans.npz", "--dtype", "fp32") == 0
    table = Embeddings.read(tmp_path / "scans.npz")
    assert table.scan.tolist() == ["", "flair", "t1"] * 6
    one = hlip.Study("s", study(seed=2).scans[1:], ["t1"])
    alone = SliceEncoder.from_pretrained(folders["clip"]).encode_study(one)
    np.testing.assert_allclose(table.embedding[8], alone.numpy(), rtol=1e-4, atol=1e-5)
    # Embeddings say by whom they were made.
    args = ["retrieve", store.path, *model, "--embeddings", tmp_path / "max.npz", "--out", tmp_path / "out"]
    assert run(*args) == 2
    assert "max.npz: made by another model than --model, or with other --pool or --slices" in capsys.readouterr().err


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
