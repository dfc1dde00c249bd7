"""What a compiled kernel's machine code says: registers, spills, matrix instructions, the length of its main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


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
        multiply=re.compile(r"\bFFMA"),
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
        multiply=re.compile(r"\bv_(pk_|dot\w*_)?fmac?_"),
    )
    stack = _number(r"\.private_segment_fixed_size:\s*", text)
    return {"registers": _number(r"\.vgpr_count:\s*", text), "stack_bytes": stack, **code_facts}


def _number(before: str, text: str) -> int:
    found = re.search(rf"{before}(\d+)", text)
    if found is None:
        raise ValueError(f"no number after {before!r} in the compiler's report")
    return int(found[1])


def _read_code(
    code: str,
    label: re.Pattern[str],
    instruction: re.Pattern[str],
    jump: re.Pattern[str],
    matrix: re.Pattern[str],
    multiply: re.Pattern[str],
) -> dict[str, Any]:
    """Matrix instructions in all, and the length of the shortest loop that holds any: the one without masks. Where
    there are none, of the shortest that multiplies and adds."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(instructions)
        elif instruction.match(line):
            instructions.append(line)
    jumps = [(i, labels[found[1]]) for i, line in enumerate(instructions) if (found := jump.match(line))]
    loops = [instructions[start : i + 1] for i, start in jumps if start <= i]
    count = sum(bool(matrix.search(line)) for line in instructions)
    wanted = matrix if count else multiply
    hot = [len(loop) for loop in loops if any(wanted.search(line) for line in loop)]
    return {"matrix_instructions": count, "loop_instructions": min(hot, default=None)}
