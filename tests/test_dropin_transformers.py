"""The attention layer in vision transformers of `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from dropin_cases import SLICES, STUDIES, gradients
from hlip_kernels import Grid, Level, StudyLayout
from hlip_kernels.dropin import register_transformers


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
