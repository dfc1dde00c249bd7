"""What PyTorch's own tools see of the ops and layers: transforms, modes of differentiation, hooks, FLOPs, traces."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import hlip
from conftest import random_study, tiny_vision
from hlip.model.encoder import Mlp, StudyEncoder
from hlip_kernels import (
    HierarchicalAttention,
    StudyLayout,
    add_regroup_norm,
    hier_attention,
    is_fusible,
    linear_of_norm,
    linear_of_pixels,
    mlp_of_norm,
    regroup,
)
from hlip_kernels import ops as library
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import Spans
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


@pytest.fixture(params=["functions", "ops"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a Function stands for an op, or all see the op as compilers do."""
    if request.param == "ops":
        monkeypatch.setattr(library, "unwatched", lambda *_: False)


EXACT = cases(torch.float64)
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


# ---- Modules: hooks, and what was put in their place


def encoder(head: str = "token") -> StudyEncoder:
    torch.manual_seed(0)
    return StudyEncoder(tiny_vision("scan+study", head=head)).double().eval()


BATCH = hlip.pack([random_study([(8, 16, 16)] * 2), random_study([(4, 16, 16)], seed=1)], (4, 8, 8))


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


# ---- FLOPs


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
