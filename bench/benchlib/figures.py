"""The pictures of the page of benchmarks: each function draws one from a frame of rows, and returns its file's name."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlip.output import new_figure, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Frame = Any  # pandas has no types here
MARKERS = "ovs^Dp<>*Xhd"
OURS, OTHERS = "#1f6fb4", "#9a9a9a"
OUR_POLICIES = ("packed", "repeat10_us")
LABELS = {"scans": "scans of a study", "slices": "slices of tokens of a scan", "studies": "studies of a batch"}
SWEEPS = {"N": "N, tokens", "M": "M, scans", "d": "d, slices of a scan", "S": "S, rows of a tile"}
STYLES = {"slice": ("C0", 5.0), "scan": ("C1", 3.0), "study": ("C2", 1.5)}  # widths, as lines may lie on each other


def encoders(rows: Frame, label: str, path: Path) -> str:
    modes = list(rows.groupby("mode", sort=False))
    figure = new_figure(4.8 * len(modes), 1 + 0.28 * len(rows) / len(modes))
    for axes, (mode, mine) in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        bars(axes, list(mine["way"]), list(mine["vol_per_s"]), f"{label}, {mode}", "volumes a second")
    return save(figure, path)


def packings(cases: Sequence[tuple[str, Frame]], path: Path) -> str:
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    figure = new_figure(4.4 * across, 2 * down)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    for axes, (name, rows) in zip(panels, cases, strict=False):
        ran = rows[rows["studies_per_s"].notna()]
        names = [f"{'hlip, ' * (way in OUR_POLICIES)}{way}" for way in ran["way"]]
        bars(axes, names, list(ran["studies_per_s"]), name, "studies a second")
    return save(figure, path)


def growth(cases: Sequence[tuple[str, Frame]], path: Path) -> str:
    figure = new_figure(9, 3.2 * len(cases))
    for (left, right), (axis, rows) in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        for (way, mine), marker in zip(rows.groupby("way", sort=False), MARKERS, strict=False):
            steps = mine[(mine["mode"] == "training") & mine["p50_s"].notna()]
            left.loglog(steps["grown"], steps["p50_s"], f"{marker}-", label=way)
            right.loglog(steps["grown"], [nan if x is None else x for x in steps["memory_gb"]], f"{marker}-", label=way)
        for axes, what in ((left, "seconds of a training step"), (right, "GiB of a training step")):
            sizes = sorted(set(rows["grown"]))
            axes.set_xticks(sizes, sizes)
            plain_numbers(axes)
            axes.set(xlabel=LABELS[axis], ylabel=what)
            axes.legend(fontsize=8)
    return save(figure, path)


def attention(cases: Sequence[tuple[str, Frame]], path: Path) -> str:
    rows = [row | {"place": float(i)} for i, (_, mine) in enumerate(cases) for row in mine.to_dict("records")]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = new_figure(5.4 * len(modes) + 1, 1.6 + 0.42 * len(cases))
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        for i, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
            mine = [row for row in rows if (row["mode"], row["way"]) == (mode, way) and row["times_ours"]]
            dots = [(row["times_ours"][0], row["place"]) for row in mine] or [(nan, nan)]
            colour = OURS if way.startswith("hlip") else f"C{1 + i % 9}"
            axes.plot(*zip(*dots, strict=True), MARKERS[i % len(MARKERS)], color=colour, label=way, alpha=0.8)
        axes.axvline(1, color=OURS, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_yticks(range(len(cases)), [name for name, _ in cases])
        axes.grid(alpha=0.3)
        axes.set(title=mode, xlabel="times as long as ours")
    panels[0].invert_yaxis()
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, path)


def exponents(rows: Frame, path: Path) -> str:
    figure = new_figure(13, 6.4)
    panels = figure.subplots(2, 4, sharey="row")
    forward = rows[(rows["pass"] == "forward") & (rows["quantity"] == "bytes")]
    for (way, title), line in zip((("ours", "our kernels"), ("standard", "standard attention")), panels, strict=True):
        for axes, (sweep, label) in zip(line, SWEEPS.items(), strict=True):
            mine = forward[(forward["way"] == way) & (forward["sweep"] == sweep)].to_dict("records")
            for row in mine:
                colour, width = STYLES[row["level"]]
                x = [row["times_longer"] * n if sweep == "N" else n for n in row["x"]]
                axes.loglog(
                    x, [y / 1e6 for y in row["counted"]], "o-", color=colour, linewidth=width, label=row["level"]
                )
                claimed = [row["counted"][0] / 1e6 * (n / row["x"][0]) ** row["claimed"] for n in row["x"]]
                axes.loglog(x, claimed, "k:", linewidth=1)
                axes.set_xticks(x, x)
            axes.set(xlabel=label, title=title)
            axes.set_visible(bool(mine))
            plain_numbers(axes)
        line[0].set(ylabel="MB of a forward pass")
        line[0].legend(title="level", fontsize=8)
    return save(figure, path)


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], title: str, label: str) -> None:
    """Horizontal bars with their values, ours in blue."""
    drawn = axes.barh(names, values, color=[OURS if name.startswith("hlip") else OTHERS for name in names])
    axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.invert_yaxis()


def plain_numbers(axes: Axes) -> None:
    """A grid, and on the logarithmic y axis 0.02 and not a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(alpha=0.3)


def save(figure: Figure, path: Path) -> str:
    write_whole(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    return path.name
