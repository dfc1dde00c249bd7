"""Curves of training runs, drawn from what `train/pretrain.py` logs; and distributions of a store."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..output import label, new_figure, shown_name
from ..read.safe import parse_json, read_lines

LOG = "log.jsonl"
MOST = 2**53  # integers beyond it are no figures: floating point does not hold them
FORMATS = (".png", ".pdf", ".svg")
# Panels in their order: what is drawn, and its title.
PANELS = (
    ("loss", "contrastive loss"),
    ("auc", "zero-shot macro AUC"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("temperature", "temperature"),
    ("studies_per_second", "studies/s"),
    ("tokens_per_second", "patch tokens/s"),
    ("data_wait", "share of time spent waiting for data"),
    ("balance", "busiest process over the mean"),
    ("memory_gb", "peak memory, GiB"),
)


class Run(NamedTuple):
    """The figures of a run.

    curves: of each figure, its value at the steps at which it was logged, steps increasing.
    damaged: lines that could not be read.
    """

    folder: Path
    curves: dict[str, dict[int, float]]
    damaged: int


def read_run(folder: Path) -> Run:
    """Read the figures that a run has logged. Of a step that was logged twice, the later entry counts.

    Raises:
        ValueError: no log, or one without figures; names it.
    """
    path = folder / LOG
    try:
        with contextlib.closing(read_lines(path, "replace")) as lines:
            entries = [_figures(line) for line in lines]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{folder}: not the folder of a run: it has no {LOG}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error})") from error
    curves: dict[str, dict[int, float]] = {}
    damaged = 0
    for figures in entries:
        if figures is None:
            damaged += 1
            continue
        for name in figures.keys() - {"step"}:
            curves.setdefault(name, {})[int(figures["step"])] = figures[name]
    if "temperature" not in curves and "logit_scale" in curves:
        curves["temperature"] = {step: float(np.exp(-value)) for step, value in curves["logit_scale"].items()}
    if not any(name in curves for name, _ in PANELS):
        raise ValueError(f"{path}: no step was logged ({damaged} damaged lines)")
    return Run(folder, {name: dict(sorted(curve.items())) for name, curve in curves.items()}, damaged)


def _figures(line: str) -> dict[str, float] | None:
    """The figures of a line; none of an event; None if the line is damaged."""
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    if isinstance(entry, dict) and "event" in entry:
        return {}
    figures = isinstance(entry, dict) and type(entry.get("step")) is int and all(map(_is_figure, entry.values()))
    return entry if figures else None


def _is_figure(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= MOST)


def draw(runs: Sequence[Run], file: IO[bytes], kind: str) -> None:
    """Draw every figure that any run has into an image, a panel each; runs are told apart by colour.

    Args:
        kind: "png", "pdf" or "svg".
    """
    panels = [panel for panel in PANELS if any(panel[0] in run.curves for run in runs)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.5 * columns, 2.6 * rows + 0.6)
    for i, (name, title) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for k, run in enumerate(runs):
            curve = run.curves.get(name, {})
            style = "o-" if len(curve) <= 30 else "-"
            axes.plot(list(curve), list(curve.values()), style, markersize=3, color=f"C{k % 10}")
        axes.set(title=title, xlabel="step" if i >= len(panels) - columns else "")
        axes.grid(alpha=0.3)
    handles = figure.axes[0].get_lines()
    figure.legend(
        handles,
        [label(shown_name(run.folder)) for run in runs],
        loc="outside upper center",
        ncols=min(3, len(runs)),
    )
    figure.savefig(file, format=kind, dpi=120)


def draw_stats(stats: dict[str, Any], file: IO[bytes], kind: str) -> None:
    """Draw the distributions that `hlip.store.tools.stats` gives into an image; `kind` as for `draw`."""
    figure = new_figure(12, 3.4)
    axes = figure.subplots(1, 3)
    for axis, key, unit in zip(axes, ("scans_per_study", "slices_per_scan"), ("studies", "scans"), strict=False):
        counts = stats[key]["counts"]
        axis.bar([int(value) for value in counts], list(counts.values()), width=1.0)
        mean = f" (mean {stats[key]['mean']:.1f}, median {stats[key]['p50']:.0f})" if counts else ""
        axis.set(title=key.replace("_", " ") + mean, xlabel=key.split("_")[0], ylabel=unit)
    axes[2].bar(list(map(label, stats["planes"])), list(stats["planes"].values()))
    axes[2].set(title="planes", ylabel="scans")
    figure.savefig(file, format=kind, dpi=150)
