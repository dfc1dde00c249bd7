"""What PyTorch's FlopCounterMode counts for the ops: two for a multiplication and an addition, of products only.

Shapes: R rows, H heads, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .layout import TILE_ROWS

COUNTER = "torch.utils.flop_counter"


def register_when_imported() -> None:
    """Register the formulas with PyTorch's counter, whose import takes that of Triton, once someone imports it."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == COUNTER else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                load(module)
                _register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register(counter: ModuleType) -> None:
    ours, onednn = torch.ops.hlip_kernels, torch.ops.mkldnn
    formulas = {
        ours.hier_attention: _attention,
        ours.hier_attention_backward: _attention_backward,
        ours.add_regroup_norm: _nothing,
        ours.add_regroup_norm_backward: _nothing,
        ours.amx_layers: _layers,
        ours.amx_mlp: _layers,
        ours.amx_hidden_gradient: _hidden_gradient,
        ours.amx_weight_gradient: _weight_gradient,
    }
    if hasattr(onednn, "_linear_pointwise"):  # not ours, but `linear` calls it
        formulas[onednn._linear_pointwise] = _linear
    for op, formula in formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


def _attention(qkv: Tensor, *groups: Any, out_val: Any) -> int:
    return 2 * _product(qkv, *groups)


def _attention_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *groups: Any, out_val: Any) -> int:
    return 5 * _product(qkv, *groups)  # with the scores once more, as PyTorch counts FlashAttention's


def _product(qkv: Tensor, cu_seqlens: Tensor, *rest: Any) -> int:
    """Count one product of all rows with all rows of their groups; or the most that it may be, from shapes alone."""
    rows, _slots, heads, head_dim = qkv.shape
    if type(cu_seqlens) is Tensor and cu_seqlens.device.type != "meta":
        pairs: int = sum((end - start) ** 2 for start, end in pairwise(cu_seqlens.tolist()))
    else:
        pairs = rows * rest[len(TILE_ROWS)]  # the longest group
    return 2 * heads * head_dim * pairs


def _layers(x: Tensor, tiles: Any, biases: Any, columns: Sequence[int], *_: Any, out_val: Any) -> int:
    return sum(2 * len(x) * inner * outer for inner, outer in pairwise((x.shape[1], *columns)))


def _hidden_gradient(grad: Tensor, tiles: Any, hidden: Tensor, *, out_val: Any) -> int:
    return 2 * grad.numel() * hidden.shape[1]


def _weight_gradient(grad: Tensor, x: Tensor, *_: Any, out_val: Any) -> int:
    return 2 * grad.numel() * x.shape[1]


def _linear(x: Tensor, *_: Any, out_val: Tensor) -> int:
    return 2 * x.numel() * out_val.shape[-1]


def _nothing(*_: Any, out_val: Any) -> int:
    return 0
