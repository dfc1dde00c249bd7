"""A check's report as Markdown: for the file beside its JSON, and as a section of the page of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .report import COLUMNS, cell, columns, legend, named, table

Report = dict[str, Any]
HIDDEN = {  # in the JSON only
    "kernel_hash", "matmul_flop_per_s", "copy_bytes_per_s", "p20_s", "p80_s", "kinds", "checked", "rounds", "calls",
    "level", "num_prefix", "dropout", "shortest", "tokens_per_s", "bytes_modelled", "flops", "bytes_per_s",
    "studies_per_s", "wrong", "mistake", "a40_vol_per_s", "a40_memory_gb",
}  # fmt: skip
SHOWN_ALONE = {"ceilings": ("matmul_flop_per_s", "copy_bytes_per_s"), "kernels": ("bytes_per_s",)}  # by stage
ENTRY = {"estimate_s", "seconds", "foreign"}  # of a step, beside texts and rows
FAULTS = ("wrong", "mistake")
FAILED = ("failed", "too long", "ended")
SKIPPED, NOTHING = "skipped", "nothing to run"


def read_check(path: Path) -> Report:
    """
    Raises:
        ValueError: the file is not a check's report, or cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for step in report["steps"]:
            texts = all(isinstance(step[key], str) for key in ("name", "stage", "verdict", "note"))
            if not texts or not all(isinstance(row, dict) for row in step["rows"]) or not step.keys() >= ENTRY:
                raise ValueError(f"step {step['name']!r:.50} is not whole")
        markdown(report)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a report of check.py ({error!r:.200}). Delete it, or make it again.") from error
    return report


def markdown(report: Report, level: int = 1) -> str:
    """level: of the heading."""
    facts, steps = report["facts"], report["steps"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    head = f"{facts['device']}; {versions}; commit {facts['commit'] or 'unknown'}; {facts['utc']}; size {facts['size']}"
    lines = [[s["name"], s["stage"], s["verdict"], cell(s, "seconds"), cell(s, "estimate_s")] for s in steps]
    sections = [
        f"{'#' * level} Check of {facts['device']}",
        f"*{head}*",
        summary(steps),
        table(["step", "stage", "verdict", "s, measured", "s, estimated before"], lines),
    ]
    for step in steps:
        if step["verdict"] != SKIPPED or step["rows"]:
            sections += [f"{'#' * (level + 1)} {step['name']}: {step['verdict']}", *body(step)]
    return "\n\n".join(sections) + "\n"


def is_fault(step: Report) -> bool:
    """Tell whether a step is wrong, or failed without another library in it."""
    return step["verdict"] == "wrong" or (step["verdict"] in FAILED and not step["foreign"])


def summary(steps: Sequence[Report]) -> str:
    faults = [f"{step['name']} ({step['verdict']})" for step in steps if is_fault(step)]
    others = [f"{step['name']} ({step['verdict']})" for step in steps if step["verdict"] in FAILED and step["foreign"]]
    right = sum(step["verdict"] == "right" for step in steps)
    skipped = [step["name"] for step in steps if step["verdict"] == SKIPPED]
    words = [f"**{', '.join(faults)}.**" if faults else f"{right} steps right, none wrong."]
    words += [f"By other libraries: {', '.join(others)}."] if others else []
    words += [f"Not run for want of time: {', '.join(skipped)}."] if skipped else []
    return " ".join(words)


def body(step: Report) -> Iterator[str]:
    """Write the result of a step: texts, a table, faults and reasons."""
    rows = step["rows"]
    for text in filter(None, [step["note"], *(row.get("text") for row in rows)]):
        yield f"```\n{text.rstrip()}\n```"
    figures = [row for row in rows if "text" not in row and "reason" not in row and len(row) > 1]
    shown = SHOWN_ALONE.get(step["stage"], ())
    keys = list(dict.fromkeys(key for row in figures for key in row if key not in HIDDEN or key in shown))
    keys = [key for key in keys if any(cell(row, key) for row in figures)]
    keys.sort(key=lambda key: key in COLUMNS)  # names first
    if keys:
        yield table(*columns(figures, keys))
        yield f"*{legend(keys)}*"
    reasons = [f"- {named(row)}{row['reason']}" for row in rows if "reason" in row]
    reasons += [f"- **{kind}**: {named(row)}{row[kind]}" for row in rows for kind in FAULTS if kind in row]
    if reasons:
        yield "\n".join(reasons)
    if step.get("clocks"):
        yield f"After it: {', '.join(f'{name} {value}' for name, value in step['clocks'].items())}."
