"""Benchmarks of the attention kernels.

    python bench/attention.py --static                 every row of the tile table, compiled without a GPU
    python bench/attention.py --static --arch sm_90 --json static.json

`--static` compiles each kernel ahead of time with Triton's own compiler and looks at the machine code: registers,
bytes spilled to the stack, shared memory, programs that fit a multiprocessor, matrix instructions, the number of
instructions of the loop over full tiles, and the same of plain dense attention with the same tile (`dense.py`).
Nothing is run and no time is measured. Exits with 1 if a half-precision kernel spills or leaves the matrix units idle.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hlip_kernels.configs import ARCHITECTURES, BLOCK_D, SHORT, Tile, attention_config

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = 12
SHARED_PER_SM = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}  # KiB
THREADS_PER_SM = {"sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}
REGISTERS_PER_SM = 65536
COLUMNS = (
    "arch", "dtype", "head_dim", "max_seqlen", "kernel", "rows", "streamed", "warps", "stages", "registers",
    "stack_bytes", "shared_bytes", "occupancy", "matrix_instructions", "loop_instructions",
    "dense_loop_instructions",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmarks of the attention kernels.")
    parser.add_argument("--static", action="store_true", help="compile the tile table ahead of time; needs no GPU")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--head-dim", nargs="+", type=int, choices=BLOCK_D, default=list(BLOCK_D), help="default: all")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="compiler processes (default: %(default)s)")
    args = parser.parse_args()
    if not args.static:
        parser.error("nothing to do: give --static")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    jobs = cases(args.arch, args.dtype, args.head_dim)
    rows = []
    context = get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        for row in tqdm(pool.map(compile_row, jobs), "compiling", total=len(jobs), unit="kernel"):
            rows.append(row)
    print_rows(rows)
    if args.json:
        partial = args.json.with_name(f"{args.json.name}.tmp")
        partial.write_text(json.dumps(rows, indent=1) + "\n")
        partial.replace(args.json)
    spilling = sum(row["stack_bytes"] > 0 for row in rows)
    print(f"{len(rows)} kernels compiled, {spilling} of them spill")
    half = [row for row in rows if row["dtype"] != "fp32"]
    return int(any(row["stack_bytes"] or not row["matrix_instructions"] for row in half))


Case = tuple[str, str, int, int, str, Tile]


def cases(archs: Sequence[str], dtypes: Sequence[str], head_dims: Sequence[int]) -> list[Case]:
    """The table's distinct rows, for a level of short groups and one of long groups."""
    found: dict[tuple, Case] = {}
    for arch in archs:
        for dtype in dtypes:
            for head_dim in head_dims:
                for max_seqlen in (SHORT, SHORT + 1):
                    config = attention_config(arch, DTYPES[dtype], head_dim, max_seqlen)
                    for kernel, tile in (("forward", config.forward), ("dq", config.dq), ("dkdv", config.dkdv)):
                        case = (arch, dtype, head_dim, max_seqlen, kernel, tile)
                        found.setdefault((arch, dtype, head_dim, kernel, tile), case)
    return list(found.values())


def compile_row(case: Case) -> dict[str, Any]:
    """Compile one kernel for one architecture, as `triton_attention` would launch it, and read its machine code."""
    import dense
    from hlip_kernels.backends import triton_attention

    arch, dtype, head_dim, max_seqlen, name, tile = case
    facts = compile_kernel(getattr(triton_attention, f"attention_{name}"), arch, dtype, head_dim, tile)
    facts["dense_loop_instructions"] = None
    if BLOCK_D[head_dim] == head_dim:
        plain = compile_kernel(getattr(dense, f"attention_{name}"), arch, dtype, head_dim, tile)
        facts["dense_loop_instructions"] = plain["loop_instructions"]
    known = dict(zip(COLUMNS, (arch, dtype, head_dim, max_seqlen, name, *tile), strict=False))
    return {column: (known | facts)[column] for column in COLUMNS}


def compile_kernel(kernel: Any, arch: str, dtype: str, head_dim: int, tile: Tile) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        "H": HEADS, "D": head_dim, "BLOCK_D": BLOCK_D[head_dim], "ROWS": tile.rows, "STREAMED": tile.streamed,
        "PRECISION": "ieee",
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    pointers = {"Lse": "*fp32", "Delta": "*fp32", "Tiles": "*i32", "CuSeqlens": "*i32"}
    pointers |= dict.fromkeys(("QKV", "Out", "GradOut", "GradQKV"), f"*{dtype}")
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        kind = "constexpr" if argument in constants else "fp32" if argument.endswith("_scale") else "i32"
        signature[argument] = pointers.get(argument, kind)
        if argument in pointers or argument.startswith("stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]  # as at run time, else loads are not vectorised
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=target, options=options)
    facts = read_cubin(binary.asm["cubin"]) if nvidia else read_amdgcn(binary.asm["amdgcn"])
    facts["shared_bytes"] = binary.metadata.shared
    facts["occupancy"] = occupancy(arch, facts["registers"], binary.metadata.shared, tile.warps) if nvidia else None
    return facts


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Facts of a CUDA binary, by the disassemblers that ship with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    code_facts = _read_code(
        code,
        label=re.compile(r"\s*(\.L\w+):"),
        instruction=re.compile(r".*/\*[0-9a-f]{4,}\*/"),
        jump=re.compile(r".*\bBRA\b.*`\((\.L\w+)\)"),
        matrix=re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)"),
    )
    return {"registers": _number("REG:", usage), "stack_bytes": _number("STACK:", usage), **code_facts}


def read_amdgcn(text: str) -> dict[str, Any]:
    """Facts of an AMD assembly listing; registers are vector registers."""
    code_facts = _read_code(
        text,
        label=re.compile(r"(\.LBB\w+):"),
        instruction=re.compile(r"\t[vsbdg]\w+_"),
        jump=re.compile(r".*s_c?branch\w*\s+(\.LBB\w+)"),
        matrix=re.compile(r"\bv_mfma"),
    )
    stack = _number(r"\.private_segment_fixed_size:\s*", text)
    return {"registers": _number(r"\.vgpr_count:\s*", text), "stack_bytes": stack, **code_facts}


def _number(before: str, text: str) -> int:
    found = re.search(rf"{before}(\d+)", text)
    if found is None:
        raise ValueError(f"no number after {before!r} in the compiler's report")
    return int(found[1])


def _read_code(
    code: str, label: re.Pattern[str], instruction: re.Pattern[str], jump: re.Pattern[str], matrix: re.Pattern[str]
) -> dict[str, Any]:
    """Matrix instructions in all, and the length of the shortest loop that holds any: the one without masks."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(instructions)
        elif instruction.match(line):
            instructions.append(line)
    jumps = [(i, labels[found[1]]) for i, line in enumerate(instructions) if (found := jump.match(line))]
    loops = [instructions[start : i + 1] for i, start in jumps if start <= i]
    hot = [len(loop) for loop in loops if any(matrix.search(line) for line in loop)]
    return {
        "matrix_instructions": sum(bool(matrix.search(line)) for line in instructions),
        "loop_instructions": min(hot, default=None),
    }


def occupancy(arch: str, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    threads = 32 * warps
    by_registers = REGISTERS_PER_SM // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED_PER_SM[arch] * 1024 // (shared + 1024)  # the driver keeps 1 KiB of each program's
    return min(by_registers, by_shared, THREADS_PER_SM[arch] // threads)


def print_rows(rows: list[dict[str, Any]]) -> None:
    cells = [[("-" if row[column] is None else str(row[column])) for column in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in [list(COLUMNS), *cells]) for i in range(len(COLUMNS))]
    for line in [list(COLUMNS), *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
