"""Native linear layers: any shape, number of threads and length."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import use_native
from hlip_kernels import StudyLayout, add_regroup_norm
from hlip_kernels import products as kernels
from hlip_kernels.backends import native_norm_gelu
from hlip_kernels.native import ISAS, native
from linear_cases import DTYPES, Layers, _fill_new_memory_with_nan, amx, assert_as_exact, rows  # noqa: F401

needs_library = pytest.mark.skipif(bool(native().reason), reason=native().reason)


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
