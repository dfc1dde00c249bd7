"""Rotary positions: their angles by hand, and the encoder that turns queries and keys. `test_published.py` compares a
whole released encoder, its gradients and patch dropout with `published.py`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import hlip
from conftest import random_study, tiny_vision
from hlip.model.config import ModelConfig, TextConfig, VisionConfig
from hlip.model.positions import POSITIONS, Rope
from hlip_kernels import native
from hlip_kernels.dropin import rotate
from test_encoder import RAGGED, make_encoder


def test_angles_of_the_released_head() -> None:
    """Of 64 dimensions 20 belong to d, 20 to h, 20 to w; the last 4 to none."""
    rope = POSITIONS["rope"]
    assert isinstance(rope, Rope)
    angles = rope.angles(torch.tensor([[1.0, 0.0, 0.0], [2.0, 3.0, 5.0]]).double(), 64)
    assert angles.shape == (2, 30)
    assert angles[0].tolist() == pytest.approx([10000 ** (-j / 10) for j in range(10)] + [0] * 20)
    assert angles[1, [0, 9, 10, 19, 20, 29]].tolist() == pytest.approx(
        [2, 2 * 10**-3.6, 3, 3 * 10**-3.6, 5, 5 * 10**-3.6]
    )
    assert rope.angles(torch.zeros(1, 3), 16).shape == (1, 6)


def test_pairs_are_turned_and_all_else_stays() -> None:
    qkv = torch.randn(2, 3, 1, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.tensor([[0.3, 0.5, -2.0], [0.0, 0.0, 0.0]])
    turned = rotate(qkv, torch.stack([angle.cos(), angle.sin()], dim=1))
    assert torch.equal(turned[1], qkv[1])
    assert torch.equal(turned[:, 2], qkv[:, 2]) and torch.equal(turned[..., 6:], qkv[..., 6:])
    for which in range(2):
        for pair in range(3):
            x, y = qkv[0, which, 0, 2 * pair : 2 * pair + 2]
            cos, sin = angle[0, pair].cos(), angle[0, pair].sin()
            expected = torch.stack([x * cos - y * sin, y * cos + x * sin])
            torch.testing.assert_close(turned[0, which, 0, 2 * pair : 2 * pair + 2], expected)
    assert rotate(qkv.bfloat16(), torch.ones(2, 2, 3)).dtype == torch.bfloat16


def test_places_are_those_of_the_whole_scan() -> None:
    encoder = make_encoder("scan+study", positions="rope", patch_dropout=0.5, scan_dropout=0.5).train()
    grids = [(2, 2, 3), (3, 1, 2), (2, 2, 2)]
    batch = hlip.pack([random_study([(4 * d, 8 * h, 8 * w) for d, h, w in grids])], (4, 8, 8))
    whole = [[d, h, w] for grid in grids for d in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    place = {bytes(row.numpy()): where for row, where in zip(batch.patches, whole, strict=True)}
    torch.manual_seed(0)
    tokens = encoder.plan(batch)
    assert len(tokens.patches) < len(batch.patches)
    assert tokens.coordinates is not None
    assert tokens.coordinates.tolist() == [place[bytes(row.numpy())] for row in tokens.patches]
    assert encoder.eval().plan(batch).coordinates.tolist() == whole  # type: ignore[union-attr]


@pytest.mark.parametrize("pattern", ["slice", "scan+study", "slice+scan+study"])
@pytest.mark.parametrize("num_prefix", [1, 2])
def test_packed_equals_each_study_alone(pattern: str, num_prefix: int) -> None:
    encoder = make_encoder(pattern, positions="rope", num_prefix=num_prefix).double()
    studies = [random_study(sizes, seed) for seed, sizes in enumerate(RAGGED)]
    together = encoder(hlip.pack(studies, (4, 8, 8)))
    alone = torch.cat([encoder(hlip.pack([study], (4, 8, 8))) for study in studies])
    assert (together - alone).abs().max() <= 1e-10
    plain = make_encoder(pattern, num_prefix=num_prefix).double()
    assert (together - plain(hlip.pack(studies, (4, 8, 8)))).abs().max() > 1e-2


@pytest.mark.parametrize("backend", ["cpu", "native"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_backends_agree(backend: str, checkpointed: bool) -> None:
    if backend == "native" and native.native() is None:
        pytest.skip("no native library")
    batch = hlip.pack([random_study(sizes, seed) for seed, sizes in enumerate(RAGGED[:2])], (4, 8, 8))
    results = []
    for name, dtype in (("reference", torch.float64), ("reference", torch.float32), (backend, torch.float32)):
        encoder = make_encoder("slice+scan+study", positions="rope").to(dtype)
        encoder.set_grad_checkpointing(checkpointed and name == backend)
        for block in encoder.blocks:
            block.attn.backend = name
        out = encoder(batch)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    for i, (exact, eager, ours) in enumerate(zip(*results, strict=True)):
        errors = [float((x.double() - exact).abs().max()) for x in (ours, eager)]
        rounding = torch.finfo(torch.float32).eps * float(exact.abs().max())
        assert errors[0] <= (3 if i else 2) * errors[1] + rounding


def test_other_positions_turn_nothing() -> None:
    encoder = make_encoder("scan+study")
    tokens = encoder.plan(hlip.pack([random_study([(8, 16, 16)])], (4, 8, 8)))
    assert tokens.coordinates is None and encoder.rotary(tokens) == {}


def test_a_hook_on_attention_sees_turned_results() -> None:
    """What runs a layer as a module gets the same."""
    encoder = make_encoder("scan+study", positions="rope")
    batch = hlip.pack([random_study([(8, 16, 16)] * 2)], (4, 8, 8))
    before = encoder(batch)
    for block in encoder.blocks:
        block.attn.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(encoder(batch), before)


def test_the_configuration_names_them() -> None:
    config = ModelConfig(tiny_vision(positions="rope"), TextConfig(), embed_dim=8)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="positions 'rope' need a width of 6 or more for each of 12 heads"):
        replace(config.vision, width=48, heads=12)
    state = make_encoder("scan+study", positions="rope").state_dict()
    plain = make_encoder("scan+study").state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in plain.items()}
    assert torch.equal(state["spatial_posemb"], plain["spatial_posemb"])
    assert VisionConfig().positions == "tiled"


def test_under_autocast_angles_stay_exact() -> None:
    """Cosines and sines are float32 where queries and keys are of 16 bits."""
    encoder = make_encoder("slice+scan+study", positions="rope")
    tokens = encoder.plan(hlip.pack([random_study([(8, 16, 16)] * 3)], (4, 8, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(tokens)
        assert {turns.dtype for turns in encoder.rotary(tokens).values()} == {torch.float32}
    exact = encoder.double()(tokens)
    assert (mixed - exact).norm() <= 0.02 * exact.norm()
