"""The released encoder, written a second time from its description: dense tensors, one study at a time, no packing.

It takes the weights by their published names and shares nothing with the package. Shapes: M scans of a study,
(d, h, w) patches of a scan, C width, P prefix tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional as F

SLICE_SCAN = ["slice", "slice", "scan"] * 4
SCAN_STUDY = ["scan", "scan", "study"] * 4
H3 = ["slice", "scan", "study"] * 4
LARGE_SCAN_STUDY = [*["scan"] * 5, "study"] * 4
LARGE_H3 = [*["slice"] * 4, "scan", "study"] * 4


PUBMED_BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
CXR_BERT = "microsoft/BiomedVLP-CXR-BERT-specialized"
# Where a model's settings are written down: in the paper, or in a configuration file beside the weights. Rates of
# patch dropout are those of the runs that made the weights.
PAPER = "arXiv 2505.21862, appendix B"
FILE = "hlip/model_configs/{}.json of the release"
BRANCH = "the release's branch of ablations"


class Facts(NamedTuple):
    """What the release states of a model.

    source: where it does.
    embed_dim: width of the embedding.
    scale, bias: what logit_scale and logit_bias begin with.
    features: width of the encoder's outputs that a projection reads; 0 without one.
    rope: whether queries and keys are turned.
    """

    source: str
    levels: list[str]
    patch: tuple[int, int, int]
    grid: tuple[int, int, int]
    prefix: int = 1
    head: str = "token"
    width: int = 768
    heads: int = 12
    max_scans: int = 0
    features: int = 768
    embed_dim: int = 512
    per_prefix: bool = True
    objective: str = "clip"
    scale: float = math.log(1 / 0.07)
    bias: float | None = None
    patch_dropout: float = 0.25
    drop_path: float = 0.2
    text: str = PUBMED_BERT
    context_length: int = 256
    pooling: str = "cls"
    locked: bool = False
    rope: bool = False


BRAIN = Facts(PAPER, SCAN_STUDY, (8, 16, 16), (6, 14, 14), max_scans=40)
CHEST = Facts(
    PAPER, SLICE_SCAN, (8, 24, 24), (14, 14, 14), patch_dropout=0.0, text=CXR_BERT, context_length=512, locked=True
)
ABLATION = BRAIN._replace(source=BRANCH, patch_dropout=0.5)
OCTOBER = Facts(
    FILE.format("ablate_seqposemb_clip_vit_base_multiscan_h2_dinotxt1568"),
    SCAN_STUDY, (6, 16, 16), (8, 14, 14), head="dinotxt", features=1536, embed_dim=768, patch_dropout=0.5,
)  # fmt: skip
DUAL: dict[str, Any] = {
    "prefix": 2, "head": "dinotxt", "features": 1536, "embed_dim": 768, "objective": "dual", "bias": math.log(1 / 0.07)
}  # fmt: skip
LARGE: dict[str, Any] = {"width": 1024, "heads": 16, "features": 2048}


def _dual(name: str, base: Facts, levels: list[str], **large: Any) -> dict[str, Facts]:
    return {name: base._replace(source=FILE.format(name), levels=levels, **{**DUAL, **large})}


RELEASED = {
    "clip_vit_base_slice_scan_token2744": CHEST,
    "vit_base_singlescan_h2_token2744": CHEST._replace(per_prefix=False),
    "clip_vit_base_scan_study_token1176": BRAIN,
    "vit_base_multiscan_h2_token1176": BRAIN._replace(per_prefix=False),
    "vit_base_multiscan_h2_token588": BRAIN._replace(patch=(16, 16, 16), grid=(3, 14, 14), per_prefix=False),
    "vit_base_multiscan_h3_token1176": BRAIN._replace(levels=H3, per_prefix=False),
    "hlip-2025_10_08": OCTOBER,
    **_dual("clip_vit_base_scan_study_dualdinotxt1568", OCTOBER, SCAN_STUDY),
    **_dual("clip_vit_base_slice_scan_study_dualdinotxt1568", OCTOBER, H3),
    **_dual("clip_vit_large_scan_study_dualdinotxt1568", OCTOBER, LARGE_SCAN_STUDY, **LARGE),
    **_dual("clip_vit_large_slice_scan_study_dualdinotxt1568", OCTOBER, LARGE_H3, **LARGE),
    **_dual("clip_vit_base_slice_scan_dualdinotxt2744", CHEST, SLICE_SCAN),
    "siglip_vit_base_singlescan_h2_token2744": CHEST._replace(
        source=FILE.format("siglip_vit_base_singlescan_h2_token2744"), head="attention_pool", features=0, embed_dim=768,
        per_prefix=False, objective="siglip", scale=math.log(10), bias=-10.0,
    ),
    "ablate_rope_clip_vit_base_multiscan_h2_dinotxt1568": OCTOBER._replace(source=BRANCH, rope=True),
    "clip_vit_base_multiscan_h2_token1568": ABLATION._replace(patch=(6, 16, 16), grid=(8, 14, 14)),
    "clip_vit_base_multiscan_h2_dinotxt1176": ABLATION._replace(head="dinotxt", features=1536, embed_dim=768),
    "clip_vit_base_multiscan_h2_dinotxt1568": ABLATION._replace(
        patch=(6, 16, 16), grid=(8, 14, 14), head="dinotxt", features=1536, embed_dim=768
    ),
}  # fmt: skip
# Spellings of the same models, in releases of other dates and on the hub.
OTHER_NAMES = {
    "ablate_seqposemb_clip_vit_base_multiscan_h2_dinotxt1568": "hlip-2025_10_08",
    "clip_vit_base_singlescan_h2_token2744": "vit_base_singlescan_h2_token2744",
    "clip_vit_base_multiscan_h2_token1176": "vit_base_multiscan_h2_token1176",
    "clip_vit_base_multiscan_h2_token588": "vit_base_multiscan_h2_token588",
    "clip_vit_base_multiscan_h3_token1176": "vit_base_multiscan_h3_token1176",
    "ablate_seqposemb_clip_vit_base_multiscan_h2_dualdinotxt1568": "clip_vit_base_scan_study_dualdinotxt1568",
    "ablate_seqposemb_clip_vit_base_multiscan_h3_dualdinotxt1568": "clip_vit_base_slice_scan_study_dualdinotxt1568",
    "ablate_seqposemb_clip_vit_large_multiscan_h2_dualdinotxt1568": "clip_vit_large_scan_study_dualdinotxt1568",
    "ablate_seqposemb_clip_vit_large_multiscan_h3_dualdinotxt1568": "clip_vit_large_slice_scan_study_dualdinotxt1568",
}
FACTS = RELEASED | {name: RELEASED[model] for name, model in OTHER_NAMES.items()}


def released_encoder(
    state: dict[str, Tensor],
    facts: Facts,
    heads: int,
    scans: Tensor,
    kept: Tensor | None = None,
    sequence: list[int] | None = None,
) -> Tensor:
    """One study to its normalised outputs.

    state: the encoder's weights, without the prefix `visual.trunk.`.
    scans: (M, D, H, W) uint8.
    kept: (groups of the first level, kept patches of each) places in the group, in training with patch dropout.
    sequence: the positions drawn for the scans, in training; the first ones if None.
    """
    mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
    pixels = (scans[:, None].to(state["norm.weight"].dtype) / 255 - mean) / std
    x = F.conv3d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=facts.patch)
    x = rearrange(x, "m c d h w -> m d h w c")
    m, d, h, w, c = x.shape

    spatial = state["spatial_posemb"]
    if spatial.shape[1:4] != (d, h, w):
        spatial = F.interpolate(rearrange(spatial, "1 d h w c -> 1 c d h w"), (d, h, w), mode="trilinear")
        spatial = rearrange(spatial, "1 c d h w -> 1 d h w c")
    x = x + spatial
    if "sequential_posemb" in state:
        table = state["sequential_posemb"]
        if table.shape[1] == 1:
            rows = table.expand(-1, m, -1)
        elif sequence is not None:
            rows = table[:, sequence]
        elif m > table.shape[1]:
            rows = rearrange(F.interpolate(rearrange(table, "1 m c -> 1 c m"), m, mode="linear"), "1 c m -> 1 m c")
        else:
            rows = table[:, :m]
        x = x + rows[0, :, None, None, None]

    groups = {"slice": m * d, "scan": m, "study": 1}
    level = facts.levels[0]
    x = x.reshape(groups[level], -1, c)
    angles = torch.cat([rope_angles((d, h, w))] * m).reshape(groups[level], -1, 3, 10) if facts.rope else None
    if kept is not None:
        x = torch.stack([group[places] for group, places in zip(x, kept, strict=True)])
        if angles is not None:
            angles = torch.stack([group[places] for group, places in zip(angles, kept, strict=True)])
    names = ("cls_token", "reg_token")[: facts.prefix]
    prefix = repeat(torch.cat([state[name] for name in names], dim=1), "1 p c -> g p c", g=groups[level])

    for layer, following in enumerate(facts.levels):
        prefix, x = change(prefix, x, groups[level], groups[following])
        level = following
        weights = {
            key.removeprefix(f"blocks.{layer}."): v for key, v in state.items() if key.startswith(f"blocks.{layer}.")
        }
        turned = None if angles is None else angles.reshape(groups[level], -1, 3, 10)
        prefix, x = block(torch.cat([prefix, x], dim=1), weights, heads, turned).split(
            [facts.prefix, x.shape[1]], dim=1
        )
    prefix, x = change(prefix, x, groups[level], 1)
    prefix, x = (F.layer_norm(each, (c,), state["norm.weight"], state["norm.bias"], 1e-6)[0] for each in (prefix, x))
    if facts.head == "attention_pool":
        return pool(x, {key.removeprefix("attn_pool."): v for key, v in state.items() if "attn_pool" in key}, heads)
    if facts.head == "dinotxt":
        return torch.cat([prefix, repeat(x.mean(0), "c -> p c", p=facts.prefix)], dim=-1)
    return prefix


def change(prefix: Tensor, x: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """To coarser groups prefix tokens are averaged, to finer ones cloned; patches are only grouped anew."""
    if after < before:
        prefix = reduce(prefix, "(coarse fine) p c -> coarse p c", "mean", coarse=after)
    elif after > before:
        prefix = repeat(prefix, "coarse p c -> (coarse fine) p c", fine=after // before)
    return prefix, x.reshape(after, -1, x.shape[-1])


def rope_angles(grid: tuple[int, int, int], pairs: int = 10) -> Tensor:
    """(d * h * w, 3, pairs) angles, in the order d, h, w; ten pairs for each axis in heads of 64."""
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
    return places[:, :, None] / 10000 ** (torch.arange(pairs, dtype=torch.float64) / pairs)


def turn(rows: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys (g, h, n, e), of which the patches, last in each group, are turned, as complex numbers."""
    prefix, width = rows.shape[2] - angles.shape[1], 6 * angles.shape[3]
    pairs = torch.view_as_complex(rows[:, :, prefix:, :width].double().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles).flatten(2)[:, None]).flatten(-2)
    patches = torch.cat([turned.to(rows.dtype), rows[:, :, prefix:, width:]], dim=-1)
    return torch.cat([rows[:, :, :prefix], patches], dim=2)


def block(x: Tensor, weights: dict[str, Tensor], heads: int, angles: Tensor | None = None) -> Tensor:
    def linear(rows: Tensor, name: str) -> Tensor:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(rows: Tensor, name: str) -> Tensor:
        return F.layer_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    q, k, v = rearrange(linear(norm(x, "norm1"), "attn.qkv"), "g n (three h e) -> three g h n e", three=3, h=heads)
    if angles is not None:
        q, k = turn(q, angles), turn(k, angles)
    scores = torch.einsum("ghqe,ghke->ghqk", q, k) * q.shape[-1] ** -0.5
    x = x + linear(rearrange(scores.softmax(-1) @ v, "g h n e -> g n (h e)"), "attn.proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


def pool(x: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """timm's pooling by a learned query, over the patches."""

    def linear(rows: Tensor, name: str) -> Tensor:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    q = rearrange(linear(weights["latent"][0], "q"), "l (h e) -> h l e", h=heads)
    k, v = rearrange(linear(x, "kv"), "n (two h e) -> two h n e", two=2, h=heads)
    scores = torch.einsum("hqe,hke->hqk", q, k) * q.shape[-1] ** -0.5
    out = linear(rearrange(scores.softmax(-1) @ v, "h l e -> l (h e)"), "proj")
    normed = F.layer_norm(out, out.shape[-1:], weights["norm.weight"], weights["norm.bias"], 1e-6)
    return out + linear(F.gelu(linear(normed, "mlp.fc1")), "mlp.fc2")
