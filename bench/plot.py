"""Draw everything that the benchmarks have measured: `docs/benchmarks.md` and its figures.

    python bench/plot.py
    python bench/plot.py --results bench/results --out docs

Reads `attention.jsonl`, `encoder.jsonl`, `packing.jsonl` and `io.jsonl`, as far as they are there. Of every case its
latest run is shown. Machines, and numbers of threads, have sections of their own. Nothing is measured here; what is
slower than something else is shown like all the rest, and listed where we lose.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from page import (
    OURS,
    Row,
    bars,
    count,
    file_name,
    heading,
    item,
    latest,
    losses,
    not_run,
    number,
    of_machines,
    plain_numbers,
    read,
    save,
    table,
    times,
    where,
    wrapped,
)
from report import megabytes

MARKERS = "ovs^Dp<>*Xhd"
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
INTRODUCTION = """# Benchmarks

Made by `make bench` and `python bench/plot.py` from the rows in `bench/results/`; every row names its hardware,
versions, commit and time. All ways of a table ran in one process, in turns, on the same data. `times ours` is how many
times as long a way takes as this library: the median of the rounds' ratios, and in brackets its 95% interval, which of
up to five rounds is about their range. Above 1 we are faster; where we are not, the row stays, and is listed under its
table. `error` is the relative distance, in norms, from a result that another computation gives."""
ENCODERS = """How many volumes a second does a whole encoder take? The paper's Table 9 encodes one volume of 224 x 224 x
224 voxels in patches of 16; its Figure 1b studies of 8 scans of 48 x 224 x 224. `hlip` is this library's encoder,
`published` the same weights computed as the released code does, `vit` a plain vision transformer. `swin` and `navit`
are MONAI's: Swin-B's widths and depths, windows of 7 and patches of 4 voxels (MONAI's class ends in one more merging of
patches, 17 M parameters that the paper's 87.9 M do not have), and NaViT of the same width and depth. Without flash,
attention writes its weights to memory; on a CPU that can be the faster way to train, so of a model the faster row is
the one to compare with. GB is by how much the largest resident size of a fresh process grows in a training step (on a
GPU, what PyTorch allocates), saved GB what autograd keeps. The last column is what the paper's authors published for
one A40, where `published` is their HLIP: another machine, not measured here."""
BASELINE = """**The published way** keeps a dense tensor of groups, (groups, 1 + patches, width). Where the level
changes it splits the cls rows off, averages or repeats them, reshapes the patches and concatenates: a copy of all
tokens. Attention is PyTorch's `scaled_dot_product_attention`. It is run eagerly, not compiled, in its best settings
otherwise: contiguous inputs that were cut into patches before, inference mode with weights in bf16, autocast in
training. Ours holds weights packed for the processor, in inference; PyTorch's layers have no such thing. Embeddings,
and in training the gradient of every parameter, of both are compared with the published way in float32."""
ALLOCATORS = {
    "kept": "The process keeps the memory that tensors leave, as this library's programs do: a favour to all models.",
    "default": """The same with the C library's allocator as it is, which is what a program gets that does nothing
about it: large results go back to the system, and every page is cleared again at the next call.""",
}
PACKING = """How many studies a second does a training step take, if studies have as many scans as they happen to have?
Packed; repeated or cropped to 10 scans, as HLIP was trained (`repeat10`); padded to the longest of the batch
(`pad_max`); and in one sequence with a block mask. These three run PyTorch's layers; `repeat10_us` is the repeated
studies by our own encoder, so that what it takes is what packing saves, and the rest is our kernels. Scan counts are
those of three collections; the same studies and weights for all, embeddings and gradients compared. `tokens` are those
encoded, repeats and padding among them."""
GROWING = """A step against scans of a study, slices of a scan, and studies of a batch. On a CPU the model is small
(width 128, three layers, scans of 294 tokens, four of them where slices or studies grow), and small inputs show what a
call costs at least, where we lose. A model runs out of memory when a training step in a process of its own would map
more than 8 GiB beyond what it started with (on a GPU: allocate)."""
ATTENTION = """How long does one call of attention within the groups of a level take, forward alone (`forward`), and
forward with backward (`training`)? A case is named by its level and the rows of a group, patches and a prefix row: 197
are a slice of 14 x 14 patches, 1177 a scan of six slices, 4705 a study of four scans; or by a mix, in which studies
have differing scan counts, with `drop50` after half of the patches were dropped. GFLOP/s count the work itself, no
padding; `of a product` is the share of what a large matrix product reached in the same run. MB kept is what a training
step holds for its backward (counted on CPUs), MB peak what a call adds at most to the process, or to the GPU's memory:
results, scratch, and what lies between. `prepare` is paid once a batch, for all layers, and is not in the
ratio: ours builds the groups of all levels, FlexAttention its block mask. The first call is where compilers run. Other
libraries get their rows in the order of groups, which favours them: a packed model would pay a gather before the call
and a scatter after. Results are compared with the formula in float64 before anything is timed."""
BYTES = """Counted, not timed: every byte that the Triton kernels request, seen by Triton's interpreter, and what
attention that writes its weights to memory would move (`standard`). Does it grow as theory says? The claims are those
of the paper's section 3.1 and, for flash attention, N^2 D^2 / S: N tokens, M scans, d slices of a scan, D head dim, S
fast memory, for which the rows of a tile stand."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page (default: %(default)s)")
    args = parser.parse_args()
    encoders = read(args.results / "encoder.jsonl")
    whole = [row for row in encoders if not row["case"].startswith("scaling_")]
    growing = [row for row in encoders if row["case"].startswith("scaling_")]
    sections = [
        summary(whole, read(args.results / "packing.jsonl"), read(args.results / "io.jsonl")),
        *of_machines(encoder, whole, args.out / "figures"),
        *of_machines(packing, read(args.results / "packing.jsonl"), args.out / "figures"),
        *of_machines(scaling, growing, args.out / "figures"),
        *of_machines(attention, read(args.results / "attention.jsonl"), args.out / "figures"),
        io(read(args.results / "io.jsonl"), args.out / "figures"),
    ]
    if not any(sections):
        parser.exit(2, f"{parser.prog}: {args.results}: no results; make bench measures some\n")
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "benchmarks.md"
    partial = page.with_name(f".{page.name}.tmp")
    partial.write_text("\n\n".join(filter(None, [INTRODUCTION, *sections])) + "\n", encoding="utf-8")
    partial.replace(page)
    print(page)
    return 0


def summary(whole: list[Row], packed: list[Row], counted: list[Row]) -> str:
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
            lines.append(f"- Table 9, {rows[0]['dtype']}, {mode}{with_it}, times as long as ours: {', '.join(others)}.")
    packed = [row for row in packed if row["policy"] == "repeat10" and row["packed_over_this"]]
    for row in latest(packed, lambda row: (row["mix"], row["dtype"], row["threads"])):
        lines.append(
            f"- A training step on {row['mix']}, {row['dtype']}: repeating every study to 10 scans, the published way, "
            f"takes {row['packed_over_this']:.2f} times as long as packing with ours."
        )
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
    return "## In short\n\n" + "\n".join(map(item, lines)) if lines else ""


def named(row: Row) -> str:
    return row["model"] + ("" if row["flash"] else ", without flash")


def encoder(rows: list[Row], figures: Path, machine: str) -> str:
    def key(row: Row) -> tuple[Any, ...]:
        size = row["studies"], row["scans"], tuple(row["shape"]), row["width"], row["depth"]
        return row["case"], row["dtype"], row["allocator"], *size

    rows = latest(rows, lambda row: (*key(row), row["mode"]))
    parts = [heading("Whole encoders", machine, ENCODERS), wrapped(BASELINE)]
    titles = {"table9": "Table 9", "figure1b": "Figure 1b"}
    for case in dict.fromkeys(map(key, rows)):
        mine = [row for row in rows if key(row) == case]
        measured = [row for row in mine if "reason" not in row]
        name, dtype, allocator, studies, scans, _, width, depth = case
        what = f"{count(studies, 'studies')} of {count(scans, 'scans')}"
        title = f"{titles[name]}: {what}, {dtype}" + ", the C library's allocator" * (allocator == "default")
        small = "" if (width, depth) == (768, 12) else f" width {width}, {depth} layers"
        title += f",{small}" * bool(small)
        parts += [f"### {title}", where(mine[0])]
        if allocator:
            parts.append(wrapped(ALLOCATORS[allocator]))
        modes = list(dict.fromkeys(row["mode"] for row in measured))
        if not modes:
            parts.append(not_run(mine, named))
            continue
        figure = Figure(figsize=(4.8 * len(modes), 1 + 0.28 * len(measured) / len(modes)), layout="constrained")
        for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
            of_mode = [row for row in measured if row["mode"] == mode]
            rates = [row["vol_per_s"] for row in of_mode]
            bars(axes, [named(row) for row in of_mode], rates, f"{titles[name]}, {dtype}, {mode}", "volumes a second")
        picture = file_name(f"{name} {studies} {dtype}{small} {'default' * (allocator == 'default')}", machine)
        caption = f"{titles[name]}, volumes a second of whole encoders. Longer is faster; ours in blue."
        parts.append(save(figure, figures / picture, caption))
        for mode in modes:
            of_mode = [row for row in measured if row["mode"] == mode]
            memory = ["GB", "saved GB"] if mode == "training" else []
            parts.append(
                table(
                    [mode, "M parameters", "volumes/s", "times ours", "of a product", *memory, "error", "paper, A40"],
                    [
                        [
                            named(row), f"{row['parameters'] / 1e6:.1f}", f"{row['vol_per_s']:.3g}",
                            times(row["times_ours"]), number(row, "share", ".0%"),
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


OUR_POLICIES = {"packed": "hlip, packed", "repeat10_us": "hlip, repeat10"}


def packing(rows: list[Row], figures: Path, machine: str) -> str:
    def key(row: Row) -> tuple[Any, ...]:
        return row["mix"], row["mode"], row["dtype"], row["width"], row["depth"], row["studies"]

    rows = latest(rows, key)
    cases = list(dict.fromkeys(map(key, rows)))
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    figure = Figure(figsize=(4.4 * across, 2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    parts = [heading("Packing", machine, PACKING, rows[-1])]
    tables = []
    for axes, case in zip(panels, cases, strict=False):
        mix, mode, dtype, width, depth, studies = case
        mine = [row for row in rows if key(row) == case]
        ran = [row for row in mine if row["studies_per_s"]]
        names = [str(OUR_POLICIES.get(row["policy"], row["policy"])) for row in ran]
        bars(axes, names, [row["studies_per_s"] for row in ran], f"{mix}, {dtype}, width {width}", "studies a second")
        tables += [
            f"### {mix}, {mode}, {dtype}, width {width}, {depth} layers, {count(studies, 'studies')} of at most "
            f"{count(mine[0]['max_scans'], 'scans')}",
            table(
                ["policy", "studies/s", "times packed", "tokens", "GFLOP", "MB peak", "error"],
                [
                    [
                        row["policy"], number(row, "studies_per_s"),
                        row["packed_over_this"] and times([row["packed_over_this"], *row["interval"]]),
                        row["tokens"], round(row["flops"] / 1e9), megabytes(row, "peak_bytes"),
                        row["error"] if isinstance(row["error"], str) else f"{row['error']:.1g}",
                    ]
                    for row in mine
                ],
            ),
            losses((row["policy"], [row["packed_over_this"], *row["interval"]]) for row in ran),
        ]  # fmt: skip
    caption = "Studies a second of packed batches and of other ways. Longer is faster; packing in blue."
    return "\n\n".join([*parts, save(figure, figures / file_name("packing", machine), caption), *tables])


AXES = {"scaling_scans": "scans", "scaling_slices": "slices", "scaling_batch": "studies"}


def scaling(rows: list[Row], figures: Path, machine: str) -> str:
    def key(row: Row) -> tuple[Any, ...]:
        size = row["studies"], row["scans"], tuple(row["shape"]), row["width"], row["depth"]
        return row["case"], row["dtype"], row["allocator"], *size, row["mode"]

    rows = latest(rows, key)
    rows = [row | {"slices": row["shape"][0] // row["patch"][0]} for row in rows]
    rows.sort(key=lambda row: row[AXES[row["case"]]])
    cases = [case for case in AXES if any(row["case"] == case for row in rows)]
    figure = Figure(figsize=(9, 3.2 * len(cases)), layout="constrained")
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
        for axes, what in ((left, "seconds of a training step"), (right, "GB of a training step")):
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
            plain_numbers(axes)
            axes.grid(alpha=0.3)
            axes.set(xlabel=axis, ylabel=what)
            axes.legend(fontsize=8)
        tables += [growth(mine, axis, sizes, mode) for mode in ("training", "inference")]
        first = [row for row in mine if "p50_s" in row]
        tables.append(losses((f"{named(r)}, {r['mode']}, {count(r[axis], axis)}", r["times_ours"]) for r in first))
    caption = (
        "A training step of growing studies. Seconds left, memory right, both axes logarithmic; lower is better, and a "
        "line ends where a model was not run or ran out of memory."
    )
    picture = save(figure, figures / file_name("scaling", machine), caption)
    return "\n\n".join([heading("Growing studies", machine, GROWING, rows[-1]), picture, *filter(None, tables)])


def growth(rows: Sequence[Row], axis: str, sizes: Sequence[int], mode: str) -> str:
    """A line for every model: seconds, times ours and GB at each size."""

    def cell(model: str, size: int) -> str | None:
        for row in rows:
            if (named(row), row[axis]) == (model, size) and row["mode"] == mode:
                if "reason" in row:
                    return "out of memory" if row["reason"].startswith("out of memory") else "not tried"
                memory = f", {row['memory_gb']:.2g} GB" if "memory_gb" in row else ""
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
    figure = Figure(figsize=(5.4 * len(modes) + 1, 1.6 + 0.42 * len(cases)), layout="constrained")
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
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
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
                        row["backend"], row["mode"], f"{1000 * row['p50_s']:.3g}", times(row["times_ours"]),
                        f"{row['flop_per_s'] / 1e9:.3g}", f"{row['of_matmul']:.0%}", f"{row['of_copy']:.0%}",
                        megabytes(row, "saved_bytes"), megabytes(row, "peak_bytes"),
                        f"{1000 * row['prepare_s']:.3g}", f"{row['first_s']:.2g}",
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
                heading("Attention", machine, ATTENTION, rows[-1]),
                save(figure, figures / file_name("attention", machine), caption),
                table(["way", "what it is"], [[way, WAYS.get(way, "")] for way in ways]),
                *tables,
                not_run(rows, lambda row: row["backend"]),
            ],
        )
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
    figure = Figure(figsize=(13, 6.4), layout="constrained")
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
        "each other (the next table but one does that). Lines of levels that cost the same lie on each other."
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
        heading("Bytes and operations", "", BYTES, rows[0]),
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
                [r["rows"], r["pass"], *(f"{r[k] / 1e6:.3g}" for k in ("bytes", "standard_bytes", "least_bytes"))]
                for r in lengths
            ],
        ),
        "### Changes of level in a whole encoder\n\nMB of one study: the published way copies all tokens, ours moves "
        "prefix rows.",
        table(
            ["model", "scans", "changes", "forward, published", "ours", "backward, published", "ours"],
            [[r["model"], r["scans"], r["changes"], *(f"{r[key] / 1e6:.3g}" for key in REGROUP)] for r in changes],
        ),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
