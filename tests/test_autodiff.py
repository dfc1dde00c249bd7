"""What PyTorch's own tools see of the ops and layers: transforms, modes of differentiation, hooks, FLOPs, traces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from autodiff_cases import EXACT, LAYOUT, Op, cases
from conftest import tiny_vision
from hlip.model.encoder import StudyEncoder
from hlip_kernels import (
    HierarchicalAttention,
)
from hlip_kernels import ops as library


@pytest.fixture(params=["functions", "ops"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a Function stands for an op, or all see the op as compilers do."""
    if request.param == "ops":
        monkeypatch.setattr(library, "unwatched", lambda *_: False)


FORWARD_MODE_WORKS = ("linear", "mlp", "pixels")  # PyTorch's own layers serve there
ONCE = [name for name in EXACT if name not in ("dense", "regroup")]  # these meet an op of PyTorch's first


def with_dual_tensors(op: Op, inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        out = op(*map(forward_ad.make_dual, inputs, tangents))
        return forward_ad.unpack_dual(out).tangent


FORWARD: dict[str, Callable[[Op, tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]] = {
    "jvp": lambda op, inputs, tangents: jvp(op, inputs, tangents)[1],
    "dual": with_dual_tensors,
    "no_grad": torch.no_grad()(with_dual_tensors),
    "requires_grad": lambda op, inputs, tangents: with_dual_tensors(
        op, tuple(x.clone().requires_grad_() for x in inputs), tangents
    ),
    "linearize": lambda op, inputs, tangents: linearize(op, *inputs)[1](*tangents),
    "jacfwd": lambda op, inputs, tangents: jacfwd(op)(*inputs).flatten(-inputs[0].dim()) @ tangents[0].flatten(),
    "hessian": lambda op, inputs, tangents: hessian(lambda x: op(x, *inputs[1:]).sum())(inputs[0]),
}


@pytest.mark.usefixtures("path")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("name", EXACT)
def test_forward_mode_is_refused_or_right(name: str, way: str, dtype: torch.dtype) -> None:
    op, inputs = cases(dtype)[name]
    torch.manual_seed(1)
    tangents = tuple(torch.randn(x.shape, dtype=torch.float64).to(dtype) for x in inputs)
    if way == "jacfwd":
        tangents = tangents[0], *(torch.zeros_like(x) for x in tangents[1:])
    if name not in FORWARD_MODE_WORKS:
        with pytest.raises(NotImplementedError, match=r"forward-mode|forward AD|forward mode AD"):
            FORWARD[way](op, inputs, tangents)
        return
    got = FORWARD[way](op, inputs, tangents)
    if way != "hessian":
        exact_op, exact_inputs = EXACT[name]
        with torch.no_grad():
            ahead, behind = (
                exact_op(*(x + sign * 1e-6 * t.double() for x, t in zip(exact_inputs, tangents, strict=True)))
                for sign in (1, -1)
            )
        tolerance = 1e-7 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(got.double(), (ahead - behind) / 2e-6, rtol=tolerance, atol=tolerance)


def test_forward_mode_is_refused_by_the_ops_themselves() -> None:
    qkv = EXACT["attention"][1][0]
    groups = (
        LAYOUT.cu_seqlens("scan"),
        *LAYOUT.tiles("scan"),
        LAYOUT.max_seqlen("scan"),
        0.25,
        "reference",
        False,
        "scan",
    )
    out, lse = torch.ops.hlip_kernels.hier_attention(qkv, *groups)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.ops.hlip_kernels.hier_attention_backward(forward_ad.make_dual(out, out), qkv, out, lse, *groups)


@pytest.mark.usefixtures("path")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", EXACT)
def test_torch_func_gives_the_gradients_of_backward(name: str) -> None:
    op, inputs = EXACT[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    expected = torch.autograd.grad(out.pow(2).sum(), leaves)
    numbers = tuple(range(len(inputs)))
    torch.testing.assert_close(grad(lambda *args: op(*args).pow(2).sum(), argnums=numbers)(*inputs), expected)
    torch.testing.assert_close(vjp(op, *inputs)[1](2 * out.detach()), expected)
    jacobians = jacrev(op, argnums=numbers)(*inputs)
    for jacobian, gradient in zip(jacobians, expected, strict=True):
        flat = 2 * out.detach().flatten() @ jacobian.reshape(out.numel(), -1)
        torch.testing.assert_close(flat.view_as(gradient), gradient)


@pytest.mark.usefixtures("path")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's segment_reduce
@pytest.mark.parametrize("name", EXACT)
def test_vmap_is_one_call_for_each(name: str) -> None:
    op, inputs = EXACT[name]
    last = [torch.stack([x, -x, x / 2], -1) for x in inputs]
    out = vmap(op, in_dims=-1)(*last)
    torch.testing.assert_close(out, torch.stack([op(*(x[..., i] for x in last)) for i in range(3)]))
    fixed = vmap(lambda x: grad(lambda y: op(y, *inputs[1:]).pow(2).sum())(x), in_dims=-1)(last[0])
    leaf = last[0][..., 2].clone().requires_grad_()
    torch.testing.assert_close(fixed[2], torch.autograd.grad(op(leaf, *inputs[1:]).pow(2).sum(), leaf)[0])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("total", [Tensor.sum, lambda out: out.pow(2).sum()], ids=["sum", "square"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ONCE)
def test_a_second_derivative_is_an_error(name: str, dtype: torch.dtype, total: Callable[[Tensor], Tensor]) -> None:
    op, inputs = cases(dtype)[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(total(op(*leaves)), leaves, create_graph=True)
    if name == "pixels" and total is Tensor.sum:  # linear: no gradient depends on anything
        return
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(sum(g.pow(2).sum() for g in first if g.requires_grad), leaves)


@pytest.mark.usefixtures("path")
def test_a_second_derivative_by_torch_func_is_an_error() -> None:
    for name in ("attention", "norm"):
        op, inputs = EXACT[name]
        with pytest.raises(RuntimeError, match="once only"):
            grad(lambda x, op=op, inputs=inputs: grad(lambda y: op(y, *inputs[1:]).pow(2).sum())(x).sum())(inputs[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["attention", "norm", "finer", "dense", "regroup"])
def test_tracing_would_keep_the_groups(name: str) -> None:
    op, inputs = EXACT[name]
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.jit.trace(op, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_is_refused() -> None:
    for module in (HierarchicalAttention(8, 2), StudyEncoder(tiny_vision())):
        with pytest.raises(NotImplementedError, match=r"torch\.export"):
            torch.jit.script(module)


@pytest.mark.parametrize("name", ["attention", "layer"])
def test_export(name: str) -> None:
    op, inputs = EXACT[name]

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(x)

    torch.testing.assert_close(torch.export.export(Model(), inputs).module()(*inputs), op(*inputs))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["attention", "norm", "finer", "regroup"])
def test_rows_that_are_not_floating_point(name: str, dtype: torch.dtype) -> None:
    op, inputs = EXACT[name]
    with pytest.raises(ValueError, match="floating-point"):
        op(*(x.to(dtype) for x in inputs))
