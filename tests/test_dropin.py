"""The layer in the places it is made for: with timm's weights, in a ViT of transformers, in MONAI's ViT."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from dropin_cases import SLICES, STUDIES
from hlip_kernels import HierarchicalAttention, Level, StudyLayout
from hlip_kernels.dropin import dense_attention


def timm_weights(dim: int, heads: int, qk_norm: bool) -> dict[str, Tensor]:
    """The names and shapes of `timm.layers.Attention`, which cannot be imported without torchvision."""
    shapes = {"qkv.weight": (3 * dim, dim), "qkv.bias": (3 * dim,), "proj.weight": (dim, dim), "proj.bias": (dim,)}
    if qk_norm:
        shapes |= {f"{norm}_norm.{kind}": (dim // heads,) for norm, kind in product("qk", ["weight", "bias"])}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_timm_weights_compute_what_they_compute_in_timm(qk_norm: bool, num_prefix: int) -> None:
    dim, heads, batch, grid = 12, 3, 2, (2, 2, 3)
    weights = timm_weights(dim, heads, qk_norm)
    attention = HierarchicalAttention(dim, heads, qk_norm=qk_norm).double()
    attention.load_state_dict(weights, strict=True)
    x = torch.randn(batch, num_prefix + 12, dim, dtype=torch.float64, requires_grad=True)

    qkv = F.linear(x, weights["qkv.weight"], weights["qkv.bias"])
    q, k, v = qkv.reshape(batch, -1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4).unbind(0)
    if qk_norm:
        q, k = (
            F.layer_norm(y, (dim // heads,), weights[f"{n}_norm.weight"], weights[f"{n}_norm.bias"], 1e-6)
            for n, y in (("q", q), ("k", k))
        )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = F.linear(out, weights["proj.weight"], weights["proj.bias"])

    layout = StudyLayout.from_grids([[grid]] * batch, num_prefix)
    y = attention(x.flatten(0, 1), layout, "study").view_as(expected)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, cotangent, retain_graph=True)[0] for out in (y, expected)))


def test_qk_norm_is_off_unless_asked_for() -> None:
    names = set(HierarchicalAttention(12, 3).state_dict())
    assert names == set(timm_weights(12, 3, qk_norm=False))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*k_norm"):
        HierarchicalAttention(12, 3).load_state_dict(timm_weights(12, 3, qk_norm=True))


class WideNorm(nn.LayerNorm):
    """What autocast makes of a LayerNorm on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def test_norms_leave_autocast_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(qkv: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(qkv)
        return qkv[:, 0]

    monkeypatch.setattr("hlip_kernels.dropin.hier_attention", record)
    attention, layout = HierarchicalAttention(12, 3, qk_norm=True), StudyLayout.from_grids([[(1, 2, 2)]])
    attention.q_norm, attention.k_norm = WideNorm(4), WideNorm(4)
    x = torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        attention(x, layout, "study")
        plain = attention.qkv(x).unflatten(-1, (3, 3, -1))
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0][:, 2], plain[:, 2])  # v is not normalised
    assert not torch.equal(seen[0][:, :2], plain[:, :2])


def carry(prefix: Tensor, groups: int) -> Tensor:
    """Of one study whose groups are equally many in each other: cloned to more groups, averaged to fewer."""
    if groups > len(prefix):
        return prefix.repeat_interleave(groups // len(prefix), 0)
    return prefix.unflatten(0, (groups, -1)).mean(1)


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("level", STUDIES)
@pytest.mark.parametrize("home", STUDIES)
def test_dense_rows_may_be_slices_scans_or_studies(home: Level, level: Level, num_prefix: int) -> None:
    """Against attention over one study's own rows; one study, so that its scans and slices can be equally long."""
    layout = StudyLayout.from_grids([[(2, 1, 3)] * 2], num_prefix)
    rows, groups = layout.num_groups(home), layout.num_groups(level)
    torch.manual_seed(0)
    qkv = torch.randn(rows, num_prefix + 12 // rows, 3, 2, 4, dtype=torch.float64, requires_grad=True)

    prefix, patches = qkv[:, :num_prefix], qkv[:, num_prefix:].reshape(groups, 12 // groups, 3, 2, 4)
    prefix = carry(prefix, groups)
    q, k, v = torch.cat([prefix, patches], 1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)
    prefix, patches = out[:, :num_prefix], out[:, num_prefix:].reshape(rows, 12 // rows, 2, 4)
    expected = torch.cat([carry(prefix, rows), patches], 1)

    actual = dense_attention(qkv, layout, level, softmax_scale=0.3)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, cotangent)[0] for y in (actual, expected)))


@pytest.mark.parametrize(
    ("shape", "level", "message"),
    [
        ((6, 5, 3, 2), "study", r"qkv: expected \(batch, tokens, 3, heads, head_dim\), got \(6, 5, 3, 2\)"),
        ((6, 5, 2, 2, 4), "study", "qkv: expected"),
        ((6, 4, 3, 2, 4), "study", r"6 rows of 4 tokens \(1 of them prefix\) are not the slices, scans or studies of"),
        ((2, 13, 3, 2, 4), "study", "StudyLayout.24 tokens, 6 slice groups, 3 scan groups, 2 study groups"),
        ((6, 5, 3, 2, 4), "voxel", "got 'voxel'"),
    ],
)
def test_dense_errors(shape: tuple[int, ...], level: Level, message: str) -> None:
    layout = StudyLayout.from_grids([[(2, 2, 2), (1, 2, 2)], [(2, 2, 2), (1, 2, 2)]])
    if shape[:2] == (2, 13):  # three scans of 8, 4 and 12 patches are no rows of equal length; nor are these studies
        layout = StudyLayout.from_grids(SLICES).with_num_prefix(2)
    with pytest.raises(ValueError, match=message):
        dense_attention(torch.zeros(shape), layout, level)
