"""How a benchmark goes through its cases, the rows that it writes, where and when they were measured, and the tables
that rows become, on a screen and in Markdown. A column has a heading, a form, and a kind of figure:

    measured    by a clock, an allocator, a driver or a comparison of results, on the device that the row names
    counted     from shapes, or by a compiler: nothing ran for it
    estimated   by a model of the work, such as the least bytes that it must move
    published   by others, on a machine of theirs

A rate has the kind of its amount where that is estimated, else that of its time.
"""

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import hlip_kernels
from hlip.output import table as text_table
from hlip.output import write_json, write_text
from hlip.terminal import say

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


NAMES = (  # whose a row is
    "backend", "model", "way", "policy", "kernel", "case", "mode", "pass", "sweep", "dtype", "head_dim", "residual",
)  # fmt: skip
KINDS = ("measured", "counted", "estimated", "published")


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table in columns, on a screen."""
    say(*text_table([header, *dashed(rows)]))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *dashed(rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def dashed(rows: Iterable[Sequence[object]]) -> list[list[object]]:
    """Rows of cells with a dash for each that is None."""
    return [["-" if cell is None else cell for cell in row] for row in rows]


def short(value: float, factor: float = 1.0) -> str:
    """Three digits of a multiple, or all before the point."""
    value *= factor
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


class Column(NamedTuple):
    """form: what is shown of a value; a format, or a function. key: of the rows, if it is another than the column's."""

    heading: str
    kind: str
    form: str | Callable[[Any], str] = short
    key: str = ""

    def show(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        return self.form.format(value) if isinstance(self.form, str) else self.form(value)


MILLI, MEGA, GIGA = (partial(short, factor=factor) for factor in (1e3, 1e-6, 1e-9))


def ratio(value: Sequence[float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*value)


def power(row: Mapping[str, Any]) -> str:
    """An exponent, with the one that is claimed."""
    return f"{round(row['exponent'], 3) + 0:.3f} ({row['claimed']})"


COLUMNS: dict[str, Column] = {
    "p20_s": Column("ms, p20", "measured", MILLI),
    "p50_s": Column("ms", "measured", MILLI),
    "p80_s": Column("ms, p80", "measured", MILLI),
    "host_s": Column("host ms", "measured", MILLI),
    "times_ours": Column("times ours", "measured", ratio),
    "times_packed": Column("times packed", "measured", ratio),
    "packed_over_this": Column("times packed", "measured", "{:.2f}"),
    "interval": Column("95% interval", "measured", "{0[0]:.2f}-{0[1]:.2f}"),
    "vol_per_s": Column("volumes/s", "measured"),
    "studies_per_s": Column("studies/s", "measured"),
    "tokens_per_s": Column("Mtokens/s", "measured", MEGA),
    "flop_per_s": Column("GFLOP/s", "measured", GIGA),
    "of_matmul": Column("of a product", "measured", "{:.0%}"),
    "matmul_flop_per_s": Column("GFLOP/s of a product", "measured", GIGA),
    "copy_bytes_per_s": Column("GB/s of a copy", "measured", GIGA),
    "prepare_s": Column("prepare, ms", "measured", MILLI),
    "first_s": Column("first call, s", "measured", "{:.2g}"),
    "seconds": Column("s", "measured"),
    "peak_bytes": Column("MB peak", "measured", MEGA),
    "memory_gb": Column("GiB peak", "measured", "{:.2f}"),
    "error": Column("error", "measured", "{:.1g}"),
    "grad_error": Column("error of gradients", "measured", "{:.1g}"),
    "repeats": Column("same bits twice", "measured", str),
    "peak_bytes_per_row": Column("bytes a row", "measured"),
    "flops": Column("GFLOP", "counted", GIGA),
    "saved_bytes": Column("MB kept", "counted", MEGA),
    "saved_bytes_per_row": Column("bytes kept a row", "counted"),
    "saved_gb": Column("GiB kept", "counted", "{:.2g}"),
    "us": Column("us", "measured", "{:.1f}"),
    "launches_us": Column("us of launches", "measured", "{:.1f}"),
    "parameters": Column("M parameters", "counted", lambda value: f"{value / 1e6:.1f}"),
    "registers": Column("registers", "counted", str),
    "spills": Column("spills", "counted", str),
    "stack_bytes": Column("stack bytes", "counted", str),
    "shared_bytes": Column("shared bytes", "counted", str),
    "matrix_instructions": Column("matrix instructions", "counted", str),
    "loop_instructions": Column("loop instructions", "counted", str),
    "serialised": Column("serialised", "counted", str),
    "bytes": Column("MB moved", "estimated", MEGA),
    "moved": Column("GB moved", "estimated", GIGA, "bytes_modelled"),
    "bytes_modelled": Column("MB at least", "estimated", MEGA),
    "standard_bytes": Column("MB writing weights", "estimated", MEGA),
    "least_bytes": Column("MB at least", "estimated", MEGA),
    "published_forward_bytes": Column("forward, published", "estimated", MEGA),
    "ours_forward_bytes": Column("ours", "counted", MEGA),
    "published_backward_bytes": Column("backward, published", "estimated", MEGA),
    "ours_backward_bytes": Column("ours", "counted", MEGA),
    "bytes_per_s": Column("GB/s", "estimated", GIGA),
    "of_copy": Column("of a copy", "estimated", "{:.0%}"),
    "estimate_s": Column("s, estimate", "estimated"),
    "a40_vol_per_s": Column("paper, A40", "published", "{} vol/s"),
    "a40_memory_gb": Column("paper, A40", "published", "{} GB"),
}


def kinds(keys: Iterable[str]) -> dict[str, str]:
    """Those of a row's figures; names and settings have none."""
    return {key: COLUMNS[key].kind for key in keys if key in COLUMNS}


def legend(keys: Iterable[str]) -> str:
    """Which headings of a table were measured, which counted, which estimated."""
    of = kinds(keys)
    lists = {kind: [COLUMNS[key].heading for key in of if of[key] == kind] for kind in KINDS}
    return "; ".join(f"{kind}: {', '.join(dict.fromkeys(names))}" for kind, names in lists.items() if names)


def cell(row: Mapping[str, Any], key: str) -> str | None:
    """None if the row has no such figure."""
    column = COLUMNS.get(key, Column("", "", str))
    value = row.get(column.key or key)
    return None if value is None or value == "" else column.show(value)


def columns(rows: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> tuple[list[str], list[list[str | None]]]:
    """The header and the lines of a table of rows: what `print_table` and `table` take."""
    headings = [COLUMNS[key].heading if key in COLUMNS else key.replace("_", " ") for key in keys]
    return headings, [[cell(row, key) for key in keys] for row in rows]


def named(row: Mapping[str, Any]) -> str:
    """Whose row it is, for what is said of it."""
    words = [str(row[key]) for key in NAMES if row.get(key) not in (None, "")]
    words += ["without flash"] * (row.get("flash") is False) + ["CUDA graph"] * bool(row.get("graph"))
    return f"{', '.join(words)}: " if words else ""
