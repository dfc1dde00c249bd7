"""The layer in the places it is made for: with timm's weights, in a ViT of transformers, in MONAI's ViT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from hlip_kernels import Grid, HierarchicalAttention, Level, StudyLayout
from hlip_kernels.dropin import MonaiAttention, dense_attention, register_transformers

SLICES: list[list[Grid]] = [[(2, 2, 2), (1, 2, 2)], [(3, 2, 2)]]  # six images of four patches
STUDIES: dict[Level, list[list[int]]] = {  # the images of each group
    "slice": [[0], [1], [2], [3], [4], [5]],
    "scan": [[0, 1], [2], [3, 4, 5]],
    "study": [[0, 1, 2], [3, 4, 5]],
}


def gradients(module: nn.Module, *outputs: Tensor) -> dict[str, Tensor]:
    """Of a sum over `outputs` in which every element counts differently."""
    module.zero_grad()
    sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outputs).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# ---- timm


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


# ---- dense batches


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


# ---- transformers


def vit(implementation: str, **changes: Any) -> Any:
    from transformers import ViTConfig, ViTModel

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    config = ViTConfig(**{**settings, "image_size": 16, "patch_size": 8, "initializer_range": 0.5, **changes})
    model = ViTModel(config).double().eval()
    model.set_attn_implementation(implementation)
    return model


def by_hand(*levels: Level) -> Callable[..., tuple[Tensor, None]]:
    """Attention of transformers that joins the images of a group, their cls tokens averaged; a level a layer."""
    turn = iter(levels)

    def attention(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        out = torch.empty_like(q)
        for images in STUDIES[next(turn)]:
            joined = [
                torch.cat([x[images, :, :1].mean(0), *(x[image, :, 1:] for image in images)], 1) for x in (q, k, v)
            ]
            result = F.scaled_dot_product_attention(*(x[None] for x in joined))[0]
            for image, patches in zip(images, result[:, 1:].split(4, 1), strict=True):
                out[image] = torch.cat([result[:, :1], patches], 1)
        return out.transpose(1, 2), None

    return attention


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def layout() -> StudyLayout:
    register_transformers()
    return StudyLayout.from_grids(SLICES, num_prefix=1)


@pytest.mark.parametrize(
    ("grid", "num_prefix"), [((1, 2, 2), 1), ((1, 1, 5), 0)], ids=["cls as prefix row", "cls as a patch"]
)
@pytest.mark.parametrize(
    ("implementation", "tolerance"),
    [("sdpa", {}), ("eager", {"rtol": 1e-4, "atol": 1e-5})],  # eager's softmax is float32 whatever the model is
    ids=["sdpa", "eager"],
)
def test_transformers_vit_with_its_weights(
    implementation: str, tolerance: dict[str, float], images: Tensor, grid: Grid, num_prefix: int
) -> None:
    register_transformers()
    theirs, ours = vit(implementation), vit("hlip")
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), ours.parameters(), strict=True))
    expected, actual = theirs(images), ours(images, layout=StudyLayout.from_grids([[grid]] * 6, num_prefix))
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, **tolerance)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, **tolerance)
    wanted = gradients(theirs, expected.last_hidden_state, expected.pooler_output)
    assert len(wanted) == len(list(theirs.parameters()))
    got = gradients(ours, actual.last_hidden_state, actual.pooler_output)
    torch.testing.assert_close(got, wanted, **tolerance)


@pytest.mark.parametrize("level", STUDIES)
def test_transformers_images_attend_across_their_group(level: Level, images: Tensor, layout: StudyLayout) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register("by hand", by_hand(level, level))
    other, ours = vit("by hand"), vit("hlip")
    expected = other(images).last_hidden_state
    actual = ours(images, layout=layout, level=level).last_hidden_state
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(ours, actual), gradients(other, expected))
    plain = vit("sdpa")(images).last_hidden_state
    assert torch.allclose(actual, plain) == (level == "slice")

    images = images.clone()
    images[2] += 1  # the second scan of the first study
    moved = (ours(images, layout=layout, level=level).last_hidden_state != actual).flatten(1).any(1)
    assert moved.nonzero().flatten().tolist() == next(group for group in STUDIES[level] if 2 in group)


def test_transformers_layers_of_their_own_level(images: Tensor, layout: StudyLayout) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register("by hand", by_hand("slice", "study"))
    ours = vit("hlip")
    ours.layers[0].attention.hlip_level = "slice"
    actual = ours(images, layout=layout).last_hidden_state
    torch.testing.assert_close(actual, vit("by hand")(images).last_hidden_state)


def test_transformers_models_keep_their_scale(images: Tensor, layout: StudyLayout) -> None:
    theirs, ours = vit("sdpa"), vit("hlip")
    for layer in (*theirs.layers, *ours.layers):
        layer.attention.scaling = 0.1
    actual = ours(images, layout=layout, level="slice").last_hidden_state
    torch.testing.assert_close(actual, theirs(images).last_hidden_state)


def test_transformers_checkpointing_keeps_the_layout(images: Tensor, layout: StudyLayout) -> None:
    model = vit("hlip", hidden_dropout_prob=0.0).train()
    expected = gradients(model, model(images, layout=layout).last_hidden_state)
    for layer in model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    torch.testing.assert_close(gradients(model, model(images, layout=layout).last_hidden_state), expected)


def test_transformers_a_mask_that_hides_nothing_is_no_mask(images: Tensor, layout: StudyLayout) -> None:
    model = vit("hlip")
    masked = model(images, layout=layout, attention_mask=torch.ones(6, 5)).last_hidden_state
    assert torch.equal(masked, model(images, layout=layout).last_hidden_state)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layout": None}, "no layout came to the attention"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 6)}, "attention_mask"),
        ({"attention_mask": torch.zeros(6, 1, 5, 5)}, "attention_mask"),
        ({"is_causal": True}, "is_causal"),
        ({"output_attentions": True}, "output_attentions"),
        ({"position_bias": torch.zeros(5, 5)}, "position_bias"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"level": "voxel"}, "got 'voxel'"),
        ({"layout": StudyLayout.from_grids([[(1, 2, 2)]])}, "6 rows of 5 tokens"),
        ({"layout": StudyLayout.from_grids(SLICES, num_prefix=0)}, "6 rows of 5 tokens"),
    ],
)
def test_transformers_errors(keywords: dict[str, Any], message: str, images: Tensor, layout: StudyLayout) -> None:
    with pytest.raises(ValueError, match=message):
        vit("hlip")(images, **{"layout": layout, **keywords})


def test_transformers_dropout_is_an_error_in_training_only(images: Tensor, layout: StudyLayout) -> None:
    model = vit("hlip", attention_probs_dropout_prob=0.1)
    assert torch.equal(
        model(images, layout=layout).last_hidden_state, vit("hlip")(images, layout=layout).last_hidden_state
    )
    with pytest.raises(ValueError, match=r"dropout .* \(it is 0.1\)"):
        model.train()(images, layout=layout)


def test_transformers_causal_and_grouped_models(layout: StudyLayout) -> None:
    from transformers import LlamaConfig, LlamaModel

    def decoder(**changes: Any) -> Any:
        config = LlamaConfig(
            vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, **changes
        )
        config._attn_implementation = "hlip"
        return LlamaModel(config)

    tokens = torch.zeros(6, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="is_causal"):
        decoder()(tokens, layout=layout)
    with pytest.raises(ValueError, match=r"one shape .no cross-attention, no grouped heads"):
        decoder(num_key_value_heads=2)(tokens, layout=layout, is_causal=False)


# ---- MONAI


def monai_vit(classification: bool = False, qkv_bias: bool = False, dropout: float = 0.0) -> Any:
    from monai.networks.nets import ViT

    torch.manual_seed(0)
    model = ViT(
        in_channels=1,
        img_size=(6, 8, 4),
        patch_size=(2, 4, 2),
        hidden_size=24,
        mlp_dim=24,
        num_layers=2,
        num_heads=3,
        classification=classification,
        qkv_bias=qkv_bias,
        dropout_rate=dropout,
    ).double()
    return model.eval()


GRID = (3, 2, 2)


def replaced(model: Any, *levels: Level) -> Any:
    for block, level in zip(model.blocks, levels, strict=True):
        block.attn = MonaiAttention(block.attn, GRID, level)
    return model


@pytest.fixture(scope="module")
def volumes() -> Tensor:
    return torch.randn(2, 1, 6, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class SliceBySlice(nn.Module):
    """MONAI's own attention, run on each slice with a clone of the cls token; the cls token takes the mean."""

    def __init__(self, block: nn.Module, num_prefix: int) -> None:
        super().__init__()
        self.block, self.num_prefix = block, num_prefix

    def forward(self, x: Tensor, attn_mask: None = None) -> Tensor:
        cls = x[:, : self.num_prefix]
        outs = [self.block(torch.cat([cls, part], 1)) for part in x[:, self.num_prefix :].split(4, 1)]
        mean = sum(out[:, : self.num_prefix] for out in outs) / len(outs)
        return torch.cat([mean, *(out[:, self.num_prefix :] for out in outs)], 1)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("classification", [False, True])
@pytest.mark.parametrize("levels", [("study", "study"), ("slice", "study"), ("slice", "slice")])
def test_monai_vit(levels: tuple[Level, ...], classification: bool, qkv_bias: bool, volumes: Tensor) -> None:
    model = monai_vit(classification, qkv_bias)
    ours = replaced(monai_vit(classification, qkv_bias), *levels)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    ours.load_state_dict(model.state_dict(), strict=True)
    for block, level in zip(model.blocks, levels, strict=True):
        if level == "slice":
            block.attn = SliceBySlice(block.attn, int(classification))

    (expected, hidden_expected), (actual, hidden) = model(volumes), ours(volumes)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(hidden, hidden_expected)
    wanted = {
        name.replace("attn.block.", "attn."): g for name, g in gradients(model, expected, *hidden_expected).items()
    }
    assert len(wanted) >= len(names) - 4  # a block's norm_cross_attn is not used
    torch.testing.assert_close(gradients(ours, actual, *hidden), wanted)


def test_monai_batches_of_any_size_and_meta_tensors(volumes: Tensor) -> None:
    from monai.data import MetaTensor

    model, ours = monai_vit(), replaced(monai_vit(), "study", "study")
    for batch in (volumes[:1], volumes.repeat(2, 1, 1, 1, 1), MetaTensor(volumes)):
        torch.testing.assert_close(ours(batch)[0], model(batch)[0])


def test_monai_holds_the_blocks_own_weights() -> None:
    block = monai_vit(qkv_bias=True).blocks[0].attn
    attention = MonaiAttention(block, GRID)
    assert all(p is q for p, q in zip(attention.parameters(), block.parameters(), strict=True))
    assert not attention.training  # as the block
    assert "grid=(3, 2, 2), level='study'" in repr(attention)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_combined_linear": False}, "use_combined_linear=True, got SABlock"),
        ({"causal": True, "sequence_length": 12}, "causal=True"),
        ({"save_attn": True}, "save_attn=True"),
        ({"attention_dtype": torch.float32}, "attention_dtype=torch.float32"),
        ({"rel_pos_embedding": "decomposed", "input_size": (3, 2, 2)}, "rel_positional_embedding=Decomposed"),
    ],
)
def test_monai_blocks_that_do_more(settings: dict[str, Any], message: str) -> None:
    from monai.networks.blocks import SABlock

    with pytest.raises(ValueError, match=message):
        MonaiAttention(SABlock(24, 3, **settings), GRID)


def test_monai_errors(volumes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected an SABlock .* got Linear"):
        MonaiAttention(nn.Linear(3, 3), GRID)
    with pytest.raises(ValueError, match="got 'voxel'"):
        MonaiAttention(monai_vit().blocks[0].attn, GRID, "voxel")  # type: ignore[arg-type]
    attention = MonaiAttention(monai_vit().blocks[0].attn, GRID)
    with pytest.raises(ValueError, match=r"grid .3, 2, 2. has 12 patches, but x has 11 tokens"):
        attention(torch.zeros(1, 11, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="attn_mask"):
        attention(torch.zeros(1, 12, 24, dtype=torch.float64), attn_mask=torch.ones(1, 12))
    model = replaced(monai_vit(dropout=0.1), "study", "study")
    model(volumes)
    with pytest.raises(ValueError, match=r"dropout .* \(it is 0.1\)"):
        model.train()(volumes)
