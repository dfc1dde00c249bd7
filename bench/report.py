"""How results leave a benchmark: a table on the screen, rows in a file."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [list(header), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write_json(rows: Sequence[dict[str, Any]], path: Path) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and when figures were measured: device, threads, versions, commit (null outside a checkout), UTC."""
    gpu = device.type == "cuda"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit.stdout.strip() or None,
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of this library, torch, and those of the others that are installed."""
    found = {name: importlib.metadata.version(name) for name in ("hlip-kernels", "torch")}
    for name in ("triton", "flash-attn", "xformers", "monai"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def append_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Add rows to a file of one JSON object a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else ""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(before + "".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)
