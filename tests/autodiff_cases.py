"""A small encoder, its loss and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import hlip
from conftest import random_study, tiny_vision
from hlip.model.encoder import Mlp, StudyEncoder
from hlip_kernels import (
    HierarchicalAttention,
    StudyLayout,
    add_regroup_norm,
    hier_attention,
    linear_of_norm,
    linear_of_pixels,
    mlp_of_norm,
    regroup,
)
from hlip_kernels.dropin import dense_attention

LAYOUT = StudyLayout.from_grids([[(2, 1, 3), (3, 1, 1)], [(1, 2, 2)]], num_prefix=1)
ROWS, WIDTH = LAYOUT.num_rows("scan"), 8
DENSE = StudyLayout.from_grids([[(2, 1, 3)], [(2, 1, 3)]], num_prefix=1)
Op = Callable[..., Tensor]


class Layers(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5), Mlp(WIDTH, 16)
        self.attention = HierarchicalAttention(WIDTH, 2)
        self.to(dtype)


def cases(dtype: torch.dtype) -> dict[str, tuple[Op, tuple[Tensor, ...]]]:
    """Everything that can be differentiated, with its inputs."""
    torch.manual_seed(0)
    layers = Layers(dtype)
    rows, update, weights = (torch.randn(n, WIDTH, dtype=torch.float64).to(dtype) for n in (ROWS, ROWS, 3))
    qkv = torch.randn(ROWS, 3, 2, 16, dtype=torch.float64).to(dtype)
    patches = torch.randint(0, 256, (7, 12), dtype=torch.uint8)

    def norm(rows: Tensor, update: Tensor, weight: Tensor, bias: Tensor, layer_scale: Tensor) -> Tensor:
        outs = add_regroup_norm(rows, update, LAYOUT, "scan", "study", weight, bias, layer_scale=layer_scale)
        return torch.cat(outs)

    def finer(rows: Tensor, update: Tensor) -> Tensor:
        return add_regroup_norm(rows, update, LAYOUT, "scan", "slice", *weights[:2])[1]

    return {
        "attention": (lambda qkv: hier_attention(qkv, LAYOUT, "scan"), (qkv,)),
        "norm": (norm, (rows, update, *weights)),
        "finer": (finer, (rows, update)),
        "dense": (lambda qkv: dense_attention(qkv, DENSE, "slice"), (qkv[:7].unflatten(2, (2, 1)).movedim(2, 0),)),
        "regroup": (lambda x: regroup(x, LAYOUT, "scan", "study"), (rows,)),
        "linear": (lambda x: linear_of_norm(layers.linear, layers.norm, x, layers.norm(x)), (rows,)),
        "mlp": (lambda x: mlp_of_norm(layers.mlp.fc1, layers.mlp.fc2, layers.norm, x, layers.norm(x)), (rows,)),
        "pixels": (lambda w, b: linear_of_pixels(patches, 115, 64, w, b), (update[:6].view(4, 12), weights[0, :4])),
        "layer": (lambda x: layers.attention(x, LAYOUT, "scan"), (rows,)),
    }  # fmt: skip


EXACT = cases(torch.float64)


def encoder(head: str = "token") -> StudyEncoder:
    torch.manual_seed(0)
    return StudyEncoder(tiny_vision("scan+study", head=head)).double().eval()


BATCH = hlip.pack([random_study([(8, 16, 16)] * 2), random_study([(4, 16, 16)], seed=1)], (4, 8, 8))
