"""Draw everything that the benchmarks have measured: `docs/benchmarks.md` and its figures.

    python bench/plot.py
    python bench/plot.py --results bench/results --out docs

Reads `attention.jsonl`, `encoder.jsonl`, `layer.jsonl`, `packing.jsonl`, `io.jsonl` and `static.jsonl`, as far as they
are there, and `check-*.json`, reports of `check.py`. Of every case its latest run is shown. Machines, and numbers of
threads, have sections of their own. Nothing is measured here; what is slower than something else is shown like all the
rest, and listed where we lose.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path
from typing import Any

from benchlib.checkpage import markdown, read_check
from benchlib.page import (
    OURS,
    Row,
    bars,
    count,
    file_name,
    heading,
    item,
    latest,
    losses,
    new_figure,
    not_run,
    number,
    of_machines,
    plain_numbers,
    read,
    save,
    times,
    where,
    wrapped,
)
from benchlib.plot_static import static
from benchlib.report import gigabytes, megabytes, short, table
from benchlib.words import (
    ALLOCATORS,
    ATTENTION,
    BASELINE,
    BYTES,
    ENCODERS,
    GROWING,
    INTRODUCTION,
    LAYER,
    MODELS,
    PACKING,
    POLICIES,
    WAYS,
)

MARKERS = "ovs^Dp<>*Xhd"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=Path("bench/results"), help="folder of the .jsonl files (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page (default: %(default)s)")
    args = parser.parse_args()
    try:
        encoders, packed, calls, layers, counted, compiled = (
            read(args.results / f"{name}.jsonl")
            for name in ("encoder", "packing", "attention", "layer", "io", "static")
        )
        checks = [read_check(path) for path in sorted(args.results.glob("check-*.json"))]
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    whole = [row for row in encoders if not row["case"].startswith("scaling_")]
    growing = [row for row in encoders if row["case"].startswith("scaling_")]
    figures = args.out / "figures"
    try:
        sections = [
            summary(whole, packed, calls, counted),
            *of_machines(encoder, whole, figures),
            *of_machines(packing, packed, figures),
            *of_machines(scaling, growing, figures),
            *of_machines(attention, calls, figures),
            *of_machines(layer, layers, figures),
            io(counted, figures),
            static(compiled),
            *(markdown(report, 2).rstrip() for report in checks),
        ]
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: pictures need matplotlib ({error}): pip install 'hlip-kernels[viz]'\n")
    if not any(sections):
        parser.exit(2, f"{parser.prog}: {args.results}: no results; make bench measures some\n")
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "benchmarks.md"
    partial = page.with_name(f".{page.name}.tmp")
    partial.write_text("\n\n".join(filter(None, [INTRODUCTION, *sections])) + "\n", encoding="utf-8")
    partial.replace(page)
    print(page)
    return 0


def summary(whole: list[Row], packed: list[Row], calls: list[Row], counted: list[Row]) -> str:
    """What the rows say to the questions that people come with; of no rows, nothing."""
    lines = []
    found = [row for row in whole if row["case"] == "table9" and "reason" not in row and row["times_ours"]]
    most = max((row["threads"] for row in found), default=0)
    for mode, allocator in (("inference", "kept"), ("inference", "default"), ("training", "kept")):
        rows = [r for r in found if (r["threads"], r["mode"], r["allocator"]) == (most, mode, allocator)]
        rows = latest(rows, lambda row: row["dtype"])
        others = [f"{named(row)} {row['times_ours'][0]:.2f}" for row in rows if row["model"] != "hlip"]
        if others:
            with_it = " with the C library's allocator as it is" * (allocator == "default")
            lines.append(
                f"- Whole encoders, the paper's Table 9, {rows[0]['dtype']}, {mode}{with_it}: times as long as ours "
                f"take {', '.join(others)}."
            )
    packed = [row for row in packed if row["policy"] == "repeat10" and row["packed_over_this"]]
    for row in latest(packed, lambda row: (row["mix"], row["mode"], row["dtype"], row["threads"])):
        what = "A training step" if row["mode"] == "train" else "A forward pass"
        lines.append(
            f"- {what} on {row['mix']}, {row['dtype']}: repeating every study to 10 scans, the published way, takes "
            f"{row['packed_over_this']:.2f} times as long as packing with ours."
        )
    lines += list(fastest_others(calls))
    exponents = [row for row in latest(counted, lambda _: "all") if row["kind"] == "exponent"]
    if exponents:
        worst = max(exponents, key=lambda row: abs(row["exponent"] - row["claimed"]))
        lines.append(
            f"- All {len(exponents)} exponents of bytes and operations lie within 0.05 of those claimed; farthest is "
            f"{worst['exponent']:.3f} for {worst['claimed']} ({worst['quantity']}, {worst['sweep']}, {worst['pass']})."
            if abs(worst["exponent"] - worst["claimed"]) <= 0.05
            else f"- **An exponent is {worst['exponent']:.3f} and not {worst['claimed']}** ({worst['quantity']}, "
            f"{worst['sweep']}, {worst['pass']})."
        )
    words = wrapped("`published` is the same model as ours, computed as its released code does; the sections say more.")
    return "\n\n".join(["## In short", words, "\n".join(map(item, lines))]) if lines else ""


def fastest_others(calls: list[Row]) -> Iterator[str]:
    """Of each machine and mode: how attention of the fastest other way compares, over all cases."""
    found: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in latest(calls, lambda row: (row["device"], row["threads"], row["dtype"], row["case"])):
        if row.get("times_ours") and not row["backend"].startswith("hlip"):
            times_ours = found[row["device"], row["threads"], row["dtype"], row["mode"]][row["case"]]
            times_ours.append(row["times_ours"][0])
    for (device, threads, dtype, mode), cases in found.items():
        best = sorted(map(min, cases.values()))
        where_it_is = f" ({device}, {count(threads, 'threads')})" if len({key[:2] for key in found}) > 1 else ""
        lines = f"{best[0]:.2f} to {best[-1]:.2f}" if len(best) > 1 else f"{best[0]:.2f}"
        yield (
            f"- Attention alone, {dtype}, {mode}{where_it_is}: the fastest way of others takes {lines} times as long "
            f"as ours in {count(len(best), 'cases')}."
        )


def named(row: Row) -> str:
    return row["model"] + ("" if row["flash"] else ", without flash") + (", CUDA graph" if row.get("graph") else "")


def encoder(rows: list[Row], figures: Path, machine: str) -> str:
    def key(row: Row) -> tuple[Any, ...]:
        size = row["studies"], row["scans"], tuple(row["shape"]), row["width"], row["depth"]
        return row["case"], row["dtype"], row["allocator"], *size

    rows = latest(rows, lambda row: (*key(row), row["mode"]))
    models = [[f"`{name}`", what] for name, what in MODELS.items() if any(row["model"] == name for row in rows)]
    parts = [heading("Whole encoders", machine, ENCODERS), table(["model", "what it is"], models), wrapped(BASELINE)]
    titles = {"table9": "Table 9", "figure1b": "Figure 1b"}
    for case in dict.fromkeys(map(key, rows)):
        mine = [row for row in rows if key(row) == case]
        measured = [row for row in mine if "reason" not in row]
        name, dtype, allocator, studies, scans, _, width, depth = case
        what = f"{count(studies, 'studies')} of {count(scans, 'scans')}"
        title = f"{titles[name]}: {what}, {dtype}" + ", the C library's allocator" * (allocator == "default")
        small = "" if (width, depth) == (768, 12) else f" width {width}, {depth} layers"
        title += f",{small}" * bool(small)
        parts += [f"### {title}", where(mine)]
        if allocator:
            parts.append(wrapped(ALLOCATORS[allocator]))
        modes = list(dict.fromkeys(row["mode"] for row in measured))
        if not modes:
            parts.append(not_run(mine, named))
            continue
        figure = new_figure(4.8 * len(modes), 1 + 0.28 * len(measured) / len(modes))
        for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
            of_mode = [row for row in measured if row["mode"] == mode]
            rates = [row["vol_per_s"] for row in of_mode]
            bars(axes, [named(row) for row in of_mode], rates, f"{titles[name]}, {dtype}, {mode}", "volumes a second")
        picture = file_name(f"{name} {studies} {dtype}{small} {'default' * (allocator == 'default')}", machine)
        caption = f"{titles[name]}, volumes a second of whole encoders. Longer is faster; ours in blue."
        parts.append(save(figure, figures / picture, caption))
        for mode in modes:
            of_mode = [row for row in measured if row["mode"] == mode]
            memory = ["GiB peak", "GiB kept"] if mode == "training" else []
            parts.append(
                table(
                    [mode, "M parameters", "volumes/s", "times ours", "of a product", "GB moved", *memory, "error",
                     "paper, A40"],
                    [
                        [
                            named(row), f"{row['parameters'] / 1e6:.1f}", f"{row['vol_per_s']:.3g}",
                            times(row["times_ours"]), number(row, "share", ".0%"),
                            gigabytes(row, "bytes_modelled"),
                            *([number(row, "memory_gb", ".2f"), number(row, "saved_gb", ".2g")] if memory else []),
                            number(row, "error", ".1g"),
                            f"{row['a40_vol_per_s']} vol/s" if "a40_vol_per_s" in row
                            else f"{row['a40_memory_gb']} GB" if "a40_memory_gb" in row else None,
                        ]
                        for row in of_mode
                    ],
                )
            )  # fmt: skip
        parts.append(losses((f"{named(row)}, {row['mode']}", row["times_ours"]) for row in measured))
        parts.append(not_run(mine, named))
    return "\n\n".join(filter(None, parts))


OUR_POLICIES = ("packed", "repeat10_us")


def packing(rows: list[Row], figures: Path, machine: str) -> str:
    def key(row: Row) -> tuple[Any, ...]:
        return row["mix"], row["mode"], row["dtype"], row["width"], row["depth"], row["studies"]

    rows = latest(rows, key)
    cases = list(dict.fromkeys(map(key, rows)))
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    figure = new_figure(4.4 * across, 2 * down)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    policies = [[f"`{name}`", what] for name, what in POLICIES.items()]
    parts = [heading("Packing", machine, PACKING, rows), table(["policy", "what it is"], policies)]
    tables = []
    for axes, case in zip(panels, cases, strict=False):
        mix, mode, dtype, width, depth, studies = case
        mine = [row for row in rows if key(row) == case]
        ran = [row for row in mine if row["studies_per_s"]]
        names = [f"{'hlip, ' * (row['policy'] in OUR_POLICIES)}{row['policy']}" for row in ran]
        bars(axes, names, [row["studies_per_s"] for row in ran], f"{mix}, {mode}, {dtype}", "studies a second")
        tables += [
            f"### {mix}, {mode}, {dtype}, width {width}, {depth} layers, {count(studies, 'studies')} of at most "
            f"{count(mine[0]['max_scans'], 'scans')}",
            table(
                ["policy", "studies/s", "times packed", "tokens", "GFLOP", "MB peak", "GB moved", "error"],
                [
                    [
                        row["policy"], number(row, "studies_per_s"),
                        row["packed_over_this"] and times([row["packed_over_this"], *row["interval"]]),
                        row["tokens"], round(row["flops"] / 1e9), megabytes(row, "peak_bytes"),
                        gigabytes(row, "bytes_modelled"),
                        row["error"] if isinstance(row["error"], str) else f"{row['error']:.1g}",
                    ]
                    for row in mine
                ],
            ),
            losses((row["policy"], [row["packed_over_this"], *row["interval"]]) for row in ran),
        ]  # fmt: skip
    caption = "Studies a second of packed batches and of other ways. Longer is faster; this library in blue."
    return "\n\n".join([*parts, save(figure, figures / file_name("packing", machine), caption), *tables])


AXES = {"scaling_scans": "scans", "scaling_slices": "slices", "scaling_batch": "studies"}
LABELS = {"scans": "scans of a study", "slices": "slices of tokens of a scan", "studies": "studies of a batch"}


def scaling(rows: list[Row], figures: Path, machine: str) -> str:
    def key(row: Row) -> tuple[Any, ...]:
        size = row["studies"], row["scans"], tuple(row["shape"]), row["width"], row["depth"]
        return row["case"], row["dtype"], row["allocator"], *size, row["mode"]

    rows = latest(rows, key)
    rows = [row | {"slices": row["shape"][0] // row["patch"][0]} for row in rows]
    rows.sort(key=lambda row: row[AXES[row["case"]]])
    cases = [case for case in AXES if any(row["case"] == case for row in rows)]
    figure = new_figure(9, 3.2 * len(cases))
    tables = []
    for (left, right), case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        axis = AXES[case]
        mine = [row for row in rows if row["case"] == case]
        sizes = sorted({row[axis] for row in mine})
        for model, marker in zip(dict.fromkeys(map(named, mine)), MARKERS, strict=False):
            steps = [row for row in mine if named(row) == model and row["mode"] == "training" and "p50_s" in row]
            x = [row[axis] for row in steps]
            left.loglog(x, [row["p50_s"] for row in steps], f"{marker}-", label=model)
            right.loglog(x, [row.get("memory_gb", nan) for row in steps], f"{marker}-", label=model)
        for axes, what in ((left, "seconds of a training step"), (right, "GiB of a training step")):
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
            plain_numbers(axes)
            axes.grid(alpha=0.3)
            axes.set(xlabel=LABELS[axis], ylabel=what)
            axes.legend(fontsize=8)
        tables += [growth(mine, axis, sizes, mode) for mode in ("training", "inference")]
        first = [row for row in mine if "p50_s" in row]
        tables.append(losses((f"{named(r)}, {r['mode']}, {count(r[axis], axis)}", r["times_ours"]) for r in first))
    caption = (
        "A training step of growing studies. Seconds left, memory right, both axes logarithmic; lower is better, and a "
        "line ends where a model was not run or ran out of memory."
    )
    picture = save(figure, figures / file_name("scaling", machine), caption)
    return "\n\n".join([heading("Growing studies", machine, GROWING, rows), picture, *filter(None, tables)])


def growth(rows: Sequence[Row], axis: str, sizes: Sequence[int], mode: str) -> str:
    """A line for every model: seconds, times ours and GiB at each size."""

    def cell(model: str, size: int) -> str | None:
        for row in rows:
            if (named(row), row[axis]) == (model, size) and row["mode"] == mode:
                if "reason" in row:
                    return "out of memory" if row["reason"].startswith("out of memory") else "not tried"
                memory = f", {row['memory_gb']:.2g} GiB" if "memory_gb" in row else ""
                ours = f" ({row['times_ours'][0]:.2f})" if row["times_ours"] and model != "hlip" else ""
                return f"{row['p50_s']:.3g} s{ours}{memory}"
        return None

    models = dict.fromkeys(map(named, rows))
    header = [f"{mode}: seconds (times ours)", *(count(size, axis) for size in sizes)]
    return table(header, [[model, *(cell(model, size) for size in sizes)] for model in models])


def attention(rows: list[Row], figures: Path, machine: str) -> str:
    def key(row: Row) -> tuple[Any, ...]:
        return row["case"], row["dtype"], row["heads"], row["head_dim"]

    rows = latest(rows, key)
    measured = [row for row in rows if "reason" not in row]
    cases = list(dict.fromkeys(map(key, measured)))
    modes = list(dict.fromkeys(row["mode"] for row in measured))
    ways = dict.fromkeys(row["backend"] for row in measured)
    figure = new_figure(5.4 * len(modes) + 1, 1.6 + 0.42 * len(cases))
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        for i, way in enumerate(ways):
            dots = [
                (row["times_ours"][0], float(cases.index(key(row))))
                for row in measured
                if (row["mode"], row["backend"]) == (mode, way) and row["times_ours"]
            ]
            colour = OURS if way.startswith("hlip") else f"C{1 + i % 9}"
            axes.plot(
                *zip(*dots or [(nan, nan)], strict=True), MARKERS[i % len(MARKERS)], color=colour, label=way, alpha=0.8
            )
        axes.axvline(1, color=OURS, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_yticks(range(len(cases)), [f"{case[0]}, {case[1]}" for case in cases])
        axes.grid(alpha=0.3)
        axes.set(title=mode, xlabel="times as long as ours")
    panels[0].invert_yaxis()
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    tables = []
    for case in cases:
        mine = [row for row in measured if key(row) == case]
        first = mine[0]
        lengths = " to ".join(str(n) for n in dict.fromkeys((first["shortest"], first["longest"])))
        groups = f"{first['groups']} group{'s' * (first['groups'] > 1)} of {lengths} rows"
        tables += [
            f"### {case[0]}, {case[1]}",
            wrapped(
                f"{groups}, {case[2]} heads of {case[3]}; compared with float64: {first['checked']}. A matrix product "
                f"reached {first['matmul_flop_per_s'] / 1e9:.4g} GFLOP/s, a copy "
                f"{first['copy_bytes_per_s'] / 1e9:.3g} GB/s."
            ),
            table(
                ["way", "mode", "ms", "times ours", "GFLOP/s", "of a product", "of a copy", "MB kept", "MB peak",
                 "prepare, ms", "first call, s", "error"],
                [
                    [
                        row["backend"], row["mode"], short(1000 * row["p50_s"]), times(row["times_ours"]),
                        short(row["flop_per_s"] / 1e9), f"{row['of_matmul']:.0%}", f"{row['of_copy']:.0%}",
                        megabytes(row, "saved_bytes"), megabytes(row, "peak_bytes"),
                        short(1000 * row["prepare_s"]), f"{row['first_s']:.2g}",
                        f"{row['error']:.1g}",
                    ]
                    for row in mine
                ],
            ),
            losses((f"{row['backend']}, {row['mode']}", row["times_ours"]) for row in mine),
        ]  # fmt: skip
    caption = (
        "Attention, how many times as long as ours each way takes. A line for each case, on a logarithmic axis: right "
        "of the blue line others are slower, left of it faster."
    )
    return "\n\n".join(
        filter(
            None,
            [
                heading("Attention", machine, ATTENTION, rows),
                save(figure, figures / file_name("attention", machine), caption),
                table(["way", "what it is"], [[way, WAYS.get(way, "")] for way in ways]),
                *tables,
                not_run(rows, lambda row: row["backend"]),
            ],
        )
    )


def layer(rows: list[Row], figures: Path, machine: str) -> str:
    """A table of changes of level; it has no figure."""
    rows = latest(rows, lambda row: (row["case"], row["dtype"], row["mode"]))
    if not rows:
        return ""
    by_case: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_case[row["case"], row["dtype"], row["mode"]][row["way"]] = row
    lines = []
    for case, ways in by_case.items():
        ours, copies = ways["hlip"], ways["copies"]
        seconds = (short(1000 * row["p50_s"]) for row in (ours, copies))
        moved = (megabytes(row, "bytes") for row in (ours, copies))
        lines.append([*case, *seconds, times(copies["times_ours"]), *moved])
    text = LAYER + f" One study of {count(rows[0]['scans'], 'scans')} of 1176 patches, width {rows[0]['width']}."
    header = ["change", "type", "mode", "ms, hlip", "ms, copies", "times ours", "MB moved, hlip", "copies"]
    names = [(", ".join(case), ways["copies"]["times_ours"]) for case, ways in by_case.items()]
    return "\n\n".join(
        [
            heading("A change of level and the attention after it", machine, text, rows),
            table(header, lines),
            losses(names),
        ]
    )


REGROUP = ("published_forward_bytes", "ours_forward_bytes", "published_backward_bytes", "ours_backward_bytes")
FORWARD = "forward", "bytes"
STYLES = {"slice": ("C0", 5.0), "scan": ("C1", 3.0), "study": ("C2", 1.5)}  # widths, as lines may lie on each other


def io(rows: list[Row], figures: Path) -> str:
    rows = latest(rows, lambda _: "all")
    if not rows:
        return ""
    found = [row for row in rows if row["kind"] == "exponent"]
    changes = [row for row in rows if row["kind"] == "regroup"]
    lengths = [row for row in rows if row["kind"] == "length"]
    sweeps = {"N": "N, tokens", "M": "M, scans", "d": "d, slices of a scan", "S": "S, rows of a tile"}
    figure = new_figure(13, 6.4)
    panels = figure.subplots(2, 4, sharey="row")
    for (way, title), line in zip((("ours", "our kernels"), ("standard", "standard attention")), panels, strict=True):
        for axes, (sweep, label) in zip(line, sweeps.items(), strict=True):
            shown = [r for r in found if (r["way"], r["sweep"], r["pass"], r["quantity"]) == (way, sweep, *FORWARD)]
            for row in shown:
                colour, width = STYLES[row["level"]]
                x = [row["times_longer"] * n if sweep == "N" else n for n in row["x"]]
                y = [each / 1e6 for each in row["counted"]]
                axes.loglog(x, y, "o-", color=colour, linewidth=width, label=row["level"])
                claimed = [row["counted"][0] / 1e6 * (n / row["x"][0]) ** row["claimed"] for n in row["x"]]
                axes.loglog(x, claimed, "k:", linewidth=1)
                axes.set_xticks(x, x)
            axes.set(xlabel=label, title=title)
            axes.set_visible(bool(shown))
            axes.minorticks_off()
            plain_numbers(axes)
            axes.grid(alpha=0.3)
        line[0].set(ylabel="MB of a forward pass")
        line[0].legend(title="level", fontsize=8)
    caption = (
        "Bytes of attention as tokens, scans, slices and tiles grow. Both axes logarithmic, where a power is a "
        "straight line; dotted: the power that is claimed, from the first point. Above what our kernels request; below "
        "standard attention, which has no tiles, on groups 16 times as long: the two rows are not to be compared with "
        "each other (the table of groups of the released models does that). Lines of levels that cost the same lie on "
        "each other."
    )
    levels = list(dict.fromkeys(row["level"] for row in found))
    of_bytes = {
        ((r["way"], r["pass"], r["sweep"]), r["level"]): f"{round(r['exponent'], 3) + 0:.3f} ({r['claimed']})"
        for r in found
        if r["quantity"] == "bytes"
    }
    lines = list(dict.fromkeys(line for line, _ in of_bytes))
    off = {q: max(abs(r["exponent"] - r["claimed"]) for r in found if r["quantity"] == q) for q in ("bytes", "flops")}
    parts = [
        heading("Bytes and operations", "", BYTES, rows),
        save(figure, figures / "io.png", caption),
        "### Exponents of bytes, measured (claimed)",
        table(
            ["way", "pass", "growing", *levels],
            [[*line, *(of_bytes[line, level] for level in levels)] for line in lines],
        ),
        wrapped(
            f"`scans` lets a study grow by whole scans, `D at S` the head dim at the same fast memory. The largest "
            f"distance from a claim is {off['bytes']:.3f} for bytes and {off['flops']:.3f} for operations, of which "
            f"the same powers are counted. What is below the claim is the part that grows slower: own rows, statistics."
        ),
        "### Groups of the released models\n\nOne head of 64 in 16 bits, with the tiles of sm_90.",
        table(
            ["rows", "pass", "MB ours", "MB writing weights", "MB at least"],
            [
                [r["rows"], r["pass"], *(megabytes(r, k) for k in ("bytes", "standard_bytes", "least_bytes"))]
                for r in lengths
            ],
        ),
        "### Changes of level in a whole encoder\n\nMB of one study: the published way copies all tokens; ours moves "
        "them in a pass that is made anyway, which adds what prefix rows take.",
        table(
            ["model", "scans", "changes", "forward, published", "ours", "backward, published", "ours"],
            [[r["model"], r["scans"], r["changes"], *(megabytes(r, key) for key in REGROUP)] for r in changes],
        ),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
