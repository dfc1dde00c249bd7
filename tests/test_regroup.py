"""regroup_prefix against one label per group, and HierarchicalAttention against the same steps by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conftest import token_labels
from hlip_kernels import Grid, HierarchicalAttention, Level, StudyLayout, regroup_prefix

Label = tuple[int, int, int]  # study, scan, slice
DEPTH: dict[Level, int] = {"study": 1, "scan": 2, "slice": 3}  # how much of a label names a group
WIDTH = 5
RAGGED: list[list[Grid]] = [[(2, 2, 3), (3, 1, 1)], [(1, 4, 2)], [(1, 1, 1), (5, 1, 1), (2, 1, 2)]]


def group_names(level: Level) -> list[tuple[int, ...]]:
    return sorted({label[: DEPTH[level]] for label in token_labels(RAGGED)})


def slow_regroup(prefix: Tensor, num_prefix: int, src: Level, dst: Level) -> Tensor:
    """Each group of `dst` takes the mean of the groups of `src` that it lies in, or that lie in it."""
    sets = prefix.unflatten(0, (len(group_names(src)), num_prefix))
    shared = min(DEPTH[src], DEPTH[dst])
    rows = []
    for name in group_names(dst):
        related = [i for i, other in enumerate(group_names(src)) if other[:shared] == name[:shared]]
        rows.append(sum(sets[i] for i in related) / len(related))
    return torch.cat(rows)


def random_prefix(layout: StudyLayout, level: Level) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(layout.num_groups(level) * layout.num_prefix, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize(("src", "dst"), list(product(DEPTH, DEPTH)))
def test_like_the_slow_oracle(src: Level, dst: Level, num_prefix: int) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix)
    prefix = random_prefix(layout, src)
    torch.testing.assert_close(regroup_prefix(prefix, layout, src, dst), slow_regroup(prefix, num_prefix, src, dst))


@pytest.mark.parametrize("num_prefix", [1, 2])
@pytest.mark.parametrize(("src", "dst"), list(product(DEPTH, DEPTH)))
def test_gradients(src: Level, dst: Level, num_prefix: int) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix)
    prefix = random_prefix(layout, src).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: regroup_prefix(x, layout, src, dst), prefix)


@pytest.mark.parametrize("num_prefix", [1, 2])
@pytest.mark.parametrize(("coarse", "fine"), [("study", "scan"), ("study", "slice"), ("scan", "slice")])
def test_down_then_up_is_identity(coarse: Level, fine: Level, num_prefix: int) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix)
    prefix = random_prefix(layout, coarse)
    down = regroup_prefix(prefix, layout, coarse, fine)
    assert down.shape == (layout.num_groups(fine) * num_prefix, WIDTH)
    torch.testing.assert_close(regroup_prefix(down, layout, fine, coarse), prefix)


def test_every_slice_of_a_study_counts_the_same() -> None:
    layout = StudyLayout.from_grids([[(1, 2, 2), (3, 1, 1)]])
    prefix = torch.tensor([[0.0], [4.0], [4.0], [4.0]])
    assert regroup_prefix(prefix, layout, "slice", "study").item() == 3
    scans = regroup_prefix(prefix, layout, "slice", "scan")
    assert regroup_prefix(scans, layout, "scan", "study").item() == 2  # scan-wise it would be another mean


def test_groups_that_lost_their_rows_do_not_count() -> None:
    keep = torch.tensor([False] * 4 + [True] * 3 + [False])
    layout = StudyLayout.from_grids([[(1, 2, 2), (4, 1, 1)]]).select(keep)
    prefix = torch.tensor([[1.0], [2.0], [6.0]])
    assert regroup_prefix(prefix, layout, "slice", "study").item() == 3


@pytest.mark.parametrize(
    ("prefix", "src", "dst", "message"),
    [
        (torch.zeros(3, WIDTH), "slice", "study", r"expected \(14, width\) at level 'slice', got \(3, 5\)"),
        (torch.zeros(14), "slice", "study", "expected"),
        (torch.zeros(14, WIDTH, device="meta"), "slice", "study", "prefix is on meta, the layout on cpu"),
        (torch.zeros(14, WIDTH), "voxel", "study", "got 'voxel'"),
        (torch.zeros(14, WIDTH), "slice", "voxel", "got 'voxel'"),
    ],
)
def test_errors(prefix: Tensor, src: Level, dst: Level, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regroup_prefix(prefix, StudyLayout.from_grids(RAGGED), src, dst)


def test_module_has_the_parameters_of_timm() -> None:
    shapes = {name: tuple(p.shape) for name, p in HierarchicalAttention(12, num_heads=3).named_parameters()}
    assert shapes == {"qkv.weight": (36, 12), "qkv.bias": (36,), "proj.weight": (12, 12), "proj.bias": (12,)}
    bare = HierarchicalAttention(12, num_heads=3, qkv_bias=False, proj_bias=False)
    assert [name for name, _ in bare.named_parameters()] == ["qkv.weight", "proj.weight"]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("level", DEPTH)
def test_module_like_the_same_steps_by_hand(level: Level, backend: str) -> None:
    dim, heads, num_prefix = 12, 3, 2
    torch.manual_seed(0)
    layout = StudyLayout.from_grids(RAGGED, num_prefix)
    module = HierarchicalAttention(dim, heads, backend=backend).double()
    names = group_names(level)
    x = torch.randn(len(names) * num_prefix + layout.num_tokens, dim, dtype=torch.float64)

    expected = torch.full_like(x, torch.nan)
    weights = zip(module.qkv.weight.chunk(3), module.qkv.bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, weight, bias).unflatten(1, (heads, -1)).transpose(0, 1) for weight, bias in weights)
    for g, name in enumerate(names):
        rows = list(range(g * num_prefix, (g + 1) * num_prefix))
        rows += [
            len(names) * num_prefix + t for t, label in enumerate(token_labels(RAGGED)) if label[: DEPTH[level]] == name
        ]
        out = F.scaled_dot_product_attention(q[None, :, rows], k[None, :, rows], v[None, :, rows])[0]
        expected[rows] = module.proj(out.transpose(0, 1).flatten(1))
    torch.testing.assert_close(module(x, layout, level), expected)


def test_module_refuses_a_width_its_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads, got 10 and 3"):
        HierarchicalAttention(10, num_heads=3)
    with pytest.raises(ValueError, match="multiple of num_heads, got 16 and 0"):
        HierarchicalAttention(16, num_heads=0)
    with pytest.raises(ValueError, match="unknown backend 'fastest'; there are auto, native, cpu"):
        HierarchicalAttention(16, backend="fastest")
    with pytest.raises(ValueError, match=r"x: expected \(rows, 16\), got \(3, 8\)"):
        HierarchicalAttention(16)(torch.zeros(3, 8), StudyLayout.from_grids([[(1, 1, 2)]]), "scan")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scans", [3, 40, 300])
def test_means_over_many_groups_are_exact_to_rounding(dtype: torch.dtype, scans: int) -> None:
    layout = StudyLayout.from_grids([[(6, 1, 1)] * scans])
    prefix = (1 + torch.randn(layout.num_groups("slice"), 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    mean = regroup_prefix(prefix, layout, "slice", "study")
    assert mean.dtype == dtype
    assert torch.equal(mean, prefix.double().mean(0, keepdim=True).float().to(dtype))
