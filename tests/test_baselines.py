""""""

from __future__ import annotations

import csv
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

import hlip
import rank_job
from baseline_cases import MEAN, PAIRS, STD, folders, open_clip, store, study  # noqa: F401
from commands import run
from hlip.embed.baselines import Pool, SliceEncoder
from hlip.embed.table import Embeddings
from hlip.embed.texts import embed_prompts
from hlip.evaluate.evaluation import scale_of, similarities_of, zeroshot_classifier
from hlip.evaluate.tasks import Task
from hlip.store.store import Store
from rank_job import free_port


@pytest.fixture(scope="module")
def encoder(folders: dict[str, Path]) -> SliceEncoder:
    return SliceEncoder.from_pretrained(folders["clip"], batch=3)


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
