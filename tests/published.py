"""The released encoder, written a second time from its description: dense tensors, one study at a time, no packing.

It takes the weights by their published names and shares nothing with the package. Shapes: M scans of a study,
(d, h, w) patches of a scan, C width, P prefix tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional as F

SLICE_SCAN = ["slice", "slice", "scan"] * 4
SCAN_STUDY = ["scan", "scan", "study"] * 4
H3 = ["slice", "scan", "study"] * 4
LARGE_SCAN_STUDY = [*["scan"] * 5, "study"] * 4
LARGE_H3 = [*["slice"] * 4, "scan", "study"] * 4


class Facts(NamedTuple):
    levels: list[str]
    patch: tuple[int, int, int]
    grid: tuple[int, int, int]
    prefix: int = 1
    head: str = "token"


RELEASED = {
    "clip_vit_base_slice_scan_token2744": Facts(SLICE_SCAN, (8, 24, 24), (14, 14, 14)),
    "vit_base_singlescan_h2_token2744": Facts(SLICE_SCAN, (8, 24, 24), (14, 14, 14)),
    "clip_vit_base_scan_study_token1176": Facts(SCAN_STUDY, (8, 16, 16), (6, 14, 14)),
    "vit_base_multiscan_h2_token1176": Facts(SCAN_STUDY, (8, 16, 16), (6, 14, 14)),
    "vit_base_multiscan_h2_token588": Facts(SCAN_STUDY, (16, 16, 16), (3, 14, 14)),
    "vit_base_multiscan_h3_token1176": Facts(H3, (8, 16, 16), (6, 14, 14)),
    "hlip-2025_10_08": Facts(SCAN_STUDY, (6, 16, 16), (8, 14, 14), head="dinotxt"),
    "clip_vit_base_scan_study_dualdinotxt1568": Facts(SCAN_STUDY, (6, 16, 16), (8, 14, 14), 2, "dinotxt"),
    "clip_vit_base_slice_scan_study_dualdinotxt1568": Facts(H3, (6, 16, 16), (8, 14, 14), 2, "dinotxt"),
    "clip_vit_large_scan_study_dualdinotxt1568": Facts(LARGE_SCAN_STUDY, (6, 16, 16), (8, 14, 14), 2, "dinotxt"),
    "clip_vit_large_slice_scan_study_dualdinotxt1568": Facts(LARGE_H3, (6, 16, 16), (8, 14, 14), 2, "dinotxt"),
    "clip_vit_base_slice_scan_dualdinotxt2744": Facts(SLICE_SCAN, (8, 24, 24), (14, 14, 14), 2, "dinotxt"),
    "siglip_vit_base_singlescan_h2_token2744": Facts(SLICE_SCAN, (8, 24, 24), (14, 14, 14), 1, "attention_pool"),
}


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
    if kept is not None:
        x = torch.stack([group[places] for group, places in zip(x, kept, strict=True)])
    names = ("cls_token", "reg_token")[: facts.prefix]
    prefix = repeat(torch.cat([state[name] for name in names], dim=1), "1 p c -> g p c", g=groups[level])

    for layer, following in enumerate(facts.levels):
        prefix, x = change(prefix, x, groups[level], groups[following])
        level = following
        weights = {
            key.removeprefix(f"blocks.{layer}."): v for key, v in state.items() if key.startswith(f"blocks.{layer}.")
        }
        prefix, x = block(torch.cat([prefix, x], dim=1), weights, heads).split([facts.prefix, x.shape[1]], dim=1)
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


def block(x: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    def linear(rows: Tensor, name: str) -> Tensor:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(rows: Tensor, name: str) -> Tensor:
        return F.layer_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    q, k, v = rearrange(linear(norm(x, "norm1"), "attn.qkv"), "g n (three h e) -> three g h n e", three=3, h=heads)
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
