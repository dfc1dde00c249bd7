"""Draw everything that the benchmarks have measured: `docs/benchmarks.md` and its figures.

    python bench/plot.py
    python bench/plot.py --results bench/results --out docs

Reads `attention.jsonl`, `encoder.jsonl`, `packing.jsonl` and `io.json`, as far as they are there, and shows the latest
run of every case. Nothing is measured here; what is slower than something else is shown like all the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
REGROUP = ("published_forward_bytes", "ours_forward_bytes", "published_backward_bytes", "ours_backward_bytes")
GREY, COLOURS = "#9a9a9a", {"hlip": "#1f6fb4", "packed": "#1f6fb4"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page (default: %(default)s)")
    args = parser.parse_args()
    sections = [section(args.results, args.out / "figures") for section in (attention, io, encoder, scaling, packing)]
    if not any(sections):
        parser.exit(2, f"{parser.prog}: {args.results}: no results; make bench measures some\n")
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "benchmarks.md"
    partial = page.with_name(f".{page.name}.tmp")
    partial.write_text("\n\n".join(filter(None, [INTRODUCTION, *sections])) + "\n", encoding="utf-8")
    partial.replace(page)
    print(page)
    return 0


INTRODUCTION = """# Benchmarks

Made by `make bench` and `python bench/plot.py` from the rows in `bench/results/`; every row names its hardware,
versions, commit and time. All ways of a table ran in one process, in turns, on the same data, after their results had
been compared. A ratio is the median of the rounds' ratios, with its 95% interval; above 1 is slower than ours. Where we
lose, the row stays."""


def read(path: Path) -> list[Row]:
    """Raises ValueError where a line is no JSON object; names it."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: not readable results ({error})") from error


def latest(rows: Iterable[Row], case: Callable[[Row], object]) -> list[Row]:
    """Of every case, the rows of its latest run; they share a time."""
    times: dict[object, str] = {}
    rows = list(rows)
    for row in rows:
        times[case(row)] = max(times.get(case(row), ""), row["utc"])
    return [row for row in rows if row["utc"] == times[case(row)]]


def where(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"*{row['device']}, {threads}; {versions}; commit {row['commit']}; {row['utc']}*"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *([("-" if cell is None else cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def times(ratio: Sequence[float] | None) -> str | None:
    return None if ratio is None else "{:.2f} ({:.2f}-{:.2f})".format(*ratio)


def save(figure: Figure, path: Path) -> str:
    """Write a picture; gives the line of the page that shows it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
    return f"![{path.stem}](figures/{path.name})"


def bars(rows: Sequence[tuple[str, Sequence[float]]], title: str, path: Path) -> str:
    """Horizontal bars of ratios to ours, with intervals."""
    figure = Figure(figsize=(7, 0.9 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, (_, (median, low, high)) in enumerate(rows):
        axes.barh(i, median, color=GREY if median > 1 else "#d08a3c", xerr=[[median - low], [high - median]])
    axes.axvline(1, color=COLOURS["hlip"])
    axes.set(yticks=range(len(rows)), yticklabels=[name for name, _ in rows], xlabel="times ours (right is slower)")
    axes.set_xscale("log")
    axes.set_title(title, fontsize=10)
    axes.invert_yaxis()
    return save(figure, path)


def attention(results: Path, figures: Path) -> str:
    rows = latest(read(results / "attention.jsonl"), lambda row: (row["case"], row["dtype"], row["device"]))
    if not rows:
        return ""
    parts = [
        "## Attention\n\nOne call of attention within the groups of a level, forward alone and forward with backward "
        "(`training`). Other libraries get their rows in the order of groups, which favours them; `published` is a "
        "dense call with the copy that a change of level costs, where groups are of one length.",
        where(rows[-1]),
    ]
    for case in dict.fromkeys((row["case"], row["dtype"], row["device"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["dtype"], row["device"]) == case]
        measured = [row for row in mine if "reason" not in row]
        memory = "peak_bytes" if any("peak_bytes" in row for row in measured) else "saved_bytes"
        parts.append(f"### {case[0]}, {case[1]}\n\n{mine[0]['groups']} groups of {mine[0]['shortest']} to "
                     f"{mine[0]['longest']} rows.")  # fmt: skip
        parts.append(
            table(
                ["way", "mode", "ms", "times ours", "GFLOP/s", "of a matrix product", "saved or peak MB"],
                [
                    [
                        row["backend"], row["mode"], f"{1000 * row['p50_s']:.3g}", times(row["times_ours"]),
                        f"{row['flop_per_s'] / 1e9:.3g}", f"{row['of_matmul']:.0%}",
                        f"{row[memory] / 1e6:.3g}",
                    ]
                    for row in measured
                ],
            )
        )  # fmt: skip
        compared = [(f"{row['backend']}, {row['mode']}", row["times_ours"]) for row in measured if row["times_ours"]]
        parts.append(bars(compared, f"{case[0]}, {case[1]}", figures / f"attention_{case[0]}_{case[1]}.png"))
        reasons = dict.fromkeys(f"{row['backend']}: {row['reason']}" for row in mine if "reason" in row)
        if reasons:
            parts.append("Not run: " + "; ".join(reasons) + ".")
    return "\n\n".join(parts)


def io(results: Path, figures: Path) -> str:
    rows = read(results / "io.json")
    if not rows:
        return ""
    found = [row for row in rows if row["kind"] == "exponent"]
    changes = [row for row in rows if row["kind"] == "regroup"]
    lengths = [row for row in rows if row["kind"] == "length"]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, sweep in zip(panels, ("N", "M", "d"), strict=True):
        for row in found:
            if (row["sweep"], row["pass"], row["quantity"], row["way"]) == (sweep, "forward", "bytes", "ours"):
                axes.loglog(row["x"], row["counted"], "o-", label=f"{row['level']} ({row['exponent']:.2f})")
        axes.set(xlabel=sweep)
        axes.legend(title="level (exponent)", fontsize=8)
    panels[0].set(ylabel="bytes our kernels request")
    parts = [
        "## Bytes and operations\n\nCounted, not timed: every byte that the Triton kernels request, and what attention "
        "that writes its weights to memory would move. A quantity that grows as a power of N (tokens), M (scans), "
        "d (slices), D (head dim) or S (tile rows, which stand for fast memory) has that power beside the claim of the "
        "paper's section 3.1, or of flash attention's N^2 D^2 / S.",
        where(rows[0]),
        save(figure, figures / "io.png"),
        table(
            ["way", "pass", "level", "sweep", "of", "measured", "claimed"],
            [
                [r["way"], r["pass"], r["level"], r["sweep"], r["quantity"], f"{r['exponent']:.3f}", r["claimed"]]
                for r in found
            ],
        ),
        "### Groups of the released models\n\nOne head of 64 in 16 bits, with the tiles of sm_90.",
        table(
            ["rows", "pass", "MB ours", "MB writing weights", "MB at least"],
            [
                [r["rows"], r["pass"], *(f"{r[k] / 1e6:.3g}" for k in ("bytes", "standard_bytes", "least_bytes"))]
                for r in lengths
            ],
        ),
        "### Changes of level in a whole encoder\n\nMB of one study: the published way copies all tokens, ours moves "
        "prefix rows.",
        table(
            ["model", "scans", "changes", "forward, published", "ours", "backward, published", "ours"],
            [
                [
                    r["model"], r["scans"], r["changes"],
                    *(f"{r[key] / 1e6:.3g}" for key in REGROUP),
                ]
                for r in changes
            ],
        ),
    ]  # fmt: skip
    return "\n\n".join(parts)


def named(row: Row) -> str:
    return row["model"] + ("" if row["flash"] else ", without flash")


def gigabytes(row: Row) -> list[str | None]:
    return [f"{row[key]:.2f}" if key in row else None for key in ("memory_gb", "saved_gb")]


def encoder(results: Path, figures: Path) -> str:
    rows = latest(
        (row for row in read(results / "encoder.jsonl") if row["case"] in ("table9", "figure1b")),
        lambda row: (row["case"], row["studies"], row["dtype"], row["device"]),
    )
    if not rows:
        return ""
    parts = [
        "## Whole encoders\n\nThe paper's Table 9 (one volume of 224 x 224 x 224 voxels, patches of 16) and Figure 1b "
        "(studies of 8 scans of 48 x 224 x 224). `hlip` is this library's encoder, `published` the same weights "
        "computed as the released code does; `bench/baselines.py` says how. On a CPU, GB is by how much the largest "
        "resident size of a fresh process grows in a training step, and saved GB what autograd keeps.",
        where(rows[-1]),
    ]
    for case in dict.fromkeys((row["case"], row["studies"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["studies"], row["dtype"]) == case]
        measured = [row for row in mine if "reason" not in row]
        parts.append(f"### {case[0]}, {case[1]} stud{'y' if case[1] == 1 else 'ies'}, {case[2]}")
        parts.append(
            table(
                ["model", "mode", "M parameters", "volumes/s", "times ours", "GB", "saved GB"],
                [
                    [
                        named(row), row["mode"], f"{row['parameters'] / 1e6:.1f}", f"{row['vol_per_s']:.3g}",
                        times(row["times_first"]), *gigabytes(row),
                    ]
                    for row in measured
                ],
            )
        )  # fmt: skip
        compared = [(f"{named(row)}, {row['mode']}", row["times_first"]) for row in measured]
        parts.append(bars(compared, f"{case[0]}, {case[2]}", figures / f"{case[0]}_{case[1]}_{case[2]}.png"))
        reasons = dict.fromkeys(f"{named(row)}: {row['reason']}" for row in mine if "reason" in row)
        if reasons:
            parts.append("Not run: " + "; ".join(reasons) + ".")
    return "\n\n".join(parts)


def scaling(results: Path, figures: Path) -> str:
    rows = latest(
        (row for row in read(results / "encoder.jsonl") if row["case"].startswith("scaling_")),
        lambda row: (row["case"], row["studies"], row["scans"], tuple(row["shape"]), row["dtype"], row["device"]),
    )
    if not rows:
        return ""
    axis_of = {"scaling_scans": "scans", "scaling_batch": "studies", "scaling_slices": "slices"}
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(9, 3.2 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 2, squeeze=False)
    lost = []
    for (left, right), case in zip(panels, cases, strict=True):
        mine = [{**row, "slices": row["shape"][0] // row["patch"][0]} for row in rows if row["case"] == case]
        for model in dict.fromkeys(map(named, mine)):
            steps = [row for row in mine if named(row) == model and row.get("mode") == "training"]
            x = [row[axis_of[case]] for row in steps]
            left.loglog(x, [row["p50_s"] for row in steps], "o-", label=model)
            right.loglog(x, [row["memory_gb"] for row in steps], "o-", label=model)
            ends = [row for row in mine if named(row) == model and "out of memory" in row.get("reason", "")]
            lost += [f"{model} at {ends[0][axis_of[case]]} {axis_of[case]} ({ends[0]['reason']})"] if ends else []
        for axes, what in ((left, "seconds of a training step"), (right, "GB of a training step")):
            axes.set(xlabel=axis_of[case], ylabel=what)
            axes.legend(fontsize=8)
    parts = [
        "## Growing studies\n\nA training step against scans of a study, slices of a scan, and studies of a batch.",
        where(rows[-1]),
        save(figure, figures / "scaling.png"),
    ]
    if lost:
        parts.append("Out of memory: " + "; ".join(lost) + ".")
    return "\n\n".join(parts)


def packing(results: Path, figures: Path) -> str:
    rows = latest(read(results / "packing.jsonl"), lambda row: (row["mix"], row["mode"], row["dtype"], row["device"]))
    if not rows:
        return ""
    parts = [
        "## Packing\n\nStudies of different numbers of scans, in a training step (`bench/packing.py`): packed, "
        "repeated or cropped to 10 scans as HLIP was trained, padded to the longest, and in one sequence with a block "
        "mask.",
        where(rows[-1]),
        table(
            ["mix", "mode", "policy", "studies/s", "times packed", "tokens", "GFLOP"],
            [
                [
                    row["mix"], row["mode"], row["policy"],
                    row["studies_per_s"] and f"{row['studies_per_s']:.3g}",
                    row["packed_over_this"] and f"{row['packed_over_this']:.2f}",
                    row["tokens"], round(row["flops"] / 1e9),
                ]
                for row in rows
            ],
        ),
    ]  # fmt: skip
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
