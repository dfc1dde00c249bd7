"""The backends of other libraries: what reaches their kernels, what comes back, and reasons.

Their kernels need a GPU. Here the libraries' own Python code runs, down to the ops or the extension that it calls; slow
kernels that take what these are given, also the log-sum-exp that backward gets, stand in for those of a GPU. Modules
with the signatures of flash-attn-4 and FlashAttention-3 stand in for the two, so that numbers can be compared;
flash-attn-4 itself compiles its kernels in `test_flash4_compiles`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import site
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from conftest import random_study
from copies import Copies
from fake_cuda import fake_mode
from hlip.study import pack
from hlip_kernels import attention
from hlip_kernels.backends import BACKENDS, choose_backend, flash4, not_supported_reasons, varlen, xformers
from hlip_kernels.backends.base import AttentionBackend, Spans
from hlip_kernels.backends.external import deterministic_algorithms
from spans import HEADS, SCALE, check_few_queries, plain_spans
from test_encoder import make_encoder

HEAD_DIM = 8
NUM_PREFIX = [0, 1, 2, 17]
LENGTHS = [(5,), (1, 1), (0, 3, 0, 0, 41, 1, 0), (33, 64, 7), (2, 0)]
QUERIES, PATCHES = (3, 1, 0, 5, 40, 2), (70, 1, 7, 0, 130, 33)  # of studies: none of the third, nothing in the fourth
# flash-attn without its kernels, and flash-attn-4; see the Makefile. Kept apart, or xformers would use them.
FLASH_SOURCE, FLASH4_SOURCE = Path(sys.prefix) / "flash-attn", Path(sys.prefix) / "flash-attn-4"
Call = Callable[..., Any]

needs_flash_source = pytest.mark.skipif(not FLASH_SOURCE.exists(), reason="needs flash-attn's source: make test")
needs_flash4_source = pytest.mark.skipif(not FLASH4_SOURCE.exists(), reason="needs flash-attn-4: make test, on Linux")


# Slow kernels


class Groups(NamedTuple):
    """First and last row of each group, of queries and of keys."""

    q: list[slice]
    k: list[slice]


def groups_of(given: dict[str, Any]) -> Groups:
    """From what a kernel is given, which has bounds of queries and of keys, and may have numbers of rows used."""

    def slices(side: str) -> list[slice]:
        bounds, used = given[f"cu_seqlens_{side}"], given.get(f"seqused_{side}")
        assert bounds.dtype == torch.int32
        lengths = bounds.diff() if used is None else used
        assert given[f"max_seqlen_{side}"] == lengths.max()
        return [slice(a, a + n) for a, n in zip(bounds[:-1].tolist(), lengths.tolist(), strict=True)]

    return Groups(slices("q"), slices("k"))


def slow_forward(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out (R, H, D) and lse (H, R); like FlashAttention 2, it says infinity where there are no keys."""
    q, k, v = (given[key] for key in "qkv")
    out, lse = q.new_full(q.shape, torch.nan), q.new_full((q.shape[1], q.shape[0]), torch.nan)
    for of_q, of_k in zip(*groups_of(given), strict=True):
        scores = torch.einsum("ihd,jhd->hij", q[of_q], k[of_k]) * given["softmax_scale"]
        lse[:, of_q] = scores.logsumexp(-1) if scores.shape[-1] else torch.inf
        out[of_q] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[of_k])
    return out, lse


def slow_backward(given: dict[str, Any]) -> None:
    """Write dq, dk, dv from out and lse as they are given, like the kernels of a GPU."""
    do, q, k, v, out, lse = (given[key] for key in ("dout", "q", "k", "v", "out", "softmax_lse"))
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.is_contiguous()
    scale = given["softmax_scale"]
    for of_q, of_k in zip(*groups_of(given), strict=True):
        p = torch.exp(torch.einsum("ihd,jhd->hij", q[of_q], k[of_k]) * scale - lse[:, of_q, None])
        dp = torch.einsum("ihd,jhd->hij", do[of_q], v[of_k])
        ds = p * (dp - (do[of_q] * out[of_q]).sum(-1).T[..., None]) * scale
        given["dq"][of_q] = torch.einsum("hij,jhd->ihd", ds, k[of_k])
        given["dk"][of_k] = torch.einsum("hij,ihd->jhd", ds, q[of_q])
        given["dv"][of_k] = torch.einsum("hij,ihd->jhd", p, do[of_q])


# How the libraries' kernels name what these take
NAMES = {
    "query": "q", "key": "k", "value": "v", "grad_out": "dout", "grad_out_": "dout", "lse": "softmax_lse",
    "logsumexp": "softmax_lse", "scale": "softmax_scale", "cum_seq_q": "cu_seqlens_q", "cum_seq_k": "cu_seqlens_k",
    "max_q": "max_seqlen_q", "max_k": "max_seqlen_k", "seqlen_k": "seqused_k", "is_causal": "causal",
}  # fmt: skip


def view(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: its memory, and which part of it."""
    return x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape), x.stride()


class SlowKernels(TorchDispatchMode):
    """Answers what the libraries' code calls; arguments that would mean another kind of attention are refused.

    called: the libraries' ops, in the order in which they are called.
    read: where q, k, v of each kernel lie; written: where its dq, dk, dv lie, if they are given to it.
    deterministic: of each backward kernel, whether it was told to be.
    """

    active: ClassVar[SlowKernels]
    num_splits: ClassVar[int | None] = 1  # untold, kernels may split keys as they see fit

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []
        self.read: list[list[Any]] = []
        self.written: list[list[Any]] = []
        self.deterministic: list[bool] = []
        self.nested = False

    def __enter__(self) -> SlowKernels:
        SlowKernels.active = self
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removesuffix(".default")
        kernel = getattr(self, name.replace(".", "_"), None)
        if kernel is None and name not in PYTHON:
            return func(*args, **(kwargs or {}))
        if not self.nested:
            self.called.append(name)
        if kernel is None:
            self.nested = True
            try:
                with self:  # the body of the library's own op, which is for CUDA tensors only
                    return PYTHON[name]()._init_fn(*args, **(kwargs or {}))
            finally:
                self.nested = False
        given = {argument.name: argument.default_value for argument in func._schema.arguments}
        given.update(zip(given, args, strict=False), **(kwargs or {}))
        return kernel(given)

    def check(self, given: dict[str, Any]) -> dict[str, Any]:
        """The same by the names of the slow kernels, after a look at everything else."""
        given = {NAMES.get(name, name): value for name, value in given.items()}
        for key in ("causal", "dropout_p", "p", "softcap", "custom_mask_type", "attention_chunk", "window_size"):
            assert not given.get(key), key
        for key in ("bias", "alibi_slopes", "block_table", "page_table", "leftpad_k", "k_new", "qv"):
            assert given.get(key) is None, key
        for key in ("window_size_left", "window_size_right"):
            assert given.get(key) in (None, -1), key  # a window without an end
        assert given.get("num_splits", self.num_splits) == self.num_splits
        self.read.append([view(given[key]) for key in "qkv"])
        return given

    def forward(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return slow_forward(self.check(given))

    def backward(self, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        given = self.check(given)
        self.deterministic.append(bool(given.get("deterministic", torch.get_deterministic_debug_mode() == 2)))
        if given.get("dq") is None:
            given |= {f"d{key}": torch.full_like(given[key], torch.nan) for key in "qkv"}
        else:
            self.written.append([view(given[key]) for key in ("dq", "dk", "dv")])
        slow_backward(given)
        return given["dq"], given["dk"], given["dv"]

    def aten__flash_attention_forward(self, given: dict[str, Any]) -> Any:
        nothing = given["query"].new_empty(0)
        return *self.forward(given), nothing, nothing, nothing

    def aten__flash_attention_backward(self, given: dict[str, Any]) -> Any:
        return self.backward(given)

    def flash_attn_3_fwd(self, given: dict[str, Any]) -> Any:
        return *self.forward(given), given["q"].new_empty(0), given["q"].new_empty(0)

    def flash_attn_3_bwd(self, given: dict[str, Any]) -> Any:
        return *self.backward(given), *[given["q"].new_empty(0)] * 5

    # CUTLASS takes a batch of one, and keeps the lse padded: (G, H, longest group and up to 31 more)

    def aten__efficient_attention_forward(self, given: dict[str, Any]) -> Any:
        bounds, longest = given["cu_seqlens_q"], given["max_seqlen_q"]
        assert given["compute_log_sumexp"]
        out, lse = self.forward({**given, **{key: given[key][0] for key in ("query", "key", "value")}})
        padded = lse.new_full((len(bounds) - 1, len(lse), (longest + 31) // 32 * 32), torch.nan)
        for g, (a, b) in enumerate(pairwise(bounds.tolist())):
            padded[g, :, : b - a] = lse[:, a:b]
        nothing = lse.new_empty(0)
        return out[None], padded, nothing, nothing, longest, longest

    def aten__efficient_attention_backward(self, given: dict[str, Any]) -> Any:
        padded, lengths = given["logsumexp"], given["cu_seqlens_q"].diff()
        assert padded.shape[2] % 32 == 0
        assert padded.shape[2] >= given["max_seqlen_q"]
        kept = torch.arange(padded.shape[2]) < lengths[:, None]
        assert padded.transpose(1, 2)[~kept].eq(torch.inf).all()
        single = {key: given[key][0] for key in ("grad_out_", "query", "key", "value", "out")}
        grads = self.backward({**given, **single, "logsumexp": padded.transpose(1, 2)[kept].T.contiguous()})
        return *(grad[None] for grad in grads), torch.empty(0)


def python_of(module: str, name: str) -> Call:
    return lambda: getattr(importlib.import_module(module), name)


# Ops of the libraries whose Python code runs here, down to what it calls
PYTHON = {
    "torch_attn._varlen_attn": python_of("torch.nn.attention.varlen", "_varlen_attn"),
    "torch_attn._varlen_attn_backward": python_of("torch.nn.attention.varlen", "_varlen_attn_backward"),
    "xformers_flash.flash_fwd": python_of("xformers.ops.fmha.flash", "_flash_fwd"),
    "xformers_flash.flash_bwd": python_of("xformers.ops.fmha.flash", "_flash_bwd"),
    **{
        f"flash_attn._flash_attn_varlen_{way}": python_of(
            "flash_attn.flash_attn_interface", f"_flash_attn_varlen_{way}"
        )
        for way in ("forward", "backward")
    },
}


def extension() -> ModuleType:
    """Stands in for flash_attn_2_cuda, the compiled part of flash-attn 2.

    Source: mha_varlen_fwd and mha_varlen_bwd of its csrc/flash_attn/flash_api.cpp.
    """

    def varlen_fwd(
        q: Tensor, k: Tensor, v: Tensor, out: None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Any,
        leftpad_k: Any, block_table: Any, alibi_slopes: Any, max_seqlen_q: int, max_seqlen_k: int, p: float,
        softmax_scale: float, zero_tensors: bool, causal: bool, window_size_left: int, window_size_right: int,
        softcap: float, return_softmax: bool, gen: None,
    ) -> Any:  # fmt: skip
        given = dict(locals())
        with _disable_current_modes():
            return *SlowKernels.active.forward(given), torch.empty(0), torch.empty(0)

    def varlen_bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, alibi_slopes: Any, max_seqlen_q: int,
        max_seqlen_k: int, p: float, softmax_scale: float, zero_tensors: bool, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, deterministic: bool, gen: None, rng_state: Any,
    ) -> Any:  # fmt: skip
        given = dict(locals())
        with _disable_current_modes():
            return *SlowKernels.active.backward(given), torch.empty(0)

    module = ModuleType("flash_attn_2_cuda")
    module.varlen_fwd, module.varlen_bwd = varlen_fwd, varlen_bwd
    return module


def import_flash_source() -> None:
    """For a process of its own, in which xformers is not imported yet: it looks for flash-attn once."""
    site.addsitedir(str(FLASH_SOURCE))
    sys.modules.setdefault("flash_attn_2_cuda", extension())


@contextmanager
def flash4_stand_in() -> Iterator[None]:
    """A module with the two functions of flash_attn.cute.interface, as flash-attn-4 4.0.0b36 has them."""

    def _flash_attn_fwd(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_q: Any, seqused_k: Any,
        max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, return_lse: bool, num_splits: int,
    ) -> Any:  # fmt: skip
        given = dict(locals())
        SlowKernels.active.called.append("_flash_attn_fwd")
        with _disable_current_modes():
            return *SlowKernels.active.forward(given), None, None, None

    def _flash_attn_bwd(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, softmax_lse: Tensor, softmax_scale: float,
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_q: Any, seqused_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, deterministic: bool, dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> Any:  # fmt: skip
        given = dict(locals())
        SlowKernels.active.called.append("_flash_attn_bwd")
        with _disable_current_modes():
            return SlowKernels.active.backward(given)

    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        yield


# Source: hopper/flash_api.cpp of flash-attention, as xformers 0.0.35 quotes it
FLASH3_FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FLASH3_BWD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0., bool deterministic=False, int sm_margin=0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@contextmanager
def flash3_stand_in(*schemas: str) -> Iterator[None]:
    """A module flash_attn_interface and the ops that it registers."""
    module = ModuleType("flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    with torch.library._scoped_library("flash_attn_3", "DEF") as library, pytest.MonkeyPatch.context() as patch:
        for schema in schemas or (FLASH3_FWD, FLASH3_BWD):
            library.define(schema)
        patch.setitem(sys.modules, module.__name__, module)
        yield


@contextmanager
def on_cpu_tensors(*modules: str) -> Iterator[None]:
    """Tells xformers that these operators, and no others, can run on CPU tensors of float64 and float32."""
    with pytest.MonkeyPatch.context() as patch:
        take_cpu_tensors(patch, *modules)
        yield


def take_cpu_tensors(patch: pytest.MonkeyPatch, *modules: str) -> None:
    from xformers.ops import fmha

    for module in modules:
        for operator in (getattr(fmha, module).FwOp, getattr(fmha, module).BwOp):
            patch.setattr(operator, "SUPPORTED_DEVICES", {"cpu"})
            patch.setattr(operator, "SUPPORTED_DTYPES", {torch.float64, torch.float32})
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


# Against the reference


class Problem(NamedTuple):
    """Attention and its gradients, of slots of packed tensors.

    packed: (R, 3, H, D), or that of queries and that of keys; the same of grads.
    """

    queries: Spans
    keys: Spans
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor

    @classmethod
    def of_self(cls, lengths: Sequence[int], num_prefix: int) -> Problem:
        torch.manual_seed(0)
        spans = plain_spans(lengths, num_prefix)
        qkv = torch.randn(int(spans.cu_seqlens[-1]), 3, HEADS, HEAD_DIM, dtype=torch.float64)
        return cls(spans, spans, *qkv.unbind(1), torch.randn_like(qkv[:, 0]))

    @classmethod
    def of_two(cls, queries: Spans, keys: Spans, num_prefix: int) -> Problem:
        """Queries of their own; keys that begin behind the prefix rows of the first group, NaN where there are none."""
        torch.manual_seed(0)
        packed = torch.randn(int(queries.cu_seqlens[-1]), 3, HEADS, HEAD_DIM, dtype=torch.float64)
        kv = torch.full((int(keys.cu_seqlens[-1]), 2, HEADS, HEAD_DIM), torch.nan, dtype=torch.float64)
        k, v = kv[num_prefix:].unbind(1)
        used = keys.cu_seqlens.diff() if keys.seqused is None else keys.seqused
        for begin, n in zip(keys.cu_seqlens.tolist(), used.tolist(), strict=False):
            k[begin : begin + n].normal_()
            v[begin : begin + n].normal_()
        return cls(queries, keys, packed[:, 1], k, v, torch.randn_like(packed[:, 1]))

    def new_grads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of new packed tensors."""
        q = torch.full((self.q.shape[0], 3, *self.q.shape[1:]), torch.nan, dtype=self.q.dtype)
        kv = q if self.k.shape == self.q.shape else q.new_full((self.k.shape[0], 3, *self.k.shape[1:]), torch.nan)
        return q[:, 0], kv[:, 1], kv[:, 2]

    def run(self, backend: AttentionBackend, deterministic: bool = False) -> tuple[Tensor, ...]:
        """out, lse and the gradients."""
        spans, grads = (self.queries, self.keys), self.new_grads()
        out, lse = backend.forward(self.q, self.k, self.v, *spans, SCALE)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        backend.backward(
            grads, self.grad_out, self.q, self.k, self.v, out, lse, *spans, SCALE, deterministic=deterministic
        )
        return out, lse, *grads


def check_against_reference(name: str, problem: Problem, deterministic: bool = False) -> SlowKernels:
    """Out, lse and gradients, from kernels that are given views of the packed tensors. Returns the kernels."""
    expected = problem.run(BACKENDS["reference"])
    with SlowKernels() as kernels, Waits() as waits:
        got = problem.run(BACKENDS[name], deterministic)
    torch.testing.assert_close(got, expected, equal_nan=True)
    of_inputs = [view(x) for x in (problem.q, problem.k, problem.v)]
    assert kernels.read == [of_inputs, of_inputs]
    assert kernels.written in ([], [[view(x) for x in got[2:]]])
    assert kernels.deterministic == [deterministic]
    assert not waits.seen
    return kernels


class Waits(TorchDispatchMode):
    """seen: the ops that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


STAND_INS: dict[str, Call] = {
    "flash4": flash4_stand_in,
    "flash3": flash3_stand_in,
    "varlen": as_it_is,
    "xformers": lambda: on_cpu_tensors("cutlass"),
}
OPS = {
    "flash4": ["_flash_attn_fwd", "_flash_attn_bwd"],
    "flash3": ["flash_attn_3.fwd", "flash_attn_3.bwd"],
    "flash": ["flash_attn._flash_attn_varlen_forward", "flash_attn._flash_attn_varlen_backward"],
    "varlen": ["torch_attn._varlen_attn", "torch_attn._varlen_attn_backward"],
    "xformers": ["aten._efficient_attention_forward", "aten._efficient_attention_backward"],
}
IN_PLACE = {"flash4", "flash3", "flash"}  # the others' gradients are copied once


def skip_without(name: str) -> None:
    if name in ("varlen", "xformers"):
        pytest.importorskip({"varlen": "torch.nn.attention.varlen"}.get(name, name))


def unequal(used: bool) -> Problem:
    """Few queries a study, over all rows of studies or, with `used`, over their patches, in place."""
    keys = plain_spans(PATCHES, 2, PATCHES) if used else plain_spans(PATCHES)
    return Problem.of_two(plain_spans(QUERIES), keys, 2 if used else 0)


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


def forward_alone(name: str, problem: Problem) -> None:
    """`seqused` of keys is for forward alone, and says so in backward."""
    expected = problem.run(BACKENDS["reference"])
    spans, message = (problem.queries, problem.keys), f"backend '{name}': seqused of keys must be None"
    with SlowKernels():
        out, lse = BACKENDS[name].forward(problem.q, problem.k, problem.v, *spans, SCALE)
        torch.testing.assert_close((out, lse), expected[:2])
        tensors = problem.grad_out, problem.q, problem.k, problem.v, out, lse
        with pytest.raises(ValueError, match=message):
            BACKENDS[name].backward(problem.new_grads(), *tensors, *spans, SCALE, False)


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


# Copies


def copies(name: str) -> tuple[list[str], list[str]]:
    """The ops of forward and of backward that copy as much as a token tensor."""
    problem = Problem.of_self((33, 64, 7), 2)
    spans = problem.queries, problem.keys
    seen = []
    with SlowKernels():
        with Copies(problem.q.numel()) as of_forward:
            out, lse = BACKENDS[name].forward(problem.q, problem.k, problem.v, *spans, SCALE)
        seen.append(of_forward.seen)
        tensors = problem.grad_out, problem.q, problem.k, problem.v, out, lse
        with Copies(problem.q.numel()) as of_backward:
            BACKENDS[name].backward(problem.new_grads(), *tensors, *spans, SCALE, False)
        seen.append(of_backward.seen)
    return seen[0], seen[1]


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


# flash-attn 2, and xformers with it, in another process


def flash_against_reference(deterministic: bool) -> list[tuple[list[str], int]]:
    import_flash_source()
    problems = [Problem.of_self(lengths, num_prefix) for lengths in LENGTHS for num_prefix in NUM_PREFIX]
    seen = [check_against_reference("flash", problem, deterministic) for problem in (*problems, unequal(used=False))]
    forward_alone("flash", unequal(used=True))
    return [(kernels.called, len(kernels.written)) for kernels in seen]


@needs_flash_source
@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_like_the_reference(fake_cuda: Call, deterministic: bool) -> None:
    assert BACKENDS["flash"].repeats == "on request"
    for called, written in fake_cuda(flash_against_reference, deterministic):
        assert called == OPS["flash"]
        assert written == 1


def flash_copies() -> tuple[list[str], list[str]]:
    import_flash_source()
    return copies("flash")


@needs_flash_source
def test_flash_copies_nothing(fake_cuda: Call) -> None:
    assert fake_cuda(flash_copies) == ([], [])


def xformers_with_flash_against_reference(deterministic: bool) -> list[tuple[list[str], int]]:
    import_flash_source()
    problems = [Problem.of_self(lengths, num_prefix) for lengths in LENGTHS for num_prefix in NUM_PREFIX]
    with on_cpu_tensors("flash", "cutlass"):
        problems.append(unequal(used=False))
        seen = [check_against_reference("xformers", problem, deterministic) for problem in problems]
        forward_alone("xformers", unequal(used=True))
    return [(kernels.called, len(kernels.written)) for kernels in seen]


@needs_flash_source
@pytest.mark.parametrize("deterministic", [False, True])
def test_xformers_with_flash_like_the_reference(fake_cuda: Call, deterministic: bool) -> None:
    """Its backward with flash-attn is flash-attn's own op, which writes into the gradients. Its operator is not
    deterministic: then another one takes the log-sum-exp of this forward."""
    skip_without("xformers")
    backward = OPS["xformers" if deterministic else "flash"][1]
    for called, written in fake_cuda(xformers_with_flash_against_reference, deterministic):
        assert called == ["xformers_flash.flash_fwd", backward]
        assert written == int(not deterministic)


def xformers_with_flash_copies() -> tuple[list[str], list[str]]:
    import_flash_source()
    with on_cpu_tensors("flash", "cutlass"):
        return copies("xformers")


@needs_flash_source
def test_xformers_with_flash_copies_nothing(fake_cuda: Call) -> None:
    skip_without("xformers")
    assert fake_cuda(xformers_with_flash_copies) == ([], [])


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("num_prefix", NUM_PREFIX)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_mask_of_xformers(lengths: tuple[int, ...], num_prefix: int, used: bool) -> None:
    skip_without("xformers")
    from xformers.ops import fmha

    queries, keys = plain_spans(lengths), plain_spans(lengths, num_prefix, lengths if used else None)
    rows = int(queries.cu_seqlens[-1]), int(keys.cu_seqlens[-1])
    mask = xformers.block_diagonal(queries, keys)
    for info in (mask.q_seqinfo, mask.k_seqinfo):  # what printing a mask needs, and running does not
        info.seqstart_py = info.seqstart.tolist()
    if used:
        mask.k_seqinfo.seqlen_py = mask.k_seqinfo.seqlen.tolist()
    expected = torch.zeros(rows)
    for n, a, (b, end) in zip(lengths, queries.cu_seqlens.tolist(), pairwise(keys.cu_seqlens.tolist()), strict=False):
        expected[a : a + n, b : b + n if used else end] = 1
    assert torch.equal(mask.materialize(rows), expected.log())
    q, k = (torch.zeros(1, n, HEADS, HEAD_DIM) for n in rows)
    fmha.Inputs(q, k, k, mask).validate_inputs()


def test_padding_is_undone() -> None:
    spans = plain_spans((3, 0, 40), 2)
    lse = torch.randn(HEADS, 49)
    padded = xformers.pad(lse, spans)
    assert padded.shape == (3, HEADS, 64)
    assert padded.isfinite().sum() == lse.numel()
    assert torch.equal(xformers.unpad(padded, spans, 49), lse)


# On fake CUDA tensors: shapes, dtypes, and that nothing is asked of the device


def facts_on_cuda(backend: str, dtype: torch.dtype) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    if backend != "varlen":
        import_flash_source()
    spans = plain_spans((3, 0, 70), 2)
    with fake_mode(), pytest.MonkeyPatch.context() as patch:
        if backend == "xformers":
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
            patch.setattr("xformers.ops.fmha.common._built_with_cuda", True)
        spans = spans._replace(cu_seqlens=spans.cu_seqlens.to("cuda"))
        qkv, grad = (torch.empty(79, 3, HEADS, HEAD_DIM, dtype=dtype, device="cuda") for _ in range(2))
        q, k, v = qkv.unbind(1)
        out, lse = BACKENDS[backend].forward(q, k, v, spans, spans, SCALE)
        tensors = torch.empty_like(out), q, k, v, out, lse
        BACKENDS[backend].backward(grad.unbind(1), *tensors, spans, spans, SCALE, False)
        return [(x.shape, x.dtype, x.device) for x in (out, lse)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "backend",
    ["varlen", *(pytest.param(name, marks=needs_flash_source) for name in ("flash", "xformers"))],
)
def test_on_fake_cuda(fake_cuda: Call, backend: str, dtype: torch.dtype) -> None:
    """Of xformers only what it does with flash-attn: PyTorch's fake of CUTLASS's backward refuses its own arguments."""
    skip_without(backend)
    cuda = torch.device("cuda:0")
    expected = [((79, HEADS, HEAD_DIM), dtype, cuda), ((HEADS, 79), torch.float32, cuda)]
    assert fake_cuda(facts_on_cuda, backend, dtype) == expected


@needs_flash4_source
@pytest.mark.parametrize(("architecture", "instruction"), [("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")])
def test_flash4_compiles(architecture: str, instruction: str, tmp_path: Path) -> None:
    """flash-attn-4 compiles its kernels, forward and backward, from our call: of views, and into views."""
    settings = {"FLASH_ATTENTION_ARCH": architecture, "CUTE_DSL_ARCH": f"{architecture}a"}
    settings |= {"FLASH_ATTENTION_NUM_SMS": "132", "CUTE_DSL_DISABLE_FILE_CACHING": "1"}
    settings |= {"CUTE_DSL_KEEP_PTX": "1", "CUTE_DSL_KEEP_CUBIN": "1"}
    program = [sys.executable, str(Path(__file__).with_name("flash4_job.py"))]
    run = subprocess.run(
        program,
        cwd=tmp_path,
        env=os.environ | settings | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    facts = json.loads(run.stdout.splitlines()[-1])
    assert facts["reasons"] == []
    passed = [["_flash_attn_fwd", key, True] for key in "qkv"]
    passed += [["_flash_attn_bwd", key, True] for key in ("q", "k", "v", "dq", "dk", "dv")]
    for case, rows in (("self", 1000), ("cross", 700)):
        shapes = {"out": [rows, 2, 64], "contiguous": True, "lse": [2, rows]}
        assert facts[case] == {**shapes, "passed": passed, "copies": []}
    number = architecture.removeprefix("sm_")
    for kernel in (f"flash_fwd_sm{number}", f"flash_bwd_sm{number}", "flash_bwd_preprocess", "flash_bwd_postprocess"):
        (compiled,) = tmp_path.glob(f"*{kernel}*.{architecture}a.cubin")
        assert compiled.read_bytes().startswith(b"\x7fELF")
    for way in ("fwd", "bwd"):
        (source,) = tmp_path.glob(f"*flash_{way}_sm{number}*.ptx")
        assert instruction in source.read_text(encoding="utf-8")


# Reasons

NOT_CUDA, NOT_NVIDIA = "needs CUDA or ROCm tensors, got cpu", "needs CUDA tensors, got cpu"
NOT_HALF = "needs float16 or bfloat16, got float64"
HEAD_DIM_12 = "needs a head dim that is a multiple of 8 and at most 256, got 12"
NO_FLASH = "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
NO_FLASH3 = (
    "FlashAttention-3 is not installed (pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130)"
)
NO_FLASH4 = "flash-attn-4 is not installed (pip install flash-attn-4==4.0.0b36)"


def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", missing)


def with_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))


def test_reasons_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    without_packages(monkeypatch)
    reasons = {name: not_supported_reasons(name, "cpu", torch.float64, 12) for name in BACKENDS}
    assert reasons["flash"] == [NO_FLASH, NOT_CUDA, NOT_HALF, HEAD_DIM_12]
    assert reasons["flash3"] == [NO_FLASH3, NOT_NVIDIA, NOT_HALF, HEAD_DIM_12]
    assert reasons["flash4"] == [NO_FLASH4, NOT_NVIDIA, NOT_HALF, HEAD_DIM_12]
    no_varlen = f"torch {torch.__version__} has no torch.nn.attention.varlen (pip install -U torch)"
    assert reasons["varlen"] == [no_varlen, NOT_CUDA, NOT_HALF, HEAD_DIM_12]
    dtypes = "needs float16, bfloat16 or float32, got float64"
    assert reasons["xformers"] == ["xformers is not installed (pip install xformers)", NOT_CUDA, dtypes]
    with pytest.raises(
        ValueError, match=r"backend 'flash' cannot run here: .*installed.*; needs CUDA.*; needs float16"
    ):
        choose_backend("flash", "cpu", torch.float64, 12)


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "reason"),
    [
        ("varlen", torch.float16, 264, "needs a head dim that is a multiple of 8 and at most 256, got 264"),
        ("flash", torch.bfloat16, 4, "needs a head dim that is a multiple of 8 and at most 256, got 4"),
        ("flash3", torch.bfloat16, 264, "needs a head dim that is a multiple of 8 and at most 256, got 264"),
        ("flash4", torch.bfloat16, 36, "needs a head dim that is a multiple of 8 and at most 256, got 36"),
        ("xformers", torch.float32, 10, "needs a head dim that is a multiple of 4, got 10"),
        ("xformers", torch.bfloat16, 12, "needs a head dim that is a multiple of 8, got 12"),
    ],
)
def test_head_dims(backend: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert reason in not_supported_reasons(backend, "cuda", dtype, head_dim)


@pytest.mark.parametrize(
    ("capability", "head_dim", "most"),
    [
        ((9, 0), 256, None),
        ((9, 0), 264, 256),
        ((10, 0), 128, None),
        ((10, 0), 192, 128),
        ((10, 3), 256, None),
        ((11, 0), 136, 128),
        ((12, 0), 128, None),
        ((12, 1), 256, 128),
    ],
)
def test_head_dims_of_flash4(
    capability: tuple[int, int], head_dim: int, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, *capability)
    reasons = [
        reason for reason in not_supported_reasons("flash4", "cuda", torch.bfloat16, head_dim) if "dim" in reason
    ]
    said = f"needs a head dim that is a multiple of 8 and at most {most}, got {head_dim}"
    assert reasons == ([] if most is None else [said])


@pytest.mark.parametrize(
    ("backend", "capability", "needed"),
    [
        ("flash", (7, 5), "8.0 or higher"),
        ("varlen", (7, 5), "8.0 or higher"),
        ("flash3", (8, 9), "9.0"),
        ("flash3", (10, 0), "9.0"),
        ("flash4", (8, 0), "9.0 to 12.9"),
        ("flash4", (13, 0), "9.0 to 12.9"),
    ],
)
def test_other_gpus(backend: str, capability: tuple[int, int], needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, *capability)
    reasons = not_supported_reasons(backend, "cuda", torch.float16, 64)
    assert f"needs a GPU of compute capability {needed}, got {capability[0]}.{capability[1]}" in reasons


@pytest.mark.parametrize("backend", ["flash3", "flash4"])
def test_gpus_of_amd(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reasons = not_supported_reasons(backend, "cuda", torch.float16, 64)
    assert "needs a GPU of NVIDIA, this torch is for those of AMD" in reasons


def install(folder: Path, package: str, version: str, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    name = package.replace("-", "_")
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    for path, text in {f"{name}-{version}.dist-info/METADATA": metadata, **files}.items():
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        (folder / path).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


def test_old_flash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flash-attn", "2.6.3", monkeypatch)
    assert not_supported_reasons("flash", "cuda", torch.float16, 64) == ["needs flash-attn 2.7 or newer, got 2.6.3"]


def test_broken_flash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "flash_attn" in sys.modules:
        pytest.skip("flash-attn is imported already")
    broken = {"flash_attn/__init__.py": "raise ImportError('undefined symbol: _ZN3c10')"}
    install(tmp_path, "flash-attn", "2.8.3.post2", monkeypatch, **broken)
    reasons = not_supported_reasons("flash", "cuda", torch.float16, 64)
    assert reasons == ["flash-attn 2.8.3.post2 cannot be imported: undefined symbol: _ZN3c10"]


def test_flash4_beside_an_older_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 2, installed after it, has put its own flash_attn/cute there."""
    install(tmp_path, "flash-attn-4", "4.0.0b36", monkeypatch)
    older = ModuleType("flash_attn.cute.interface")
    older._flash_attn_fwd = lambda q, k, v, cu_seqlens_q, seqused_q, seqused_k, softmax_scale: None
    monkeypatch.setitem(sys.modules, older.__name__, older)
    missing = "max_seqlen_k, max_seqlen_q, num_splits, return_lse"
    assert not_supported_reasons("flash4", "cuda", torch.float16, 64) == [
        f"_flash_attn_fwd of flash-attn-4 4.0.0b36 takes no {missing} ({flash4.REPAIR})"
    ]
    monkeypatch.delattr(older, "_flash_attn_fwd")
    (reason,) = not_supported_reasons("flash4", "cuda", torch.float16, 64)
    assert reason.startswith("flash-attn-4 4.0.0b36 cannot be used: ")


def test_flash4_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flash-attn-4", "4.0.0b36", monkeypatch)
    with flash4_stand_in():
        assert not_supported_reasons("flash4", "cuda", torch.bfloat16, 64) == []


def test_flash4_repeats_not_on_small_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.of_self((5, 2), 1)
    with_gpu(monkeypatch, 12, 0)
    with flash4_stand_in(), SlowKernels():
        problem.run(BACKENDS["flash4"])
        with pytest.raises(ValueError, match=r"not the same bits on every run on a GPU of compute capability 12\.x"):
            problem.run(BACKENDS["flash4"], deterministic=True)


def test_flash3_can_run_and_older_ones_cannot() -> None:
    with flash3_stand_in():
        assert not_supported_reasons("flash3", "cuda", torch.bfloat16, 64) == []
    with flash3_stand_in(FLASH3_FWD, FLASH3_BWD.replace("bool deterministic=False, ", "")):
        (reason,) = not_supported_reasons("flash3", "cuda", torch.bfloat16, 64)
        assert reason.startswith("torch.ops.flash_attn_3.bwd takes no deterministic (pip install flash-attn-3")
    with flash3_stand_in(FLASH3_FWD):
        (reason,) = not_supported_reasons("flash3", "cuda", torch.bfloat16, 64)
        assert reason.startswith("FlashAttention-3 cannot be used: ")


@pytest.mark.skipif(torch.backends.cuda.is_flash_attention_available(), reason="for a torch without FlashAttention")
def test_torch_without_flash_attention() -> None:
    skip_without("varlen")
    reasons = not_supported_reasons("varlen", "cuda", torch.float16, 64)
    assert reasons == ["this torch was built without FlashAttention"]


def xformers_reasons_on(capability: tuple[int, int]) -> list[str]:
    if FLASH_SOURCE.exists():
        import_flash_source()  # before xformers, which looks for it once
    with pytest.MonkeyPatch.context() as patch, fake_mode():
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return not_supported_reasons("xformers", "cuda", torch.float16, 64)


def test_xformers_is_asked(fake_cuda: Call) -> None:
    skip_without("xformers")
    reasons = fake_cuda(xformers_reasons_on, (3, 5))
    assert len(reasons) == 2  # forward and backward
    assert all("no operator of xformers can run: " in reason and "(too old)" in reason for reason in reasons)


def test_order_of_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["native", "cpu", "triton", "flash", "varlen", "xformers", "flash4", "flash3", "reference"]
    assert [name for name in BACKENDS if name in names] == names
    without_packages(monkeypatch)
    assert choose_backend.__wrapped__("auto", "cuda", torch.bfloat16, 64) == "reference"  # past the cache
