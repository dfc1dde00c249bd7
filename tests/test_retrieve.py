from __future__ import annotations

import io
import json
from collections.abc import Sequence
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("pyarrow")

import hlip
from commands import run
from conftest import TINY_RECIPE, random_study, tiny_vision
from hlip import HLIPModel, ModelConfig
from hlip.embed.table import Embeddings
from hlip.embed.texts import embed_texts
from hlip.evaluate import retrieve as module
from hlip.evaluate.retrieve import Pairs, draw_recall, match_ranks, nearest, recall, retrieve
from hlip.model.config import TextConfig
from hlip.store.format import write_shard
from hlip.store.store import Store
from hlip.store.tools import finish
from hlip.study import PreparedScan, StudyRecord, join_report
from tiny_store import make_store

REPORTS = [
    ("Glioma.", "A mass in the left frontal lobe."),
    ("Acute stroke.", "Restricted diffusion."),
    ("Glioma.", "A mass in the left frontal lobe."),
    ("", ""),
    ("Normal.", ""),
    ("", "Old blood."),
    ("Meningioma.", "A mass."),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    (folder / "shards").mkdir()
    studies = []
    for i, (impression, findings) in enumerate(REPORTS):
        scans = [
            PreparedScan(f"scan {m}", image, (3.0, 1.0, 1.0), "axial", 8)
            for m, image in enumerate(random_study([(8, 16, 16)] * (1 + i % 3), i))
        ]
        studies.append(StudyRecord(f"s{i}", scans, impression, findings))
    write_shard(folder / "shards" / "00000.safetensors", studies, {}, "0", folder)
    finish(folder, folder)
    return Store(folder)


def embeddings_of(uids: Sequence[str], heads: Sequence[torch.Tensor]) -> Embeddings:
    n = len(uids)
    rows = F.normalize(torch.cat(list(heads)), dim=-1).numpy()
    return Embeddings(
        np.array([*uids] * len(heads)),
        np.full(n * len(heads), ""),
        np.repeat(np.arange(len(heads), dtype=np.int8), n),
        rows,
    )


def on_circle(degrees: Sequence[float]) -> torch.Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1).float()


def test_ranks_by_a_hand_worked_table() -> None:
    queries, gallery = on_circle([0, 90, 0, 180]), on_circle([10, 20, 40, 0])
    groups = np.array(["a", "b", "c", "d"])
    # From 0 degrees the order is d, a, b, c; from 90 degrees c, b, a, d; from 180 also c, b, a, d.
    assert match_ranks(queries, gallery, groups).tolist() == [2, 2, 4, 4]
    # Back, a and c are in one place, and the one that does not match comes first; b is next from all of them, then d.
    assert match_ranks(gallery, queries, groups).tolist() == [2, 3, 2, 4]
    # The first and last are of one report: either of them is a match of both.
    groups = np.array(["a", "b", "c", "a"])
    assert match_ranks(queries, gallery, groups).tolist() == [1, 2, 4, 3]


def test_ties_count_as_before_the_match_and_duplicates_do_not() -> None:
    same = on_circle([30] * 5)
    assert match_ranks(same, same, np.arange(5)).tolist() == [5] * 5
    assert match_ranks(same, same, np.array([0, 0, 1, 1, 1])).tolist() == [4, 4, 3, 3, 3]
    assert match_ranks(same, same, np.zeros(5)).tolist() == [1] * 5
    # Rank 2 at best: the two duplicates of another report stand before it.
    gallery = on_circle([0, 0, 10, 90])
    assert match_ranks(on_circle([0, 0, 0, 0]), gallery, np.array([0, 0, 1, 2])).tolist() == [1, 1, 3, 4]


@pytest.mark.parametrize("block", [1, 7 * 50, 2**24])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    rng = np.random.default_rng(0)
    # Small integers: similarities are exact, whatever block they are made in.
    queries, gallery = (torch.from_numpy(rng.integers(-3, 4, (50, 6)).astype(np.float32)) for _ in range(2))
    groups = rng.integers(0, 30, 50)
    similarity = queries.numpy() @ gallery.numpy().T
    expected = []
    for i in range(50):
        best = max(similarity[i, j] for j in range(50) if groups[j] == groups[i])
        expected.append(1 + sum(similarity[i, j] >= best for j in range(50) if groups[j] != groups[i]))
    assert match_ranks(queries, gallery, groups).tolist() == expected


def test_recall_and_chance() -> None:
    groups = np.array(["a", "b", "b", "c", "d", "e"])
    figures = recall(np.array([1, 2, 2, 5, 6, 3]), groups, ks=(1, 2, 5, 6, 50))
    assert figures["recall"] == {1: 1 / 6, 2: 3 / 6, 5: 5 / 6}
    assert figures["median_rank"] == 2.5
    for k, value in figures["chance"].items():
        assert value == pytest.approx(np.mean([1 - comb(6 - m, k) / comb(6, k) for m in (1, 2, 2, 1, 1, 1)]))
    # What a random order has is what one sees in random orders.
    rng = np.random.default_rng(0)
    n, many = 40, np.repeat(np.arange(10), 4)
    shares = []
    for _ in range(200):
        ranks = match_ranks(torch.from_numpy(rng.normal(size=(n, 8))), torch.from_numpy(rng.normal(size=(n, 8))), many)
        shares.append(recall(ranks, many, (5,))["recall"][5])
    assert np.mean(shares) == pytest.approx(recall(ranks, many, (5,))["chance"][5], abs=0.02)


def test_both_directions_are_told_apart() -> None:
    image, text = on_circle([0, 90, 0, 180])[None], on_circle([10, 20, 40, 0])[None]
    pairs = Pairs(list("wxyz"), image, text, [["a", "b ", "c", "d"]], [], [], [])
    there, back = retrieve(pairs, (1, 2, 3))
    assert (there["direction"], back["direction"]) == ("image to report", "report to image")
    assert there["ranks"].tolist() == [2, 2, 4, 4]
    assert back["ranks"].tolist() == [2, 3, 2, 4]
    assert there["recall"] == {1: 0.0, 2: 0.5, 3: 0.5}
    assert (there["median_rank"], back["median_rank"]) == (3, 2.5)
    assert back["recall"] == {1: 0.0, 2: 0.5, 3: 0.75}


def test_studies_and_reports_are_paired(tiny_model: HLIPModel, store: Store) -> None:
    image = torch.randn(6, 32)
    pairs = Pairs.embed(tiny_model, store, embeddings_of(["s6", "s5", "s4", "s3", "s1", "elsewhere"], [image]))
    assert pairs.uids == ["s1", "s4", "s5", "s6"]
    assert pairs.without_report == ["s3"]
    assert pairs.without_embedding == ["s0", "s2"]
    assert pairs.not_in_store == ["elsewhere"]
    assert pairs.texts == [["Acute stroke. Restricted diffusion.", "Normal.", "Old blood.", "Meningioma. A mass."]]
    assert torch.equal(pairs.image[0], F.normalize(image, dim=-1)[[4, 2, 1, 0]])
    torch.testing.assert_close(pairs.text[0], tiny_model.encode_text(pairs.texts[0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="none of the 1 studies with embeddings has a report"):
        Pairs.embed(tiny_model, store, embeddings_of(["s3"], [image[:1]]))
    with pytest.raises(ValueError, match="width 31, the model's of 32"):
        Pairs.embed(tiny_model, store, embeddings_of(["s1"], [image[:1, :31]]))


@pytest.fixture(scope="module")
def two_heads(bert_folder: str) -> HLIPModel:
    torch.manual_seed(1)
    vision = tiny_vision(num_prefix=2)
    text = TextConfig(bert_folder, context_length=32, pooling="mean", locked=True)
    return HLIPModel(ModelConfig(vision, text, TINY_RECIPE, embed_dim=32, per_prefix=True, objective="dual")).eval()


def test_two_heads_meet_impressions_and_findings(two_heads: HLIPModel, store: Store, tmp_path: Path) -> None:
    heads = [torch.randn(7, 32), torch.randn(7, 32)]
    uids = [f"s{i}" for i in range(7)]
    pairs = Pairs.embed(two_heads, store, embeddings_of(uids, heads))
    kept = [0, 1, 2, 4, 5, 6]
    assert pairs.texts[0] == ["Glioma.", "Acute stroke.", "Glioma.", "Normal.", "Old blood.", "Meningioma."]
    assert pairs.texts[1][3:] == ["Normal.", "Old blood.", "A mass."]
    for p in range(2):
        assert torch.equal(pairs.image[p], F.normalize(heads[p], dim=-1)[kept])
        torch.testing.assert_close(pairs.text[p], two_heads.encode_text(pairs.texts[p]), rtol=1e-4, atol=1e-5)
    figures = retrieve(pairs, (1,))
    assert [(each["head"], each["texts"]) for each in figures] == [(0, 5), (0, 5), (1, 5), (1, 5)]
    with pytest.raises(ValueError, match="no embeddings of whole studies of head 1"):
        Pairs.embed(two_heads, store, embeddings_of(uids, heads[:1]))
    # The command embeds both heads by itself.
    two_heads.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert run("retrieve", store.path, "--model", tmp_path / "model", "--out", out, "--k", 1, 2) == 0
    content = json.loads((out / "retrieve.json").read_text())
    assert [each["head"] for each in content["figures"]] == [0, 0, 1, 1]
    with torch.no_grad():
        image = torch.cat([two_heads.encode_image(hlip.pack([store.study(i)], (4, 8, 8))) for i in kept])
    groups = np.array(pairs.texts[1])
    expected = match_ranks(image[:, 1], pairs.text[1], groups).tolist()
    rows = [line.split(",") for line in (out / "ranks.csv").read_text().splitlines()[1:]]
    assert [int(row[3]) for row in rows] == expected


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_the_command(
    suffix: str,
    tiny_model: HLIPModel,
    model_folder: Path,
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    # Each study's embedding is that of its own report, so that retrieval is perfect, and neighbours are known.
    texts = [join_report(*report) or "nothing" for report in REPORTS]
    path = tmp_path / f"e{suffix}"
    with path.open("wb") as file:
        embeddings_of([f"s{i}" for i in range(7)], [embed_texts(tiny_model, texts)]).write(file, suffix)
    out = tmp_path / "out"
    args = ["--model", model_folder, "--embeddings", path, "--out", out, "--top", 2]
    assert run("retrieve", store.path, *args, "--query", "Normal.", "--study", "s0") == 0
    captured = capsys.readouterr()
    assert "studies without report, left out: 1 (s3)" in captured.err
    assert "image to report: 6 studies, 5 different texts" in captured.out
    content = json.loads((out / "retrieve.json").read_text())
    assert content["without_report"] == ["s3"]
    for each in content["figures"]:
        assert each["recall"] == {"1": 1.0, "5": 1.0}
        assert each["median_rank"] == 1
        assert each["chance"]["1"] == pytest.approx((4 * 1 + 2 * 2) / 36)
    assert content["queries"][0]["query"] == "Normal."
    assert content["queries"][0]["studies"][0] == {"study": "s4", "similarity": 1.0, "text": "Normal."}
    (near,) = content["nearest"]
    assert next(each["study"] for each in near["studies"]) == "s2"  # its twin, not itself
    assert {each["study"] for each in near["reports"]} == {"s0", "s2"}
    assert (out / "ranks.csv").read_text().splitlines() == [
        'study,"image to report, head 0","report to image, head 0"',
        *(f"s{i},1,1" for i in (0, 1, 2, 4, 5, 6)),
    ]
    assert (out / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(each.name for each in out.iterdir()) == ["ranks.csv", "recall.png", "retrieve.json"]


def test_the_command_embeds_the_store_itself(
    tiny_model: HLIPModel, model_folder: Path, store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("retrieve", store.path, "--model", model_folder, "--out", out) == 0
    kept = [0, 1, 2, 4, 5, 6]
    with torch.no_grad():
        image = torch.cat([tiny_model.encode_image(hlip.pack([store.study(i)], (4, 8, 8))) for i in kept])
    texts = [join_report(*REPORTS[i]) for i in kept]
    ranks = match_ranks(image, embed_texts(tiny_model, texts), np.array(texts))
    rows = [line.split(",") for line in (out / "ranks.csv").read_text().splitlines()[1:]]
    assert [int(row[1]) for row in rows] == ranks.tolist()


def test_embeddings_that_are_all_equal_are_not_ranked(
    tiny_model: HLIPModel, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scans of one value; and a head that says nothing where its texts are all the same."""
    blank = [[torch.full((8, 16, 16), 3, dtype=torch.uint8)]] * 4
    blind = make_store(tmp_path / "blind", [1] * 4, images=blank)
    assert run("retrieve", blind.path, "--model", model_folder, "--out", tmp_path / "out") == 2
    assert "all 4 embeddings of whole studies of head 0 are equal" in capsys.readouterr().err
    with pytest.raises(ValueError, match="all 2 embeddings of whole studies of head 1 are equal"):
        embeddings_of(["a", "b"], [torch.eye(2), torch.ones(2, 2)]).of_studies(1)
    assert len(embeddings_of(["a"], [torch.ones(1, 2)]).of_studies()[0]) == 1  # nothing to be told from


def test_a_head_whose_texts_are_all_the_same_says_so(
    two_heads: HLIPModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "store", [1] * 4, reports=[("Abnormal.", f"Mass {i}.") for i in range(4)])
    two_heads.save_pretrained(tmp_path / "model")
    assert run("retrieve", store.path, "--model", tmp_path / "model", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err.count("all texts are the same") == 2  # both directions of head 0


def test_nearest() -> None:
    gallery = on_circle([0, 20, 20, 180])
    assert [i for i, _ in nearest(on_circle([5])[0], gallery, 3)] == [0, 1, 2]
    assert [i for i, _ in nearest(gallery[0], gallery, 9, leave=0)] == [1, 2, 3]
    assert nearest(7 * gallery[0], gallery, 1) == [(0, 1.0)]


def test_the_picture_of_two_heads() -> None:
    ranks = np.array([1, 2, 2, 5, 6, 3])
    each = {"studies": 6, "ranks": ranks, **recall(ranks, np.arange(6), (1, 5))}
    figures = [{**each, "direction": name, "head": head} for head in (0, 1) for name in module.DIRECTIONS]
    file = io.BytesIO()
    draw_recall(figures, file, "svg")
    text = file.getvalue().decode()
    assert "<svg" in text
    assert "report to image, head 1 (median 2.5)" in text


def test_bad_input_is_named_and_nothing_is_written(
    model_folder: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"hello")
    out, model = tmp_path / "out", ["--model", model_folder]
    make_store(tmp_path / "one", [1])
    make_store(tmp_path / "same", [1] * 4, reports=[("Normal.", "")] * 2 + [("", "Normal. "), ("", "")])
    cases = [
        ([tmp_path / "nowhere", *model], "nowhere: not a store"),
        ([store.path, *model, "--embeddings", bad], "bad.npz: not a readable file of embeddings"),
        ([store.path, *model, "--study", "s99"], "holds no study s99"),
        ([store.path, *model, "--study", "s3"], "--study s3: has no report"),
        ([store.path, *model, "--query", " "], "expected words"),
        ([store.path, *model, "--k", 0], "--k: expected 1 or more, got 0"),
        ([store.path, *model, "--pool", "max"], "are for 2D models"),
        ([store.path, "--model", tmp_path / "no_model"], "no_model: unknown model"),
        ([tmp_path / "one", *model], "got one, of 1 of its 1 studies"),
        ([tmp_path / "same", *model], "got one, of 3 of its 4 studies"),
    ]
    for args, message in cases:
        assert run("retrieve", *args, "--out", out) == 2, message
        assert message in capsys.readouterr().err
    assert not out.exists()
