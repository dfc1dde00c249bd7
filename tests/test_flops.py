"""FLOPs that PyTorch counts are those of plain attention over the groups."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from autodiff_cases import BATCH, EXACT, LAYOUT, ROWS, cases, encoder
from conftest import tiny_vision
from hlip_kernels import (
    hier_attention,
    linear_of_pixels,
)
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import Spans


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("level", ["slice", "scan", "study"])
def test_flops_are_those_of_plain_attention_over_the_groups(level: Any, num_prefix: int) -> None:
    layout = LAYOUT.with_num_prefix(num_prefix)
    rows = layout.num_rows(level)
    qkv = torch.randn(rows, 3, 2, 16, requires_grad=True)
    with FlopCounterMode(display=False) as ours:
        out = hier_attention(qkv, layout, level)
    with FlopCounterMode(display=False) as ours_backward:
        out.sum().backward()
    spans = Spans(layout.cu_seqlens(level), layout.tiles(level), layout.max_seqlen(level))
    q, k, v = qkv.unbind(1)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    reference = BACKENDS["reference"]
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        out, lse = reference.forward(q, k, v, spans, spans, 0.25)
    with torch.no_grad(), FlopCounterMode(display=False) as plain_backward:
        reference.backward(grads, out, q, k, v, out, lse, spans, spans, 0.25, False)
    assert ours.get_total_flops() == plain.get_total_flops() > 0
    assert ours_backward.get_total_flops() == plain_backward.get_total_flops() > 0


def test_flops_of_meta_tensors_are_a_bound() -> None:
    layout = LAYOUT.to("meta")
    with FlopCounterMode(display=False) as counter:
        hier_attention(torch.empty(ROWS, 3, 2, 16, device="meta"), layout, "scan", backend="reference")
    assert counter.get_total_flops() == 4 * 2 * 16 * ROWS * LAYOUT.max_seqlen("scan")


def test_flops_of_an_encoder() -> None:
    model, config = encoder().float(), tiny_vision("scan+study")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(BATCH)
    layout = BATCH.layout.with_num_prefix(config.num_prefix)
    expected, width, hidden = 2 * layout.num_tokens * 4 * 8 * 8 * 48, 48, 48 * 4
    for level in config.levels:
        rows = layout.num_rows(level)
        expected += 2 * rows * width * (4 * width + 2 * hidden)
        expected += sum(4 * width * int(n + layout.num_prefix) ** 2 for n in layout.seqlens(level))
    assert counter.get_total_flops() == expected


def test_flops_of_linear_layers() -> None:
    """By oneDNN's products and by those for AMX, which fake tensors run anywhere."""
    patches = torch.zeros(7, 12, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        linear_of_pixels(patches, 115, 64, torch.randn(5, 12), torch.randn(5))
    assert counter.get_total_flops() == 2 * 7 * 12 * 5
    ops = torch.ops.hlip_kernels
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, hidden, y = (torch.empty(7, width, dtype=torch.bfloat16) for width in (12, 20, 5))
        first, second = ops.amx_tiles(torch.empty(20, 12), False), ops.amx_tiles(torch.empty(5, 20), False)
        biases, columns = [torch.empty(20), torch.empty(5)], [20, 5]
        totals = [0]
        for call in (
            lambda: ops.amx_layers(x, [first], biases[:1], columns[:1], True),
            lambda: ops.amx_layers(x, [first, second], biases, columns, False),
            lambda: ops.amx_mlp(x, [first, second], biases, columns),
            lambda: ops.amx_hidden_gradient(y, second, hidden),
            lambda: ops.amx_weight_gradient(y, hidden, torch.empty(5, 20), torch.empty(5), False),
        ):
            call()
            totals.append(counter.get_total_flops())
    one, both = 2 * 7 * 12 * 20, 2 * 7 * (12 * 20 + 20 * 5)
    assert [b - a for a, b in pairwise(totals)] == [one, both, both, 2 * 7 * 20 * 5, 2 * 7 * 20 * 5]


LATER = """
import importlib.util
import sys
import torch
import hlip_kernels
importlib.util.find_spec("torch.utils.flop_counter")  # looks, and imports nothing
assert "triton" not in sys.modules and "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import flop_registry
assert torch.ops.hlip_kernels.hier_attention in flop_registry
assert torch.ops.hlip_kernels.amx_mlp in flop_registry
assert not any(type(finder).__module__.startswith("hlip") for finder in sys.meta_path)
"""


def test_formulas_come_with_the_counter() -> None:
    """Whichever is imported first; and the counter's import is nobody's who does not ask for it."""
    earlier = "from torch.utils import flop_counter\nimport hlip_kernels, torch\n"
    earlier += "assert torch.ops.hlip_kernels.hier_attention_backward in flop_counter.flop_registry"
    for program in (LATER, earlier):
        subprocess.run([sys.executable, "-c", program], check=True)


def test_backward_asks_who_looks_by_itself() -> None:
    """Modes, transforms, dual and fake tensors that come between forward and backward meet the op."""
    op, inputs = EXACT["attention"]
    leaf = inputs[0].clone().requires_grad_()
    out = op(leaf)
    given = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, leaf, given, retain_graph=True)
    stacked = torch.stack([given, 2 * given])
    (batched,) = torch.autograd.grad(out, leaf, stacked, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([expected, 2 * expected]))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, leaf, given, retain_graph=True)
    assert counter.get_total_flops() > 0
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.autograd.grad(out, leaf, forward_ad.make_dual(given, given), retain_graph=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        (fake,) = torch.autograd.grad(out, leaf, torch.ones(out.shape, dtype=out.dtype))
    assert type(fake).__name__ == "FakeTensor" and fake.shape == leaf.shape


@pytest.mark.parametrize("name", ["attention", "norm"])
def test_another_default_device_changes_nothing(name: str) -> None:
    op, inputs = cases(torch.float32)[name]
    with torch.device("meta"):
        inside = op(*inputs)
    assert torch.equal(inside, op(*inputs))
