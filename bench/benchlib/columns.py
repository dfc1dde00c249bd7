"""The columns of the benchmarks' rows: heading, form, and whether a figure was measured, counted or estimated.

    measured    by a clock, an allocator, a driver or a comparison of results, on the device that the row names
    counted     from shapes, or by a compiler: nothing ran for it
    estimated   by a model of the work, such as the least bytes that it must move

A rate has the kind of its amount where that is estimated, else that of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .report import short

KINDS = ("measured", "counted", "estimated")


class Column(NamedTuple):
    heading: str
    kind: str
    form: Callable[[Any], str]


def _scaled(factor: float) -> Callable[[Any], str]:
    return lambda value: short(factor * value)


def _rate(value: float) -> str:
    return f"{short(value / 1e12)} T" if value >= 1e12 else f"{short(value / 1e9)} G"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _ratio(value: Any) -> str:
    return "{:.3g} ({:.3g}-{:.3g})".format(*value)


def _error(value: float) -> str:
    return f"{value:.1e}"


COLUMNS: dict[str, Column] = {
    "p20_s": Column("ms, p20", "measured", _scaled(1e3)),
    "p50_s": Column("ms", "measured", _scaled(1e3)),
    "p80_s": Column("ms, p80", "measured", _scaled(1e3)),
    "host_s": Column("host ms", "measured", _scaled(1e3)),
    "times_ours": Column("times ours", "measured", _ratio),
    "vol_per_s": Column("volumes/s", "measured", short),
    "studies_per_s": Column("studies/s", "measured", short),
    "tokens_per_s": Column("Mtokens/s", "measured", _scaled(1e-6)),
    "flop_per_s": Column("FLOP/s", "measured", _rate),
    "flops_per_s": Column("FLOP/s", "measured", _rate),
    "of_matmul": Column("of a product", "measured", _share),
    "share": Column("of a product", "measured", _share),
    "matmul_flop_per_s": Column("FLOP/s of a product", "measured", _rate),
    "copy_bytes_per_s": Column("GB/s of a copy", "measured", _scaled(1e-9)),
    "prepare_s": Column("prepare ms", "measured", _scaled(1e3)),
    "first_s": Column("first call s", "measured", short),
    "seconds": Column("s", "measured", short),
    "peak_bytes": Column("MB peak", "measured", _scaled(1e-6)),
    "memory_gb": Column("GiB peak", "measured", short),
    "error": Column("error", "measured", _error),
    "grad_error": Column("error of gradients", "measured", _error),
    "repeats": Column("same bits twice", "measured", str),
    "peak_bytes_per_row": Column("bytes a row", "measured", short),
    "flops": Column("GFLOP", "counted", _scaled(1e-9)),
    "saved_bytes": Column("MB kept", "counted", _scaled(1e-6)),
    "saved_bytes_per_row": Column("bytes kept a row", "counted", short),
    "saved_gb": Column("GiB kept", "counted", short),
    "parameters": Column("M parameters", "counted", _scaled(1e-6)),
    "registers": Column("registers", "counted", str),
    "spills": Column("spills", "counted", str),
    "stack_bytes": Column("stack bytes", "counted", str),
    "shared_bytes": Column("shared bytes", "counted", str),
    "matrix_instructions": Column("matrix instructions", "counted", str),
    "loop_instructions": Column("loop instructions", "counted", str),
    "serialised": Column("serialised", "counted", str),
    "bytes_modelled": Column("MB at least", "estimated", _scaled(1e-6)),
    "bytes_per_s": Column("GB/s", "estimated", _scaled(1e-9)),
    "of_copy": Column("of a copy", "estimated", _share),
    "estimate_s": Column("s, estimate", "estimated", short),
}


def kinds(keys: Iterable[str]) -> dict[str, str]:
    """Those of a row's figures; names and settings have none."""
    return {key: COLUMNS[key].kind for key in keys if key in COLUMNS}


def legend(keys: Iterable[str]) -> str:
    """Which headings of a table were measured, which counted, which estimated."""
    of = kinds(keys)
    lists = {kind: [COLUMNS[key].heading for key in of if of[key] == kind] for kind in KINDS}
    return "; ".join(f"{kind}: {', '.join(dict.fromkeys(names))}" for kind, names in lists.items() if names)


def heading(key: str) -> str:
    return COLUMNS[key].heading if key in COLUMNS else key.replace("_", " ")


def cell(row: Mapping[str, Any], key: str) -> str | None:
    """None if the row has no such figure."""
    value = row.get(key)
    if value is None or value == "":
        return None
    return COLUMNS[key].form(value) if key in COLUMNS else str(value)
