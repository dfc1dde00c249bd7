"""The benchmark of packed batches: its policies encode the same studies, and its figures are counted right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import packing
from benchlib.problems import SCANS, draw_scans
from benchlib.timing import RESET_PEAK, OpTraffic
from conftest import random_study
from hlip.model.config import VisionConfig
from hlip.model.encoder import StudyEncoder
from hlip.model.levels import level_pattern
from hlip.model.memory import release_memory

BENCH = Path(__file__).parents[1] / "bench"

CPU = torch.device("cpu")
COUNTS = (3, 1, 2)
SMALL = ["--studies=4", "--rounds=2", "--depth=3", "--width=64", "--device=cpu", "--grid", "2", "2", "2"]
SMALL += ["--patch", "2", "4", "4"]


def bench(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / "packing.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("mix", "mode"), [("pub_brain_5", "train"), ("head_ct", "forward")])
def test_the_program(mix: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = bench("--mix", mix, "--mode", mode, "--json", path, *SMALL)
    assert done.returncode == 0, done.stderr
    rows: dict[str, dict[str, Any]] = {row["policy"]: row for row in json.loads(path.read_text())}
    assert list(rows) == ["packed", "repeat10_us", "repeat10", "pad_max", "block_mask"]
    counts = draw_scans(mix, 4, most=10)
    scans = {
        "packed": counts.sum(),
        "repeat10": 40,
        "repeat10_us": 40,
        "pad_max": 4 * counts.max(),
        "block_mask": counts.sum(),
    }
    for policy, row in rows.items():
        assert row["tokens"] == 8 * scans[policy]
        assert row["studies_per_s"] == pytest.approx(4 / row["p50_s"])
        assert row["p20_s"] <= row["p50_s"] <= row["p80_s"]
        low, high = row["interval"]
        assert 0 < low <= row["packed_over_this"] <= high
        assert row["error"] <= 1e-4
        assert (row["mix"], row["mode"], row["width"], row["grid"]) == (mix, mode, 64, [2, 2, 2])
        assert row["versions"]["torch"] == torch.__version__
        assert row["utc"].endswith("+00:00")
        assert policy in done.stdout
    assert rows["packed"]["flops"] < min(rows[policy]["flops"] for policy in rows if policy != "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_wrong_sizes_are_named() -> None:
    done = bench("--width", 100)
    assert done.returncode == 2
    assert "--width: must be a multiple of 64, got '100'" in done.stderr


@pytest.fixture(scope="module")
def encoder() -> StudyEncoder:
    torch.manual_seed(0)
    config = VisionConfig(
        64, 1, patch_size=(2, 4, 4), grid=(2, 3, 3), levels=level_pattern("scan+study", 6, 2), init_std=0.1
    )
    return StudyEncoder(config)


@pytest.fixture(scope="module")
def studies() -> list[list[torch.Tensor]]:
    return [random_study([(4, 12, 12)] * count, seed) for seed, count in enumerate(COUNTS)]


def jobs_of(encoder: StudyEncoder, studies: list[list[torch.Tensor]]) -> dict[str, packing.Job]:
    makers = {"packed": packing.packed, "dense": packing.dense, "block_mask": packing.block_mask}
    return {name: make(encoder, studies, CPU) for name, make in makers.items()}


def test_every_policy_gives_a_study_its_embedding(encoder: StudyEncoder, studies: list[list[torch.Tensor]]) -> None:
    alone = torch.cat([packing.packed(encoder, [study], CPU).encode() for study in studies])
    for name, job in jobs_of(encoder, studies).items():
        torch.testing.assert_close(job.encode(), alone, rtol=1e-4, atol=1e-5, msg=name)


def test_floating_point_operations_are_those_that_run(encoder: StudyEncoder, studies: list[list[torch.Tensor]]) -> None:
    """As PyTorch counts them, with attention in plain products; packed has those of its studies one by one."""
    alone = [packing.dense(encoder, [study], CPU) for study in studies]
    for job in (packing.dense(encoder, studies, CPU), packing.block_mask(encoder, studies, CPU), *alone):
        # Of oneDNN's own ops it knows nothing.
        plain = torch.backends.mkldnn.flags(enabled=False)
        with plain, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            job.encode()
        assert job.flops == counter.get_total_flops()
    packed = packing.packed(encoder, studies, CPU)
    assert packed.flops == sum(job.flops or 0 for job in alone)


def test_results_that_differ_stop_the_run(encoder: StudyEncoder, studies: list[list[torch.Tensor]]) -> None:
    jobs = jobs_of(encoder, studies)
    other = jobs["packed"]._replace(encode=lambda: jobs["packed"].encode().roll(1, 0))

    def step(job: packing.Job) -> list[torch.Tensor]:
        return packing.forward(job, "fp32")

    with pytest.raises(SystemExit, match="other: results are"):
        packing.measure({"packed": jobs["packed"], "other": other}, step, 1, 1e-4)
    full, _ = packing.train_step(jobs["packed"], "fp32"), packing.train_step(other, "fp32")
    assert len(full) == 2
    assert full[1].numel() == sum(p.numel() for p in encoder.parameters())


@pytest.mark.skipif(not RESET_PEAK.exists(), reason="the system does not say how much memory was resident")
def test_padding_takes_memory_and_moves_bytes(encoder: StudyEncoder) -> None:
    many = [random_study([(4, 12, 12)] * count, seed=count) for count in (40, 1) * 5]
    jobs = {"packed": packing.packed(encoder, many, CPU), "pad_max": packing.dense(encoder, many, CPU)}
    with OpTraffic():
        for job in jobs.values():
            packing.train_step(job, "fp32")
    packed, padded = packing.measure(jobs, lambda job: packing.train_step(job, "fp32"), 1, 1e-4)
    release_memory()
    saved = 4 * 3690 * 64 * len(encoder.blocks) * 10  # rows of attention and MLP that autograd keeps, of a block
    assert saved < packed["peak_bytes"] < 0.6 * padded["peak_bytes"]
    assert 2 * saved < packed["bytes_modelled"] < 0.6 * padded["bytes_modelled"]
    assert next(encoder.parameters()).grad is None  # gradients of one step are no memory of the next


@pytest.mark.parametrize("mix", SCANS)
def test_a_few_drawn_studies_stand_for_the_mix(mix: str) -> None:
    weights = np.array(SCANS[mix]) / np.sum(SCANS[mix])
    for seed in range(5):
        drawn = draw_scans(mix, 64, seed)
        assert drawn.min() >= 1
        assert drawn.max() <= len(weights)
        below = (drawn[:, None] <= np.arange(1, len(weights) + 1)).mean(0)
        assert np.abs(below - np.cumsum(weights)).max() <= 1 / 64 + 1e-9
        assert (draw_scans(mix, 64, seed) == drawn).all()
        assert (draw_scans(mix, 64, seed, most=10) == np.minimum(drawn, 10)).all()
