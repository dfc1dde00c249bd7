"""What the page of benchmarks is made of: rows that are read and chosen, tables, pictures, words."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # tables need no matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
PROVENANCE = ("device", "threads", "versions", "commit", "utc")
OURS, OTHERS = "#1f6fb4", "#9a9a9a"


def read(path: Path) -> list[Row]:
    """The rows of a file of one JSON object a line; none where there is no file.

    Raises:
        ValueError: a line is not a benchmark's row; names file and line.
    """
    rows: list[Row] = []
    for at, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {at}: no JSON ({error})") from error
        missing = [key for key in PROVENANCE if key not in row] if isinstance(row, dict) else list(PROVENANCE)
        if missing:
            raise ValueError(f"{path}: line {at}: not a benchmark's row: {', '.join(missing)} missing")
        rows.append(row)
    return rows


def latest(rows: Iterable[Row], case: Callable[[Row], object]) -> list[Row]:
    """Of every case, the rows of its latest run. Rows of a run share a time."""
    runs: dict[object, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        runs[case(row)][row["utc"]].append(row)
    return [row for of in runs.values() for row in of[max(of)]]


def of_machines(draw: Callable[[list[Row], Path, str], str], rows: Sequence[Row], figures: Path) -> list[str]:
    """A section for each machine and number of threads; only the most threads of the first have plain names."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["device"], row["threads"]].append(row)
    order = sorted(found, key=lambda machine: -machine[1])
    return [
        draw(found[machine], figures, ", ".join(machine_name(found[machine][0])) if i else "")
        for i, machine in enumerate(order)
    ]


def machine_name(row: Row) -> tuple[str, str]:
    return row["device"], count(row["threads"], "threads")


def count(number: int, things: str) -> str:
    """1 scan, 4 scans; 1 study, 2 studies."""
    one = f"{things[:-3]}y" if things.endswith("ies") else things[:-1]
    return f"{number} {one if number == 1 else things}"


def where(rows: Iterable[Row]) -> str:
    """Where rows were measured, with what, of which commits, and from when to when: all there is, each once."""
    rows = sorted(rows, key=lambda row: row["utc"])
    versions: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        for name, version in row["versions"].items():
            versions[name][version] = None
    commits = list(dict.fromkeys(row["commit"] or "unknown" for row in rows))
    (day, begin), (last_day, end) = ((row["utc"][:10], row["utc"][11:16]) for row in (rows[0], rows[-1]))
    last = end if day == last_day else f"{last_day} {end}"
    facts = [
        " and ".join(dict.fromkeys(", ".join(machine_name(row)) for row in rows)),
        ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items()),
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
        f"{day} {begin}{f' to {last}' * (last != begin)} UTC",
    ]
    return f"*{'; '.join(facts)}*"


def losses(lines: Iterable[tuple[str, Sequence[float] | None]]) -> str:
    """Where others are faster, of pairs of a name and how many times as long as ours it takes: median, low, high."""
    known = [(f"{name} ({ratio[0]:.2f})", ratio) for name, ratio in lines if ratio]
    faster = [name for name, ratio in known if ratio[2] < 1]
    level = [name for name, ratio in known if ratio[1] < 1 <= ratio[2]]
    words = f"**We lose to:** {', '.join(faster)}." if faster else "We lose to none of these."
    return wrapped(words + (f" Level, within the interval: {', '.join(level)}." if level else ""))


def not_run(rows: Iterable[Row], name: Callable[[Row], str]) -> str:
    """A list of what could not run, each with its reason and, if not all cases share it, the cases."""
    rows = list(rows)
    every = {row["case"] for row in rows}
    cases: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if "reason" in row:
            cases.setdefault((name(row), row["reason"]), set()).add(row["case"])
    if not cases:
        return ""
    lines = [
        f"- {way}: {reason}" + ("" if where == every else f" ({', '.join(sorted(where))})")
        for (way, reason), where in cases.items()
    ]
    return "Not run here:\n\n" + "\n".join(lines)


def heading(title: str, machine: str, text: str, rows: Sequence[Row] = ()) -> str:
    """Of a section; says where its rows were measured, if they are given."""
    return f"## {title}{f': {machine}' * bool(machine)}\n\n{wrapped(text)}" + (f"\n\n{where(rows)}" if rows else "")


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def item(text: str) -> str:
    """Of a list, wrapped."""
    return textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def times(ratio: Sequence[float] | None) -> str | None:
    return None if ratio is None else "{:.2f} ({:.2f}-{:.2f})".format(*ratio)


def number(row: Row, key: str, form: str = ".3g") -> str | None:
    return format(row[key], form) if row.get(key) is not None else None


def file_name(name: str, machine: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in f"{name} {machine}".lower()).split()
    return "_".join(words) + ".png"


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, caption: str) -> str:
    """Write a picture; gives the lines of the page that show it, with a caption that says how to read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
    return f"![{caption.split('.')[0]}](figures/{path.name})\n\n{wrapped(f'*{caption}*')}"


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], title: str, label: str) -> None:
    """Horizontal bars with their values, ours in blue."""
    drawn = axes.barh(names, values, color=[OURS if name.startswith("hlip") else OTHERS for name in names])
    axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.invert_yaxis()


def plain_numbers(axes: Axes) -> None:
    """Of a logarithmic y axis: 0.02 and not a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
