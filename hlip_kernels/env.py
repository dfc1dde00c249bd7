"""`python -m hlip_kernels.env`: what this machine has, and which attention backends can run on it.

Printed as a block of Markdown, to paste into an issue: no token, host or user is in it, and paths are short.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path, PurePosixPath

import torch

from .backends import (
    BACKENDS,
    choose_backend,
    choose_norm_backend,
    not_supported_reasons,
    unmeasured_libraries,
)
from .layout import LEVELS
from .native import native
from .tiles import EVIDENCE, Measured, Row, architecture, evidence, table_path, user_table

SHOWN = (  # variables that change what runs
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "HLIP_NATIVE_ISA",
    "TRITON_INTERPRET",
    "TORCH_COMPILE_DISABLE",
    "CUDA_VISIBLE_DEVICES",
    "WORLD_SIZE",
    "HF_HUB_OFFLINE",
)
REPEATS = {
    "always": "",
    "on request": ", the same bits on every run with deterministic=True",
    "never": ", not the same bits on every run",
}
HIDDEN = ("XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "LD_PRELOAD")  # paths


def report() -> str:
    """Versions, processors, memory, and every backend with the reasons if it cannot run, as text."""
    gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
    facts = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: _version(name) for name in _packages()},
        "torch": torch.__version__,  # with what it was built for, which its metadata may leave out
        "cpu": f"{_cpu()}; {len(os.sched_getaffinity(0))} cores to use, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "memory": _memory(),
        "native": native().reason or native().isa,
        "gpu": "; ".join(gpus) or "none",
        "tiles": _tiles(),
        "variables": _variables(),
    }
    width = max(map(len, facts)) + 2
    lines = [f"{name:<{width}}{fact}" for name, fact in facts.items()]
    kinds = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    kinds += [("cuda", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16) if gpus]
    for device, dtype in kinds:
        lines += ["", describe_backends(device, dtype, 64)]
        name = str(dtype).removeprefix("torch.")
        lines.append(f"norm on {device} in {name} (auto: {choose_norm_backend('auto', device, dtype, dtype)})")
    return _without_private_paths("\n".join(lines))


def describe_backends(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Which backend attention takes on tensors of this kind, and why each of the others does not run.

    Of one whose gradients may differ in the last bits from run to run it says so, and on a GPU which libraries were not
    measured.
    """
    unmeasured: list[str] = []
    try:
        by_level = {level: choose_backend("auto", device, dtype, head_dim, level=level) for level in LEVELS}
        auto = ", ".join(f"{name} at level {level}" for level, name in by_level.items())
        if len(set(by_level.values())) == 1:
            auto = by_level["study"]
        if device == "cuda":
            unmeasured = unmeasured_libraries(dtype, head_dim)
    except ValueError as error:  # of a table, which may be what the report is wanted for
        auto = str(error)
    lines = [f"attention on {device} in {str(dtype).removeprefix('torch.')} (auto: {auto})"]
    for name, backend in BACKENDS.items():
        reasons = not_supported_reasons(name, device, dtype, head_dim)
        lines.append(f"  {name:<12}{'; '.join(reasons) or 'can run' + REPEATS[backend.repeats]}")
    if unmeasured:
        lines.append(f"  not measured on this GPU: {', '.join(unmeasured)} (`python bench/attention.py --tune`)")
    return "\n".join(lines)


def memory_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process may have by its control groups (version 2), the least of all it is in; None if no limit.

    A container or a job of Slurm often may have less than the machine has, and is ended without a word above that.
    """
    try:
        own = next((line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")), "/")
    except OSError:
        return None
    limits = []
    for group in (PurePosixPath(own), *PurePosixPath(own).parents):
        path = root / str(group).lstrip("/") / "memory.max"
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits, default=None)


def _packages() -> list[str]:
    """What the package needs or can use, as its metadata say: optional ones too, but no tools of development."""
    try:
        needed = importlib.metadata.requires("hlip-kernels") or []
    except importlib.metadata.PackageNotFoundError:  # not installed: run from a folder of sources
        needed = ["torch", "numpy"]
    needed = [line for line in needed if not re.search(r"extra == .(dev|docs)\b", line)]
    names = [match[0] for line in needed if (match := re.match(r"[\w.-]+", line))]
    return list(dict.fromkeys(["hlip-kernels", "torch", "triton", *names, "monai"]))


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return model[1] if model else platform.machine()


def _gpu(index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.major}.{facts.minor}, {runtime}"


def _memory() -> str:
    whole, limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), memory_limit()
    limited = f"; limited to {limit / 2**30:.1f} GiB" if limit is not None and limit < whole else ""
    return f"{whole / 2**30:.1f} GiB{limited}"


def _tiles() -> str:
    """The measured tables in use, with their GPUs and dates; their choices stand beside the backends."""
    arch = architecture()
    try:
        tables = {table_path(): user_table(), EVIDENCE / f"{arch}.json": evidence(arch)}
    except ValueError as error:
        return str(error)
    texts = [_describe_table(path, rows) for path, rows in tables.items() if rows]
    return "; ".join([*texts, "the others built-in"]) if texts else f"built-in; none in {table_path()}"


def _describe_table(path: Path, rows: dict[Row, Measured]) -> str:
    where = dict.fromkeys(f"{measured.device}, {measured.utc}" for measured in rows.values())
    return f"{len(rows)} row{'s' * (len(rows) > 1)} from {path} ({'; '.join(where)})"


def _variables() -> str:
    shown = [f"{name}={os.environ[name]}" for name in SHOWN if name in os.environ]
    return ", ".join([*shown, *(f"{name} is set" for name in HIDDEN if name in os.environ)]) or "none"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _without_private_paths(text: str) -> str:
    """Folders that may tell a name are shortened: the cache, where the package lies, the home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    short = {cache: "$XDG_CACHE_HOME", str(Path(__file__).parents[1]): "(packages)", os.path.expanduser("~"): "~"}  # noqa: PTH111
    for path in sorted(short, key=len, reverse=True):  # one may lie in another
        if len(path) > 1:
            text = text.replace(path, short[path])
    return text


if __name__ == "__main__":
    print(f"```text\n{report()}\n```")
