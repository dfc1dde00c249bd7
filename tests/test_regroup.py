"""regroup against one label per group, and HierarchicalAttention against the same steps by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from conftest import token_labels
from hlip_kernels import Grid, HierarchicalAttention, Level, StudyLayout, regroup, regroup_prefix

Label = tuple[int, int, int]  # study, scan, slice
DEPTH: dict[Level, int] = {"study": 1, "scan": 2, "slice": 3}  # how much of a label names a group
WIDTH = 5
RAGGED: list[list[Grid]] = [[(2, 2, 3), (3, 1, 1)], [(1, 4, 2)], [(1, 1, 1), (5, 1, 1), (2, 1, 2)]]


def group_names(level: Level) -> list[tuple[int, ...]]:
    return sorted({label[: DEPTH[level]] for label in token_labels(RAGGED)})


def rows_of(level: Level, num_prefix: int) -> list[tuple[tuple[int, ...], str, int]]:
    """Each row of a level: its group, and which prefix row or patch it is. Group after group."""
    patches = [(label[: DEPTH[level]], "patch", t) for t, label in enumerate(token_labels(RAGGED))]
    prefixes = [(name, "a prefix", p) for name in group_names(level) for p in range(num_prefix)]
    return sorted(prefixes + patches)


def slow_regroup(x: Tensor, num_prefix: int, src: Level, dst: Level) -> Tensor:
    """A patch stays what it is; a prefix row of `dst` is the mean of those of the groups of `src` that it lies in, or
    that lie in it."""
    shared = min(DEPTH[src], DEPTH[dst])
    before, rows = rows_of(src, num_prefix), []
    for name, kind, which in rows_of(dst, num_prefix):
        related = [
            i for i, (other, *same) in enumerate(before) if same == [kind, which] and other[:shared] == name[:shared]
        ]
        rows.append(x[related].mean(0))
    return torch.stack(rows)


def random_rows(layout: StudyLayout, level: Level) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(layout.num_rows(level), WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("src", "dst"), list(product(DEPTH, DEPTH)))
def test_like_the_slow_oracle(src: Level, dst: Level, num_prefix: int) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix)
    x = random_rows(layout, src)
    torch.testing.assert_close(regroup(x, layout, src, dst), slow_regroup(x, num_prefix, src, dst))


@pytest.mark.parametrize("num_prefix", [1, 2])
@pytest.mark.parametrize(("src", "dst"), list(product(DEPTH, DEPTH)))
def test_gradients(src: Level, dst: Level, num_prefix: int) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix)
    x = random_rows(layout, src).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: regroup(x, layout, src, dst), x)


@pytest.mark.parametrize("num_prefix", [1, 2])
@pytest.mark.parametrize(("coarse", "fine"), [("study", "scan"), ("study", "slice"), ("scan", "slice")])
def test_down_then_up_is_identity(coarse: Level, fine: Level, num_prefix: int) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix)
    x = random_rows(layout, coarse)
    down = regroup(x, layout, coarse, fine)
    assert down.shape == (layout.num_rows(fine), WIDTH)
    torch.testing.assert_close(regroup(down, layout, fine, coarse), x)


def prefixes(values: list[float], layout: StudyLayout, level: Level) -> Tensor:
    """Rows of `level` whose prefix rows have these values, and whose patches have others."""
    x = torch.full((layout.num_rows(level), 1), 99.0)
    x[layout.prefix_rows(level)] = torch.tensor(values)[:, None]
    return x


def test_every_slice_of_a_study_counts_the_same() -> None:
    layout = StudyLayout.from_grids([[(1, 2, 2), (3, 1, 1)]])
    x = prefixes([0.0, 4.0, 4.0, 4.0], layout, "slice")
    assert regroup(x, layout, "slice", "study")[0].item() == 3
    scans = regroup(x, layout, "slice", "scan")
    assert regroup(scans, layout, "scan", "study")[0].item() == 2  # scan-wise it would be another mean


def test_groups_that_lost_their_rows_do_not_count() -> None:
    keep = torch.tensor([False] * 4 + [True] * 3 + [False])
    layout = StudyLayout.from_grids([[(1, 2, 2), (4, 1, 1)]]).select(keep)
    x = prefixes([1.0, 2.0, 6.0], layout, "slice")
    assert regroup(x, layout, "slice", "study")[0].item() == 3


@pytest.mark.parametrize(
    ("x", "src", "dst", "message"),
    [
        (torch.zeros(3, WIDTH), "slice", "study", r"x: expected 47 rows at level 'slice' .*, got 3"),
        (torch.zeros(47), "slice", "study", r"x: expected a floating-point tensor \(rows, width\)"),
        (torch.zeros(47, WIDTH, dtype=torch.int64), "slice", "study", "x: expected a floating-point tensor"),
        (torch.zeros(47, WIDTH, device="meta"), "slice", "study", "x is on meta, the layout on cpu"),
        (torch.zeros(47, WIDTH), "voxel", "study", "got 'voxel'"),
        (torch.zeros(47, WIDTH), "slice", "voxel", "got 'voxel'"),
    ],
)
def test_errors(x: Tensor, src: Level, dst: Level, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regroup(x, StudyLayout.from_grids(RAGGED), src, dst)


def test_its_predecessor_says_what_to_call() -> None:
    layout = StudyLayout.from_grids(RAGGED)
    with pytest.raises(RuntimeError, match=r"regroup\(x, layout, src, dst\).*CHANGELOG"):
        regroup_prefix(torch.zeros(14, WIDTH), layout, "slice", "study")


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
    x = torch.randn(layout.num_rows(level), dim, dtype=torch.float64)

    expected = torch.full_like(x, torch.nan)
    weights = zip(module.qkv.weight.chunk(3), module.qkv.bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, weight, bias).unflatten(1, (heads, -1)).transpose(0, 1) for weight, bias in weights)
    for name in names:
        rows = [i for i, (group, *_) in enumerate(rows_of(level, num_prefix)) if group == name]
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
    x = (1 + torch.randn(layout.num_rows("slice"), 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    mean = regroup(x, layout, "slice", "study")[:1]
    assert mean.dtype == dtype
    expected = x[layout.prefix_rows("slice")].double().mean(0, keepdim=True)
    assert torch.equal(mean, expected.float().to(dtype))


def test_compiles_as_one_graph_for_all_mixes_of_studies() -> None:
    def both(x: Tensor, layout: StudyLayout) -> Tensor:
        return regroup(x, layout, "scan", "study").square().sum() + regroup(x, layout, "scan", "slice").square().sum()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for grids in (RAGGED, RAGGED[1:] * 2, [[(2, 3, 3)] * 4] * 5):
        layout = StudyLayout.from_grids(grids, 2)
        x = random_rows(layout, "scan").requires_grad_()
        results = [(out, *torch.autograd.grad(out, x)) for out in (run(x, layout) for run in (compiled, both))]
        torch.testing.assert_close(*results)
    assert counters["stats"]["unique_graphs"] == 1
