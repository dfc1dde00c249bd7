"""Every kernel compiled ahead of time with Triton's own compiler, and what its machine code says. Nothing is run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from hlip_kernels.tiles import BLOCK_D, Tile, built_in_config, kind_of, max_registers, row_of

from . import machine_code

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
HEADS = 12
WIDTHS = (384, 768, 1024)
SHARED_PER_SM = {  # KiB
    "sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_103": 228, "sm_110": 228, "sm_120": 100,
    "sm_121": 100,
}  # fmt: skip
THREADS_PER_SM = {
    "sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_103": 2048, "sm_110": 1536,
    "sm_120": 1536, "sm_121": 1536,
}  # fmt: skip
REGISTERS_PER_SM = 65536
COLUMNS = (
    "arch", "dtype", "head_dim", "width", "kernel", "rows", "streamed", "warps", "stages", "registers",
    "stack_bytes", "shared_bytes", "occupancy", "matrix_instructions", "serialised", "warning", "loop_instructions",
    "dense_loop_instructions", "dense_serialised",
)  # fmt: skip
NORM_DTYPES = {"fp32+bf16": ("fp32", "bf16"), "bf16": ("bf16", "bf16")}  # of the residual, of the update


class Attention(NamedTuple):
    arch: str
    dtype: str
    head_dim: int
    name: str
    tile: Tile


class Rows(NamedTuple):
    """A kernel of whole rows: the norm, or what computes something once more in backward.

    width: of the norm; None for GELU, which takes rows of any.
    change: of the norm, from one level to the next: same, coarser or finer.
    """

    arch: str
    dtype: str
    width: int | None
    name: str
    change: str = ""


Case = Attention | Rows


def run(cases: Sequence[Case], workers: int) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = pool.map(compile_case, cases)
        return list(tqdm(rows, "compiling", total=len(cases), unit="kernel"))


def faults(rows: list[dict[str, Any]], triton: str) -> list[str]:
    """List the faults of rows that no row of the built-in table may have, on this version of Triton.

    The assembler of 3.2 and 3.3 serialises plain dense attention with any tile: there ours may be no worse.
    """
    serialises_all = tuple(map(int, triton.split(".")[:2])) < (3, 4)
    lines = []
    for row in rows:
        what = " ".join(str(row[name]) for name in ("arch", "dtype", "head_dim", "width", "kernel") if row[name])
        if row["stack_bytes"]:
            lines.append(f"{what}: {row['stack_bytes']} bytes spill")
        if row["occupancy"] == 0:
            lines.append(f"{what}: {row['shared_bytes']} bytes of shared memory are more than there is")
        if row["head_dim"] and row["dtype"] != "fp32" and not row["matrix_instructions"]:
            lines.append(f"{what}: the matrix units are idle")
        if (row["serialised"] or row["warning"]) and not (serialises_all and row["dense_serialised"]):
            why = f" ({row['warning']})" if row["warning"] else ""
            lines.append(f"{what}: every matrix instruction waits for the one before{why}")
    return lines


def attention_cases(archs: Sequence[str], dtypes: Sequence[str], head_dims: Sequence[int]) -> list[Case]:
    """The built-in table's rows."""
    return [
        Attention(arch, dtype, head_dim, name, tile)
        for arch, dtype, head_dim in product(archs, dtypes, head_dims)
        for name, tile in vars(built_in_config(row_of(arch, DTYPES[dtype], head_dim, dtype == "tf32"))).items()
    ]


def row_cases(archs: Sequence[str], widths: Sequence[int]) -> list[Case]:
    """The norm's kernels; those of GELU with them."""
    changes = (
        ("same", ("norm_forward", "norm_backward")),
        ("coarser", ("norm_forward", "norm_backward", "prefix_forward", "prefix_backward")),
        ("finer", ("norm_forward", "norm_backward", "prefix_backward")),
        ("", ("norm_rows",)),
    )
    cases: list[Case] = [
        Rows(arch, dtype, width, name, change)
        for arch, dtype, width in product(archs, NORM_DTYPES, widths)
        for change, names in changes
        for name in names
    ]
    gelu = (Rows(arch, dtype, None, "gelu_backward") for arch, dtype in product(archs, ("bf16", "fp32")))
    return [*cases, *(gelu if widths else ())]


def compile_case(case: Case) -> dict[str, Any]:
    facts = dict.fromkeys(COLUMNS) | {"arch": case.arch, "dtype": case.dtype}
    return facts | (_attention_facts(case) if isinstance(case, Attention) else _row_facts(case))


def _attention_facts(case: Attention) -> dict[str, Any]:
    """Compile a kernel as `triton_attention` would launch it; where it is of bf16 or serialised, also plain dense
    attention with the same tile."""
    from hlip_kernels.backends import triton_attention

    from . import dense

    arch, dtype, head_dim, name, tile = case
    facts = compile_attention(getattr(triton_attention, f"attention_{name}"), arch, dtype, head_dim, tile)
    like_dense = dtype == "bf16" and BLOCK_D[head_dim] == head_dim
    if like_dense or facts["serialised"] or facts["warning"]:
        plain = compile_attention(getattr(dense, f"attention_{name}"), arch, dtype, BLOCK_D[head_dim], tile)
        facts["dense_serialised"] = plain["serialised"]
        if like_dense:
            facts["dense_loop_instructions"] = plain["loop_instructions"]
    return {"head_dim": head_dim, "kernel": name, **tile._asdict()} | facts


def compile_attention(
    kernel: Any, arch: str, dtype: str, head_dim: int, tile: Tile, used: bool = False
) -> dict[str, Any]:
    """used: whether there is a `seqused`."""
    from hlip_kernels.backends import triton_attention

    constants = {
        "H": HEADS, "D": head_dim, "BLOCK_D": BLOCK_D[head_dim], "ROWS": tile.rows, "STREAMED": tile.streamed,
        "PRECISION": "tf32" if dtype == "tf32" else "ieee",
        **({} if used else {"UsedQueries": None, "UsedKeys": None}),
    }  # fmt: skip
    stored = {"tf32": "fp32"}.get(dtype, dtype)
    types = dict.fromkeys(("Lse", "Delta", "Stats"), "*fp32") | dict.fromkeys(triton_attention.MAPS, "*i32")
    tensors = ("Q", "K", "V", "QKV", "Out", "GradOut", "GradQ", "GradK", "GradV", "GradQKV")
    types |= dict.fromkeys(tensors, f"*{stored}")
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    registers = max_registers(kind_of(DTYPES[dtype], dtype == "tf32"), tile.warps)
    if arch.startswith("sm_") and registers:
        options["maxnreg"] = registers
    return compile_kernel(kernel, arch, types, constants, options)


def _row_facts(case: Rows) -> dict[str, Any]:
    """The norm with a scale per path; without one per layer, and with the residual's own gradient."""
    from hlip_kernels.backends import triton_norm, triton_rows

    facts: dict[str, Any] = {"width": case.width, "kernel": f"{case.name} {case.change}".strip()}
    residual, update = NORM_DTYPES.get(case.dtype, (case.dtype, case.dtype))
    types = dict.fromkeys(("Residual", "X", "GradX", "GradResidual"), f"*{residual}")
    types |= dict.fromkeys(("Update", "Y", "GradY", "GradUpdate", "Grad", "Active"), f"*{update}")
    types |= dict.fromkeys(("PathScale", "Weight", "Bias", "Mean", "Rstd", "Partials"), "*fp32")
    types |= dict.fromkeys(triton_norm.MAPS, "*i32")
    if case.width is None or not case.change:
        kernel = getattr(triton_rows, case.name)
        settings = triton_rows.GELU if case.width is None else triton_rows.norm_constants(case.width)
    else:
        kernel = getattr(triton_norm, case.name)
        settings = triton_norm._constants(case.width, case.name.startswith("prefix"))
        facts |= {"rows": triton_norm.ROWS, "streamed": settings.get("SUB", 1)}
        settings = settings | {"LayerScale": None, "COARSER": case.change == "coarser"}
        settings |= {"Parents": None} if case.change == "same" else {}
    options = {"num_warps": settings["num_warps"]}
    return facts | {"warps": options["num_warps"]} | compile_kernel(kernel, case.arch, types, settings, options)


def compile_kernel(
    kernel: Any, arch: str, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """types: of the pointers. Scales and eps are fp32, other arguments integers."""
    import triton
    from triton.backends.compiler import GPUTarget

    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    scalars = {x: "fp32" if x == "eps" or x.endswith("_scale") else "i32" for x in kernel.arg_names}
    signature = {x: "constexpr" if x in used else types.get(x, scalars[x]) for x in kernel.arg_names}
    free = {*kernel.do_not_specialize, *kernel.do_not_specialize_on_alignment}
    aligned = [
        i
        for i, name in enumerate(kernel.arg_names)
        if name not in free and (signature[name][0] == "*" or name.startswith("stride"))
    ]  # as at run time, else loads are not vectorised
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    source = _source(kernel, signature, used, aligned)
    binary = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    facts = machine_code.read_cubin(binary.asm["cubin"]) if nvidia else machine_code.read_amdgcn(binary.asm["amdgcn"])
    codes = machine_code.serialisation_codes(binary.asm["ptx"]) if arch == "sm_90" else []
    shared = binary.metadata.shared
    return facts | {
        "shared_bytes": shared, "stages": binary.metadata.num_stages,
        "warning": " ".join(dict.fromkeys(codes)) or None,
        "occupancy": occupancy(arch, facts["registers"], shared, options["num_warps"]) if nvidia else None,
    }  # fmt: skip


def _source(kernel: Any, signature: dict[str, str], constants: dict[str, Any], aligned: list[int]) -> Any:
    """A kernel with its arguments' types. Before Triton 3.3 the signature leaves constants out, and what is known of
    arguments is an object."""
    from triton.compiler import ASTSource

    if "constexprs" in inspect.signature(ASTSource).parameters:
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        return ASTSource(kernel, signature, constants, attributes)
    from triton.backends.compiler import AttrsDescriptor

    varying = {name: kind for name, kind in signature.items() if name not in constants}
    return ASTSource(kernel, varying, constants, AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16)))


def occupancy(arch: str, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    threads = 32 * warps
    by_registers = REGISTERS_PER_SM // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED_PER_SM[arch] * 1024 // (shared + 1024)  # the driver keeps 1 KiB of each program's
    return min(by_registers, by_shared, THREADS_PER_SM[arch] // threads)
