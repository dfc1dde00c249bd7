"""Linear layers, GELU and the MLP in their forms for CPUs, against the plain layers in float64."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from conftest import use_native
from hlip.model.encoder import Mlp
from hlip_kernels import StudyLayout, add_regroup_norm, linear_of_norm, linear_of_pixels, mlp_of_norm
from hlip_kernels import products as kernels
from hlip_kernels.backends import native_norm_gelu
from hlip_kernels.linear import linear
from hlip_kernels.native import ISAS, native

WIDTH, HIDDEN = 24, 72
DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [1, 15, kernels.ROWS, kernels.ROWS_BACKWARD + 17]  # the last in several runs of rows in both directions
needs_library = pytest.mark.skipif(bool(native().reason), reason=native().reason)


@pytest.fixture(autouse=True)
def _fill_new_memory_with_nan() -> object:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This processor's, or an emulated one's."""
    if native().isa != "amx":
        use_native(monkeypatch, request.getfixturevalue("emulated_native"))


@pytest.fixture(params=["own", "amx"])
def processor(request: pytest.FixtureRequest) -> None:
    if request.param == "amx":
        request.getfixturevalue("amx")


def assert_as_exact(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Error at most 2x (results) or 3x (gradients) that of eager PyTorch, plus one rounding."""
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        errors = [float((x.double() - exact[name]).abs().max()) for x in (value, eager[name])]
        rounding = torch.finfo(value.dtype).eps * float(exact[name].abs().max())
        assert errors[0] <= (3 if name.startswith("d") else 2) * errors[1] + rounding, (name, errors, rounding)


class Layers(nn.Module):
    """What a block does to its rows, but for attention: with our functions, or with PyTorch's modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(2 * WIDTH, WIDTH)
        self.mlp = Mlp(WIDTH, HIDDEN)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, plain: bool) -> Tensor:
        y = self.norm(x)
        if plain:
            return self.proj(self.qkv(y)) + self.mlp(y)
        update = linear(self.proj, linear_of_norm(self.qkv, self.norm, x, y))
        return update + mlp_of_norm(self.mlp.fc1, self.mlp.fc2, self.norm, x, y)


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


def rows(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)


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


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("widths", [(1, 8), (0, 40), (40, 0), (24, 72), (33, 100), (416, 520), (3000, 64)])
@pytest.mark.parametrize("length", [0, 1, 31, 33, 700])
def test_native_linears_of_any_shape(length: int, widths: tuple[int, int]) -> None:
    """One layer, one with a GELU, two, the transposed weight, gradients of the hidden rows and of a weight, against
    float64."""
    inner, columns = widths
    torch.manual_seed(0)
    x, grad = (torch.randn(length, width).bfloat16() for width in widths)
    weight1 = (torch.randn(columns, inner) * max(inner, 1) ** -0.5).bfloat16()
    weight2 = (torch.randn(inner, columns) * max(columns, 1) ** -0.5).bfloat16()
    biases = [torch.randn(columns), torch.randn(inner)]
    ops = torch.ops.hlip_kernels
    tiles = [ops.amx_tiles(weight, False) for weight in (weight1, weight2)]

    def formulas(dtype: torch.dtype) -> dict[str, Tensor]:
        x_, w1, w2, g, b1, b2 = (t.to(dtype) for t in (x, weight1, weight2, grad, *biases))
        one = F.linear(x_, w1, b1)
        two = F.linear(F.gelu(one), w2, b2)
        return {
            "one": one, "gelu": F.gelu(one), "two": two, "turned": x_ @ w2, "active": F.gelu(g),
            "dhidden": torch.ops.aten.gelu_backward(x_ @ w2, g), "dweight": g.T @ x_, "dbias": g.sum(0),
        }  # fmt: skip

    weight, bias = torch.full((columns, inner), 5.0), torch.full((columns,), 5.0)
    ops.amx_weight_gradient(grad, x, weight, bias, False)
    turned = ops.amx_tiles(weight2, True)
    active, dhidden = ops.amx_hidden_gradient(x, turned, grad)
    ours = {
        "active": active,
        "dhidden": dhidden,
        "one": ops.amx_layers(x, tiles[:1], biases[:1], [columns], False),
        "gelu": ops.amx_layers(x, tiles[:1], biases[:1], [columns], True),
        "two": ops.amx_layers(x, tiles, biases, [columns, inner], False),
        "turned": ops.amx_layers(x, [turned], [], [columns], False),
        "dweight": weight.bfloat16(),
        "dbias": bias.bfloat16(),
    }
    kept, hidden = ops.amx_mlp(x, tiles, biases, [columns, inner])
    assert torch.equal(kept, ours["two"])
    assert torch.equal(hidden, ours["one"])
    if not length * inner * columns:  # sums of nothing
        exact = formulas(torch.float64)
        for name, value in ours.items():
            torch.testing.assert_close(value.double(), exact[name], rtol=2e-2, atol=2e-2)
        return
    assert_as_exact(ours, formulas(torch.bfloat16), formulas(torch.float64))
    ops.amx_weight_gradient(grad, x, weight, bias, True)
    torch.testing.assert_close(weight, 2 * grad.float().T @ x.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias, 2 * grad.float().sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("amx")
def test_native_linears_do_not_depend_on_threads(many_threads: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1500, 96).bfloat16(), torch.randn(160, 96).bfloat16()
    ops, found = torch.ops.hlip_kernels, []
    for threads in (1, 2, 5):
        many_threads(threads)
        tiles = ops.amx_tiles(weight, False)
        y = ops.amx_layers(x, [tiles], [torch.ones(160)], [160], True)
        gradients = torch.empty(160, 96), torch.empty(160)
        ops.amx_weight_gradient(y, x, *gradients, False)
        of_hidden = ops.amx_hidden_gradient(x, tiles, y)
        found.append([tiles, y, *gradients, *of_hidden])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("amx")
def test_native_gelu_of_extremes() -> None:
    """Values are biases: what is multiplied is zero."""
    x = torch.cat([torch.linspace(-20, 20, 2045), torch.tensor([3e38, -3e38, float("nan")])])
    ops = torch.ops.hlip_kernels
    tiles = ops.amx_tiles(torch.zeros(len(x), 32).bfloat16(), False)
    y = ops.amx_layers(torch.zeros(1, 32).bfloat16(), [tiles], [x], [len(x)], True)[0].double()
    exact = x.double() * torch.special.erfc(-x.double() * 0.5**0.5) / 2
    near = x >= -5
    assert float((y / exact - 1).abs()[near & (x != 0)].max()) <= 5e-3
    assert float(y[~near & ~x.isnan()].abs().max()) <= 2e-6
    assert y[-1].isnan()


@pytest.mark.usefixtures("amx")
def test_native_gradient_of_gelu_at_extremes() -> None:
    """What is multiplied, and its gradient, is one."""
    x = torch.cat([torch.linspace(-20, 20, 2046), torch.tensor([3e38, -3e38, float("nan")])]).bfloat16()
    ops = torch.ops.hlip_kernels
    tiles = ops.amx_tiles(torch.ones(len(x), 1).bfloat16(), False)
    active, slope = ops.amx_hidden_gradient(torch.ones(1, 1).bfloat16(), tiles, x[None])
    wide = x.double()
    phi = torch.special.erfc(-wide * 0.5**0.5) / 2
    exact = {"active": wide * phi, "dx": phi + wide * torch.exp(-(wide**2) / 2) * (2 * torch.pi) ** -0.5}
    eager = {"active": F.gelu(x), "dx": torch.ops.aten.gelu_backward(torch.ones_like(x), x)}
    ours = {"active": active[0], "dx": slope[0]}
    finite = slice(0, -3)
    assert_as_exact(*({name: t[finite] for name, t in each.items()} for each in (ours, eager, exact)))
    assert active[0, -3:-1].tolist() == [float(x[-3]), 0]
    assert slope[0, -3:-1].tolist() == [1, 0]
    assert active[0, -1].isnan() and slope[0, -1].isnan()


@pytest.mark.usefixtures("amx")
def test_opcheck() -> None:
    x, weight = torch.randn(5, 40).bfloat16(), torch.randn(24, 40).bfloat16()
    ops = torch.ops.hlip_kernels
    torch.library.opcheck(ops.amx_tiles.default, (weight, False))
    tiles = ops.amx_tiles(weight, False)
    torch.library.opcheck(ops.amx_layers.default, (x, [tiles], [torch.zeros(24)], [24], True))
    y = ops.amx_layers(x, [tiles], [], [24], False)
    turned = ops.amx_tiles(weight, True)
    torch.library.opcheck(ops.amx_mlp.default, (x, [tiles, turned], [torch.zeros(24), torch.zeros(40)], [24, 40]))
    torch.library.opcheck(ops.amx_hidden_gradient.default, (y, turned, x))
    torch.library.opcheck(ops.amx_weight_gradient.default, (y, x, torch.zeros(24, 40), torch.zeros(24), True))


class Calls(TorchDispatchMode):
    """Counts the calls of some ops."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.count = names, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in self.names
        return func(*args, **(kwargs or {}))


def test_weights_are_converted_once_while_they_are_held_and_anew_after() -> None:
    layers, x = Layers(), rows(8, torch.float32)
    names = ("mkldnn._reorder_linear_weight.default", "hlip_kernels.amx_tiles.default")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with kernels.hold_weights(), Calls(*names) as calls:
            for _ in range(3):
                before = layers(x, False)
        assert calls.count == (4 if kernels.on_cpu(x, torch.bfloat16) else 0)
        for parameter in layers.parameters():
            parameter.mul_(2)
        after = layers(x, False)
        with kernels.hold_weights():
            assert (layers(x, False) - after).norm() <= 1e-2 * after.norm()
    assert (after - before).norm() > before.norm()


def isas() -> list[str]:
    return list(ISAS[: ISAS.index(native().isa) + 1]) if native().isa else []


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_gelu(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    use_native(monkeypatch, native()._replace(isa=isa))
    x = torch.cat(
        [torch.linspace(-15, 15, 100_003), torch.tensor([0.0, -0.0, 40.0, -40.0, float("inf"), float("nan")])]
    )
    x = x.to(dtype)
    grad = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = x.double().requires_grad_()
    y = wide * torch.special.erfc(-wide * 0.5**0.5) / 2
    exact = {"y": y, "dx": torch.autograd.grad(y, wide, grad.double())[0]}
    eager = {"y": F.gelu(x), "dx": torch.ops.aten.gelu_backward(grad, x)}
    ours = {"y": native_norm_gelu.gelu_backward_(grad, x), "dx": grad}
    finite = slice(0, -2)
    assert_as_exact(*({name: t[finite].detach() for name, t in each.items()} for each in (ours, eager, exact)))
    assert ours["y"][-2] == float("inf")
    assert ours["y"][-1].isnan() and ours["dx"][-1].isnan()
    tail = (x >= -12) & (x < 0)  # relatively exact, too, where PyTorch's differences of nearly equal numbers are not
    wrong = (ours["y"].double() / exact["y"].detach() - 1).abs()[tail]
    assert float(wrong.max()) <= (4e-6 if dtype == torch.float32 else 4e-3)


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("width", [1, 33, 768])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_normalised_again_have_the_same_bits(
    isa: str, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_native(monkeypatch, native()._replace(isa=isa))
    layout = StudyLayout.from_grids([[(2, 3, 3)] * 2])
    x, weight, bias = torch.randn(38, width).to(dtype), torch.randn(width), torch.randn(width)
    for kind in DTYPES:
        nothing = torch.zeros(38, width, dtype=kind)
        same, y = add_regroup_norm(x, nothing, layout, "scan", "scan", weight, bias, backend="native")
        assert torch.equal(same, x)
        assert torch.equal(native_norm_gelu.normalised(x, weight, bias, 1e-6, kind), y)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 15, 63, 64, 65, 4095, 4097])
def test_gelu_of_any_length_writes_no_more(length: int, dtype: torch.dtype) -> None:
    x, grad = torch.randn(length + 8).to(dtype), torch.ones(length + 8).to(dtype)
    expected = torch.ops.aten.gelu_backward(grad, x)
    y = native_norm_gelu.gelu_backward_(grad[:length], x[:length])
    torch.testing.assert_close(y, F.gelu(x[:length]))
    torch.testing.assert_close(grad, torch.cat([expected[:length], torch.ones(8).to(dtype)]))


@needs_library
def test_any_number_of_threads_gives_the_same_bits(many_threads: Callable[[int], None]) -> None:
    found = []
    for threads in (1, 2, 5):
        many_threads(threads)
        grad, x = (rows(3000, torch.float32) for _ in range(2))
        found.append([native_norm_gelu.gelu_backward_(grad, x), grad])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.fixture
def many_threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


FAULTS = """
import resource, torch
from hlip.model.memory import keep_memory, release_memory

def faults(rounds):
    '''In each of the rounds, of tensors of more than the 32 MiB from which memory is mapped.'''
    counts = [0] * (rounds + 1)
    for i in range(rounds + 1):
        counts[i] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        a = torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
        b = torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
        del a, b
    return [after - before for before, after in zip(counts, counts[1:])]

keep_memory()
release_memory()
print(faults(3)[-1])
keep_memory()
print(faults(10)[-1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    released, kept = map(int, run.stdout.split())
    assert kept <= released / 10
