"""The benchmark of whole encoders: what it compares is the same, and its rows say what was done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchlib import encoders as bench
from benchlib.baselines import flash, published, regroup, unfused
from benchlib.report import named
from benchlib.timing import in_turns, ratio
from conftest import random_study, tiny_vision
from hlip.model.encoder import StudyEncoder
from hlip.study import Study, pack

BENCH = Path(__file__).parents[1] / "bench"

SMALL = bench.Case("small", 2, 3, (8, 16, 16), (4, 8, 8), "scan+study")
SETTING = bench.Setting("fp32", "cpu", 64, 3)


@pytest.mark.parametrize("pattern", ["slice+scan", "scan+study", "slice+scan+study", "study"])
@pytest.mark.parametrize("attend", [flash, unfused])
def test_the_published_way_gives_what_ours_gives(pattern: str, attend: Any) -> None:
    torch.manual_seed(0)
    encoder = StudyEncoder(tiny_vision(pattern, max_scans=2)).eval()  # three scans: positions are interpolated
    torch.nn.init.normal_(encoder.cls_token)
    studies = [Study(str(s), random_study([(8, 16, 16)] * 3, seed=s)) for s in range(2)]
    tokens = encoder.plan(pack(studies, (4, 8, 8)))
    with torch.no_grad():
        torch.testing.assert_close(published(encoder, tokens, attend), encoder(tokens)[:, 0], rtol=1e-5, atol=1e-5)


def test_regrouping_averages_and_repeats_prefix_rows() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    joined = regroup(x, 1)
    assert joined.tolist() == [[[3, 4], [2, 3], [4, 5], [8, 9], [10, 11]]]
    assert regroup(joined, 2).tolist() == [[[3, 4], [2, 3], [4, 5]], [[3, 4], [8, 9], [10, 11]]]


def test_all_models_run_and_take_memory() -> None:
    cube = SMALL._replace(shape=(16, 16, 16), patch=(8, 8, 8))
    for kind in bench.KINDS:
        if kind.model == "swin":
            continue  # its windows want larger volumes
        job = bench.build(kind, cube, SETTING)
        out = bench.inference(job)
        assert out.shape[0] in (cube.studies, cube.volumes) and out.isfinite().all()
        assert bench.training_memory(kind, cube, SETTING, 1, None, "kept")["saved_gb"] > 0
    with pytest.raises(NotImplementedError, match="patches of one side"):
        bench.build(bench.Kind("navit", False), SMALL, SETTING)


@pytest.mark.slow
def test_swin_runs() -> None:
    job = bench.build(bench.Kind("swin", True), SMALL._replace(studies=1, scans=1, shape=(64, 64, 64)), SETTING)
    assert bench.inference(job).isfinite().all()


def test_results_that_differ_stop_the_run() -> None:
    ours, wanted = bench.Kind("hlip", True), {"out": torch.ones(3), "w": torch.ones(3), "b": torch.ones(3) / 10**9}
    assert 0 < bench.compare(ours, {**wanted, "out": torch.ones(3) + 1e-6}, wanted, "fp32") < 1e-5
    assert bench.compare(ours, {**wanted, "w": torch.ones(3) * 1.00015}, wanted, "fp32") > bench.TOLERANCE["fp32"]
    for off in (
        {"out": torch.ones(3) * 1.1},
        {"w": torch.ones(3) * 1.001},
        {"b": torch.ones(3) / 1000},
        {"out": torch.full((3,), torch.nan)},
    ):
        with pytest.raises(SystemExit, match=rf"hlip.*{next(iter(off))} is .* away"):
            bench.compare(ours, wanted | off, wanted, "fp32")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_reference_is_the_published_way_in_float32(mode: str) -> None:
    """A step of ours has its embeddings and gradients, and a model that computes something else has not."""
    expected = bench.reference(SMALL, SETTING._replace(dtype="bf16"), mode)
    for model in ("hlip", "published"):
        job = bench.build(bench.Kind(model, True), SMALL, SETTING)
        out = bench.training_step(job, "fp32") if mode == "training" else bench.inference(job)
        found = {"out": out} | (bench.gradients(job.module) if mode == "training" else {})
        assert bench.compare(bench.Kind(model, True), found, expected, "fp32") < 1e-4
    if mode == "training":  # every layer's gradients count, those of biases too
        assert len(found) == 1 + sum(p.requires_grad for p in job.module.parameters())
        for name in ("blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.bias", "patch_embed.proj.weight"):
            with pytest.raises(SystemExit, match=name):
                bench.compare(bench.Kind("hlip", True), found | {name: found[name] * 0.8}, expected, "bf16")
    other = bench.build(bench.Kind("vit", True), SMALL, SETTING)
    with pytest.raises(SystemExit, match="out is"):
        bench.compare(bench.Kind("vit", True), {"out": bench.inference(other)}, {"out": expected["out"]}, "fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_are_no_graphs() -> None:
    jobs = {kind: bench.build(kind, SMALL, SETTING) for kind in (bench.Kind("hlip", True), bench.Kind("vit", True))}
    rows = list(bench.replayed(jobs, "inference", SMALL, SETTING, 1))
    assert [(row["model"], row["graph"], row["reason"]) for row in rows] == [
        (model, True, "CUDA graphs need a GPU, got cpu") for model in ("hlip", "vit")
    ]
    assert named(rows[0]) == "hlip, inference, CUDA graph: "


@pytest.mark.slow
def test_a_model_beyond_the_limit_is_out_of_memory() -> None:
    many = SMALL._replace(studies=1, scans=400, shape=(16, 16, 16), patch=(4, 4, 4))  # 25,600 tokens: 2.6 GB a head
    with pytest.raises(MemoryError, match="out of memory of 1 GiB"):
        bench.in_a_fresh_process(bench.Kind("vit", False), many, SETTING, 1, 1.0, "kept")


@pytest.mark.slow
def test_the_program(tmp_path: Path) -> None:
    rows_file, results = tmp_path / "rows.json", tmp_path / "results.jsonl"
    command = [
        sys.executable, BENCH / "encoder.py", "--scaling", "batch", "--sizes", 1, 2, "--width", 64, "--rounds", 2,
        "--models", "hlip", "published", "--flash", "true", "--device", "cpu", "--json", rows_file,
        "--results", results,
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    rows = json.loads(rows_file.read_text())
    assert [(r["studies"], r["model"], r["mode"]) for r in rows] == [
        (size, model, mode) for size in (1, 2) for mode in ("inference", "training") for model in ("hlip", "published")
    ]
    for row in rows:
        assert row["vol_per_s"] == pytest.approx(4 * row["studies"] / row["p50_s"])
        assert row["p20_s"] <= row["p50_s"] <= row["p80_s"] and len(row["times_ours"]) == 3
        assert row["bytes_modelled"] == pytest.approx(row["bytes_per_s"] * row["p50_s"]) and row["of_copy"] > 0
        assert ("memory_gb" in row) == (row["mode"] == "training")
        assert 0 < row["error"] < 5e-2
        assert (row["width"], row["depth"], row["case"], row["allocator"]) == (64, 3, "scaling_batch", "kept")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["bytes_modelled"] < theirs["bytes_modelled"]  # which copies all tokens where the level changes
    assert len(results.read_text().splitlines()) == 2 * len(rows)


def test_ratios_are_paired() -> None:
    found = ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert tuple(found) == (2.0, 2.0, 2.0) and str(found) == "2 (2-2)"
    wide = ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert wide.low < wide.median == 3.0 < wide.high


def test_rounds_go_both_ways() -> None:
    calls: list[str] = []
    seconds = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert all(len(each) == 3 for each in seconds.values())


@pytest.mark.parametrize("model", ["hlip", "vit"])
def test_operations_are_those_that_pytorch_counts(model: str) -> None:
    plain = bench.build(bench.Kind("published" if model == "hlip" else model, False), SMALL, SETTING)
    # Of oneDNN's own ops it knows nothing.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        bench.inference(plain)
    assert plain.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
