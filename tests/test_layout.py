"""StudyLayout against plain-Python counting over one (study, scan, slice) label per token."""

from __future__ import annotations

import pickle
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import token_labels
from hlip_kernels import Grid, Level, StudyLayout
from hlip_kernels import layout as layout_module
from hlip_kernels.layout import TILE_ROWS

Label = tuple[int, int, int]  # study, scan, slice
Grids = list[list[Grid]]
DEPTH: dict[Level, int] = {"study": 1, "scan": 2, "slice": 3}  # how much of a label names a group
PAIRS: list[tuple[Level, Level]] = [("slice", "scan"), ("slice", "study"), ("scan", "study")]

# Scans of one study differ, and so do the studies: 12 + 3 + 8 + 1 + 5 = 29 tokens.
RAGGED: Grids = [[(2, 2, 3), (3, 1, 1)], [(1, 4, 2)], [(1, 1, 1), (5, 1, 1)]]


def group_names(labels: list[Label], level: Level) -> list[tuple[int, ...]]:
    return sorted({label[: DEPTH[level]] for label in labels})


def group_sizes(labels: list[Label], level: Level) -> list[int]:
    return [sum(label[: len(name)] == name for label in labels) for name in group_names(labels, level)]


def bounds(sizes: list[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))


def check(layout: StudyLayout, labels: list[Label], grids: Grids, num_prefix: int) -> None:
    """`layout` has exactly the groups that the labels of its tokens say it has."""
    assert layout.num_tokens == len(labels)
    assert layout.num_prefix == num_prefix
    assert layout.num_studies == len(group_sizes(labels, "study"))
    assert layout.num_scans == len(group_sizes(labels, "scan"))
    for level in DEPTH:
        sizes = group_sizes(labels, level)
        assert layout.num_groups(level) == len(sizes)
        assert layout.seqlens(level).tolist() == sizes
        assert layout.max_seqlen(level) == max(sizes) + num_prefix
        assert layout.cu_seqlens(level).tolist() == bounds([num_prefix + n for n in sizes])
        assert layout.cu_patches(level).tolist() == bounds(sizes)
        assert layout.cu_seqlens(level).dtype == layout.cu_patches(level).dtype == torch.int32
        check_rows(layout, level, sizes)
    for fine, coarse in PAIRS:
        names = group_names(labels, fine)
        runs = [sum(name[: len(parent)] == parent for name in names) for parent in group_names(labels, coarse)]
        assert layout.children(fine, coarse).tolist() == bounds(runs)
        assert layout.parents(fine, coarse).tolist() == [c for c, run in enumerate(runs) for _ in range(run)]
        assert layout.children(fine, coarse).dtype == layout.parents(fine, coarse).dtype == torch.int32
    scans = group_names(labels, "scan")
    assert layout.grids == tuple(
        tuple(grid for m, grid in enumerate(study) if (s, m) in scans) for s, study in enumerate(grids)
    )


def check_rows(layout: StudyLayout, level: Level, sizes: list[int]) -> None:
    """Group after group, in each its prefix rows and then its patches; tiles cut every group's rows."""
    kinds = [kind for n in sizes for kind in ["prefix"] * layout.num_prefix + ["patch"] * n]
    assert layout.num_rows(level) == len(kinds)
    for rows, kind in ((layout.prefix_rows(level), "prefix"), (layout.patch_rows(level), "patch")):
        assert rows.dtype == torch.int64
        assert rows.tolist() == [row for row, its in enumerate(kinds) if its == kind]
    for height, tiles in zip(TILE_ROWS, layout.tiles(level), strict=True):
        expected = [(g, first) for g, n in enumerate(sizes) for first in range(0, n + layout.num_prefix, height)]
        assert sorted(map(tuple, tiles.tolist())) == expected
        lengths = [sizes[g] for g, _ in tiles.tolist()]
        assert lengths == sorted(lengths, reverse=True)


def rows_where(labels: list[Label], *dropped: tuple[int, ...]) -> torch.Tensor:
    """The rows that are left when these studies, scans or slices are dropped whole."""
    return torch.tensor([all(label[: len(name)] != name for name in dropped) for label in labels])


@pytest.mark.parametrize("num_prefix", [0, 1, 32])
@pytest.mark.parametrize("grids", [[[(1, 1, 1)]], [[(4, 2, 2)] * 3] * 2, RAGGED])
def test_from_grids(grids: Grids, num_prefix: int) -> None:
    check(StudyLayout.from_grids(grids, num_prefix), token_labels(grids), grids, num_prefix)


def test_numbers_by_hand() -> None:
    layout = StudyLayout.from_grids(RAGGED)
    assert layout.num_prefix == 1
    assert layout.cu_patches("slice").tolist() == [0, 6, 12, 13, 14, 15, 23, 24, 25, 26, 27, 28, 29]
    assert layout.cu_patches("scan").tolist() == [0, 12, 15, 23, 24, 29]
    assert layout.cu_patches("study").tolist() == [0, 15, 23, 29]
    assert layout.cu_seqlens("scan").tolist() == [0, 13, 17, 26, 28, 34]
    assert layout.cu_seqlens("study").tolist() == [0, 16, 25, 32]
    assert layout.prefix_rows("study").tolist() == [0, 16, 25]
    assert layout.patch_rows("study").tolist() == [*range(1, 16), *range(17, 25), *range(26, 32)]
    assert layout.parents("scan", "study").tolist() == [0, 0, 1, 2, 2]
    assert layout.children("slice", "scan").tolist() == [0, 2, 5, 6, 7, 12]
    assert layout.children("slice", "study").tolist() == [0, 5, 6, 12]
    assert layout.children("scan", "study").tolist() == [0, 2, 3, 5]
    assert [layout.max_seqlen(level) for level in DEPTH] == [16, 13, 9]


@pytest.mark.parametrize(
    "dropped",
    [
        pytest.param([], id="nothing"),
        pytest.param([(0, 0, 1)], id="one slice"),
        pytest.param([(0, 1)], id="one scan"),
        pytest.param([(0, 0), (2, 1)], id="first and last scan"),
        pytest.param([(0, 0, 0), (0, 0, 1)], id="a scan by its slices"),
        pytest.param([(0, 1, 0), (0, 1, 2), (2, 0), (2, 1, 4)], id="slices and scans"),
    ],
)
def test_select_drops_whole_groups(dropped: list[tuple[int, ...]]) -> None:
    labels = token_labels(RAGGED)
    mask = rows_where(labels, *dropped)
    kept = [label for label, keep in zip(labels, mask.tolist(), strict=True) if keep]
    layout = StudyLayout.from_grids(RAGGED, num_prefix=2)
    check(layout.select(mask), kept, RAGGED, 2)
    check(layout.select(mask.nonzero().flatten()), kept, RAGGED, 2)
    check(layout, labels, RAGGED, 2)  # the layout selected from is untouched


@st.composite
def cases(draw: st.DrawFn) -> tuple[Grids, int, list[bool], list[bool]]:
    """Grids, prefix rows, and two masks, the second over what the first keeps; every study keeps a token."""
    sides = st.integers(1, 3)
    scans = st.lists(st.tuples(sides, sides, sides), min_size=1, max_size=3)
    grids = draw(st.lists(scans, min_size=1, max_size=3))

    def mask(studies: list[int]) -> list[bool]:
        keep: list[bool] = []
        for study in sorted(set(studies)):
            size = studies.count(study)
            some = draw(st.lists(st.booleans(), min_size=size, max_size=size))
            some[draw(st.integers(0, size - 1))] = True
            keep += some
        return keep

    studies = [study for study, _, _ in token_labels(grids)]
    first = mask(studies)
    second = mask([study for study, keep in zip(studies, first, strict=True) if keep])
    return grids, draw(st.integers(0, 32)), first, second


@settings(max_examples=60, deadline=None)
@given(cases())
def test_select_like_the_slow_oracle(case: tuple[Grids, int, list[bool], list[bool]]) -> None:
    grids, num_prefix, first, second = case
    layout, labels = StudyLayout.from_grids(grids, num_prefix), token_labels(grids)
    for keep in (first, second):  # a selection can be selected from
        layout = layout.select(torch.tensor(keep))
        labels = [label for label, kept in zip(labels, keep, strict=True) if kept]
        check(layout, labels, grids, num_prefix)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        pytest.param(torch.tensor([0, 16]), "study 2 would keep no", id="last study lost"),
        pytest.param(rows_where(token_labels(RAGGED), (1,)), "study 1 would keep no", id="study lost by mask"),
        pytest.param(torch.empty(0, dtype=torch.int64), "study 0 would keep no", id="no rows"),
        pytest.param(torch.tensor([0, 16, 15, 25]), "increase strictly", id="out of order"),
        pytest.param(torch.tensor([0, 16, 16, 25]), "increase strictly", id="twice"),
        pytest.param(torch.tensor([-1, 0, 16, 25]), "increase strictly", id="negative"),
        pytest.param(torch.tensor([0, 16, 29]), "increase strictly", id="past the end"),
        pytest.param(torch.ones(28, dtype=torch.bool), "mask of shape", id="short mask"),
        pytest.param(torch.ones(29, 1, dtype=torch.bool), "mask of shape", id="2D mask"),
        pytest.param(torch.tensor([[0, 16, 25]]), "1D bool or int64", id="2D rows"),
        pytest.param(torch.tensor([0.0, 16.0, 25.0]), "1D bool or int64", id="float rows"),
        pytest.param(torch.ones(29, dtype=torch.bool, device="meta"), "on the host", id="on a device"),
    ],
)
def test_select_refuses(keep: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyLayout.from_grids(RAGGED).select(keep)


def test_with_num_prefix() -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix=1)
    check(layout.with_num_prefix(4), token_labels(RAGGED), RAGGED, 4)
    assert layout.num_prefix == 1


def test_with_num_prefix_after_select() -> None:
    mask = rows_where(token_labels(RAGGED), (0, 0))
    kept = [label for label in token_labels(RAGGED) if label[:2] != (0, 0)]
    check(StudyLayout.from_grids(RAGGED).select(mask).with_num_prefix(3), kept, RAGGED, 3)


def test_to() -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix=2)
    moved = layout.to("meta")
    assert layout.to("cpu") is layout
    assert moved.device == torch.device("meta")
    for level in DEPTH:
        assert moved.cu_seqlens(level).device == moved.device
        assert moved.cu_seqlens(level).shape == layout.cu_seqlens(level).shape
        assert moved.seqlens(level).tolist() == layout.seqlens(level).tolist()  # the host copy stays readable
        assert moved.patch_rows(level).device == moved.prefix_rows(level).device == moved.device
    for fine, coarse in PAIRS:
        assert moved.children(fine, coarse).device == moved.parents(fine, coarse).device == moved.device
    assert moved.select(torch.arange(29)).device == moved.device
    assert moved.with_num_prefix(1).device == moved.device


def count_tile_maps(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Grows by the lengths of a level whenever its tile maps are made."""
    made = []
    make = layout_module._tile_maps

    def counted(lengths: np.ndarray) -> list[np.ndarray]:
        made.append(lengths)
        return make(lengths)

    monkeypatch.setattr(layout_module, "_tile_maps", counted)
    return made


def test_a_layout_moves_as_one_buffer_and_is_not_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix=2)
    made = count_tile_maps(monkeypatch)
    with CopyCounter() as counter:
        moved = layout.to("meta")
    assert (made, counter.copies) == ([], 1)
    storages = {moved.cu_seqlens(level).untyped_storage().nbytes() for level in DEPTH}
    assert storages == {tiles.untyped_storage().nbytes() for level in DEPTH for tiles in moved.tiles(level)}


def test_a_layout_moved_in_inference_mode_serves_in_training() -> None:
    layout = StudyLayout.from_grids(RAGGED)
    with torch.inference_mode():
        moved, pinned = layout.to("meta"), layout.pin_memory()
    assert not moved.cu_seqlens("scan").is_inference()
    assert not pinned.cu_seqlens("scan").is_inference()


class CopyCounter(TorchDispatchMode):
    copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.copies += func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


def test_a_layout_of_which_others_are_made_has_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_tile_maps(monkeypatch)
    layout = StudyLayout.from_grids(RAGGED, device=None).select(torch.arange(0, 29, 2)).with_num_prefix(2)
    assert made == []
    assert layout.device == torch.device("cpu")
    kept = token_labels(RAGGED)[::2]
    check(layout, kept, RAGGED, 2)  # they are made when they are asked for, once
    check(layout.to("cpu"), kept, RAGGED, 2)
    assert len(made) == 3
    moved = StudyLayout.from_grids(RAGGED, device=None).to("meta").select(torch.arange(29))
    assert len(made) == 3
    assert moved.device == moved.cu_seqlens("scan").device == torch.device("meta")
    unmade = StudyLayout.from_grids(RAGGED, device=None)
    compiled = torch.compile(lambda x, layout: x + len(layout.cu_seqlens("scan")), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"layout.build\(\)"):
        compiled(torch.zeros(3), unmade)
    assert compiled(torch.zeros(3), unmade.build()).tolist() == [6.0] * 3


def test_pickle() -> None:
    mask = rows_where(token_labels(RAGGED), (0, 0))
    layout = StudyLayout.from_grids(RAGGED, num_prefix=3).select(mask)
    kept = [label for label in token_labels(RAGGED) if label[:2] != (0, 0)]
    check(pickle.loads(pickle.dumps(layout)), kept, RAGGED, 3)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([], "at least one study"),
        ([[(1, 1, 1)], []], "study 1 has no scans"),
        ([[(1, 1, 1), (2, 2)]], "study 0, scan 1"),
        ([[(1, 1, 1, 1)]], "study 0, scan 0"),
        ([[(1, 1, 1)], [(1, 0, 1)]], "study 1, scan 0"),
        ([[(1, -2, 1)]], "positive integers"),
        ([[(1.5, 1, 1)]], "positive integers"),
    ],
)
def test_bad_grids(grids: Grids, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyLayout.from_grids(grids)


@pytest.mark.parametrize("num_prefix", [-1, 33, 1.0, None])
def test_bad_num_prefix(num_prefix: int) -> None:
    with pytest.raises(ValueError, match="num_prefix must be an integer from 0 to 32"):
        StudyLayout.from_grids(RAGGED, num_prefix)
    with pytest.raises(ValueError, match="num_prefix must be an integer from 0 to 32"):
        StudyLayout.from_grids(RAGGED).with_num_prefix(num_prefix)


@pytest.mark.parametrize(
    "method",
    [
        "num_groups",
        "num_rows",
        "cu_seqlens",
        "cu_patches",
        "patch_rows",
        "prefix_rows",
        "seqlens",
        "max_seqlen",
        "tiles",
    ],
)
def test_bad_level(method: str) -> None:
    with pytest.raises(ValueError, match="slice, scan, study, got 'voxel'"):
        getattr(StudyLayout.from_grids(RAGGED), method)("voxel")


@pytest.mark.parametrize("levels", [("voxel", "scan"), ("slice", "voxel")])
def test_bad_level_of_children(levels: tuple[Level, Level]) -> None:
    with pytest.raises(ValueError, match="slice, scan, study, got 'voxel'"):
        StudyLayout.from_grids(RAGGED).children(*levels)
    with pytest.raises(ValueError, match="slice, scan, study, got 'voxel'"):
        StudyLayout.from_grids(RAGGED).parents(*levels)


def test_more_rows_than_an_int32_counts() -> None:
    with pytest.raises(ValueError, match="2147483648 rows: a batch holds at most 2147483647"):
        StudyLayout.from_grids([[(1, 2**20, 2**11 - 1)], [(1, 2**20 - 2, 1)]], num_prefix=1, device=None)
    StudyLayout.from_grids([[(1, 2**20, 2**11 - 1)], [(1, 2**20 - 3, 1)]], num_prefix=1, device=None)
