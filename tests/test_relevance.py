"""Relevance carried back as one row, against whole matrices multiplied in their order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hlip
from conftest import random_study, tiny_vision, token_labels
from hlip.explain import relevance as module
from hlip.explain.relevance import Relevance, relevance
from hlip.model.clip import VisualTower
from hlip_kernels import HierarchicalAttention
from published import rope_angles, turn

SIZES = [(4, 16, 24), (12, 8, 16), (8, 16, 16)]  # of three scans with different grids
KEY: dict[str, Callable[[tuple[int, int, int]], tuple[int, ...]]] = {
    "slice": lambda place: place,
    "scan": lambda place: place[:2],
    "study": lambda place: place[:1],
}
MakeModel = Callable[..., hlip.HLIPModel]


@pytest.fixture
def make_model(tiny_model: hlip.HLIPModel) -> MakeModel:
    def make(pattern: str = "slice+scan+study", **changes: Any) -> hlip.HLIPModel:
        model = copy.copy(tiny_model)  # with the same text tower
        model._modules = dict(tiny_model._modules)
        torch.manual_seed(0)
        model.config = replace(tiny_model.config, vision=tiny_vision(pattern, **changes))
        model.visual = VisualTower(model.config).eval()
        with torch.no_grad():  # cls tokens and biases that matter
            for name, parameter in model.visual.named_parameters():
                if parameter.ndim < 2 or "token" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model

    return make


def random_texts(count: int) -> Tensor:
    return F.normalize(torch.randn(count, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64), dim=1)


def dense(model: hlip.HLIPModel, scans: Sequence[Tensor], text: Tensor, layers: str, normalize: bool) -> Tensor:
    """All matrices in full: attention over all rows of a level with a mask, its gradient by autograd, the matrices that
    regroup, and their product. `text` (E) is what the embedding is multiplied with. Returns (T) relevance."""
    trunk, config = model.visual.trunk, model.config.vision
    batch = hlip.pack([scans], config.patch_size)
    places, num_prefix = token_labels(batch.layout.grids), config.num_prefix
    keys = {level: sorted(set(map(key, places))) for level, key in KEY.items()}

    def rows(level: str) -> list[tuple[tuple[int, ...], int | None, int | None]]:
        """Group, prefix place, patch: of every row, group after group."""
        of_group = {key: [(key, p, None) for p in range(num_prefix)] for key in keys[level]}
        for t, place in enumerate(places):
            of_group[KEY[level](place)].append((KEY[level](place), None, t))
        return [row for group in of_group.values() for row in group]

    def regroup(src: str, dst: str) -> Tensor:
        """(rows of dst, rows of src)"""
        matrix = torch.zeros(len(rows(dst)), len(rows(src)), dtype=torch.float64)
        for i, (mine, p, t) in enumerate(rows(dst)):
            for j, (other, q, u) in enumerate(rows(src)):
                nested = all(a == b for a, b in zip(mine, other, strict=False))
                matrix[i, j] = (p, t) == (q, u) and (p is None or nested)
        return matrix / matrix.sum(1, keepdim=True)

    def patches_of(level: str) -> list[int]:
        return [i for i, (_, p, _) in enumerate(rows(level)) if p is None]

    x, level = trunk.embed(trunk.plan(batch)).x.detach(), config.levels[0]
    attentions, moves = [], []
    turned = torch.cat([rope_angles(grid, config.width // config.heads // 6) for grid in batch.layout.grids[0]])
    still = torch.zeros_like(turned[0])
    for block, following in zip(trunk.blocks, config.levels, strict=True):
        moves.append(regroup(level, following))
        x, level = moves[-1] @ x, following
        owner = [group for group, _, _ in rows(level)]
        apart = torch.tensor([[a != b for b in owner] for a in owner])
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, config.heads, -1)).permute(1, 2, 0, 3)
        if config.positions == "rope":
            angles = torch.stack([still if t is None else turned[t] for _, _, t in rows(level)])
            q, k = (turn(one[None], angles[None])[0] for one in (q, k))
        attention = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(apart, -torch.inf).softmax(-1)
        attention.retain_grad() if attention.requires_grad else attention.requires_grad_()
        attentions.append(attention)
        x = x + block.attn.proj((attention @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    moves.append(regroup(level, "study"))
    x = trunk.norm(moves[-1] @ x)
    outputs = x[0] if config.head == "token" else torch.cat([x[0], x[num_prefix:].mean(0)])
    (F.normalize(model.visual.head(outputs), dim=0) @ text * model.logit_scale.detach().exp()).backward()

    matrices = [(a * a.grad).clamp(min=0).mean(0).detach() for a in attentions if a.grad is not None]
    assert len(matrices) == len(trunk.blocks)
    if normalize:
        matrices = [torch.nan_to_num(matrix / matrix.sum(1, keepdim=True)) for matrix in matrices]
    if layers == "last":
        return (moves[-1] @ matrices[-1])[0, patches_of(level)]
    total = torch.eye(len(rows(config.levels[0]))).double()
    for matrix, move in zip(matrices, moves[:-1], strict=True):
        total = move @ total
        total = total + matrix @ total
    return (moves[-1] @ total)[0, patches_of(config.levels[0])]


def flat(found: Relevance) -> Tensor:
    return torch.cat([each.flatten() for each in found.maps])


@pytest.mark.parametrize("tile", [None, 300], ids=["whole", "tiled"])
@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize(("head", "num_prefix"), [("token", 1), ("token", 2), ("dinotxt", 1), ("dinotxt", 2)])
@pytest.mark.parametrize("pattern", ["slice", "study", "scan+study", "slice+scan+study"])
def test_equals_whole_matrices(
    pattern: str, head: str, num_prefix: int, layers: Any, tile: int | None, make_model: MakeModel, monkeypatch: Any
) -> None:
    if tile:  # some rows of some heads at a time
        monkeypatch.setattr(module, "TILE", tile)
        monkeypatch.setattr(module, "TILE_ROWS", 3)
    model = make_model(pattern, head=head, num_prefix=num_prefix)
    model.visual.double()
    scans, (text, other) = random_study(SIZES), random_texts(2)
    found = relevance(model, hlip.Study("s", scans), text, layers)
    expected = dense(model, scans, text, layers, False)
    assert expected.max() > 0
    torch.testing.assert_close(flat(found).double(), expected, rtol=2e-6, atol=1e-7 * float(expected.max()))
    found = relevance(model, hlip.Study("s", scans), text, layers, other, normalize=True)
    expected = dense(model, scans, text - other, layers, True)
    torch.testing.assert_close(flat(found).double(), expected, rtol=2e-6, atol=1e-7 * float(expected.max()))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("positions", ["tiled", "rope"])
def test_equals_whole_matrices_to_the_last_digits(
    positions: str, layers: Any, normalize: bool, make_model: MakeModel
) -> None:
    """Before they are rounded to float32."""
    model = make_model(positions=positions)
    model.visual.double()
    scans, texts = random_study(SIZES), random_texts(1)
    batch = hlip.pack([scans], model.config.vision.patch_size)
    row, _ = module._carried_back(model, batch, texts, layers, normalize, iter)
    torch.testing.assert_close(row, dense(model, scans, texts[0], layers, normalize), rtol=1e-10, atol=1e-14)


def test_of_a_text(make_model: MakeModel) -> None:
    model = make_model()
    study = hlip.Study("u", random_study(SIZES), ["a", "b"])
    found = relevance(model, study, "glioma", "all", against="normal brain")
    assert (found.uid, found.names) == ("u", ["a", "b", "scan 2"])
    assert [tuple(each.shape) for each in found.maps] == [(1, 2, 3), (3, 1, 2), (2, 2, 2)]
    assert all(each.dtype == torch.float32 and each.min() >= 0 for each in found.maps)
    with torch.no_grad():
        image, texts = model.encode_image(hlip.pack([study], (4, 8, 8))), model.encode_text(["glioma", "normal brain"])
        assert found.similarity == pytest.approx(float(image[0] @ texts[0]), abs=1e-5)
    same = relevance(model, study, texts[0], against=texts[1])
    torch.testing.assert_close(flat(same), flat(found), rtol=1e-4, atol=1e-7)
    sums = np.array([float(each.sum()) for each in found.maps])
    np.testing.assert_allclose(found.shares, sums / sums.sum(), rtol=1e-6)
    nothing = Relevance("u", ["a"], [torch.zeros(1, 2, 3)], 0.0)
    assert nothing.shares.tolist() == [0.0]


def test_the_model_is_left_as_it_was(make_model: MakeModel) -> None:
    model = make_model(drop_path=0.5, patch_dropout=0.5)
    model.visual.train()
    model.visual.trunk.patch_embed.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    study = hlip.Study("s", random_study(SIZES))
    maps = relevance(model, study, random_texts(1)[0].float()).maps
    assert [tuple(each.shape) for each in maps] == [(1, 2, 3), (3, 1, 2), (2, 2, 2)]  # no patch was dropped
    assert model.visual.training and model.visual.trunk.blocks[0].training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    for each in model.modules():
        if isinstance(each, HierarchicalAttention):
            assert not each.qkv._forward_hooks and not each.proj._forward_pre_hooks
    model.visual.eval()
    again = relevance(model, study, random_texts(1)[0].float()).maps
    torch.testing.assert_close(maps, again, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that any op returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *(x.untyped_storage().nbytes() // x.element_size() for x in storages)])
        return result


@pytest.mark.parametrize("layers", ["last", "all"])
def test_no_tensor_of_tokens_times_tokens(layers: Any, make_model: MakeModel, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "TILE", 2**15)
    model = make_model("scan+study")
    scans = random_study([(16, 64, 64)] * 8)  # 2048 patches of 256 voxels
    with Largest() as largest:
        maps = relevance(model, hlip.Study("s", scans), random_texts(1)[0].float(), layers).maps
    assert sum(each.numel() for each in maps) == 2048
    assert largest.numel <= 2048 * 4 * 8 * 8 < 2048**2 / 4  # the patches themselves


def test_wrong_arguments(make_model: MakeModel) -> None:
    study, text = hlip.Study("s", random_study(SIZES)), random_texts(1)[0].float()
    for head in ("average", "weighted_average", "attention_pool"):
        with pytest.raises(ValueError, match=f"head '{head}' makes the embedding without one"):
            relevance(make_model(head=head), study, text)
    model = make_model()
    with pytest.raises(ValueError, match="layers must be last or all, got 'first'"):
        relevance(model, study, text, "first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"its embedding of \(32\), got \(31,\)"):
        relevance(model, study, text[1:])
    with pytest.raises(ValueError, match="s, scan 0: shape"):
        relevance(model, hlip.Study("s", random_study([(3, 8, 8)])), text)
