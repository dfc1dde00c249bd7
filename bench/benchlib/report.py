"""How results leave a benchmark: a table on the screen, rows in a file."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import hlip_kernels
from hlip.terminal import visible

WRITTEN = ("bench/results", "docs/benchmarks.md", "docs/figures")


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [list(header), *([("-" if cell is None else visible(str(cell))) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *([("-" if cell is None else cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def megabytes(row: Mapping[str, Any], key: str) -> str | None:
    """Of a number of bytes that a row may have."""
    return None if row.get(key) is None else short(row[key] / 1e6)


def gigabytes(row: Mapping[str, Any], key: str) -> str | None:
    """As `megabytes`."""
    return None if row.get(key) is None else short(row[key] / 1e9)


def write_json(rows: Sequence[dict[str, Any]], path: Path) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and when figures were measured: device, threads, versions, commit (null outside a checkout), UTC."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """Model, cores and the instructions that matter here, such as "Intel(R) Xeon(R) 8488C, 2 cores, AMX"."""
    path = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in (path.read_text().splitlines() if path.exists() else ()))
    lines = {name.strip(): value.strip() for name, _, value in pairs}
    capability = "AMX" if "amx_bf16" in lines.get("flags", "").split() else torch.backends.cpu.get_cpu_capability()
    return f"{lines.get('model name') or platform.machine()}, {os.cpu_count()} cores, {capability}"


def commit() -> str | None:
    """Of this checkout; -dirty if something is changed beside what benchmarks write."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", *words], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
            )
        except OSError:  # a machine without git
            return ""
        return done.stdout.strip()

    name = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in WRITTEN))
    return f"{name}{'-dirty' * bool(changed)}" if name else None


def versions() -> dict[str, str]:
    """List the versions of this library, torch, and others that are installed. A checkout need not be installed."""
    installed = {"hlip-kernels": hlip_kernels.__version__, "torch": torch.__version__}
    for name in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "monai"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def append_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Add rows to a file of one JSON object a line, whole or not at all."""
    _write(path, (path.read_text() if path.exists() else "") + _lines(rows))


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as `append_rows` does, in place of all that the file has."""
    _write(path, _lines(rows))


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text)
    partial.replace(path)
