"""Hooks, parametrizations and exchanged layers of an encoder are seen and change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations
from torch.testing._internal.two_tensor import TwoTensor

import hlip
from autodiff_cases import BATCH, LAYOUT, ROWS, encoder
from hlip.model.encoder import StudyEncoder
from hlip_kernels import (
    HierarchicalAttention,
    is_fusible,
)


def loss(out: Tensor) -> Tensor:
    """One that is not the same for all normalised rows."""
    return (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()).sum()


def out_and_grads(model: StudyEncoder) -> list[Tensor]:
    out = model(BATCH)
    leaves = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(out), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True))]


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Those that are called: not lists of them, nor what stands for a norm of queries and keys that there is not."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, (nn.ModuleList, nn.Identity)) and name
    }


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("head", ["token", "dinotxt", "attention_pool", "weighted_average"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward_pre", "global"])
def test_every_module_is_seen_and_changes_nothing(kind: str, head: str) -> None:
    model = encoder(head)
    expected = out_and_grads(model)
    seen: set[nn.Module] = set()

    def see(module: nn.Module, *_: Any) -> None:
        seen.add(module)

    for module in modules(model).values():
        if kind == "forward":
            module.register_forward_hook(see)
        elif kind == "pre":
            module.register_forward_pre_hook(see)
        elif kind == "backward":
            module.register_full_backward_hook(see)
        elif kind == "backward_pre":
            module.register_full_backward_pre_hook(see)
    handle = register_module_forward_hook(see) if kind == "global" else None
    try:
        torch.testing.assert_close(out_and_grads(model), expected)
    finally:
        if handle is not None:
            handle.remove()
    names = modules(model)
    blind = {"blocks"}
    if "backward" in kind:  # takes hooks' tensors apart: a Stream is none, nor has uint8 a gradient
        blind |= {name for name, module in names.items() if type(module).__name__ in ("Block", "PatchEmbed", "Conv3d")}
    assert {name for name, module in names.items() if module not in seen} <= blind


LAYERS = [f"blocks.1.{name}" for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.mark.parametrize("name", [*LAYERS, "norm", "patch_embed.proj"])
@pytest.mark.parametrize("head", ["token", "dinotxt"])
def test_a_hook_that_doubles_is_a_layer_with_doubled_weights(name: str, head: str) -> None:
    model, doubled = encoder(head), encoder(head)
    layer, given = doubled.get_submodule(name), model.get_submodule(name)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    expected = dict(zip(["out", *(key for key, _ in model.named_parameters())], out_and_grads(doubled), strict=True))
    for key in expected:  # of the layer's own parameters, half as large where they are doubled
        if key.startswith(f"{name}."):
            expected[key] = expected[key] * 2
    plain = out_and_grads(model)[0]
    handle = given.register_forward_hook(lambda module, args, out: 2 * out)  # later than a first call
    got = dict(zip(expected, out_and_grads(model), strict=True))
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got["out"], plain)
    handle.remove()
    assert torch.equal(out_and_grads(model)[0], plain)


class Adapted(nn.Module):
    """As adapters of low rank are put around a layer, whose weight and bias they hand on."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@pytest.mark.parametrize("name", [name for name in LAYERS if "norm" not in name])
def test_a_layer_in_the_place_of_another_computes(name: str) -> None:
    model, merged = encoder(), encoder()
    adapted = Adapted(model.get_submodule(name))  # type: ignore[arg-type]
    model.set_submodule(name, adapted)
    with torch.no_grad():
        merged.get_parameter(f"{name}.weight").add_(adapted.up.weight @ adapted.down.weight)
    torch.testing.assert_close(model(BATCH), merged(BATCH))
    loss(model(BATCH)).backward()
    assert adapted.up.weight.grad is not None and adapted.up.weight.grad.abs().max() > 0


class Shift(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("name", ["blocks.1.norm1", "blocks.1.norm2", "norm"])
def test_a_norm_of_another_class_computes(name: str) -> None:
    model, shifted = encoder("dinotxt"), encoder("dinotxt")
    norm = Shift(48, eps=1e-6, dtype=torch.float64)
    model.set_submodule(name, norm)
    with torch.no_grad():
        shifted.get_parameter(f"{name}.bias").add_(1)
    torch.testing.assert_close(out_and_grads(model), out_and_grads(shifted))


def test_a_forward_of_ones_own_computes() -> None:
    """As libraries that move weights between devices wrap it: on the object."""
    model = encoder()
    plain = model(BATCH)
    proj = model.get_submodule("blocks.1.attn.proj")
    forward = proj.forward
    proj.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    assert not torch.allclose(model(BATCH), plain)


def test_parametrized_weights_are_trained() -> None:
    model = encoder()
    plain = model(BATCH)
    for name in ("blocks.0.attn.proj", "blocks.1.mlp.fc1"):
        parametrizations.weight_norm(model.get_submodule(name))
    torch.testing.assert_close(model(BATCH), plain)
    loss(model(BATCH)).backward()
    scale = model.get_parameter("blocks.0.attn.proj.parametrizations.weight.original0")
    assert scale.grad is not None and scale.grad.abs().max() > 0


def test_a_norm_of_queries_that_comes_later_computes() -> None:
    given, later = (HierarchicalAttention(8, 2, qk_norm=qk_norm).double() for qk_norm in (True, False))
    later.q_norm, later.k_norm = given.q_norm, given.k_norm
    later.load_state_dict(given.state_dict())
    x = torch.randn(ROWS, 8, dtype=torch.float64)
    assert torch.equal(later(x, LAYOUT, "scan"), given(x, LAYOUT, "scan"))


def test_sharded_and_quantized_weights_are_not_read() -> None:
    linear = nn.Linear(4, 4)
    assert is_fusible(linear)
    linear.weight = nn.Parameter(TwoTensor(torch.randn(4, 4), torch.randn(4, 4)))  # a tensor made of two
    assert not is_fusible(linear)


def test_the_text_tower_is_seen(tiny_model: hlip.HLIPModel) -> None:
    seen: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda module, *_: seen.append(module)) for m in tiny_model.children()]
    with torch.no_grad():
        tiny_model(BATCH, ["a mass", "no mass"])
    for handle in handles:
        handle.remove()
    assert set(seen) == {tiny_model.visual, tiny_model.text}


def test_hooks_do_not_break_the_graph() -> None:
    layer = HierarchicalAttention(8, 2).double()
    x = torch.randn(ROWS, 8, dtype=torch.float64)
    seen = []
    for hooked in (False, True):
        torch._dynamo.reset()
        if hooked:
            layer.proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, LAYOUT, "scan"), layer(x, LAYOUT, "scan"))
    assert seen == [(ROWS, 8)] * 2
