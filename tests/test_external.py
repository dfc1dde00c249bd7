"""The backends of other libraries: what reaches their kernels, what comes back, and reasons.

Their kernels need a GPU. Here the libraries' own Python code runs, down to the ops or the extension that it calls; slow
kernels that take what these are given, also the log-sum-exp that backward gets, stand in for those of a GPU. Modules
with the signatures of flash-attn-4 and FlashAttention-3 stand in for the two, so that numbers can be compared;
flash-attn-4 itself compiles its kernels in `test_flash4_compiles`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import random_study
from copies import Copies
from external_cases import OPS, Problem, check_against_reference, copies, forward_alone, skip_without, unequal
from hlip.study import pack
from hlip_kernels import attention
from hlip_kernels.backends import BACKENDS, choose_backend, varlen
from hlip_kernels.backends.external import deterministic_algorithms
from slow_kernels import (
    HEAD_DIM,
    LENGTHS,
    NUM_PREFIX,
    Call,
    SlowKernels,
    flash3_stand_in,
    flash4_stand_in,
    on_cpu_tensors,
)
from spans import SCALE, check_few_queries
from test_encoder import make_encoder


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


STAND_INS: dict[str, Call] = {
    "flash4": flash4_stand_in,
    "flash3": flash3_stand_in,
    "varlen": as_it_is,
    "xformers": lambda: on_cpu_tensors("cutlass"),
}
IN_PLACE = {"flash4", "flash3", "flash"}  # the others' gradients are copied once


@pytest.mark.parametrize("num_prefix", NUM_PREFIX)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", STAND_INS)
def test_like_the_reference(name: str, lengths: tuple[int, ...], num_prefix: int) -> None:
    skip_without(name)
    with STAND_INS[name]():
        kernels = check_against_reference(name, Problem.of_self(lengths, num_prefix))
    assert kernels.called == OPS[name]
    assert bool(kernels.written) == (name in IN_PLACE)


@pytest.mark.parametrize("name", STAND_INS)
def test_queries_of_their_own(name: str) -> None:
    skip_without(name)
    with STAND_INS[name]():
        check_against_reference(name, unequal(used=False))


@pytest.mark.parametrize("name", ["flash4", "flash3"])
def test_patches_in_place(name: str) -> None:
    with STAND_INS[name]():
        check_against_reference(name, unequal(used=True))
        with SlowKernels():
            check_few_queries(BACKENDS[name], torch.float32, HEAD_DIM)


def test_varlen_refuses_seqused_in_backward() -> None:
    skip_without("varlen")
    forward_alone("varlen", unequal(used=True))


def test_older_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without("varlen")
    problem = unequal(used=True)
    monkeypatch.setattr(varlen, "_arguments", lambda: {"scale"})
    with pytest.raises(ValueError, match=r"varlen_attn of torch .* takes no seqused_k \(pip install -U torch\)"):
        BACKENDS["varlen"].forward(problem.q, problem.k, problem.v, problem.queries, problem.keys, SCALE)
    with SlowKernels(), pytest.raises(AssertionError):  # no num_splits either
        Problem.of_self((5,), 0).run(BACKENDS["varlen"])


def test_cutlass_of_xformers_refuses_seqused() -> None:
    skip_without("xformers")
    problem = unequal(used=True)
    with on_cpu_tensors("cutlass"), pytest.raises(ValueError, match=r"no operator of xformers can run.*GappyKeysMask"):
        BACKENDS["xformers"].forward(problem.q, problem.k, problem.v, problem.queries, problem.keys, SCALE)


@pytest.mark.parametrize("name", ["flash", "varlen", "xformers"])
def test_seqused_of_queries_is_refused(name: str) -> None:
    problem = unequal(used=False)
    queries = problem.queries._replace(seqused=problem.queries.cu_seqlens.diff())
    with pytest.raises(ValueError, match=f"backend '{name}': seqused of queries must be None"):
        BACKENDS[name].forward(problem.q, problem.k, problem.v, queries, problem.keys, SCALE)


@pytest.mark.parametrize("name", STAND_INS)
def test_deterministic_is_passed_on(name: str) -> None:
    """`check_against_reference` compares what the kernel was told."""
    skip_without(name)
    assert BACKENDS[name].repeats == "on request"
    with STAND_INS[name]():
        check_against_reference(name, Problem.of_self((33, 64, 7), 2), deterministic=True)
    assert torch.get_deterministic_debug_mode() == 0


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_setting_is_put_back(mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.utils.deterministic
    monkeypatch.setattr(memory, "fill_uninitialized_memory", True)
    torch.set_deterministic_debug_mode(mode)
    try:
        with deterministic_algorithms(False):
            assert torch.get_deterministic_debug_mode() == mode
        with pytest.raises(KeyError), deterministic_algorithms(True):
            assert torch.get_deterministic_debug_mode() == 2
            assert not memory.fill_uninitialized_memory
            raise KeyError
        assert torch.get_deterministic_debug_mode() == mode
        assert memory.fill_uninitialized_memory
    finally:
        torch.set_deterministic_debug_mode(0)


def test_strange_strides_are_copied() -> None:
    """No library takes rows of a head whose numbers lie apart."""
    problem = Problem.of_self((5, 2), 1)
    apart = problem._replace(q=problem.q.transpose(1, 2).contiguous().transpose(1, 2))
    ones = apart._replace(grad_out=torch.ones(()).double().expand(problem.grad_out.shape))
    assert ones.q.stride(-1) != 1
    with flash4_stand_in(), SlowKernels():
        got = ones.run(BACKENDS["flash4"])
    torch.testing.assert_close(got, ones.run(BACKENDS["reference"]))


@pytest.mark.parametrize("name", STAND_INS)
def test_copies(name: str) -> None:
    skip_without(name)
    with STAND_INS[name]():
        assert copies(name) == ([], [] if name in IN_PLACE else ["_foreach_copy_"])


class InOurOps(TorchDispatchMode):
    """Runs the Python of our attention ops under `modes`, which see no further than the op otherwise."""

    def __init__(self, *modes: TorchDispatchMode) -> None:
        super().__init__()
        self.modes = modes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = torch.ops.hlip_kernels
        bodies = {
            ours.hier_attention.default: attention._attention,
            ours.hier_attention_backward.default: attention._attention_backward,
        }
        if func not in bodies:
            return func(*args, **(kwargs or {}))
        with ExitStack() as stack:
            for mode in self.modes:
                stack.enter_context(mode)
            return bodies[func](*args)


@pytest.mark.parametrize("name", STAND_INS)
def test_a_whole_encoder_copies_no_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the patches' place in the stream and the head, forward and backward, through every change of level."""
    skip_without(name)
    monkeypatch.setattr(type(BACKENDS[name]), "not_supported_reasons", lambda *_: [])
    choose_backend.cache_clear()
    encoder = make_encoder("study", levels=("slice", "scan", "study", "slice", "study", "study"), num_prefix=2)
    tokens = encoder.plan(pack([random_study([(8, 16, 16)] * n) for n in (20, 15, 5)], (4, 8, 8)))
    results, layers, seen = [], len(encoder.blocks), []
    for backend in ("reference", name):
        for block in encoder.blocks:
            block.attn.backend = backend
        with STAND_INS[name]() if backend == name else as_it_is():
            copies, kernels = Copies(tokens.layout.num_tokens * 48), SlowKernels()
            with copies, InOurOps(kernels):
                out = encoder(tokens)
                seen.append(Counter(copies.seen))
                copies.seen.clear()
                out.sum().backward()
                seen.append(Counter(copies.seen))
            results.append([out.detach(), *(p.grad for p in encoder.parameters())])
        encoder.zero_grad()
    choose_backend.cache_clear()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    forward, backward = seen[2:]
    assert forward == {"index_copy_": 1, "index_add_": 1}  # the patches, the few prefix rows
    gradients = {} if name in IN_PLACE else {"_foreach_copy_": layers}
    assert backward == {"index_select": 2, **gradients}  # the patches, the few prefix rows


def test_a_copy_would_be_seen() -> None:
    x = torch.randn(6, 2, 8)
    with Copies(x.numel()) as seen:
        x[torch.tensor([1, 0])]
        torch.empty_like(x).copy_(x)
        torch.cat([x, x])
        x.transpose(0, 1).contiguous()
        x[:, 0].clone()  # too small
    assert seen.seen == ["index", "copy_", "cat", "clone"]
