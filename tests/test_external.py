"""The backends of other libraries: index arithmetic, what is handed to their ops, and reasons.

Their kernels need a GPU. Here the libraries' own Python code runs, down to the ops; slow kernels that take what the ops
are given, also the log-sum-exp that backward gets, stand in for those of a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import plain_groups
from fake_cuda import fake_mode
from hlip_kernels.backends import BACKENDS, choose_backend, not_supported_reasons
from hlip_kernels.backends.external import group_order

HEADS, HEAD_DIM, SCALE = 2, 8, 0.3
NUM_PREFIX = [0, 1, 2, 17]
LENGTHS = [(5,), (1, 1), (0, 3, 0, 0, 41, 1, 0), (33, 64, 7), (2, 0)]
# flash-attn without its kernels; see the Makefile. Kept apart, or xformers would take it for a whole one.
FLASH_SOURCE = Path(sys.prefix) / "flash-attn"
Call = Callable[..., Any]

needs_flash_source = pytest.mark.skipif(not FLASH_SOURCE.exists(), reason="needs flash-attn's source: make test")


def oracle(lengths: Sequence[int], num_prefix: int) -> list[list[int]]:
    """The rows of every group: prefix rows, then patches."""
    first = len(lengths) * num_prefix
    groups = []
    for g, n in enumerate(lengths):
        groups.append([*range(g * num_prefix, (g + 1) * num_prefix), *range(first, first + n)])
        first += n
    return groups


def check_order(lengths: Sequence[int], num_prefix: int) -> None:
    groups = oracle(lengths, num_prefix)
    rows = [row for group in groups for row in group]
    order = group_order(plain_groups(lengths, num_prefix), len(rows))
    assert order.rows.tolist() == rows
    assert order.group.tolist() == [g for g, group in enumerate(groups) for _ in group]
    assert order.offset.tolist() == [i for group in groups for i in range(len(group))]
    assert order.cu_seqlens.tolist() == [sum(map(len, groups[:g])) for g in range(len(groups) + 1)]
    assert order.cu_seqlens.dtype == torch.int32
    assert order.max_seqlen == max(map(len, groups))
    x = torch.randn(len(rows), 3)
    assert torch.equal(order.gather(x), x[rows])
    assert torch.equal(order.scatter(order.gather(x)), x)
    assert torch.equal(order.scatter(order.gather(x.T, 1), 1), x.T)


@pytest.mark.parametrize("num_prefix", NUM_PREFIX)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_order(lengths: tuple[int, ...], num_prefix: int) -> None:
    check_order(lengths, num_prefix)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(0, 5))
def test_order_of_anything(lengths: list[int], num_prefix: int) -> None:
    check_order(lengths, num_prefix)


# Slow kernels


def slow_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of packed rows (R, H, D): out, and lse (H, R)."""
    assert bounds.dtype == torch.int32
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        scores = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) * scale
        lse[:, a:b] = scores.logsumexp(-1)
        out[a:b] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[a:b])
    return out, lse


def slow_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, scale: float
) -> list[Tensor]:
    """From out and lse as they are given, like the kernels of a GPU."""
    assert lse.shape == (q.shape[1], q.shape[0])
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        p = torch.exp(torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) * scale - lse[:, a:b, None])
        dp = torch.einsum("ihd,jhd->hij", do[a:b], v[a:b])
        ds = p * (dp - (do[a:b] * out[a:b]).sum(-1).T[..., None]) * scale
        grads[0][a:b] = torch.einsum("hij,jhd->ihd", ds, k[a:b])
        grads[1][a:b] = torch.einsum("hij,ihd->jhd", ds, q[a:b])
        grads[2][a:b] = torch.einsum("hij,ihd->jhd", p, do[a:b])
    return grads


class SlowKernels(TorchDispatchMode):
    """Answers the libraries' ops; arguments that would mean another kind of attention are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removesuffix(".default")
        answer = getattr(self, name.replace(".", "_"), None)
        if answer is None:
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        given = {argument.name: argument.default_value for argument in func._schema.arguments}
        given.update(zip(names, args, strict=False), **(kwargs or {}))
        for key in ("causal", "is_causal", "dropout_p", "softcap", "custom_mask_type"):
            assert not given.get(key), key
        for key in ("bias", "alibi_slopes", "window_size", "seqused_k", "seqlen_k", "block_table"):
            assert given.get(key) in (None, [-1, -1]), key  # -1: a window without an end
        self.called.append(name)
        return answer(given)

    def torch_attn__varlen_attn(self, given: dict[str, Any]) -> Any:
        q, k, v, bounds = (given[key] for key in ("query", "key", "value", "cu_seq_q"))
        assert given["max_q"] == given["max_k"] == bounds.diff().max()
        assert torch.equal(bounds, given["cu_seq_k"])
        return *slow_forward(q, k, v, bounds, given["scale"]), torch.zeros(2, dtype=torch.uint64)

    def torch_attn__varlen_attn_backward(self, given: dict[str, Any]) -> Any:
        assert given["max_q"] == given["max_k"] == given["cu_seq_q"].diff().max()
        names = ("grad_out", "query", "key", "value", "out", "lse", "cu_seq_q", "scale")
        return tuple(slow_backward(*(given[key] for key in names)))

    def flash_attn__flash_attn_varlen_forward(self, given: dict[str, Any]) -> Any:
        bounds = given["cu_seqlens_q"]
        assert given["max_seqlen_q"] == given["max_seqlen_k"] == bounds.diff().max()
        assert given["window_size_left"] == given["window_size_right"] == -1
        q, k, v = (given[key] for key in "qkv")
        nothing = q.new_empty(0)
        return *slow_forward(q, k, v, bounds, given["softmax_scale"]), nothing, nothing

    def flash_attn__flash_attn_varlen_backward(self, given: dict[str, Any]) -> Any:
        assert given["deterministic"]
        names = ("dout", "q", "k", "v", "out", "softmax_lse", "cu_seqlens_q", "softmax_scale")
        grads = slow_backward(*(given[key] for key in names))
        for key, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            given[key].copy_(grad)
        return grads[0].new_empty(0)

    def xformers_flash_flash_fwd(self, given: dict[str, Any]) -> Any:
        assert given["max_seqlen_q"] == given["max_seqlen_k"] == given["cu_seqlens_q"].diff().max()
        assert given["window_left"] == given["window_right"] == -1
        names = ("query", "key", "value", "cu_seqlens_q", "softmax_scale")
        return *slow_forward(*(given[key] for key in names)), torch.empty(0)

    def xformers_flash_flash_bwd(self, given: dict[str, Any]) -> Any:
        names = ("grad", "query", "key", "value", "out", "lse", "cu_seqlens_q", "softmax_scale")
        return tuple(slow_backward(*(given[key] for key in names)))

    # CUTLASS takes a batch of one, and keeps the lse padded: (G, H, longest group and up to 31 more)

    def aten__efficient_attention_forward(self, given: dict[str, Any]) -> Any:
        bounds, longest = given["cu_seqlens_q"], given["max_seqlen_q"]
        assert longest == bounds.diff().max()
        assert given["compute_log_sumexp"]
        out, lse = slow_forward(*(given[key][0] for key in ("query", "key", "value")), bounds, given["scale"])
        padded = lse.new_full((len(bounds) - 1, HEADS, (longest + 31) // 32 * 32), torch.nan)
        for g, (a, b) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:], strict=False)):
            padded[g, :, : b - a] = lse[:, a:b]
        nothing = lse.new_empty(0)
        return out[None], padded, nothing, nothing, longest, longest

    def aten__efficient_attention_backward(self, given: dict[str, Any]) -> Any:
        bounds, padded = given["cu_seqlens_q"], given["logsumexp"]
        lengths = bounds.diff()
        assert padded.shape[2] % 32 == 0
        assert padded.shape[2] >= given["max_seqlen_q"] == lengths.max()
        kept = torch.arange(padded.shape[2]) < lengths[:, None]
        assert padded.transpose(1, 2)[~kept].eq(torch.inf).all()
        tensors = [given[key][0] for key in ("grad_out_", "query", "key", "value", "out")]
        grads = slow_backward(*tensors, padded.transpose(1, 2)[kept].T, bounds, given["scale"])
        return *(grad[None] for grad in grads), torch.empty(0)


def check_against_reference(backend: ModuleType, dtype: torch.dtype, lengths: Sequence[int], num_prefix: int) -> list:
    """Out, lse and gradient on real CPU tensors. Returns the ops that ran."""
    torch.manual_seed(0)
    groups = plain_groups(lengths, num_prefix)
    rows = sum(lengths) + len(lengths) * num_prefix
    qkv = torch.randn(rows, 3, HEADS, HEAD_DIM, dtype=dtype)
    grad_out = torch.randn(rows, HEADS, HEAD_DIM, dtype=dtype)
    out, lse = BACKENDS["reference"].forward(qkv, groups, SCALE)
    grad = BACKENDS["reference"].backward(grad_out, qkv, out, lse, groups, SCALE)
    with SlowKernels() as kernels:
        got = backend.forward(qkv, groups, SCALE)
        got_grad = backend.backward(grad_out, qkv, *got, groups, SCALE)
    torch.testing.assert_close(got, (out, lse))
    torch.testing.assert_close(got_grad, grad)
    return kernels.called


@pytest.mark.parametrize("num_prefix", NUM_PREFIX)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_varlen_like_the_reference(lengths: tuple[int, ...], num_prefix: int) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    called = check_against_reference(BACKENDS["varlen"], torch.float64, lengths, num_prefix)
    assert called == ["torch_attn._varlen_attn", "torch_attn._varlen_attn_backward"]


def import_flash_source() -> None:
    """Its extension is never called, but must be there to be imported."""
    if str(FLASH_SOURCE) not in sys.path:
        sys.path.insert(0, str(FLASH_SOURCE))
        sys.modules["flash_attn_2_cuda"] = ModuleType("flash_attn_2_cuda")


def flash_against_reference() -> list[list[str]]:
    import_flash_source()
    return [
        check_against_reference(BACKENDS["flash"], torch.float64, lengths, num_prefix)
        for lengths in LENGTHS
        for num_prefix in NUM_PREFIX
    ]


@needs_flash_source
def test_flash_like_the_reference(fake_cuda: Call) -> None:
    for called in fake_cuda(flash_against_reference):
        assert called == ["flash_attn._flash_attn_varlen_forward", "flash_attn._flash_attn_varlen_backward"]


@pytest.mark.parametrize("num_prefix", NUM_PREFIX)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_xformers_like_the_reference(
    lengths: tuple[int, ...], num_prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xformers")
    take_cpu_tensors(monkeypatch, "cutlass")
    called = check_against_reference(BACKENDS["xformers"], torch.float64, lengths, num_prefix)
    assert called == ["aten._efficient_attention_forward", "aten._efficient_attention_backward"]


def take_cpu_tensors(patch: pytest.MonkeyPatch, *modules: str) -> None:
    """Tells xformers that these operators, and no others, can run on CPU tensors of float64."""
    from xformers.ops import fmha

    for module in modules:
        for operator in (getattr(fmha, module).FwOp, getattr(fmha, module).BwOp):
            patch.setattr(operator, "SUPPORTED_DEVICES", {"cpu"})
            patch.setattr(operator, "SUPPORTED_DTYPES", {torch.float64})
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


def xformers_with_flash_against_reference(deterministic: bool) -> list[list[str]]:
    import_flash_source()
    torch.use_deterministic_algorithms(deterministic)
    with pytest.MonkeyPatch.context() as patch:
        take_cpu_tensors(patch, "flash", "cutlass")
        called = [
            check_against_reference(BACKENDS["xformers"], torch.float64, lengths, num_prefix)
            for lengths in LENGTHS
            for num_prefix in NUM_PREFIX
        ]
    torch.use_deterministic_algorithms(False)
    return called


@needs_flash_source
@pytest.mark.parametrize("deterministic", [False, True])
def test_xformers_with_flash_like_the_reference(fake_cuda: Call, deterministic: bool) -> None:
    """Its backward with flash-attn is not deterministic: another operator then takes the log-sum-exp of this one."""
    pytest.importorskip("xformers")
    backward = "aten._efficient_attention_backward" if deterministic else "xformers_flash.flash_bwd"
    for called in fake_cuda(xformers_with_flash_against_reference, deterministic):
        assert called == ["xformers_flash.flash_fwd", backward]


@pytest.mark.parametrize("num_prefix", NUM_PREFIX)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_mask_of_xformers(lengths: tuple[int, ...], num_prefix: int) -> None:
    pytest.importorskip("xformers")
    groups = oracle(lengths, num_prefix)
    rows = sum(map(len, groups))
    order = group_order(plain_groups(lengths, num_prefix), rows)
    mask = BACKENDS["xformers"].block_diagonal(order.cu_seqlens, order.max_seqlen)
    mask.q_seqinfo.seqstart_py = mask.q_seqinfo.seqstart.tolist()  # what printing a mask needs, and running does not
    blocks = torch.block_diag(*(torch.ones(len(group), len(group)) for group in groups if group))
    assert torch.equal(mask.materialize((rows, rows)), blocks.log())
    inputs = [torch.zeros(1, rows, HEADS, HEAD_DIM)] * 3
    sys.modules["xformers.ops.fmha"].Inputs(*inputs, mask).validate_inputs()


def test_padding_is_undone() -> None:
    backend = BACKENDS["xformers"]
    order = group_order(plain_groups((3, 0, 40), 2), 49)
    lse = torch.randn(HEADS, 49)
    padded = backend.pad(lse, order)
    assert padded.shape == (3, HEADS, 64)
    assert padded.isfinite().sum() == lse.numel()
    assert torch.equal(backend.unpad(padded, order), lse)


# On fake CUDA tensors: shapes, dtypes, and that nothing is asked of the device


def facts_on_cuda(backend: str, dtype: torch.dtype) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    if backend != "varlen":
        import_flash_source()
    groups = plain_groups((3, 0, 70), 2)
    with fake_mode(), pytest.MonkeyPatch.context() as patch:
        if backend == "xformers":
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
            patch.setattr("xformers.ops.fmha.common._built_with_cuda", True)
        groups = groups._replace(cu_seqlens=groups.cu_seqlens.to("cuda"))
        qkv = torch.empty(79, 3, HEADS, HEAD_DIM, dtype=dtype, device="cuda")
        out, lse = BACKENDS[backend].forward(qkv, groups, SCALE)
        grad = BACKENDS[backend].backward(torch.empty_like(out), qkv, out, lse, groups, SCALE)
        return [(x.shape, x.dtype, x.device) for x in (out, lse, grad)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "backend",
    ["varlen", *(pytest.param(name, marks=needs_flash_source) for name in ("flash", "xformers"))],
)
def test_on_fake_cuda(fake_cuda: Call, backend: str, dtype: torch.dtype) -> None:
    """Of xformers only what it does with flash-attn: PyTorch's fake of CUTLASS's backward refuses its own arguments."""
    if backend != "flash":
        pytest.importorskip({"varlen": "torch.nn.attention.varlen", "xformers": "xformers"}[backend])
    cuda = torch.device("cuda:0")
    assert fake_cuda(facts_on_cuda, backend, dtype) == [
        ((79, HEADS, HEAD_DIM), dtype, cuda),
        ((HEADS, 79), torch.float32, cuda),
        ((79, 3, HEADS, HEAD_DIM), dtype, cuda),
    ]


# Reasons

NOT_CUDA = "needs CUDA or ROCm tensors, got cpu"
HEAD_DIM_12 = "needs a head dim that is a multiple of 8 and at most 256, got 12"
NO_FLASH = "flash-attn is not installed (pip install flash-attn --no-build-isolation)"


def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", missing)


def test_reasons_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    without_packages(monkeypatch)
    reasons = {name: not_supported_reasons(name, "cpu", torch.float64, 12) for name in BACKENDS}
    shared = [NOT_CUDA, "needs float16 or bfloat16, got float64", HEAD_DIM_12]
    assert reasons["flash"] == [NO_FLASH, *shared]
    no_varlen = f"torch {torch.__version__} has no torch.nn.attention.varlen (pip install -U torch)"
    assert reasons["varlen"] == [no_varlen, *shared]
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
        ("xformers", torch.float32, 10, "needs a head dim that is a multiple of 4, got 10"),
        ("xformers", torch.bfloat16, 12, "needs a head dim that is a multiple of 8, got 12"),
    ],
)
def test_head_dims(backend: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert reason in not_supported_reasons(backend, "cuda", dtype, head_dim)


def test_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    for backend in ("flash", "varlen"):
        reasons = not_supported_reasons(backend, "cuda", torch.float16, 64)
        assert "needs a GPU of compute capability 8.0 or higher, got 7.5" in reasons


def install_flash(folder: Path, version: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        (f"flash_attn-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n"),
        ("flash_attn/__init__.py", source),
    ):
        (folder / name).parent.mkdir()
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


def test_old_flash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash(tmp_path, "2.6.3", "", monkeypatch)
    assert not_supported_reasons("flash", "cuda", torch.float16, 64) == ["needs flash-attn 2.7 or newer, got 2.6.3"]


def test_broken_flash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "flash_attn" in sys.modules:
        pytest.skip("flash-attn is imported already")
    install_flash(tmp_path, "2.8.3.post2", "raise ImportError('undefined symbol: _ZN3c10')", monkeypatch)
    reasons = not_supported_reasons("flash", "cuda", torch.float16, 64)
    assert reasons == ["flash-attn 2.8.3.post2 cannot be imported: undefined symbol: _ZN3c10"]


@pytest.mark.skipif(torch.backends.cuda.is_flash_attention_available(), reason="for a torch without FlashAttention")
def test_torch_without_flash_attention() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
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
    pytest.importorskip("xformers")
    reasons = fake_cuda(xformers_reasons_on, (3, 5))
    assert len(reasons) == 2  # forward and backward
    assert all("no operator of xformers can run: " in reason and "(too old)" in reason for reason in reasons)


def test_order_of_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(BACKENDS) == ["native", "cpu", "triton", "flash", "varlen", "xformers", "reference"]
    without_packages(monkeypatch)
    assert choose_backend.__wrapped__("auto", "cuda", torch.bfloat16, 64) == "reference"  # past the cache
