"""Slow kernels in place of those that need a GPU; modules with the signatures of flash-attn-4 and FlashAttention-3."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import site
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

HEAD_DIM = 8
NUM_PREFIX = [0, 1, 2, 17]
LENGTHS = [(5,), (1, 1), (0, 3, 0, 0, 41, 1, 0), (33, 64, 7), (2, 0)]
QUERIES, PATCHES = (3, 1, 0, 5, 40, 2), (70, 1, 7, 0, 130, 33)  # of studies: none of the third, nothing in the fourth
# flash-attn without its kernels, and flash-attn-4; see the Makefile. Kept apart, or xformers would use them.
FLASH_SOURCE, FLASH4_SOURCE = Path(sys.prefix) / "flash-attn", Path(sys.prefix) / "flash-attn-4"
Call = Callable[..., Any]


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
