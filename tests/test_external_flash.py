"""Other libraries' backends: flash-attn, xformers, fake CUDA and flash-attn-4's compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from external_cases import OPS, Problem, check_against_reference, copies, forward_alone, skip_without, unequal
from fake_cuda import fake_mode
from hlip_kernels.backends import BACKENDS, xformers
from slow_kernels import (
    FLASH4_SOURCE,
    FLASH_SOURCE,
    HEAD_DIM,
    LENGTHS,
    NUM_PREFIX,
    Call,
    import_flash_source,
    on_cpu_tensors,
)
from spans import HEADS, SCALE, plain_spans

needs_flash_source = pytest.mark.skipif(not FLASH_SOURCE.exists(), reason="needs flash-attn's source: make test")
needs_flash4_source = pytest.mark.skipif(not FLASH4_SOURCE.exists(), reason="needs flash-attn-4: make test, on Linux")


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
