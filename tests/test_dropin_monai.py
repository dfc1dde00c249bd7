"""The attention layer in MONAI's ViT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from dropin_cases import gradients
from hlip_kernels import Level
from hlip_kernels.dropin import MonaiAttention


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
