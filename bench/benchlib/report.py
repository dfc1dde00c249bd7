"""How a benchmark goes through its cases, the files of rows that it writes, and where and when they were measured."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import hlip_kernels
from hlip.output import write_json, write_text

from .tables import columns, legend, named, print_table

Row = dict[str, Any]
PROVENANCE = ("device", "threads", "versions", "commit", "utc")
WRITTEN = ("bench/results", "docs/benchmarks.md", "docs/figures")


def read(path: Path) -> list[Row]:
    """The rows of a file of one JSON object a line; none where there is no file.

    Raises:
        ValueError: a line is not a benchmark's row; names file and line.
    """
    rows: list[Row] = []
    for at, line in enumerate(text_of(path).splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {at}: no JSON ({error})") from error
        missing = [key for key in PROVENANCE if key not in row] if isinstance(row, dict) else list(PROVENANCE)
        if missing:
            raise ValueError(f"{path}: line {at}: not a benchmark's row: {', '.join(missing)} missing")
        rows.append(row)
    return rows


def write_rows(rows: Sequence[Row], path: Path, before: str = "") -> None:
    """Write rows as one JSON object a line behind a text, whole or not at all."""
    write_text(path, before + "".join(json.dumps(row) + "\n" for row in rows))


def text_of(path: Path) -> str:
    """The text of a file, nothing where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def run_cases(cases: Iterable[Iterable[Row]], show: Callable[[list[Row]], None], args: argparse.Namespace) -> int:
    """Measure, show and write the rows of each case, which are measured as they are asked for.

    Returns:
        The exit status: 1 if some row has `wrong`, 130 after an interruption.
    """
    rows: list[Row] = []
    try:
        for case in cases:
            measured = list(case)
            rows += measured
            show(measured)
            write(args, measured, rows)
    except KeyboardInterrupt:
        print("interrupted: the cases before are written", file=sys.stderr)
        return 130
    wrong = [f"{named(row)}{row['wrong']}" for row in rows if row.get("wrong")]
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    return int(bool(wrong))


def write(args: argparse.Namespace, new: Sequence[Row], rows: Sequence[Row] | None = None) -> None:
    """Write all rows of a run to the file of `--json`, and add the new ones to that of `--results`, where given."""
    if getattr(args, "json", None):
        write_json(args.json, new if rows is None else rows)
    if getattr(args, "results", None):
        write_rows(new, args.results, text_of(args.results))


def show(title: str, rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Print what was measured as a table of columns, and what was not run with its reason."""
    print(f"\n{title}")
    print_table(*columns([row for row in rows if "reason" not in row], keys))
    print(legend(keys))
    for row in rows:
        if "reason" in row:
            print(f"  {named(row)}not run: {row['reason']}")


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
    text = text_of(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    capability = "AMX" if "amx_bf16" in text.split() else torch.backends.cpu.get_cpu_capability()
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, {capability}"


def commit() -> str | None:
    """Of this checkout; -dirty if something is changed beside what benchmarks write."""
    git = "git", "-C", str(Path(__file__).parents[2])
    name = output(*git, "rev-parse", "--short", "HEAD")
    changed = output(*git, "status", "--porcelain", "--", ".", *(f":!{path}" for path in WRITTEN))
    return f"{name}{'-dirty' * bool(changed)}" if name else None


def output(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """List the versions of this library, torch, and others that are installed. A checkout need not be installed."""
    installed = {"hlip-kernels": hlip_kernels.__version__, "torch": torch.__version__}
    for name in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "monai"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
