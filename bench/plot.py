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
from math import nan
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
REGROUP = ("published_forward_bytes", "ours_forward_bytes", "published_backward_bytes", "ours_backward_bytes")
OURS, OTHERS = "#1f6fb4", "#9a9a9a"
ATTENTION = """One call of attention within the groups of a level, forward alone and forward with backward (`training`).
A case is named by its level and the rows of a group, patches and a prefix row: 197 are a slice of 14 x 14 patches, 1177
a scan of six slices, 4705 a study of four scans. Cases of a mix hold studies of differing scan counts, `drop50` after
half of the patches were dropped. GFLOP/s count the work itself, no padding, and stand beside a matrix product of the
same run. MB kept is what a training step holds for its backward, or on a GPU the peak. Other libraries get their rows
in the order of groups, which favours them: a packed model would pay a gather before the call and a scatter after."""
ENCODERS = """The paper's Table 9: one volume of 224 x 224 x 224 voxels in patches of 16, of Swin 4; and its Figure 1b,
where it was run: studies of 8 scans of 48 x 224 x 224. `hlip` is this library's encoder, `vit` a plain vision
transformer, `swin` and `navit` are MONAI's. `published` is the weights of `hlip` computed as the released
code does, with reshaped copies at every change of level and a dense call; it has contiguous inputs, inference
mode, and autocast when training. Without flash, attention writes its weights to memory. On CPUs PyTorch's
flash backward can be the slower one, so of a model the faster row is to be compared with; MONAI's Swin takes
flash attention in inference alone, and its two rows of training differ by noise. On a CPU, GB is by how much
the largest resident size of a fresh process grows in a training step, and saved GB what autograd keeps."""
GROWING = """A training step against scans of a study, slices of a scan, and studies of a batch. On a CPU the model is
small (width 128, three layers, scans of 294 tokens, four of them where slices or studies grow), and small inputs show
what a call costs at least, where we lose."""
WAYS = {
    "hlip-native": "this library, its C++ kernels",
    "hlip-cpu": "this library, PyTorch's dense attention on groups of like length",
    "hlip-reference": "this library's plain formula",
    "hlip-triton": "this library, its Triton kernels",
    "hlip-varlen": "this library, by PyTorch's varlen attention",
    "hlip-flash": "this library, by flash-attn",
    "hlip-xformers": "this library, by xformers",
    "sdpa": "PyTorch's `scaled_dot_product_attention`, one call for each group",
    "sdpa-dense": "the same in one call, where all groups are of one length",
    "published": "the same with the copies that the released code makes when the level changes",
    "padded": "one call, all groups padded to the longest, a mask over the padding",
    "block-mask": "one call over all rows with a block-diagonal mask",
    "flex": "PyTorch's FlexAttention, compiled, with its block mask",
    "nested": "PyTorch's nested tensors of jagged layout",
    "varlen": "PyTorch's `torch.nn.attention.varlen`",
    "flash-attn": "flash-attn's `flash_attn_varlen_qkvpacked_func`",
    "xformers": "xformers' `memory_efficient_attention` with its block-diagonal mask",
}


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
versions, commit and time. All ways of a table ran in one process, in turns, on the same data. Before that, attention
was compared with float64, and encoders that should agree with each other. A ratio is the median of the rounds' ratios,
with its 95% interval, which of two or three rounds is their range; above 1 is slower than ours. Where we lose, the row
stays."""


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


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], title: str, label: str) -> None:
    """Horizontal bars, ours in blue."""
    axes.barh(names, values, color=[OURS if name.startswith("hlip") else OTHERS for name in names])
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.invert_yaxis()


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


def attention(results: Path, figures: Path) -> str:
    rows = latest(read(results / "attention.jsonl"), lambda row: (row["case"], row["dtype"], row["device"]))
    if not rows:
        return ""
    measured = [row for row in rows if "reason" not in row]
    cases = list(dict.fromkeys((row["case"], row["dtype"], row["device"]) for row in measured))
    modes = list(dict.fromkeys(row["mode"] for row in measured))
    ways = dict.fromkeys(row["backend"] for row in measured)
    figure = Figure(figsize=(3.6 * len(cases), 0.5 + (0.9 + 0.24 * len(ways)) * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(cases), squeeze=False)
    tables = []
    for column, case in zip(panels.T, cases, strict=True):
        mine = [row for row in measured if (row["case"], row["dtype"], row["device"]) == case]
        first, memory = mine[0], "peak_bytes" if any("peak_bytes" in row for row in mine) else "saved_bytes"
        for axes, mode in zip(column, modes, strict=True):
            of_mode = [row for row in mine if row["mode"] == mode]
            rates = [row["flop_per_s"] / 1e9 for row in of_mode]
            bars(axes, [row["backend"] for row in of_mode], rates, f"{case[0]}\n{case[1]}, {mode}", "GFLOP/s")
            axes.axvline(first["matmul_flop_per_s"] / 1e9, color="black", linestyle=":", linewidth=1)
        lengths = " to ".join(str(n) for n in dict.fromkeys((first["shortest"], first["longest"])))
        groups = f"{first['groups']} group{'s' * (first['groups'] > 1)} of {lengths} rows"
        heads = f"{first['heads']} heads of {first['head_dim']}"
        tables.append(f"### {case[0]}, {case[1]}\n\n{groups}, {heads}.")
        tables.append(
            table(
                ["way", "mode", "ms", "times ours", "GFLOP/s", "of a matrix product", "MB kept"],
                [
                    [
                        row["backend"], row["mode"], f"{1000 * row['p50_s']:.3g}", times(row["times_ours"]),
                        f"{row['flop_per_s'] / 1e9:.3g}", f"{row['of_matmul']:.0%}",
                        f"{row[memory] / 1e6:.3g}",
                    ]
                    for row in mine
                ],
            )
        )  # fmt: skip
    return "\n\n".join(
        [
            "## Attention\n\n" + ATTENTION,
            where(rows[-1]),
            save(figure, figures / "attention.png"),
            "*Useful operations a second, longer is faster; ours in blue. A column for each case, forward above, "
            "forward with backward below. The dotted line is what a matrix product reached in the same run.*",
            table(["way", "what it is"], [[way, WAYS.get(way, "")] for way in ways]),
            *tables,
            not_run(rows, lambda row: row["backend"]),
        ]
    )


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
        "*Bytes of a forward pass, on logarithmic axes, where a power is a straight line; its slope is in the legend.*",
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
        "## Whole encoders\n\n" + ENCODERS,
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
        modes = list(dict.fromkeys(row["mode"] for row in measured))
        figure = Figure(figsize=(4.2 * len(modes), 3.2), layout="constrained")
        for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
            of_mode = [row for row in measured if row["mode"] == mode]
            rates = [row["vol_per_s"] for row in of_mode]
            bars(axes, [named(row) for row in of_mode], rates, f"{case[0]}, {case[2]}, {mode}", "volumes a second")
        parts.append(save(figure, figures / f"{case[0]}_{case[1]}_{case[2]}.png"))
        parts.append("*Volumes a second, longer is faster; ours in blue.*")
        parts.append(not_run(mine, named))
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
            steps = [row for row in mine if named(row) == model and row.get("mode") == "training" and "p50_s" in row]
            x = [row[axis_of[case]] for row in steps]
            left.loglog(x, [row["p50_s"] for row in steps], "o-", label=model)
            right.loglog(x, [row.get("memory_gb", nan) for row in steps], "o-", label=model)
            ends = [row for row in mine if named(row) == model and "out of memory" in row.get("reason", "")]
            lost += [f"{model} at {ends[0][axis_of[case]]} {axis_of[case]} ({ends[0]['reason']})"] if ends else []
        sizes = sorted({row[axis_of[case]] for row in mine})
        for axes, what in ((left, "seconds of a training step"), (right, "GB of a training step")):
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
            axes.set(xlabel=axis_of[case], ylabel=what)
            axes.legend(fontsize=8)
    parts = [
        "## Growing studies\n\n" + GROWING,
        where(rows[-1]),
        save(figure, figures / "scaling.png"),
        "*Time left, memory right, on logarithmic axes; a line ends where a model ran out of memory.*",
    ]
    if lost:
        parts.append("Out of memory: " + "; ".join(lost) + ".")
    return "\n\n".join(parts)


def packing(results: Path, figures: Path) -> str:
    rows = latest(read(results / "packing.jsonl"), lambda row: (row["mix"], row["mode"], row["dtype"], row["device"]))
    if not rows:
        return ""
    cases = list(dict.fromkeys((row["mix"], row["mode"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(3.6 * len(cases), 2.4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        mine = [row for row in rows if (row["mix"], row["mode"], row["dtype"]) == case and row["studies_per_s"]]
        names = ["hlip, packed" if row["policy"] == "packed" else row["policy"] for row in mine]
        bars(axes, names, [row["studies_per_s"] for row in mine], ", ".join(case), "studies a second")
    parts = [
        "## Packing\n\nStudies of different numbers of scans, as three collections have them, in a training step "
        "(`bench/packing.py`): packed, repeated or cropped to 10 scans as HLIP was trained, padded to the longest, and "
        "in one sequence with a block mask.",
        where(rows[-1]),
        save(figure, figures / "packing.png"),
        "*Studies a second, longer is faster; packing in blue.*",
        table(
            ["mix", "mode", "type", "policy", "studies/s", "times packed", "tokens", "GFLOP"],
            [
                [
                    row["mix"], row["mode"], row["dtype"], row["policy"],
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
