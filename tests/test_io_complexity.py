"""`bench/attention.py --io`: what is counted is what closed forms say, and claims that do not hold are found."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hlip_kernels import Level, StudyLayout

pytest.importorskip("triton")
from benchlib import io_complexity as io
from benchlib.baselines import regroup, unfused
from benchlib.io_complexity import watched
from benchlib.timing import Counts, OpTraffic
from benchlib.trial import Problem
from hlip_kernels.tiles import Tile

BENCH = Path(__file__).parents[1] / "bench"

KERNELS = ("forward", "dq", "dkdv")


def closed_form(kernel: str, length: int, head_dim: int, rows: int) -> int:
    """Bytes, loaded and stored, of one head in fp16: see test_triton_memory.py."""
    row, tiles = 2 * head_dim, math.ceil(length / rows)
    own = {"forward": 2 * row + 4, "dq": 4 * row + 12, "dkdv": 4 * row}[kernel]
    streamed = 2 * row + (8 if kernel == "dkdv" else 0)
    return length * own + tiles * (length * streamed + 24)


@pytest.mark.parametrize("kernel", KERNELS)
def test_counts_are_the_closed_form_whatever_the_streamed_tile(kernel: str) -> None:
    for length, head_dim, rows in ((100, 32, 32), (65, 16, 64)):
        for streamed in (io.STREAMED, 32, 128):
            found = io.kernel_counts(kernel, length, head_dim, rows, streamed)
            assert found.bytes == closed_form(kernel, length, head_dim, rows)


@pytest.mark.parametrize("kernel", KERNELS)
def test_groups_of_one_length_ask_for_the_same(kernel: str) -> None:
    tile = Tile(32, 32, 4, 1)
    with watched(compute=False) as three:
        Problem([69, 69, 69], 1, torch.float16, 16, "cpu").launch(kernel, tile)
    one = io.kernel_counts(kernel, 70, 16, 32, 32)
    assert three.total == one * 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_change_no_address(kernel: str) -> None:
    counts = []
    for compute in (True, False):
        problem = Problem([40, 7], 2, torch.float16, 16, "cpu")
        with watched(compute) as traffic:
            problem.launch(kernel, Tile(32, 32, 4, 1))
        counts.append(traffic.total)
    assert counts[0] == counts[1]
    products = {"forward": 2, "dq": 3, "dkdv": 4}[kernel]
    streamed = 2 * (32 + 16) + 16  # the group of 41 rows has two tiles, and is streamed in a whole one and a tail
    assert counts[0].flops == 2 * products * 2 * 32 * 16 * streamed


def test_standard_attention_moves_its_scores() -> None:
    """Forward: q is scaled; scores are written, softmax reads and writes them, and the last product reads them."""
    length, head_dim = 50, 8
    rows, scores = length * head_dim, length**2
    forward = io.standard_counts(length, head_dim)["forward"]
    assert forward.loaded == 2 * (rows + 2 * rows + scores + scores + rows)
    assert forward.stored == 2 * (rows + scores + scores + rows)
    assert forward.flops == 4 * length**2 * head_dim
    backward = io.standard_counts(length, head_dim)["backward"]
    assert backward.flops == 8 * length**2 * head_dim
    assert backward.bytes > forward.bytes


def test_meta_tensors_are_counted_like_real_ones() -> None:
    q, k, v = (torch.randn(1, 1, 50, 8).half() for _ in range(3))
    with OpTraffic() as traffic:
        unfused(q, k, v)
    forward = io.standard_counts(50, 8)["forward"]
    assert (traffic.counts.loaded, traffic.counts.stored) == (forward.loaded, forward.stored)


def test_views_and_empty_tensors_move_nothing() -> None:
    x = torch.randn(4, 6)
    with OpTraffic() as traffic:
        x.view(2, 12).T[1:].unsqueeze(0).expand(3, -1, -1)
        torch.empty(100)
    assert traffic.counts == Counts()
    with OpTraffic() as traffic:
        x[:2].add_(1)
    assert traffic.counts == Counts(loaded=2 * 6 * 4, stored=2 * 6 * 4)


def test_parts_of_an_op_are_counted_and_not_the_whole() -> None:
    """In inference mode a linear layer and a reshape arrive as one op each; the reshape is a view."""
    x, weight = torch.randn(4, 6), torch.randn(2, 6)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), OpTraffic() as traffic:
            torch.nn.functional.linear(x.reshape(2, 2, 6).flatten(0, 1), weight)
        assert traffic.counts == Counts(loaded=4 * (24 + 12), stored=4 * 8)


def test_what_an_op_changes_it_writes() -> None:
    """Though it gives nothing back."""
    x, y = torch.zeros(3, 4), torch.ones(3, 4)
    with OpTraffic() as traffic:
        torch._foreach_add_([x], [y])
    assert traffic.counts == Counts(loaded=x.nbytes + y.nbytes, stored=x.nbytes)


def test_an_address_outside_is_found() -> None:
    problem = Problem([40], 1, torch.float16, 16, "cpu")
    problem.out = problem.out[:10].clone()
    with watched(), pytest.raises(Exception, match="are not in one tensor"):
        problem.launch("forward", Tile(32, 32, 4, 1))


@pytest.mark.parametrize(("src", "dst"), [(10, 1), (1, 10), (60, 10)])
def test_the_published_way_copies_all_tokens(src: int, dst: int) -> None:
    """Forward it reads and writes each once or, where they must be reshaped first, twice; backward at least as often,
    and it fills what the slices leave out, and adds the two halves."""
    tokens, width = 60, 8
    whole = 4 * tokens * width
    forward, backward = io.published_change(src, dst, tokens, width).values()
    prefix = 4 * (src + dst) * width
    assert 2 * whole < forward.bytes < 4 * whole + 4 * prefix
    assert 6 * whole < backward.bytes < 8 * whole + 8 * prefix
    x = torch.randn(src, 1 + tokens // src, width)
    with OpTraffic() as traffic:
        regroup(x, dst)
    assert traffic.counts.bytes == forward.bytes


@pytest.mark.parametrize(("src", "dst"), [("scan", "study"), ("study", "slice")])
def test_our_change_of_level_moves_prefix_rows_only(src: Level, dst: Level) -> None:
    width = 16
    found = [io.prefix_change(StudyLayout.from_grids([[(3, *grid)] * 2]), src, dst, width) for grid in ((1, 1), (2, 3))]
    assert found[0] == found[1]
    forward, backward = found[0].values()
    fine = 2 if src == "scan" else 6
    rows = {"scan": 2, "slice": 6, "study": 1}
    row = 4 * width
    programs = 0 if src == "study" else rows[dst]  # means have programs of their own, clones have none
    read = rows[dst] if src == "study" else rows[src]  # a row for each of its clones
    bounds = 12 * programs + 4 * fine * (programs > 0)
    assert forward.stored == rows[dst] * (2 * row + 8)
    assert forward.loaded == read * 2 * row + programs * 2 * row + bounds  # residual and update; weight and bias
    programs = min(rows[src], rows[dst])
    assert backward.stored == rows[src] * row + programs * 2 * row
    assert backward.loaded == rows[dst] * (3 * row + 8) + programs * row + 12 * programs + 4 * fine
    assert max(rows[src], rows[dst]) == fine


@pytest.mark.parametrize("power", [-1, 0, 1.5, 2])
def test_the_exponent_of_a_power_law(power: float) -> None:
    x = np.array([3.0, 7.0, 20.0])
    assert io.exponent(x, 5 * x**power) == pytest.approx(power, abs=1e-9)


def test_points_divide_tokens_among_groups() -> None:
    point = io.Point(240, 2, 3)
    levels: tuple[Level, ...] = ("slice", "scan", "study")
    assert [point.groups(level) for level in levels] == [6, 2, 1]
    assert [point.length(level) for level in levels] == [40, 120, 240]
    for sweep in io.SWEEPS:
        for point in sweep.points:
            assert point.tokens % (point.scans * point.slices) == 0
            groups = [point.length(level) for level in levels if sweep.name != "scans"]
            assert all(length % io.STREAMED == 0 for length in groups)


@pytest.mark.parametrize("claimed", [2, 1])
def test_claims_are_held_against_counts(
    claimed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = io.SWEEPS[3]
    assert sweep.name == "scans"
    points = tuple(io.Point(1024 * k, k, 1) for k in (1, 2))
    short = sweep._replace(points=points, bytes=(1, 1, claimed), flops=(1, 1, 2))
    monkeypatch.setattr(io, "SWEEPS", (short,))
    monkeypatch.setattr(io, "PUBLISHED", (33,))
    monkeypatch.setattr(io, "ENCODERS", {"clip_vit_base_scan_study_token1176": 2})
    path, results = tmp_path / "io.json", tmp_path / "io.jsonl"
    assert io.main(argparse.Namespace(json=path, results=results)) == int(claimed == 1)
    output = capsys.readouterr()
    assert ("ours, forward, scans: at level study 1.97" in output.err) == (claimed == 1)
    rows = json.loads(path.read_text())
    assert rows == [json.loads(line) for line in results.read_text().splitlines()]
    exponents = [row for row in rows if row["kind"] == "exponent"]
    assert len(exponents) == 2 * 2 * 2 * 3  # ways, passes, quantities, levels
    for row in exponents:
        if (row["level"], row["quantity"]) != ("study", "bytes"):
            assert row["exponent"] == pytest.approx(row["claimed"], abs=io.TOLERANCE)
    (forward, backward) = [row for row in rows if row["kind"] == "length"]
    assert forward["bytes"] == closed_form("forward", 33, 64, 128)
    assert backward["least_bytes"] < backward["bytes"] < backward["standard_bytes"] * 10
    (change,) = [row for row in rows if row["kind"] == "regroup"]
    assert (change["changes"], change["tokens"]) == (7, 2 * 1176)
    assert change["published_forward_bytes"] > 2 * 7 * 2 * 1176 * 768 * 4 > 100 * change["ours_forward_bytes"]
    assert "clip_vit_base_scan_study_token1176" in output.out
    for row in exponents:
        assert set(row["kinds"].values()) == {"counted" if row["way"] == "ours" else "estimated"}
    assert (forward["kinds"]["bytes"], forward["kinds"]["least_bytes"]) == ("counted", "estimated")
    assert change["kinds"]["ours_forward_bytes"] != change["kinds"]["published_forward_bytes"]
    assert "Nothing is measured here" in output.out
    assert rows[0]["versions"]["torch"] == torch.__version__
