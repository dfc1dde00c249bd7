"""Other libraries' backends: reasons that one cannot run, all at once."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from external_cases import Problem, skip_without
from fake_cuda import fake_mode
from hlip_kernels.backends import BACKENDS, choose_backend, flash4, not_supported_reasons
from slow_kernels import (
    FLASH3_BWD,
    FLASH3_FWD,
    FLASH_SOURCE,
    Call,
    SlowKernels,
    flash3_stand_in,
    flash4_stand_in,
    import_flash_source,
)

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
