"""The packed encoder against each study alone, and against the textbook reshape of the published method."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hlip
from conftest import random_study, tiny_vision
from hlip.model.config import VisionConfig
from hlip.model.encoder import PIXEL_MEAN, PIXEL_STD, Block, Stream, StudyEncoder, add_norm
from hlip.model.levels import level_pattern, place_levels
from hlip.model.positions import POSITIONS, sincos
from hlip.study import PackedBatch

PATTERNS = ["slice", "scan", "study", "slice+scan", "scan+study", "slice+scan+study"]
HEADS = [("token", 1), ("token", 2), ("dinotxt", 1), ("dinotxt", 2), ("average", 0), ("average", 1),
         ("weighted_average", 0), ("attention_pool", 0), ("attention_pool", 1)]  # fmt: skip
RAGGED = [
    [(8, 16, 16)],
    [(4, 16, 24), (12, 8, 16), (8, 16, 16)],
    [(4 + 4 * (m % 3), 8, 8) for m in range(40)],
    [(8, 16, 16)] * 2,
]


def make_encoder(pattern: str, **changes: object) -> StudyEncoder:
    torch.manual_seed(1)
    encoder = StudyEncoder(tiny_vision(pattern, **changes)).eval()
    with torch.no_grad():  # a cls token and biases that matter
        for name, parameter in encoder.named_parameters():
            if parameter.ndim < 2 or "token" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return encoder


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("head", "num_prefix"), HEADS)
def test_packed_equals_each_study_alone(pattern: str, head: str, num_prefix: int) -> None:
    encoder = make_encoder(pattern, head=head, num_prefix=num_prefix).double()
    studies = [random_study(sizes, seed) for seed, sizes in enumerate(RAGGED)]
    together = encoder(hlip.pack(studies, (4, 8, 8)))
    alone = torch.cat([encoder(hlip.pack([study], (4, 8, 8))) for study in studies])
    assert together.shape == (len(studies), encoder.config.num_outputs, encoder.config.num_features)
    assert (together - alone).abs().max() <= 1e-10


def textbook(encoder: StudyEncoder, images: Tensor, group: dict[str, int], kept: Tensor | None = None) -> Tensor:
    """The published way: dense tensors, reshaped and concatenated at every change of level.

    images: (B, M, D, H, W) uint8; group: how many groups of a level one study has; kept: the patches of each group of
    the first level that are not dropped.
    """
    config, width = encoder.config, encoder.config.width
    batch, scans = images.shape[:2]
    weight = encoder.patch_embed.proj.weight
    x = ((images.to(weight.dtype) / 255 - PIXEL_MEAN) / PIXEL_STD).flatten(0, 1)[:, None]
    x = F.conv3d(x, weight, encoder.patch_embed.proj.bias, stride=config.patch_size)  # (B * M, C, d, h, w)
    x = x.unflatten(0, (batch, scans)).permute(0, 1, 3, 4, 5, 2)
    x = x + encoder.spatial_posemb[None].to(x) + encoder.sequential_posemb[:, :scans, None, None, None].to(x)
    tokens = [getattr(encoder, name) for name in ("cls_token", "reg_token")[: config.num_prefix]]
    level = config.levels[0]
    x = x.reshape(batch * group[level], -1, width)
    if kept is not None:
        x = x.gather(1, kept[:, :, None].expand(-1, -1, width))
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1)

    def move(x: Tensor, src: str, dst: str) -> Tensor:
        prefix, patches = x[:, : config.num_prefix], x[:, config.num_prefix :]
        if group[dst] < group[src]:
            prefix = prefix.unflatten(0, (batch * group[dst], -1)).mean(1)
        elif group[dst] > group[src]:
            prefix = prefix.repeat_interleave(group[dst] // group[src], dim=0)
        return torch.cat([prefix, patches.reshape(batch * group[dst], -1, width)], dim=1)

    for block, following in zip(encoder.blocks, config.levels, strict=True):
        x = move(x, level, following)
        level = following
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, config.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + block.attn.proj(out)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    x = encoder.norm(move(x, level, "study"))
    prefix, mean = x[:, : config.num_prefix], x[:, config.num_prefix :].mean(1, keepdim=True)
    if config.head == "attention_pool":
        pool = encoder.attn_pool
        k, v = pool.kv(x[:, config.num_prefix :]).unflatten(-1, (2, config.heads, -1)).permute(2, 0, 3, 1, 4)
        query = pool.q(pool.latent).unflatten(-1, (config.heads, -1)).transpose(1, 2).expand(batch, -1, -1, -1)
        out = pool.proj(F.scaled_dot_product_attention(query, k, v).transpose(1, 2).flatten(2))
        return out + pool.mlp.fc2(F.gelu(pool.mlp.fc1(pool.norm(out))))
    if config.head == "weighted_average":
        patches = x[:, config.num_prefix :]
        return (encoder.weighted_average.score(patches).softmax(1) * patches).sum(1, keepdim=True)
    dinotxt = torch.cat([prefix, mean.expand_as(prefix)], dim=-1) if config.num_prefix else mean
    return {"token": prefix, "average": mean, "dinotxt": dinotxt}[config.head]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("head", "num_prefix"), HEADS)
def test_equals_the_textbook_reshape(pattern: str, head: str, num_prefix: int) -> None:
    encoder = make_encoder(pattern, head=head, num_prefix=num_prefix)
    studies = [random_study([(8, 16, 16)] * 3, seed) for seed in range(2)]
    images = torch.stack([torch.stack(study) for study in studies])
    group = {"slice": 6, "scan": 3, "study": 1}

    probe = torch.randn(2, encoder.config.num_outputs, encoder.config.num_features,
                        generator=torch.Generator().manual_seed(2))  # fmt: skip
    grads = []
    outs = []
    for out in (encoder(hlip.pack(studies, (4, 8, 8))), textbook(encoder, images, group)):
        encoder.zero_grad()
        (out * probe).sum().backward()
        outs.append(out.detach())
        grads.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    assert (outs[0] - outs[1]).abs().max() <= 1e-5
    assert grads[0].keys() == grads[1].keys() == dict(encoder.named_parameters()).keys()
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).abs().max() <= 1e-5 * max(1.0, float(grad.abs().max())), name


def test_one_scan_makes_scan_and_study_the_same() -> None:
    batch = hlip.pack([random_study([(8, 16, 16)])], (4, 8, 8))
    scan, study = make_encoder("slice+scan"), make_encoder("slice+scan")
    study.config = tiny_vision("slice+scan", levels=("slice", "study") * 2)
    torch.testing.assert_close(scan(batch), study(batch), rtol=0, atol=0)


def test_gradients_reach_every_parameter_through_dropout() -> None:
    encoder = make_encoder("scan+study", patch_dropout=0.5, scan_dropout=0.5, drop_path=0.2).train()
    torch.manual_seed(3)
    batch = hlip.pack([random_study(sizes, seed) for seed, sizes in enumerate(RAGGED)], (4, 8, 8))
    encoder(batch).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_dropout_is_a_choice_of_rows_and_repeats_with_the_seed() -> None:
    encoder = make_encoder("scan+study", patch_dropout=0.25, scan_dropout=0.5).train()
    batch = hlip.pack([random_study([(8, 16, 16)] * 4)], (4, 8, 8))
    rows: list[int] = []
    encoder.patch_embed.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(encoder(batch))
    assert rows == [2 * 6] * 3  # half of 4 scans, three quarters of 8 patches
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    encoder.eval()
    encoder(batch)
    assert rows[-1] == 32


def test_drop_path_scales_or_drops_whole_groups() -> None:
    block = Block(tiny_vision("scan"), drop_path=0.5).train()
    layout = hlip.pack([random_study([(8, 16, 16)] * 50)], (4, 8, 8)).layout
    with torch.no_grad():  # attention adds nothing, the MLP adds one to every row
        for parameter in (block.attn.proj.weight, block.attn.proj.bias, block.mlp.fc2.weight):
            parameter.zero_()
        block.mlp.fc2.bias.fill_(1)
    torch.manual_seed(0)
    before = Stream(torch.randn(50 + 400, 48), None, None)
    after = add_norm(block(before, layout, "scan", "scan"), layout, "scan", "scan", block.norm1, "auto")[0]
    change = (after - before.x).unflatten(0, (50, 1 + 8)).round(decimals=4)
    assert set(change.unique().tolist()) == {0.0, 2.0}
    assert (change == change[:, :1, :1]).all()


def positions(encoder: StudyEncoder, batch: PackedBatch) -> Tensor:
    return encoder._positions(encoder.plan(batch))


def numbered_encoder(max_scans: int) -> StudyEncoder:
    """Every position is the number of its scan."""
    encoder = make_encoder("scan+study", max_scans=max_scans, grid=(1, 1, 1))
    with torch.no_grad():
        encoder.spatial_posemb.zero_()
        encoder.sequential_posemb.copy_(torch.arange(max_scans)[None, :, None].expand(1, max_scans, 48))
    return encoder


@pytest.mark.parametrize("scan_dropout", [0.0, 0.5])
def test_training_draws_positions_of_scans_without_replacement(scan_dropout: float) -> None:
    encoder = numbered_encoder(max_scans=4).train()
    encoder.config = replace(encoder.config, scan_dropout=scan_dropout)
    sizes = (4, 3) if scan_dropout == 0 else (8, 7)  # the scans that are left must fit, not those there were
    batch = hlip.pack([random_study([(4, 8, 8)] * n) for n in sizes], (4, 8, 8))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = positions(encoder, batch)[:, 0].tolist()
        assert sorted(drawn[:4]) == [0, 1, 2, 3]
        assert len(set(drawn[4:])) == 3
        seen.add(tuple(drawn))
    assert len(seen) > 10


def test_evaluation_takes_the_first_positions_in_order_and_interpolates_beyond_them() -> None:
    encoder = numbered_encoder(max_scans=4)
    batch = hlip.pack([random_study([(4, 8, 8)] * n) for n in (4, 3)], (4, 8, 8))
    assert positions(encoder, batch)[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert positions(encoder, batch.select(torch.tensor([1, 3, 4])))[:, 0].tolist() == [1, 3, 0]
    longer = hlip.pack([random_study([(4, 8, 8)] * n) for n in (7, 3)], (4, 8, 8))
    expected = F.interpolate(torch.arange(4.0)[None, None], 7, mode="linear", align_corners=False)[0, 0]
    for training in (False, True):
        torch.testing.assert_close(positions(encoder.train(training), longer)[:7, 0], expected)
    assert positions(encoder.eval(), longer)[7:, 0].tolist() == [0, 1, 2]


def test_positions_of_mixed_grids_are_resampled_per_scan() -> None:
    encoder = make_encoder("scan+study", max_scans=0, grid=(3, 4, 5))
    grids = [(3, 4, 5), (1, 4, 6), (7, 3, 2), (3, 4, 5)]
    scans = random_study([(4 * d, 8 * h, 8 * w) for d, h, w in grids])
    table = encoder.spatial_posemb.permute(0, 4, 1, 2, 3)
    expected = [F.interpolate(table, g, mode="trilinear", align_corners=False)[0].flatten(1).T for g in grids]
    batch = hlip.pack([scans[:3], scans[3:]], (4, 8, 8))
    torch.testing.assert_close(positions(encoder, batch), torch.cat(expected))
    same = hlip.pack([scans[:1], scans[3:]], (4, 8, 8))
    assert torch.equal(positions(encoder, same), encoder.spatial_posemb.flatten(0, 3).repeat(2, 1))


def test_position_tables() -> None:
    table = sincos(np.arange(5), 8)
    assert table.shape == (5, 8)
    for place in range(5):
        for i in range(4):
            angle = place / 10000 ** (i / 4)
            assert table[place, i] == pytest.approx(np.sin(angle), abs=1e-6)
            assert table[place, 4 + i] == pytest.approx(np.cos(angle), abs=1e-6)
    cube = POSITIONS["sincos3d"].table((2, 3, 4), 12)
    assert torch.equal(cube[1, 2, 3], torch.cat([sincos(np.array([n]), 4)[0] for n in (3, 2, 1)]))
    tiled = POSITIONS["tiled"].table((2, 3, 4), 8)
    in_plane = torch.cat([sincos(np.array([n]), 4)[0] for n in (3, 2)])
    assert torch.equal(tiled[1, 2, 3], in_plane + sincos(np.array([1]), 8)[0])


def test_level_patterns_are_the_published_ones() -> None:
    def places(pattern: str, depth: int) -> dict[str, list[int]]:
        levels = level_pattern(pattern, depth)  # type: ignore[arg-type]
        return {level: [i for i, value in enumerate(levels) if value == level] for level in set(levels)}

    assert places("scan+study", 12) == {"scan": [0, 1, 3, 4, 6, 7, 9, 10], "study": [2, 5, 8, 11]}
    assert places("slice+scan+study", 12) == {"slice": [0, 3, 6, 9], "scan": [1, 4, 7, 10], "study": [2, 5, 8, 11]}
    assert places("scan+study", 24)["study"] == [5, 11, 17, 23]
    large = places("slice+scan+study", 24)
    assert large["scan"] == [4, 10, 16, 22]
    assert large["study"] == [5, 11, 17, 23]
    with pytest.raises(ValueError, match="unknown level pattern"):
        level_pattern("patch", 12)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not divide"):
        level_pattern("scan+study", 10)


def test_coarse_layers_in_any_number_and_place() -> None:
    for depth in (1, 6, 12):
        for count in range(depth + 1):
            for place in ("first", "last", "even"):
                levels = place_levels("scan", "study", depth, count, place)
                assert (len(levels), levels.count("study")) == (depth, count)
            assert place_levels("scan", "study", depth, count, "first") == ("study",) * count + ("scan",) * (
                depth - count
            )
            assert (
                place_levels("scan", "study", depth, count, "last") == ("scan",) * (depth - count) + ("study",) * count
            )
    assert place_levels("scan", "study", 12, 4) == level_pattern("scan+study", 12)
    gaps = np.diff([i for i, level in enumerate(place_levels("slice", "scan", 12, 5)) if level == "scan"])
    assert gaps.max() - gaps.min() <= 1
    for bad, message in [({"count": 7}, "from 0 to the depth of 6"), ({"place": "middle"}, "first, last or even"),
                         ({"fine": "voxel"}, "levels must be of")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            place_levels(**{"fine": "scan", "coarse": "study", "depth": 6, "count": 2, **bad})


def test_kept_patches_equal_the_textbook_on_those_patches() -> None:
    """Patch dropout with a given choice: three of the four patches of every slice."""
    encoder = make_encoder("slice+scan+study", num_prefix=2, head="dinotxt")
    studies = [random_study([(8, 16, 16)] * 3, seed) for seed in range(2)]
    batch = hlip.pack(studies, (4, 8, 8))
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(batch.layout.num_groups("slice"), 4, generator=generator).argsort(1)[:, :3].sort(1).values
    rows = (kept + 4 * torch.arange(len(kept))[:, None]).flatten()
    images = torch.stack([torch.stack(study) for study in studies])
    expected = textbook(encoder, images, {"slice": 6, "scan": 3, "study": 1}, kept)
    assert (encoder(batch.select(rows)) - expected).abs().max() <= 1e-5


def test_errors_name_what_is_wrong() -> None:
    encoder = make_encoder("scan+study")
    with pytest.raises(ValueError, match="patches of"):
        encoder(hlip.pack([random_study([(8, 8, 8)])], (8, 8, 8)))
    with pytest.raises(ValueError, match="num_prefix"):
        VisionConfig(num_prefix=0)
    with pytest.raises(ValueError, match="patch_dropout"):
        VisionConfig(patch_dropout=1.0)
    with pytest.raises(ValueError, match="multiple of 6"):
        tiny_vision(positions="sincos3d", width=64, heads=4)


def test_published_parameter_names() -> None:
    names = set(make_encoder("scan+study", num_prefix=2).state_dict())
    assert {"cls_token", "reg_token", "spatial_posemb", "sequential_posemb", "patch_embed.proj.weight"} <= names
    block = {f"blocks.0.{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")}  # fmt: skip
    assert block <= names


def test_residual_stream_and_embedding_stay_in_fp32_under_autocast() -> None:
    encoder = make_encoder("slice+scan+study")
    seen: list[torch.dtype] = []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].x.dtype))
    batch = hlip.pack([random_study([(8, 16, 16)] * 3)], (4, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(batch)
    assert set(seen) == {torch.float32}
    assert mixed.dtype == torch.float32
    exact = encoder.double()(batch)
    assert (mixed - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("std", [0.2, 0.02, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patch_projection_of_pixels_is_as_exact_as_a_plain_one(dtype: torch.dtype, std: float) -> None:
    """Scaling folded into the weights, against normalising the pixels first; brain-like: mostly far from the mean."""
    embed = make_encoder("scan", init_std=std).patch_embed
    patches = torch.randint(0, 60, (500, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight = embed.proj.weight.flatten(1)
    pixels = (patches.double() / 255 - PIXEL_MEAN) / PIXEL_STD
    exact = pixels @ weight.double().T + embed.proj.bias.double()
    eager = F.linear(pixels.to(dtype), weight.to(dtype), embed.proj.bias.to(dtype))
    ours = embed.to(dtype)(patches)
    errors = [float((out.detach().double() - exact.detach()).square().mean().sqrt()) for out in (ours, eager)]
    assert errors[0] <= 2 * errors[1]


def test_batch_moves_and_selects_consistently() -> None:
    batch: PackedBatch = hlip.pack([random_study([(8, 16, 16)] * 2)], (4, 8, 8))
    encoder = make_encoder("scan+study")
    first_scan = batch.select(torch.arange(8))
    expected = encoder(hlip.pack([random_study([(8, 16, 16)] * 2)[:1]], (4, 8, 8)))
    torch.testing.assert_close(encoder(first_scan), expected, rtol=0, atol=0)
