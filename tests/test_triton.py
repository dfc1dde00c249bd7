"""The Triton kernels in the interpreter (bf16 as `interpreter.py` corrects it), and through the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hlip
from conftest import random_study, tiny_vision
from hlip.model.encoder import StudyEncoder
from hlip_kernels import StudyLayout, available_backends, hier_attention
from hlip_kernels.attention import flat_attention
from hlip_kernels.backends import BACKENDS
from hlip_kernels.layout import LEVELS, TILE_ROWS
from hlip_kernels.tiles import ALLOWED, ARCHITECTURES, BLOCK_D, KINDS, Row, attention_config, built_in_config
from spans import check_few_queries, plain_spans

pytest.importorskip("triton")
import triton

from benchlib import static

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret is False, reason="conftest sets TRITON_INTERPRET=1")

forward_op = torch.ops.hlip_kernels.hier_attention.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 197, 300]
HEADS = 2


@pytest.fixture(autouse=True)
def _fill_new_memory_with_nan() -> object:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def attend(qkv: torch.Tensor, lengths: list[int], num_prefix: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return forward_op(
        qkv, *flat_attention(plain_spans(lengths, num_prefix), qkv.shape[3] ** -0.5, backend, False, "scan")
    )


def assert_close_to_oracle(
    lengths: list[int], num_prefix: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> None:
    """Error against float64 at most 2x (out, lse) or 3x (gradients) eager PyTorch's, plus one rounding."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths) * num_prefix + sum(lengths)
    qkv = torch.randn(rows, 3, HEADS, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    grad_out = torch.randn(rows, HEADS, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    results = {}
    for name, backend, kind in [
        ("ours", "triton", dtype),
        ("eager", "reference", dtype),
        ("oracle", "reference", torch.float64),
    ]:
        leaf = qkv.to(kind).requires_grad_()
        out, lse = attend(leaf, lengths, num_prefix, backend)
        (grad,) = torch.autograd.grad(out, leaf, grad_out.to(kind))
        results[name] = {"out": out.detach(), "lse": lse, "grad": grad}
    if rows == 0:
        return
    for part, exact in results["oracle"].items():
        ours, eager = (float((results[name][part].double() - exact).abs().max()) for name in ("ours", "eager"))
        rounding = torch.finfo(torch.float32 if part == "lse" else dtype).eps * float(exact.abs().max())
        assert ours <= (3 if part == "grad" else 2) * eager + rounding, (part, ours, eager, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5, 17])
def test_ragged_groups_equal_the_oracle(num_prefix: int, dtype: torch.dtype) -> None:
    assert_close_to_oracle(LENGTHS, num_prefix, 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", sorted(BLOCK_D))
def test_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    assert_close_to_oracle([5, 0, 70], 2, head_dim, dtype)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 140), min_size=1, max_size=5),
    st.integers(0, 32),
    st.sampled_from([16, 80]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_random_groups_equal_the_oracle(
    lengths: list[int], num_prefix: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    assert_close_to_oracle(lengths, num_prefix, head_dim, dtype, seed)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_few_queries_attend_to_patches_where_they_lie(dtype: torch.dtype, head_dim: int) -> None:
    check_few_queries(BACKENDS["triton"], dtype, head_dim)


def test_queries_and_keys_of_any_strides() -> None:
    """k and v in memory of their own, or of different strides; gradients into strided views."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = plain_spans([5, 40]), plain_spans([70, 3])
    q = torch.randn(HEADS, 45, 16, generator=generator).transpose(0, 1)
    k, v = (torch.randn(73, HEADS, 16, generator=generator) for _ in range(2))
    grad_out = torch.randn(45, HEADS, 32, generator=generator)[..., :16]
    results = []
    for key, value in ((k, v), (k, v.transpose(0, 1).contiguous().transpose(0, 1)), (k.flip(2).flip(2), v)):
        out, lse = BACKENDS["triton"].forward(q, key, value, queries, keys, 0.25)
        grads = torch.zeros(HEADS, 45, 16).transpose(0, 1), torch.zeros(73, HEADS, 24)[..., 8:], torch.zeros_like(value)
        BACKENDS["triton"].backward(grads, grad_out, q, key, value, out, lse, queries, keys, 0.25, False)
        results.append((out, lse, *grads))
    expected = BACKENDS["reference"].forward(q, k, v, queries, keys, 0.25)
    torch.testing.assert_close(results[0][:2], expected, rtol=1e-5, atol=1e-5)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    with pytest.raises(ValueError, match="grad_v: expected memory whose last dimension is contiguous"):
        grads = *grads[:2], torch.zeros(73, 16, HEADS).transpose(1, 2)
        BACKENDS["triton"].backward(grads, grad_out, q, k, v, out, lse, queries, keys, 0.25, False)


@pytest.mark.filterwarnings("ignore:overflow encountered in matmul")
def test_a_first_tile_of_infinite_scores_spoils_nothing() -> None:
    """Products of some rows with the first keys, which are more than a tile, leave float32's range: they are -inf."""
    num_keys, head_dim = 130, 16
    qkv = torch.randn(200, 3, 1, head_dim, generator=torch.Generator().manual_seed(0))
    qkv[:, :2, :, 0] = 0
    qkv[::3, 0, :, 0], qkv[:num_keys, 1, :, 0] = 1e30, -1e30
    results = []
    for backend in ("triton", "reference"):
        leaf = qkv.clone().requires_grad_()
        out, lse = attend(leaf, [200], 0, backend)
        (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        assert grad.isfinite().all()
        results.append((out, lse, grad[..., 1:]))  # in column 0, numbers of 1e30 cancel one another
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_group_of_nan_leaves_the_others_exact() -> None:
    lengths, num_prefix = [70, 64, 3], 1
    qkv = torch.randn(3 + 137, 3, HEADS, 32, generator=torch.Generator().manual_seed(0))
    spoiled = qkv.clone()
    group = torch.arange(71, 71 + 65)
    spoiled[group] = float("nan")
    others = torch.ones(len(qkv), dtype=torch.bool)
    others[group] = False
    grads, outs = [], []
    for x in (qkv, spoiled):
        leaf = x.requires_grad_()
        outs.append(attend(leaf, lengths, num_prefix, "triton")[0])
        grads.append(torch.autograd.grad(outs[-1], leaf, torch.ones_like(outs[-1]))[0])
    assert torch.equal(outs[0][others], outs[1][others])
    assert torch.equal(grads[0][others], grads[1][others])
    assert outs[1][group].isnan().all()


@pytest.mark.parametrize("level", ["slice", "scan", "study"])
def test_a_study_alone_is_bitwise_the_study_in_a_batch(level: str) -> None:
    study, others = [(2, 5, 7), (3, 4, 4)], [[(1, 9, 9)], [(4, 3, 3)] * 2]
    alone = StudyLayout.from_grids([study], num_prefix=2)
    batch = StudyLayout.from_grids([others[0], study, others[1]], num_prefix=2)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch.num_rows(level), 3, HEADS, 32, generator=generator)
    rows = 2 + 81 + torch.arange(alone.num_rows(level))  # the study before has one group at every level
    grad_out = torch.randn(len(qkv), HEADS, 32, generator=generator)

    def results(layout: StudyLayout, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = qkv[rows].requires_grad_()
        out = hier_attention(leaf, layout, level, backend="triton")
        return out, torch.autograd.grad(out, leaf, grad_out[rows])[0]

    everything = torch.arange(len(qkv))
    for one, whole, again in zip(
        *(results(*x) for x in ((alone, rows), (batch, everything), (batch, everything))), strict=True
    ):
        assert torch.equal(whole[rows], one)
        assert torch.equal(whole, again)


def test_strided_qkv() -> None:
    layout = StudyLayout.from_grids([[(2, 5, 7)]])
    wide = torch.randn(71, 3, HEADS, 48, generator=torch.Generator().manual_seed(0))
    for qkv in (wide[..., 16:], wide.transpose(1, 2).contiguous().transpose(1, 2)[..., :32], wide[..., :32].flip(3)):
        expected = hier_attention(qkv.contiguous(), layout, "scan", backend="triton")
        assert torch.equal(hier_attention(qkv, layout, "scan", backend="triton"), expected)


def test_opcheck() -> None:
    rest = flat_attention(plain_spans([3, 0, 20], 1), 0.25, "triton", False, "scan")
    qkv = torch.randn(26, 3, HEADS, 16)
    torch.library.opcheck(forward_op, (qkv.clone().requires_grad_(), *rest))
    out, lse = forward_op(qkv, *rest)
    backward_op = torch.ops.hlip_kernels.hier_attention_backward.default
    torch.library.opcheck(backward_op, (torch.ones_like(out), qkv, out, lse, *rest))


def test_a_training_step_of_the_encoder_equals_the_cpu_backend() -> None:
    batch = hlip.pack([random_study([(8, 16, 16)] * 3), random_study([(4, 16, 24)], 1)], (4, 8, 8))
    grads = []
    for backend in ("triton", "cpu"):
        torch.manual_seed(0)
        encoder = StudyEncoder(tiny_vision("slice+scan+study", num_prefix=2))
        for block in encoder.blocks:
            block.attn.backend = backend
        torch.manual_seed(1)
        out = encoder.train()(batch)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        grads.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_tile_maps_cover_every_row_once_longest_groups_first(num_prefix: int) -> None:
    layout = StudyLayout.from_grids([[(2, 3, 3), (1, 9, 9)], [(3, 2, 5)], [(4, 9, 9)]], num_prefix)
    for level, (i, rows) in product(LEVELS, enumerate(TILE_ROWS)):
        lengths = layout.seqlens(level) + num_prefix
        tiles = layout.tiles(level)[i].tolist()
        covered = [(g, r) for g, first in tiles for r in range(first, min(first + rows, lengths[g]))]
        assert sorted(covered) == [(g, r) for g, n in enumerate(lengths) for r in range(n)]
        assert all(first < lengths[g] for g, first in tiles)
        assert (np.diff([lengths[g] for g, _ in tiles]) <= 0).all()


def test_every_reason_is_given() -> None:
    layout = StudyLayout.from_grids([[(1, 1, 2)]])
    with pytest.raises(ValueError, match=r"'triton' cannot run here: needs float16.*got float64; needs a head dim of"):
        hier_attention(torch.randn(3, 3, 1, 7, dtype=torch.float64), layout, "scan", backend="triton")
    assert available_backends("cuda")[0] == "triton"
    assert available_backends("cpu")[0] != "triton"  # interpreted


def test_tf32_only_where_pytorch_allows_it() -> None:
    """In a process of its own: PyTorch refuses a mix of its old and new settings."""
    code = (
        "import torch; from hlip_kernels.backends.triton_attention import _constants, _kind\n"
        "from hlip_kernels.tiles import Tile\n"
        "def kind(dtype=torch.float32): return _constants(_kind(dtype), 1, 16, Tile(64, 32, 4, 1))['PRECISION']\n"
        "assert kind() == 'ieee'\n"
        "{allow}\n"
        "assert kind() == 'tf32' and kind(torch.float16) == 'ieee'\n"
    )
    ways = ["torch.set_float32_matmul_precision('high')", "torch.backends.cuda.matmul.allow_tf32 = True"]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        ways += ["torch.backends.cuda.matmul.fp32_precision = 'tf32'", "torch.backends.fp32_precision = 'tf32'"]
    for allow in ways:
        subprocess.run([sys.executable, "-c", code.format(allow=allow)], check=True)


def test_without_triton_the_cpu_works_and_triton_explains_itself() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch\nfrom hlip_kernels import *\n"
        "layout = StudyLayout.from_grids([[(1, 1, 2)]]); x = torch.randn(3, 3, 1, 16)\n"
        "print(available_backends('cpu', torch.float64), hier_attention(x, layout, 'scan').shape)\n"
        "hier_attention(x, layout, 'scan', backend='triton')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "['cpu', 'reference'] torch.Size([3, 1, 16])" in done.stdout
    assert "triton is not installed (pip install triton)" in done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_999"])
def test_the_table_has_a_row_for_everything(arch: str, kind: str) -> None:
    for head_dim in BLOCK_D:
        for tile in vars(built_in_config(Row(arch, kind, head_dim))).values():
            assert all(value in allowed for value, allowed in zip(tile, ALLOWED, strict=True))


def test_each_dtype_finds_its_row() -> None:
    half, single, tf32 = (built_in_config(Row("sm_90", kind, 64)) for kind in KINDS)
    assert half != single != tf32 != half
    assert attention_config("sm_90", torch.float16, 64) == attention_config("sm_90", torch.bfloat16, 64) == half
    assert attention_config("sm_90", torch.float32, 64) == single
    assert attention_config("sm_90", torch.float32, 64, tf32=True) == tf32


def static_rows(folder: Path, *settings: str) -> list[dict[str, Any]]:
    """What `bench/attention.py --static` finds, without a fault."""
    script = Path(__file__).parents[1] / "bench" / "attention.py"
    done = subprocess.run(
        [sys.executable, str(script), "--static", *settings, "--workers", "1", "--json", str(folder / "static.json")],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((folder / "static.json").read_text())


@pytest.mark.slow
def test_kernels_compile_ahead_of_time_without_spills(tmp_path: Path) -> None:
    """A sample of the tile table; `make test-all` does all of it.

    On sm_90 the loop over full tiles is as short as that of plain dense attention.
    """
    archs = ("sm_80", "sm_90", "gfx942")
    rows = static_rows(tmp_path, "--arch", *archs, "--dtype", "bf16", "--head-dim", "64", "--width")
    assert {(row["arch"], row["kernel"]) for row in rows} == set(product(archs, ("forward", "dq", "dkdv")))
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert row["matrix_instructions"] > 0, row
        assert not row["serialised"], row
        if row["arch"] == "sm_90":
            assert row["loop_instructions"] <= row["dense_loop_instructions"], row


@pytest.mark.slow
def test_kernels_compile_with_lengths_of_their_own() -> None:
    """`Spans.seqused`; in a process without the interpreter."""
    code = (
        "from benchlib import static\nfrom hlip_kernels.backends import triton_attention\n"
        "for kernel, tile in vars(static.built_in_config(static.row_of('sm_90', static.DTYPES['bf16'], 64))).items():\n"
        "    kernel = getattr(triton_attention, 'attention_' + kernel)\n"
        "    facts = static.compile_attention(kernel, 'sm_90', 'bf16', 64, tile, used=True)\n"
        "    assert not facts['stack_bytes'] and not facts['serialised'], facts\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(static.__file__).parents[i]) for i in (1, 2))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
def test_norm_kernels_compile_ahead_of_time_without_spills(tmp_path: Path) -> None:
    rows = static_rows(tmp_path, "--arch", "sm_90", "--head-dim", "--width", "384")
    kernels = {f"{half}_{way}" for half in ("norm", "prefix") for way in ("forward", "backward")}
    assert {row["kernel"].split()[0] for row in rows} == {*kernels, "norm_rows", "gelu_backward"}
    for row in rows:
        assert row["head_dim"] is None
        assert row["width"] == (None if row["kernel"] == "gelu_backward" else 384)
        assert (row["stack_bytes"], row["matrix_instructions"]) == (0, 0), row
        assert row["occupancy"] * row["warps"] >= 16, row
