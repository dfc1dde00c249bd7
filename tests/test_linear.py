"""Linear layers, GELU and the MLP in their forms for CPUs, against the plain layers in float64."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hlip_kernels import linear_of_pixels, mlp_of_norm
from hlip_kernels import products as kernels
from hlip_kernels.linear import linear
from linear_cases import DTYPES, WIDTH, Layers, _fill_new_memory_with_nan, amx, assert_as_exact, rows  # noqa: F401

LENGTHS = [1, 15, kernels.ROWS, kernels.ROWS_BACKWARD + 17]  # the last in several runs of rows in both directions


@pytest.fixture(params=["own", "amx"])
def processor(request: pytest.FixtureRequest) -> None:
    if request.param == "amx":
        request.getfixturevalue("amx")


def results(layers: Layers, x: Tensor, plain: bool, autocast: bool) -> dict[str, Tensor]:
    """The output, and the gradients of all parameters and of the input."""
    layers.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layers(x, plain)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weights).sum().backward()
    assert x.grad is not None
    grads = {f"d{name}": p.grad.clone() for name, p in layers.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad, **grads}


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("length", LENGTHS)
def test_layers_are_as_exact_as_plain_ones(length: int, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    layers = Layers().to(dtype)
    x = rows(length, dtype)
    ours, eager = (results(layers, x, plain, kind == "autocast") for plain in (False, True))
    exact = results(layers.double(), x.double(), True, False)
    assert_as_exact(ours, eager, exact)


@pytest.fixture
def gpu_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the forms for GPUs, their Triton kernels in the interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "on_cpu", lambda *_: False)
    monkeypatch.setattr(kernels, "runs", lambda x, *_: [slice(0, len(x))])
    monkeypatch.setattr(kernels, "has_triton", lambda _: True)


@pytest.mark.usefixtures("gpu_forms")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("length", [1, 70])
def test_the_forms_for_gpus_are_as_exact_as_plain_layers(length: int, kind: str) -> None:
    test_layers_are_as_exact_as_plain_ones(length, kind)


class Conversions(TorchDispatchMode):
    """Counts the tensors that are made in another dtype."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].dtype != (kwargs or {})["dtype"]
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("gpu_forms")
def test_autocast_converts_a_parameter_once_for_as_long_as_it_stays_the_same() -> None:
    layers, x = Layers(), rows(5, torch.bfloat16)
    y = x.float()

    def step() -> tuple[int, int]:
        """Parameters converted in forward, and in backward, where gradients of weights are made float32."""
        counts = []
        with Conversions() as conversions:
            with torch.autocast("cpu", torch.bfloat16):
                out = mlp_of_norm(layers.mlp.fc1, layers.mlp.fc2, layers.norm, y, x.requires_grad_())
            counts.append(conversions.count)
            out.sum().backward()
        return counts[0], conversions.count - counts[0] - 2

    assert step() == (4, 0)
    with kernels.hold_weights():
        assert [step(), step()] == [(4, 0), (0, 0)]
        with torch.no_grad():
            layers.mlp.fc1.weight.mul_(2)
            expected = layers.mlp.fc2(F.gelu(layers.mlp.fc1(y)))
        assert step() == (1, 0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got = mlp_of_norm(layers.mlp.fc1, layers.mlp.fc2, layers.norm, y, x)
        torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.usefixtures("gpu_forms")
def test_held_weights_follow_an_optimizer(fused: bool) -> None:
    """A fused one counts no version of its parameters up."""
    losses = []
    for context in (contextlib.nullcontext, kernels.hold_weights):
        layers, x = Layers(), rows(5, torch.float32)
        optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1, fused=fused)
        with context():
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = layers(x, False).float().square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses.append(loss.detach())
    assert torch.equal(*losses)


def test_layers_compile_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where eager products could give their results in another dtype."""
    monkeypatch.setattr(kernels, "on_cpu", lambda *_: False)
    monkeypatch.setattr(kernels, "MM_WIDENS", True)
    torch._dynamo.reset()
    layers, x = Layers(), rows(70, torch.float32)
    eager, exact = results(layers, x, True, True), results(Layers().double(), x.double(), True, False)
    compiled = results(torch.compile(layers, fullgraph=True, backend="aot_eager"), x, False, True)  # type: ignore[arg-type]
    assert_as_exact({name.replace("_orig_mod.", ""): value for name, value in compiled.items()}, eager, exact)


@pytest.mark.usefixtures("gpu_forms")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_keep_no_converted_weights(reentrant: bool) -> None:
    layers, x = Layers(), rows(5, torch.float32).requires_grad_()
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        out = checkpoint(layers, x, False, use_reentrant=reentrant)
    assert not [t for t in kept if t.dtype == torch.bfloat16]
    out.float().square().mean().backward()
    assert all(p.grad is not None for p in layers.mlp.parameters())


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("autocast", [False, True])
def test_inference_is_as_exact_as_plain_layers(autocast: bool) -> None:
    layers, x = Layers(), rows(LENGTHS[-1], torch.float32)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, eager = ({"out": layers(x, plain)} for plain in (False, True))
            with kernels.hold_weights():
                held = [{"out": layers(x, False)} for _ in range(2)]
        exact = {"out": layers.double()(x.double(), True)}
    for each in (ours, *held):
        assert_as_exact(each, eager, exact)
    assert torch.equal(held[0]["out"], held[1]["out"])


@pytest.mark.usefixtures("processor")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("shape", [(40, 0, 24), (40, 32, 0), (0, 32, 24), (1500, 0, 24), (1500, 24, 0), (1500, 0, 0)])
def test_layers_of_nothing_give_what_plain_ones_give(shape: tuple[int, int, int], kind: str) -> None:
    """Without rows, inputs or outputs; few rows, and so many that a weight is packed for one product."""
    length, inner, hidden = shape
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(inner, hidden).to(dtype), nn.Linear(hidden, 5).to(dtype)
    x = torch.randn(length, inner).to(dtype).requires_grad_()
    norm = nn.LayerNorm(inner).to(dtype)
    leaves = [x, *fc1.parameters(), *fc2.parameters()]

    def plain() -> Tensor:
        return fc2(F.gelu(fc1(norm(x))))

    def layers() -> Tensor:
        return linear(fc2, F.gelu(linear(fc1, norm(x))))

    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        for function in (layers, lambda: mlp_of_norm(fc1, fc2, norm, x, norm(x))):
            outs = [f() for f in (function, plain)]
            grads = [torch.autograd.grad(out.float().sum(), leaves) for out in outs]
            for ours, expected in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
                assert ours.dtype == expected.dtype
                torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)
        with torch.no_grad():
            for held in (contextlib.nullcontext(), kernels.hold_weights()):
                with held:
                    torch.testing.assert_close(kernels.mlp(norm(x), fc1, fc2), plain(), rtol=2e-2, atol=2e-2)
                    one = kernels.linear(x, fc1.weight, fc1.bias, gelu=True)
                    torch.testing.assert_close(one, F.gelu(fc1(x)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("frozen", ["qkv", "mlp.fc1", "mlp.fc2", "proj"])
def test_frozen_layers_get_no_gradient_and_pass_it_on(frozen: str) -> None:
    layers, x = Layers(), rows(LENGTHS[-1], torch.float32)
    whole = results(layers, x, False, False)
    layers.get_submodule(frozen).requires_grad_(False)
    part = results(layers, x, False, False)
    assert part.keys() == {name for name in whole if not name.startswith(f"d{frozen}.")}
    assert all(torch.equal(value, whole[name]) for name, value in part.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_are_projected_as_exactly_as_by_a_plain_layer(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (LENGTHS[-1], 64), dtype=torch.uint8, generator=generator)
    found: dict[str, dict[str, Tensor]] = {}
    for name, kind in (("ours", dtype), ("eager", dtype), ("exact", torch.float64)):
        layer = Layers().qkv
        layer = nn.Linear(64, WIDTH).to(kind)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(WIDTH, 64, generator=torch.Generator().manual_seed(1)).to(dtype))
            layer.bias.fill_(0.5)
        if name == "ours":
            out = linear_of_pixels(patches, 115, 64, layer.weight, layer.bias)
        else:
            out = layer((patches.to(kind) - 115) / 64)
        out.backward(torch.ones_like(out))
        assert layer.weight.grad is not None and layer.bias.grad is not None
        found[name] = {"out": out.detach(), "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    assert_as_exact(**found)
