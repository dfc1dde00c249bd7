"""What a GPU would run, up to its kernels, on fake CUDA tensors: devices, dtypes, shapes and the choice of backend.

The functions that `fake_cuda` calls run in another process, and return what is to be checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hlip
from conftest import random_study, tiny_vision
from fake_cuda import fake_mode
from hlip.model.config import Head, ModelConfig, TextConfig
from hlip.model.encoder import StudyEncoder
from hlip.model.plan import TokenBatch
from hlip.objective import Clip, Outputs
from hlip.train.step import MicroBatch
from hlip_kernels import Level, StudyLayout, add_regroup_norm, hier_attention

HEADS, HEAD_DIM, NUM_PREFIX = 2, 32, 2
GRIDS = [[(2, 5, 7), (1, 9, 9)], [(3, 4, 4)]]
CUDA = torch.device("cuda:0")
Call = Callable[..., Any]
Facts = tuple[torch.Size, torch.dtype, torch.device]


class SeenBackends(TorchDispatchMode):
    """The `backend` argument of every attention op that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hlip_kernels":
            self.names.append(next(x for x in args if isinstance(x, str)))
        return func(*args, **(kwargs or {}))


def facts(x: Tensor) -> Facts:
    assert isinstance(x, FakeTensor)
    return x.shape, x.dtype, x.device


def make_layout() -> StudyLayout:
    return StudyLayout.from_grids(GRIDS, NUM_PREFIX)


def num_rows(level: Level) -> int:
    return make_layout().num_groups(level) * NUM_PREFIX + make_layout().num_tokens


def moved_layout() -> tuple[torch.device, list[Facts]]:
    layout = make_layout()
    with fake_mode():
        moved = layout.to("cuda")
        tensors = [moved.cu_seqlens("scan"), moved.children("slice", "study"), *moved.tiles("slice")]
        return moved.device, [facts(x) for x in tensors]


def test_layout(fake_cuda: Call) -> None:
    device, tensors = fake_cuda(moved_layout)
    layout = make_layout()
    assert device == CUDA
    expected = [layout.cu_seqlens("scan"), layout.children("slice", "study"), *layout.tiles("slice")]
    assert tensors == [(x.shape, torch.int32, CUDA) for x in expected]


def attention(level: Level, dtype: torch.dtype) -> tuple[Facts, list[str]]:
    layout = make_layout()
    with fake_mode(), SeenBackends() as seen:
        qkv = torch.empty(num_rows(level), 3, HEADS, HEAD_DIM, dtype=dtype, device="cuda")
        return facts(hier_attention(qkv, layout.to("cuda"), level)), seen.names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", ["slice", "scan", "study"])
def test_attention_takes_triton(fake_cuda: Call, level: Level, dtype: torch.dtype) -> None:
    out, backends = fake_cuda(attention, level, dtype)
    assert out == ((num_rows(level), HEADS, HEAD_DIM), dtype, CUDA)
    assert backends == ["triton"]


def attention_backward(dtype: torch.dtype) -> tuple[Facts, Facts]:
    layout = make_layout()
    with fake_mode():
        moved = layout.to("cuda")
        qkv = torch.empty(num_rows("scan"), 3, HEADS, HEAD_DIM, dtype=dtype, device="cuda")
        groups = moved.cu_seqlens("scan"), *moved.tiles("scan"), layout.max_seqlen("scan")
        settings = 0.25, "triton", False, "scan"
        out, lse = torch.ops.hlip_kernels.hier_attention(qkv, *groups, *settings)
        grad = torch.ops.hlip_kernels.hier_attention_backward(torch.empty_like(out), qkv, out, lse, *groups, *settings)
        return facts(lse), facts(grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_backward(fake_cuda: Call, dtype: torch.dtype) -> None:
    lse, grad = fake_cuda(attention_backward, dtype)
    assert lse == ((HEADS, num_rows("scan")), torch.float32, CUDA)
    assert grad == ((num_rows("scan"), 3, HEADS, HEAD_DIM), dtype, CUDA)


def attention_with_the_layout_left_behind() -> None:
    layout = make_layout()
    with fake_mode():
        qkv = torch.empty(num_rows("scan"), 3, HEADS, HEAD_DIM, device="cuda")
        hier_attention(qkv, layout, "scan")


def test_mixed_devices_are_refused(fake_cuda: Call) -> None:
    with pytest.raises(ValueError, match=r"qkv is on cuda:0, the layout on cpu; move one with \.to\(device\)"):
        fake_cuda(attention_with_the_layout_left_behind)


def moved_batch() -> tuple[Facts, torch.device]:
    batch = hlip.pack([random_study([(8, 16, 16)] * 3), random_study([(4, 16, 24)], 1)], (4, 8, 8))
    with fake_mode():
        moved = batch.to("cuda")
        return facts(moved.patches), moved.layout.device


def test_batch(fake_cuda: Call) -> None:
    patches, device = fake_cuda(moved_batch)
    assert patches == ((30, 256), torch.uint8, CUDA)
    assert device == CUDA


def make_encoder() -> tuple[StudyEncoder, TokenBatch]:
    encoder = StudyEncoder(tiny_vision("slice+scan+study", num_prefix=2, drop_path=0.2, patch_dropout=0.2)).train()
    batch = hlip.pack([random_study([(8, 16, 16)] * 3), random_study([(4, 16, 24)], 1)], (4, 8, 8))
    return encoder, encoder.plan(batch)


def encoder_and_loss(dtype: torch.dtype) -> tuple[Facts, Facts, list[str]]:
    encoder, tokens = make_encoder()
    with fake_mode(), SeenBackends() as seen:
        out = encoder.to("cuda", dtype)(tokens.to("cuda"))
        embedding = F.normalize(out[:, 0].float(), dim=-1)
        embedding, scale = embedding[:, None], torch.ones(1, device="cuda")
        loss = Clip().loss(Outputs(embedding, embedding.roll(1, 0), scale))
        return facts(out), facts(loss), seen.names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_encoder_and_loss(fake_cuda: Call, dtype: torch.dtype) -> None:
    out, loss, backends = fake_cuda(encoder_and_loss, dtype)
    assert out == ((2, 2, 48), dtype, CUDA)
    assert loss == ((), torch.float32, CUDA)
    assert backends == ["triton"] * (6 + 2 * 6 - 1)


class HostTraffic(TorchDispatchMode):
    """Ops that take or give tensors both here and on a GPU, or numbers read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.dim()}
        reads = isinstance(out, (bool, int, float)) and any(isinstance(x, Tensor) for x in args)
        if len(devices) > 1 or reads:
            self.ops.append(str(func))
        return out


def host_traffic(head: Head) -> tuple[list[str], list[str]]:
    """While a batch is moved, and while it is encoded."""
    config = tiny_vision("slice+scan+study", num_prefix=2, head=head)
    encoder = StudyEncoder(config).eval()
    tokens = encoder.plan(hlip.pack([random_study([(8, 16, 16)] * 3), random_study([(4, 16, 24)], 1)], (4, 8, 8)))
    with fake_mode():
        encoder = encoder.to("cuda")
        with HostTraffic() as moving:
            moved = tokens.to("cuda")
        with HostTraffic() as encoding:
            encoder(moved)
        return moving.ops, encoding.ops


@pytest.mark.parametrize("head", get_args(Head))
def test_nothing_crosses_between_host_and_gpu_while_a_batch_is_encoded(head: Head, fake_cuda: Call) -> None:
    """So it can be captured as a CUDA graph."""
    moving, encoding = fake_cuda(host_traffic, head)
    assert moving and not encoding


def step_of_the_trainer(objective: str, bert: str) -> list[Facts]:
    """A micro-batch moved, and a whole model's outputs and loss, as the trainer's forward has them."""
    config = ModelConfig(
        tiny_vision("slice+scan+study", num_prefix=2, drop_path=0.2, patch_dropout=0.2), TextConfig(bert), None,
        embed_dim=32, per_prefix=objective == "dual", objective=objective,
    )  # fmt: skip
    model = hlip.HLIPModel(config).train()
    batch = hlip.pack([random_study([(8, 16, 16)] * 3), random_study([(4, 16, 24)], 1)], (4, 8, 8))
    features = torch.randn(4 if objective == "dual" else 2, model.text.proj.in_features)
    piece = MicroBatch(model.visual.trunk.plan(batch), features, batch.uids, 0)
    with fake_mode():
        model = model.to("cuda")
        moved = piece.to(torch.device("cuda"))
        outputs = model(moved.tokens, moved.texts)
        assert isinstance(moved.texts, Tensor)
        found = [moved.tokens.patches, moved.texts, outputs.image, outputs.text, outputs.scale]
        return [facts(each) for each in [*found, model.objective.loss(outputs)]]


@pytest.mark.parametrize("objective", ["clip", "siglip", "dual"])
def test_step_of_the_trainer(objective: str, fake_cuda: Call, bert_folder: str) -> None:
    pairs = 2 if objective == "dual" else 1
    patches, texts, image, text, scale, loss = fake_cuda(step_of_the_trainer, objective, bert_folder)
    assert patches[1:] == (torch.uint8, CUDA)
    assert texts[1:] == (torch.float32, CUDA)
    assert image == text == ((2, pairs, 32), torch.float32, CUDA)
    assert scale == ((pairs,), torch.float32, CUDA)
    assert loss == ((), torch.float32, CUDA)


def norm_backward(residual: torch.dtype, update: torch.dtype) -> list[Facts]:
    layout, width = make_layout(), 48
    with fake_mode():
        moved = layout.to("cuda")
        x = torch.empty(num_rows("slice"), width, dtype=residual, device="cuda")
        weight = torch.empty(width, device="cuda")
        regroup = (
            moved.cu_seqlens("slice"), moved.cu_seqlens("study"), moved.tiles("slice")[0],
            moved.children("slice", "study"), moved.parents("slice", "study"), NUM_PREFIX, True,
        )  # fmt: skip
        scale = torch.empty(layout.num_groups("slice"), device="cuda")
        ops = torch.ops.hlip_kernels
        outs = ops.add_regroup_norm(x, x.to(update), weight, weight, None, scale, *regroup, 1e-6, "triton")
        x, y, *statistics = outs
        grads = ops.add_regroup_norm_backward(
            x, y, x, *statistics, None, scale, None, weight, *regroup, "triton"
        )  # fmt: skip
        return [facts(out) for out in (*outs, *grads)]


@pytest.mark.parametrize("update", [torch.float32, torch.bfloat16])
def test_norm_and_its_backward(fake_cuda: Call, update: torch.dtype) -> None:
    single, before, after = torch.float32, num_rows("slice"), num_rows("study")
    expected = [((after, 48), single), ((after, 48), update), ((after,), single), ((after,), single)]
    expected += [((before, 48), single), ((before, 48), update), ((0,), single), ((48,), single), ((48,), single)]
    assert fake_cuda(norm_backward, single, update) == [(*fact, CUDA) for fact in expected]


def layout_on_the_wrong_device(name: str) -> None:
    layout = make_layout()
    with fake_mode():
        on_card = torch.empty(num_rows("slice"), 48, device="cuda")
        weight = torch.empty(48, device="cuda")
        moved = layout if name == "layout" else layout.to("cuda")
        given = {"residual": on_card, "update": on_card, "weight": weight, "bias": weight}
        if name != "layout":
            given[name] = torch.empty(given[name].shape)
        add_regroup_norm(**given, layout=moved, src="slice", dst="scan")


@pytest.mark.parametrize("name", ["layout", "residual", "update", "weight", "bias"])
def test_the_norm_refuses_mixed_devices(fake_cuda: Call, name: str) -> None:
    with pytest.raises(ValueError, match="cpu"):
        fake_cuda(layout_on_the_wrong_device, name)


def parameters_and_copies() -> tuple[list[Facts], Facts, Facts]:
    linear = torch.nn.Linear(3, 5)
    with fake_mode():
        linear.to("cuda", torch.bfloat16)
        buffer = torch.empty(7, 3, dtype=torch.bfloat16, device="cuda")
        buffer[2:].copy_(torch.ones(5, 3))
        return [facts(x) for x in linear.parameters()], facts(linear(buffer)), facts(buffer.cpu())


def test_modules_and_copies(fake_cuda: Call) -> None:
    """Nothing of ours: what tests of whole models rely on."""
    parameters, out, copied = fake_cuda(parameters_and_copies)
    assert parameters == [((5, 3), torch.bfloat16, CUDA), ((5,), torch.bfloat16, CUDA)]
    assert out == ((7, 5), torch.bfloat16, CUDA)
    assert copied == ((7, 3), torch.bfloat16, torch.device("cpu"))


def test_this_process_has_no_guard(fake_cuda: Call) -> None:
    with fake_mode(), pytest.raises(RuntimeError, match="not linked with support for cuda"):
        torch.empty(1).to("cuda")
