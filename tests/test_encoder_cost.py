"""What the encoder costs: passes over the stream, graphs, what a training step keeps, layers put in place or frozen."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hlip
from conftest import random_study
from hlip.model.config import preset
from hlip.model.encoder import StudyEncoder
from hlip.model.plan import TokenBatch
from hlip_kernels import StudyLayout
from test_encoder import make_encoder, textbook


class BigOps(TorchDispatchMode):
    """Counts the ops, views apart, that read or write a tensor of at least so many elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if not func.is_view and any(x.numel() >= self.size for x in tensors):
            self.seen[str(func)] += 1
        return out


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_a_change_of_level_takes_no_pass_over_the_stream(drop_path: float) -> None:
    """As many ops over (T, C) with every level in turn as with one level throughout, and no others than the layers'."""
    batch = hlip.pack([random_study([(8, 16, 16)] * n) for n in (20, 15, 5)], (4, 8, 8))
    forwards, backwards = [], []
    for levels in (("study",) * 6, ("slice", "scan", "study", "slice", "study", "study")):
        encoder = make_encoder("study", levels=levels, drop_path=drop_path).train()
        tokens = encoder.plan(batch)
        with BigOps(batch.layout.num_tokens * 48) as forward:
            out = encoder(tokens)
        with BigOps(batch.layout.num_tokens * 48) as backward:
            out.sum().backward()
        forwards.append(forward.seen)
        backwards.append(backward.seen)
    assert forwards[0] == forwards[1]
    assert backwards[0] == backwards[1]
    for name in ("sub_.Tensor", "mul_.Tensor", "_to_copy.default"):  # of pixels, before there is a stream
        del forwards[0][f"aten.{name}"]
    products = [forwards[0].pop(name, 0) for name in ("aten.addmm.default", "mkldnn._linear_pointwise.default")]
    assert sum(products) == 1 + 4 * 6
    assert forwards[0] == {
        "aten._embedding_bag_forward_only.default": 1,
        "aten.add.Tensor": 1,  # of positions
        "aten.new_empty.default": 1,  # the stream, and into it
        "aten.index_copy_.default": 1,  # the patches, and
        "aten.index_fill_.int_Scalar": 1,  # the few
        "aten.index_add_.default": 1,  # prefix rows
        "aten.native_layer_norm.default": 1,
        "hlip_kernels.hier_attention.default": 6,
        "hlip_kernels.add_regroup_norm.default": 2 * 6 - 1,
        "aten.gelu.default": 6,
        "aten.embedding.default": 2,  # the studies' prefix rows, of residual and update
    }
    assert backwards[0]["hlip_kernels.add_regroup_norm_backward.default"] == 2 * 6 - 1
    moved = {name: count for name, count in backwards[0].items() if "cat" in name or "index" in name or "stack" in name}
    assert moved == {
        "aten.index_select.default": 2,  # the gradients of patches and of prefix rows, for what made them
    }


MIXES = [
    [[(8, 16, 16)] * 3, [(4, 16, 24)] * 2, [(8, 16, 16)]],
    [[(8, 16, 16)] * 5, [(4, 16, 24)]],
    [[(8, 16, 16)] * 2] * 4,
    [[(12, 16, 16)], [(12, 16, 16)]],
    [[(8, 16, 16)] * 45, [(4, 8, 8)]],
    [[(4, 8, 8)]] * 9,
]


@pytest.mark.parametrize("positions", ["tiled", "rope"])
def test_compiles_as_one_graph_for_all_mixes_of_studies(positions: str) -> None:
    changes = {"num_prefix": 2, "drop_path": 0.2, "patch_dropout": 0.2, "positions": positions}
    encoder = make_encoder("slice+scan+study", **changes).train()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, mix in enumerate(MIXES):
        batch = hlip.pack([random_study(sizes, seed) for sizes in mix], (4, 8, 8))
        torch.manual_seed(seed)
        tokens = encoder.plan(batch)
        results = []
        double = copy.deepcopy(encoder).double()
        for run, module in ((compiled, encoder), (encoder, encoder), (double, double)):
            torch.manual_seed(seed)
            out = run(tokens)
            module.zero_grad()
            out.square().sum().backward()
            results.append([out.detach(), *[p.grad.clone() for p in module.parameters()]])
        for i, (ours, eager, exact) in enumerate(zip(*results, strict=True)):
            errors = [float((x.double() - exact).abs().max()) for x in (ours, eager)]
            rounding = torch.finfo(ours.dtype).eps * float(exact.abs().max())
            assert errors[0] <= (3 if i else 2) * errors[1] + rounding, (errors, rounding)  # gradients after the output
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_put_in_place_and_hooks_are_used_in_training() -> None:
    encoder = make_encoder("scan")
    batch = hlip.pack([random_study([(8, 16, 16)])], (4, 8, 8))

    class Adapted(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.layer, self.extra = layer, torch.nn.Parameter(torch.ones(layer.out_features))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.extra

    plain = encoder(batch)
    seen: list[str] = []
    for name in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
        layer = encoder.get_submodule(f"blocks.0.{name}")
        handle = layer.register_forward_hook(lambda *_, name=name: seen.append(name))
        torch.testing.assert_close(encoder(batch), plain)
        handle.remove()
        part, _, last = name.partition(".")
        adapted = Adapted(layer)
        setattr(encoder.get_submodule(f"blocks.0.{part}"), last, adapted)
        out = encoder(batch)
        out.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(encoder(batch), out)
        assert adapted.extra.grad is not None
        setattr(encoder.get_submodule(f"blocks.0.{part}"), last, layer)
    assert seen == ["attn.qkv", "mlp.fc1", "mlp.fc2"]


def test_frozen_layers_get_no_gradient_and_pass_it_on() -> None:
    encoder = make_encoder("scan").double()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name == "cls_token")
    batch = hlip.pack([random_study([(8, 16, 16)])], (4, 8, 8))
    encoder(batch).sum().backward()
    whole = make_encoder("scan").double()
    whole(batch).sum().backward()
    torch.testing.assert_close(encoder.cls_token.grad, whole.cls_token.grad)
    assert all(p.grad is None for name, p in encoder.named_parameters() if name != "cls_token")


def bytes_kept(run: Callable[[], Tensor]) -> int:
    """Of the tensors that autograd keeps for backward, parameters among them; each storage once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("mixed", [False, True])
def test_a_training_step_keeps_three_quarters_of_the_textbook_or_less(mixed: bool) -> None:
    """ViT-B, ten scans of 1176 tokens, a quarter of the patches dropped; on fake tensors, without the memory."""
    vision = replace(preset("clip_vit_base_scan_study_token1176").vision, drop_path=0.0)
    encoder = StudyEncoder(vision).train()
    layout = StudyLayout.from_grids([[vision.grid] * 10])
    kept = torch.arange(882).expand(10, -1)
    layout = layout.select((kept + 1176 * torch.arange(10)[:, None]).flatten())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        places = torch.zeros(8820, 2, dtype=torch.int32)
        tokens = TokenBatch(torch.empty(8820, 2048, dtype=torch.uint8), places, torch.ones(8820, 2), layout)
        images = torch.empty(1, 10, 48, 224, 224, dtype=torch.uint8)
        ours = bytes_kept(lambda: encoder(tokens))
        plain = bytes_kept(lambda: textbook(encoder, images, {"scan": 10, "study": 1}, kept))
        encoder.set_grad_checkpointing()
        checkpointed = bytes_kept(lambda: encoder(tokens))
    assert ours <= 0.75 * plain
    assert checkpointed <= 0.2 * plain


def test_activation_checkpointing_keeps_less_and_changes_nothing() -> None:
    encoder = make_encoder("slice+scan+study", num_prefix=2, drop_path=0.3).train()
    tokens = encoder.plan(hlip.pack([random_study([(8, 16, 16)] * 3), random_study([(4, 16, 24)])], (4, 8, 8)))
    results, kept = [], []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        kept.append(bytes_kept(lambda: encoder(tokens)))
        encoder.zero_grad()
        torch.manual_seed(0)
        out = encoder(tokens)
        out.square().sum().backward()
        results.append([out.detach(), *[p.grad.clone() for p in encoder.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.5 * kept[0]
