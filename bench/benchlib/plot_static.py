"""The section of `docs/benchmarks.md` on machine code: rows that `static_versions.py` writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .page import Row, heading, wrapped
from .report import table
from .words import STATIC

SHOWN = {"arch": "sm_90", "dtype": "bf16"}
HEAD_DIMS = (64, 128)


def static(rows: Sequence[Row]) -> str:
    """One line for each version and architecture, and the loops of sm_90 beside those of dense attention."""
    if not rows:
        return ""
    rows = sorted(rows, key=version, reverse=True)
    compiled: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        compiled[row["versions"]["triton"], row["arch"]].append(row)
    totals = [[*key, len(group), *(sum(map(is_so, group)) for is_so in (spills, serialised, excused))]
              for key, group in compiled.items()]  # fmt: skip
    loops = [
        [
            row["versions"]["triton"], row["kernel"], row["head_dim"], tile(row), row["registers"],
            row["loop_instructions"], row["dense_loop_instructions"],
            f"{row['loop_instructions'] / row['dense_loop_instructions']:.2f}", row["stack_bytes"],
            "yes" if serialised(row) else "no", row["occupancy"],
        ]
        for row in rows
        if SHOWN.items() <= row.items() and row["head_dim"] in HEAD_DIMS
    ]  # fmt: skip
    return "\n\n".join(
        [
            heading("Machine code", "", STATIC, rows),
            table(["Triton", "architecture", "kernels", "spill", "serialised", "dense, too"], totals),
            "### Loops over whole tiles, sm_90, bf16",
            table(
                ["Triton", "kernel", "head dim", "tile", "registers", "loop", "loop, dense", "ratio", "bytes spilled",
                 "serialised", "programs"],
                loops,
            ),
            longest(rows),
        ]
    )  # fmt: skip


def longest(rows: Sequence[Row]) -> str:
    """List the loops that have more instructions than those of dense attention, in some version."""
    ratios: dict[str, float] = defaultdict(float)
    for row in rows:
        if row["dense_loop_instructions"]:
            case = f"{row['kernel']} {row['head_dim']} on {row['arch']}"
            ratios[case] = max(ratios[case], row["loop_instructions"] / row["dense_loop_instructions"])
    longer = [f"{case} ({ratio:.2f})" for case, ratio in ratios.items() if ratio > 1]
    return wrapped(
        f"Loops longer than those of dense attention, by kernel and head dim: {', '.join(longer) or 'none'}."
    )


def version(row: Row) -> tuple[int, ...]:
    return tuple(map(int, row["versions"]["triton"].split(".")))


def tile(row: Row) -> str:
    return f"{row['rows']}x{row['streamed']}, {row['warps']} warps, {row['stages']} stages"


def spills(row: Row) -> bool:
    return bool(row["stack_bytes"])


def serialised(row: Row) -> bool:
    return bool(row["serialised"] or row["warning"])


def excused(row: Row) -> bool:
    return serialised(row) and bool(row["dense_serialised"])
