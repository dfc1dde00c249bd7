"""Facts of a compiled kernel's machine code: registers, spills, matrix instructions, its main loop."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Facts of a CUDA binary, by the disassemblers that ship with Triton."""
    usage = _disassemble(cubin, "cuobjdump", "-res-usage")
    return {"registers": _number("REG:", usage), "stack_bytes": _number("STACK:", usage), **read_sass(sass(cubin))}


def sass(cubin: bytes) -> str:
    """The disassembly of a CUDA binary."""
    return _disassemble(cubin, "nvdisasm", "-c")


def _disassemble(cubin: bytes, tool: str, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tools() / tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def serialisation_codes(ptx: str) -> list[str]:
    """Codes, such as C7515, of the assembler's warnings that it serialises matrix instructions of sm_90.

    Assembles once more, without what Triton's newest versions say of registers, as Triton keeps the warnings to itself.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for assembler in _assemblers():  # what is written for a newer one, an older one refuses
            words = [str(assembler), "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return re.findall(r"\((C\d+)\) Potential Performance Loss: wgmma\.mma_async", done.stderr)
    raise ValueError(f"Triton's assembler does not take its PTX: {done.stderr.strip()}")


def can_assemble(arch: str) -> bool:
    """Tell whether Triton's assembler has code for an architecture such as sm_103."""
    words = (subprocess.run([tool, "--help"], capture_output=True, text=True, check=True) for tool in _assemblers())
    return any(f"'{arch}'" in done.stdout for done in words)


def _assemblers() -> list[Path]:
    """The older one first, where there are two."""
    return sorted(_tools().glob("ptxas*"))


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def read_sass(code: str) -> dict[str, Any]:
    """Facts of the disassembly of a CUDA binary."""
    return _read_code(
        code,
        label=re.compile(r"\s*(\.L\w+):"),
        instruction=re.compile(r".*/\*[0-9a-f]{4,}\*/"),
        jump=re.compile(r".*\bBRA\b.*`\((\.L\w+)\)"),
        matrix=re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)"),
        multiply=re.compile(r"\bFFMA"),
    )


def read_amdgcn(text: str) -> dict[str, Any]:
    """Facts of an AMD assembly listing; registers are vector registers."""
    return {
        "registers": _number(r"\.vgpr_count:\s*", text),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s*", text),
        **_read_code(
            text,
            label=re.compile(r"(\.LBB\w+):"),
            instruction=re.compile(r"\t[vsbdg]\w+_"),
            jump=re.compile(r".*s_c?branch\w*\s+(\.LBB\w+)"),
            matrix=re.compile(r"\bv_mfma"),
            multiply=re.compile(r"\bv_(pk_|dot\w*_)?fmac?_"),
        ),
    }


def _number(before: str, text: str) -> int:
    number = re.search(rf"{before}(\d+)", text)
    if number is None:
        raise ValueError(f"no number after {before!r} in the compiler's report")
    return int(number[1])


def _read_code(
    code: str,
    label: re.Pattern[str],
    instruction: re.Pattern[str],
    jump: re.Pattern[str],
    matrix: re.Pattern[str],
    multiply: re.Pattern[str],
) -> dict[str, Any]:
    """Matrix instructions in all, the length of the loop over whole tiles, and whether each matrix instruction in it
    waits for the one before (of sm_90).

    It is the first loop that holds any: masked tiles come later, and what waits for a barrier is put at the end. Where
    there are no matrix instructions, it is the first loop that multiplies and adds.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if match := label.match(line):
            labels[match[1]] = len(instructions)
        elif instruction.match(line):
            instructions.append(line)
    jumps = [(i, labels[match[1]]) for i, line in enumerate(instructions) if (match := jump.match(line))]
    loops = [instructions[start : i + 1] for i, start in jumps if start <= i]
    count = sum(bool(matrix.search(line)) for line in instructions)
    wanted = matrix if count else multiply
    hot: list[str] = next((loop for loop in loops if any(map(wanted.search, loop))), [])
    products = [line for line in hot if matrix.search(line)]
    return {
        "matrix_instructions": count,
        "loop_instructions": len(hot) or None,
        "serialised": bool(products) and all(re.search(r"\bHGMMA\b.*\bgsb0\b", line) for line in products),
    }
