"""Packing and dropout, against loops over single patches."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import random_study, tiny_vision
from hlip.model.encoder import StudyEncoder
from hlip.study import PackedBatch, Study, pack, patch_dropout, scan_dropout
from hlip_kernels import Grid, Level, StudyLayout
from hlip_kernels.layout import LEVELS

PATCH: Grid = (2, 3, 4)
RATES = (0.0, 0.25, 0.5, 0.9, 0.99, 1.0)
Grids = list[list[Grid]]

grid_lists = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def make_scans(grids: list[Grid], seed: int = 0, patch: Grid = PATCH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(n * p for n, p in zip(grid, patch, strict=True)) for grid in grids]
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]


def make_batch(grids: Grids) -> PackedBatch:
    return pack([make_scans(study, seed) for seed, study in enumerate(grids)], PATCH)


def owners(grids: Grids) -> list[tuple[int, int, int]]:
    """Study, scan and slice of every patch, in order."""
    return [
        (s, m, d)
        for s, study in enumerate(grids)
        for m, (depth, height, width) in enumerate(study)
        for d in range(depth)
        for _ in range(height * width)
    ]


def group_lengths(rows: list[tuple[int, int, int]], level: Level) -> list[int]:
    key = {"study": 1, "scan": 2, "slice": 3}[level]
    return [len(list(group)) for _, group in itertools.groupby(rows, lambda row: row[:key])]


def some_grids(num_scans: int) -> list[Grid]:
    return [(1 + m % 4, 1 + m % 2, 1 + m % 3) for m in range(num_scans)]


STUDIES: Grids = [some_grids(1), some_grids(40), [(5, 2, 2), (1, 3, 1)]]


@pytest.mark.parametrize("patch", [PATCH, (1, 1, 1), (4, 2, 1)])
@pytest.mark.parametrize("grids", [STUDIES, STUDIES[:1], STUDIES[1:2]])
def test_patches_and_positions_come_in_order(grids: Grids, patch: Grid) -> None:
    studies = [make_scans(study, seed, patch) for seed, study in enumerate(grids)]
    batch = pack(studies, patch)
    pd, ph, pw = patch
    want_patches, want_positions = [], []
    for scans, study in zip(studies, grids, strict=True):
        for m, (scan, (depth, height, width)) in enumerate(zip(scans, study, strict=True)):
            for place, (d, h, w) in enumerate(np.ndindex(depth, height, width)):
                block = scan[d * pd : (d + 1) * pd, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw]
                want_patches.append(block.flatten())
                want_positions.append([m, place])
    assert torch.equal(batch.patches, torch.stack(want_patches))
    assert batch.patches.dtype == torch.uint8
    assert batch.positions.tolist() == want_positions
    assert batch.positions.dtype == torch.int32
    assert batch.patch_size == patch
    assert batch.layout.grids == tuple(map(tuple, grids))
    assert len(batch) == len(grids)


@settings(deadline=None, max_examples=50)
@given(grid_lists)
def test_layout_matches_the_rows(grids: Grids) -> None:
    layout = make_batch(grids).layout
    for level in LEVELS:
        assert layout.seqlens(level).tolist() == group_lengths(owners(grids), level)


def test_a_study_is_packed_alike_alone_and_among_others() -> None:
    alone = pack([make_scans(STUDIES[1])], PATCH)
    among = pack([make_scans(STUDIES[0], 1), make_scans(STUDIES[1]), make_scans(STUDIES[2], 2)], PATCH)
    start, end = among.layout.cu_patches("study")[1:3].tolist()
    assert torch.equal(among.patches[start:end], alone.patches)
    assert torch.equal(among.positions[start:end], alone.positions)


def test_accepts_studies_and_lists_of_scans() -> None:
    first, second = make_scans(some_grids(2)), make_scans(some_grids(3), 1)
    named = pack([Study("a", first, ["x", "y"], "No stroke."), Study("b", second)], PATCH)
    plain = pack([first, tuple(second)], PATCH)
    assert torch.equal(named.patches, plain.patches)
    assert (named.uids, named.impressions) == (["a", "b"], ["No stroke.", ""])
    assert (plain.uids, plain.impressions) == (["study 0", "study 1"], ["", ""])


def test_accepts_views_of_scans() -> None:
    big = make_scans([(3, 4, 4)])[0]
    view = big.flip(0).transpose(0, 1)[::2, :6, 4:12].transpose(0, 1)
    assert not view.is_contiguous()
    assert torch.equal(pack([[view]], (2, 2, 4)).patches, pack([[view.contiguous()]], (2, 2, 4)).patches)


def test_later_changes_of_a_scan_do_not_reach_the_batch() -> None:
    scans = make_scans(some_grids(2))
    batch = pack([scans], PATCH)
    before = batch.patches.clone()
    scans[0].zero_()
    assert torch.equal(batch.patches, before)


GOOD = torch.zeros(2, 3, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("studies", "message"),
    [
        ([], "at least one study"),
        ([[GOOD], []], "study 1: the study has no scans"),
        ([Study("p7", [])], "p7: the study has no scans"),
        ([Study("p7", [GOOD, GOOD.float()], ["t1", "t2"])], r"p7, scan t2: expected a uint8 tensor .* torch\.float32"),
        ([Study("p7", [GOOD, GOOD[None]])], r"p7, scan 1: expected a uint8 tensor .* \(1, 2, 3, 4\)"),
        ([[GOOD], [GOOD, GOOD[0]]], r"study 1, scan 1: expected a uint8 tensor .* \(3, 4\)"),
        ([[GOOD, GOOD[:1]]], r"study 0, scan 1: shape \(1, 3, 4\) is not a whole number of patches \(2, 3, 4\)"),
        ([[GOOD[:, :, :3]]], r"study 0, scan 0: shape \(2, 3, 3\) is not a whole number"),
        ([[GOOD[:0]]], r"study 0, scan 0: shape \(0, 3, 4\) is not a whole number"),
    ],
)
def test_errors_name_study_and_scan(studies: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(studies, PATCH)


@st.composite
def grids_and_rows(draw: st.DrawFn) -> tuple[Grids, list[bool]]:
    """Grids, and a choice of patches that leaves at least one to every study."""
    grids = draw(grid_lists)
    studies = [s for s, _, _ in owners(grids)]
    keep = draw(st.lists(st.booleans(), min_size=len(studies), max_size=len(studies)))
    for s in range(len(grids)):
        keep[studies.index(s)] |= not any(k for k, owner in zip(keep, studies, strict=True) if owner == s)
    return grids, keep


@settings(deadline=None, max_examples=50)
@given(grids_and_rows())
def test_select_keeps_patches_positions_and_layout_together(case: tuple[Grids, list[bool]]) -> None:
    grids, keep = case
    batch = make_batch(grids)
    mask = torch.tensor(keep)
    rows = [row for row, kept in enumerate(keep) if kept]
    for choice in (mask, torch.tensor(rows)):
        part = batch.select(choice)
        assert part.patches.tolist() == [batch.patches[row].tolist() for row in rows]
        assert part.positions.tolist() == [batch.positions[row].tolist() for row in rows]
        left = [owners(grids)[row] for row in rows]
        for level in LEVELS:
            assert part.layout.seqlens(level).tolist() == group_lengths(left, level)
        scans = [grids[s][m] for s, m in dict.fromkeys(row[:2] for row in left)]
        assert [grid for study in part.layout.grids for grid in study] == scans
        assert (part.uids, part.impressions, part.patch_size) == (batch.uids, batch.impressions, batch.patch_size)


def test_select_in_steps_equals_select_at_once() -> None:
    batch = make_batch(STUDIES)
    first = torch.arange(0, len(batch.patches), 2)
    first = torch.unique(torch.cat([first, batch.layout.cu_patches("study")[:-1].long()]))
    second = torch.ones(len(first), dtype=torch.bool)
    second[1::3] = False
    in_steps, at_once = batch.select(first).select(second), batch.select(first[second])
    assert torch.equal(in_steps.patches, at_once.patches)
    assert torch.equal(in_steps.positions, at_once.positions)
    assert in_steps.layout.grids == at_once.layout.grids
    for level in LEVELS:
        assert in_steps.layout.seqlens(level).tolist() == at_once.layout.seqlens(level).tolist()


@settings(deadline=None, max_examples=50)
@given(grid_lists, st.sampled_from(LEVELS), st.sampled_from(RATES) | st.floats(0, 1))
def test_patch_dropout_keeps_the_same_share_of_every_group(grids: Grids, level: Level, rate: float) -> None:
    layout = StudyLayout.from_grids(grids)
    keep = patch_dropout(layout, rate, level)
    assert keep.dtype == torch.int64
    kept = np.zeros(layout.num_tokens, dtype=bool)
    kept[keep.numpy()] = True
    assert keep.tolist() == np.flatnonzero(kept).tolist()  # increasing, none twice
    lengths = group_lengths(owners(grids), level)
    ends = np.cumsum(lengths)
    counts = [int(kept[end - length : end].sum()) for length, end in zip(lengths, ends, strict=True)]
    assert counts == [max(1, int(length * (1 - rate))) for length in lengths]
    layout.select(keep)  # must be a choice that a layout accepts


@settings(deadline=None, max_examples=50)
@given(grid_lists, st.sampled_from(RATES) | st.floats(0, 1))
def test_scan_dropout_keeps_whole_scans(grids: Grids, rate: float) -> None:
    layout = StudyLayout.from_grids(grids)
    part = layout.select(scan_dropout(layout, rate))
    for before, after in zip(grids, part.grids, strict=True):
        assert len(after) == max(1, int(len(before) * (1 - rate)))
    sizes = [d * h * w for study in part.grids for d, h, w in study]
    assert part.seqlens("scan").tolist() == sizes


def test_no_dropout_keeps_everything() -> None:
    layout = StudyLayout.from_grids(STUDIES)
    everything = list(range(layout.num_tokens))
    assert scan_dropout(layout, 0.0).tolist() == everything
    for level in LEVELS:
        assert patch_dropout(layout, 0.0, level).tolist() == everything


@pytest.mark.parametrize("level", [*LEVELS, None])
def test_dropout_is_random_and_repeatable(level: Level | None) -> None:
    layout = StudyLayout.from_grids([[(3, 4, 4)] * 8] * 4)

    def draw() -> list[int]:
        return (patch_dropout(layout, 0.5, level) if level else scan_dropout(layout, 0.5)).tolist()

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert (draw(), draw()) == (first, second)
    assert first != second


def test_dropout_keeps_every_place_equally_often() -> None:
    torch.manual_seed(0)
    layout = StudyLayout.from_grids([[(1, 1, 8)] * 2])
    rounds = 2000
    patches = torch.stack([patch_dropout(layout, 0.75, "scan") for _ in range(rounds)])
    counts = torch.bincount(patches.flatten(), minlength=16)
    # 2 of 8 kept: binomial with p = 1/4; five standard deviations either side.
    assert (counts - rounds / 4).abs().max() < 5 * (rounds * 3 / 16) ** 0.5
    first_scan = sum(int(scan_dropout(layout, 0.5)[0]) == 0 for _ in range(rounds))
    assert abs(first_scan - rounds / 2) < 5 * (rounds / 4) ** 0.5


def test_dropout_refuses_an_unknown_level() -> None:
    with pytest.raises(ValueError, match="slice, scan, study"):
        patch_dropout(StudyLayout.from_grids(STUDIES), 0.5, "volume")  # type: ignore[arg-type]


def test_batch_survives_pickling() -> None:
    batch = make_batch(STUDIES)
    batch = batch.select(patch_dropout(batch.layout, 0.5, "scan"))
    copy = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copy.patches, batch.patches)
    assert torch.equal(copy.positions, batch.positions)
    assert (copy.uids, copy.impressions, copy.patch_size) == (batch.uids, batch.impressions, batch.patch_size)
    assert copy.layout.grids == batch.layout.grids
    for level in LEVELS:
        assert torch.equal(copy.layout.cu_seqlens(level), batch.layout.cu_seqlens(level))
    assert torch.equal(copy.layout.children("slice", "study"), batch.layout.children("slice", "study"))


def test_a_study_may_stand_alone() -> None:
    study = Study("s", make_scans(some_grids(2)))
    assert torch.equal(pack(study, PATCH).patches, pack([study], PATCH).patches)
    for wrong in (["a.nii"], [["a.nii"]]):
        with pytest.raises(ValueError, match="study 0, scan 0: expected a uint8 tensor"):
            pack(wrong, PATCH)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("num_prefix", [1, 2])
def test_a_batch_makes_the_tensors_of_one_layout(
    num_prefix: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = StudyLayout._tensors

    def counted(layout: StudyLayout) -> object:
        made.append(layout)
        return make(layout)

    monkeypatch.setattr(StudyLayout, "_tensors", counted)
    vision = tiny_vision("slice+scan+study", num_prefix=num_prefix, patch_dropout=dropout, scan_dropout=dropout)
    encoder = StudyEncoder(vision).train()
    encoder(pack([random_study([(8, 16, 16)] * 3), random_study([(4, 16, 24)])], (4, 8, 8))).sum().backward()
    assert len(made) == 1
