"""The tile table compiled by the Triton of every PyTorch since 2.6, without a GPU.

    python bench/static_versions.py
    python bench/static_versions.py --triton 3.6.0 3.9.0 --results static.jsonl

Installs each version into a folder of its own, `build/triton/VERSION` (0.6 GB), beside the environment's own version,
and runs `bench/attention.py --static` on it. Writes one row for each kernel, with all that is counted in its machine
code; rows of a version take the place of its earlier ones. A version whose rows are of today's kernels and tiles is
passed over. Exits with 1 if the table of some version has a fault.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchlib import static
from benchlib.options import command, number
from benchlib.report import Row, provenance, read, write_rows
from hlip.output import replacing_folder
from hlip_kernels.tiles import ARCHITECTURES, BLOCK_D, max_registers

COMMON = ("sm_80", "sm_90", "sm_100")
VERSIONS = {  # of Triton, and the architectures that its table is compiled for; the first card will likely bring 3.6
    "3.6.0": ARCHITECTURES,
    "3.9.0": ARCHITECTURES,
    "3.5.1": COMMON,
    "3.4.0": COMMON,
    "3.3.1": COMMON,
    "3.2.0": ("sm_80", "sm_90"),  # its assembler has no code for others
}
ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--triton", nargs="+", choices=VERSIONS, default=list(VERSIONS), help="default: all")
    parser.add_argument("--results", type=Path, default=Path("bench/results/static.jsonl"), help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("build/triton"), help="of versions; default: %(default)s")
    parser.add_argument(
        "--workers", type=number, default=os.cpu_count(), help="compiler processes (default: %(default)s)"
    )
    args = parser.parse_args()
    kernels = digest()
    faults = []
    for version in args.triton:
        others, rows = split(read(args.results), version)
        if rows and all(row["kernels"] == kernels for row in rows):
            print(f"Triton {version}: {args.results} has it")
        else:
            install(version, args.folder / version)
            stamp = {"kernels": kernels, **provenance(torch.device("cpu")), "versions": {"triton": version}}
            rows = [row | stamp for row in compile_table(version, args.folder / version, args.workers)]
            write_rows([*others, *rows], args.results)
        print(f"Triton {version}: {len(rows)} kernels, {sum(row['stack_bytes'] > 0 for row in rows)} spill")
        faults += [f"Triton {version}: {fault}" for fault in static.faults(rows, version)]
    print(*faults, sep="\n")
    return int(bool(faults))


def digest() -> str:
    """Hash all that the compiler is given: kernels, tiles, limits of registers."""
    from triton.runtime.jit import JITFunction

    from hlip_kernels.backends import triton_attention, triton_norm, triton_rows

    modules = triton_attention, triton_norm, triton_rows
    kernels = [x.src for module in modules for x in vars(module).values() if isinstance(x, JITFunction)]
    functions = max_registers, triton_norm._constants, triton_rows.norm_constants
    sources = [inspect.getsource(function) for function in functions]
    cases = static.attention_cases(ARCHITECTURES, list(static.DTYPES), list(BLOCK_D))
    text = "\n".join([*kernels, *sources, repr(triton_rows.GELU), repr(cases)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split(rows: Sequence[Row], version: str) -> tuple[list[Row], list[Row]]:
    """Rows of other versions, and those of this one."""
    others = [row for row in rows if row["versions"]["triton"] != version]
    return others, [row for row in rows if row["versions"]["triton"] == version]


def install(version: str, folder: Path) -> None:
    """Install a version into a folder, which is there whole or not at all; where it is there, nothing is done."""
    if not folder.exists():
        with replacing_folder(folder) as partial:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
            subprocess.run([*pip, f"triton=={version}"], check=True)


def compile_table(version: str, folder: Path, workers: int) -> list[Row]:
    """The rows of `bench/attention.py --static`, whatever faults they have."""
    path = os.pathsep.join(filter(None, [str(folder.resolve()), str(ROOT), os.environ.get("PYTHONPATH")]))
    print(f"Triton {version}, {' '.join(VERSIONS[version])}", flush=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        subprocess.run(
            [sys.executable, str(ROOT / "bench" / "attention.py"), "--static", "--arch", *VERSIONS[version],
             "--workers", str(workers), "--json", out.name],
            env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        return list(json.loads(Path(out.name).read_text()))


if __name__ == "__main__":
    sys.exit(main())
