"""Every released model against the released encoder as `published.py` writes it down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hlip
from conftest import random_study
from hlip.model.config import ALIASES, MODELS, preset
from hlip.model.encoder import StudyEncoder
from hlip.model.released import identify
from hlip.model.weights import Weights, check_fit
from published import FACTS, RELEASED, Facts, released_encoder
from test_model import published_shapes

HEADS = 2  # of 64, as released


def narrow(name: str, **changes: object) -> tuple[StudyEncoder, dict[str, Tensor]]:
    """The model's encoder, of its depth, levels, patches and grid, but a narrow one; weights that all matter."""
    torch.manual_seed(0)
    vision = replace(preset(name).vision, width=64 * HEADS, heads=HEADS, init_std=0.09, **changes)
    encoder = StudyEncoder(vision).eval()
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            if parameter.ndim < 2 or "token" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return encoder, {key: value.detach() for key, value in encoder.state_dict().items()}


def scans_of(name: str, count: int, seed: int, grid: tuple[int, int, int] | None = None) -> list[Tensor]:
    facts = RELEASED[name]
    size = tuple(g * p for g, p in zip(grid or facts.grid, facts.patch, strict=True))
    return random_study([size] * count, seed)


def test_all_names_are_here() -> None:
    assert {*MODELS, *ALIASES} - {"demo"} == FACTS.keys()


@pytest.mark.parametrize("name", FACTS)
def test_settings_are_the_released_ones(name: str) -> None:
    facts, config = FACTS[name], preset(name)
    vision, text = config.vision, config.text
    with torch.device("meta"):
        model = hlip.HLIPModel(config)
    own = Facts(
        facts.source, list(vision.levels), vision.patch_size, vision.grid, vision.num_prefix, vision.head,
        vision.width, vision.heads, vision.max_scans, vision.num_features if config.projection else 0,
        config.embed_dim, config.per_prefix, config.objective, facts.scale, facts.bias,
        vision.patch_dropout, vision.drop_path, text.name, text.context_length, text.pooling, text.locked,
        facts.rope,
    )  # fmt: skip
    assert own == facts
    assert (vision.mlp_ratio, vision.width // vision.heads, vision.positions) == (
        4.0,
        64,
        "rope" if facts.rope else "tiled",
    )
    assert (text.unlocked_layers, vision.scan_dropout) == (0, 0.0)
    assert model.visual.trunk.norm.eps == 1e-6


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.usefixtures("small_models")
def test_scale_and_bias_begin_as_released(name: str) -> None:
    model = hlip.create_model(name)
    begins = [p.item() for key, p in model.named_parameters() if key in ("logit_scale", "logit_bias")]
    assert begins == pytest.approx([value for value in (FACTS[name].scale, FACTS[name].bias) if value is not None])


@pytest.mark.parametrize("name", FACTS)
def test_weights_of_the_released_shapes_are_those_of_the_preset(name: str) -> None:
    """Not one field is replaced to make them fit, whether the name is told or read from the run's."""
    path = Path("epoch_5.pt")
    state = {key: torch.empty(shape, device="meta") for key, shape in published_shapes(name).items()}
    for run, told in (("", name), (f"of-{name}-1", None)):
        assert identify(Weights(path, state, run), None, told).config == preset(name)
    with torch.device("meta"):
        check_fit(hlip.HLIPModel(preset(name)), state, path)


@torch.no_grad()
@pytest.mark.parametrize("name", RELEASED)
def test_outputs_are_those_of_the_released_encoder(name: str) -> None:
    """One study alone, and a batch of unlike ones: in number of scans, one of them on another grid."""
    encoder, state = narrow(name)
    d, h, w = RELEASED[name].grid
    studies = [scans_of(name, 1, 0), scans_of(name, 3, 1, (d - 1, h // 2, w // 2)), scans_of(name, 2, 2)]
    expected = [released_encoder(state, RELEASED[name], HEADS, torch.stack(study)) for study in studies]
    found = encoder(hlip.pack(studies, RELEASED[name].patch))
    for own, other in zip(found, expected, strict=True):
        assert (own - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))
    alone = encoder(hlip.pack(studies[:1], RELEASED[name].patch))
    assert (alone[0] - expected[0]).abs().max() <= 1e-5 * max(1.0, float(expected[0].abs().max()))


@torch.no_grad()
def test_scans_of_144_slices() -> None:
    """As the paper evaluated Pub-Brain-5 with a model of 48: 18 x 14 x 14 tokens, positions trilinear between its."""
    name = "clip_vit_base_scan_study_token1176"
    encoder, state = narrow(name)
    study = scans_of(name, 2, 0, (18, 14, 14))
    assert study[0].shape[-3:] == (144, 224, 224)
    expected = released_encoder(state, RELEASED[name], HEADS, torch.stack(study))
    found = encoder(hlip.pack([study], RELEASED[name].patch))[0]
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip_vit_base_scan_study_token1176", "clip_vit_base_scan_study_dualdinotxt1568"])
def test_more_scans_than_positions(name: str) -> None:
    encoder, state = narrow(name)
    study = scans_of(name, 45, 0, (2, 3, 3))
    expected = released_encoder(state, RELEASED[name], HEADS, torch.stack(study))
    found = encoder(hlip.pack([study], RELEASED[name].patch))[0]
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", RELEASED)
def test_training_with_the_patches_that_were_kept(name: str) -> None:
    """Outputs and gradients, on the patches and scan positions that a plan for training drew."""
    facts = RELEASED[name]
    encoder, state = narrow(name, patch_dropout=0.25, drop_path=0.0)
    encoder.train()
    d, h, w = facts.grid
    grid = (max(2, d // 2), h // 2, w // 2)
    studies = [scans_of(name, count, count, grid) for count in (2, 1)]
    torch.manual_seed(3)
    tokens = encoder.plan(hlip.pack(studies, facts.patch))

    size = grid[1] * grid[2] * (1 if facts.levels[0] == "slice" else grid[0])
    keep = max(1, int(size * 0.75))
    bounds = tokens.layout.cu_patches(facts.levels[0])
    assert (bounds.diff() == keep).all()
    # A patch is known by its voxels, which are random.
    whole = hlip.pack(studies, facts.patch)
    where = {bytes(row.numpy()): i for i, row in enumerate(whole.patches)}
    rows = torch.tensor([where[bytes(row.numpy())] for row in tokens.patches])
    assert (rows.diff() > 0).all()
    kept = (rows % size).reshape(-1, keep)
    scan = rows // (grid[0] * grid[1] * grid[2])
    drawn = {int(s): int(p) for s, p in zip(scan, tokens.places[:, -1] - d * h * w, strict=True)}

    leaves = {key: value.clone().requires_grad_() for key, value in state.items()}
    found = encoder(tokens)
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * probe).sum().backward()
    group, first = 0, 0
    for own, weight, study in zip(found, probe, studies, strict=True):
        count = len(study) * (grid[0] if facts.levels[0] == "slice" else 1)
        sequence = [drawn[first + i] for i in range(len(study))] if "sequential_posemb" in state else None
        expected = released_encoder(leaves, facts, HEADS, torch.stack(study), kept[group : group + count], sequence)
        assert (own - expected).detach().abs().max() <= 1e-5 * max(1.0, float(expected.detach().abs().max()))
        (expected * weight).sum().backward()
        group, first = group + count, first + len(study)
    for key, parameter in encoder.named_parameters():
        expected_grad = leaves[key].grad
        assert parameter.grad is not None, key
        assert (parameter.grad - expected_grad).abs().max() <= 2e-5 * max(1.0, float(expected_grad.abs().max())), key


@torch.no_grad()
@pytest.mark.slow
def test_a_whole_model_of_the_released_size() -> None:
    torch.manual_seed(0)
    name = "clip_vit_base_scan_study_token1176"
    encoder = StudyEncoder(preset(name).vision).eval()
    study = scans_of(name, 2, 0)
    expected = released_encoder(encoder.state_dict(), RELEASED[name], 12, torch.stack(study))
    found = encoder(hlip.pack([study], RELEASED[name].patch))[0]
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
