"""The page of benchmarks: rows that are chosen and compared, for the template `benchmarks.md.jinja`.

A frame holds the rows of a file: lists as tuples, None where a row lacks a column, and `way`, which names what a row is
of. In the template, `rows` is always such a frame.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from . import figures
from .report import MEGA, MILLI, Row, columns, power, table

OPTIONAL = ("reason", "graph", "times_ours", "memory_gb", "saved_gb", "allocator", "p50_s")  # rows may lack them
TITLES = {"table9": "Table 9", "figure1b": "Figure 1b"}
ENCODERS = ["case", "dtype", "allocator", "studies", "scans", "shape", "width", "depth"]
PACKINGS = ["mix", "mode", "dtype", "width", "depth", "studies"]
AXES = {"scaling_scans": "scans", "scaling_slices": "slices", "scaling_batch": "studies"}
Frame = Any  # pandas has no types here


def render(files: Mapping[str, Sequence[Row]], pictures: Path) -> str:
    """The page of the rows of each file, by the file's name; nothing without rows. Pictures go into a folder."""
    frames = {name: frame(files.get(name, ())) for name in ("encoder", "packing", "attention", "layer", "io", "static")}
    if all(rows.empty for rows in frames.values()):
        return ""
    grows = frames["encoder"]["case"].isin(AXES)
    frames |= {"growing": frames["encoder"][grows], "encoder": frames["encoder"][~grows]}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    functions = (
        machines, latest, where, losses, not_run, shown, encoders, packings, growth, sizes, calls, call_facts,
        layers, exponents, off, selected, machine_code, totals, longest, summary, count, file_name,
        table,
    )  # fmt: skip
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"figures": figures, "pictures": pictures, "ENCODERS": ENCODERS, "PACKINGS": PACKINGS}
    environment.filters |= {"wrap": wrapped, "item": partial(wrapped, indent="  ")}
    text = environment.get_template("benchmarks.md.jinja").render(**frames)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def frame(rows: Iterable[Row]) -> Frame:
    plain = [{name: tuple(x) if isinstance(x, list) else x for name, x in row.items()} for row in rows]
    whole = pd.DataFrame([dict.fromkeys(OPTIONAL) | {"case": None} | row | derived(row) for row in plain], dtype=object)
    return whole.where(whole.notna(), None) if plain else pd.DataFrame(columns=[*OPTIONAL, "case", "device", "threads"])


def derived(row: Row) -> Row:
    """Columns that rows of several files have by other names."""
    way = next((row[name] for name in ("way", "backend", "policy") if name in row), None)
    if "model" in row and "flash" in row:
        way = row["model"] + ", without flash" * (not row["flash"]) + ", CUDA graph" * bool(row.get("graph"))
    packed = row.get("packed_over_this")
    return {
        "way": way, "times_packed": packed and (packed, *row["interval"]),
        "of_matmul": row.get("of_matmul", row.get("share")),  # as encoders' rows had it
    }  # fmt: skip


def latest(rows: Frame, case: Sequence[str] = ()) -> Frame:
    """Of every case, the rows of its latest run. Rows of a run share a time; without names all rows are of one case."""
    groups = [mine for _, mine in rows.groupby(list(case), sort=False, dropna=False)] if case else [rows]
    return pd.concat([mine[mine["utc"] == mine["utc"].max()] for mine in groups])


def machines(rows: Frame, case: Sequence[str]) -> Iterator[tuple[str, Frame]]:
    """Each machine and number of threads, with the latest rows of every case; only the most threads of the first have
    no name."""
    groups = sorted(rows.groupby(["device", "threads"], sort=False), key=lambda group: -group[0][1])
    for i, (machine, mine) in enumerate(groups):
        yield machine_name(*machine) if i else "", latest(mine, case)


def machine_name(device: str, threads: int) -> str:
    return f"{device}, {count(threads, 'threads')}"


def count(number: int, things: str) -> str:
    """1 scan, 4 scans; 1 study, 2 studies."""
    return f"{number} {things if number != 1 else re.sub('ie$', 'y', things[:-1])}"


def file_name(name: str, machine: str) -> str:
    return "_".join(re.findall(r"[^\W_]+", f"{name} {machine}".lower())) + ".png"


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def where(rows: Frame) -> str:
    """Where rows were measured, with what, of which commits, and from when to when: all there is, each once."""
    rows = rows.sort_values("utc", kind="stable")
    versions = pd.DataFrame(list(rows["versions"]))
    commits = list(dict.fromkeys(commit or "unknown" for commit in rows["commit"]))
    (day, begin), (last_day, end) = ((utc[:10], utc[11:16]) for utc in (rows["utc"].iloc[0], rows["utc"].iloc[-1]))
    last = end if day == last_day else f"{last_day} {end}"
    facts = [
        " and ".join(dict.fromkeys(map(machine_name, rows["device"], rows["threads"]))),
        ", ".join(f"{name} {' and '.join(used.dropna().unique())}" for name, used in versions.items()),
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
        f"{day} {begin}{f' to {last}' * (last != begin)} UTC",
    ]
    return f"*{'; '.join(facts)}*"


def losses(rows: Frame, *names: str, by: str = "times_ours") -> str:
    """Where others are faster, by the names of rows and by how many times as long as ours they take."""
    measured = [row for row in rows.to_dict("records") if row[by]]
    lines = [(f"{', '.join(row[name] for name in names)} ({row[by][0]:.2f})", row[by]) for row in measured]
    faster = [name for name, (_, _, high) in lines if high < 1]
    level = [name for name, (_, low, high) in lines if low < 1 <= high]
    words = f"**We lose to:** {', '.join(faster)}." if faster else "We lose to none of these."
    return wrapped(words + (f" Level, within the interval: {', '.join(level)}." if level else ""))


def not_run(rows: Frame) -> str:
    """A list of what could not run, each with its reason and, if not all cases share it, the cases."""
    lines = []
    for (way, reason), mine in rows[rows["reason"].notna()].groupby(["way", "reason"], sort=False):
        cases = set(mine["case"])
        some = "" if cases == set(rows["case"]) else f" ({', '.join(sorted(cases))})"
        lines.append(f"- {way}: {reason}{some}")
    return "\n".join(["Not run here:\n", *lines]) if lines else ""


def shown(rows: Frame, keys: Sequence[str], heads: Sequence[str] = ()) -> str:
    """A table of rows; heads: headings in place of the first columns' own."""
    header, lines = columns(rows.to_dict("records"), keys)
    return table([*heads, *header[len(heads) :]], lines)


def summary(encoder: Frame, packing: Frame, attention: Frame, io: Frame) -> Iterator[str]:
    """What the rows say to the questions that people come with; of no rows, nothing."""
    whole = encoder[(encoder["case"] == "table9") & encoder["times_ours"].map(bool)]
    whole = whole[whole["threads"] == whole["threads"].max()]
    for mode, allocator in (("inference", "kept"), ("inference", "default"), ("training", "kept")):
        rows = whole[(whole["mode"] == mode) & (whole["allocator"] == allocator)] if len(whole) else whole
        others = [] if rows.empty else latest(rows, ["dtype"]).query("model != 'hlip'").to_dict("records")
        if others:
            with_it = " with the C library's allocator as it is" * (allocator == "default")
            ratios = ", ".join(f"{row['way']} {row['times_ours'][0]:.2f}" for row in others)
            yield (
                f"Whole encoders, the paper's Table 9, {others[0]['dtype']}, {mode}{with_it}: times as long as ours "
                f"take {ratios}."
            )
    repeated = packing[(packing["way"] == "repeat10") & packing["times_packed"].map(bool)] if len(packing) else packing
    for row in [] if repeated.empty else latest(repeated, ["mix", "mode", "dtype", "threads"]).to_dict("records"):
        step = "A training step" if row["mode"] == "train" else "A forward pass"
        yield (
            f"{step} on {row['mix']}, {row['dtype']}: repeating every study to 10 scans, the published way, takes "
            f"{row['packed_over_this']:.2f} times as long as packing with ours."
        )
    if len(attention):
        yield from fastest_others(attention)
    if len(io):
        yield farthest(selected(io, "exponent"))


def fastest_others(rows: Frame) -> Iterator[str]:
    """How attention of the fastest other way compares, over all cases, for each machine and mode."""
    rows = latest(rows, ["device", "threads", "dtype", "case"])
    others = rows[rows["times_ours"].map(bool) & ~rows["way"].str.startswith("hlip")]
    setting = ["device", "threads", "dtype", "mode"]
    best = others.assign(times=others["times_ours"].str[0]).groupby([*setting, "case"], sort=False)["times"].min()
    several = others.groupby(["device", "threads"]).ngroups > 1
    for (device, threads, dtype, mode), times_ours in best.groupby(level=setting, sort=False):
        place = f" ({machine_name(device, threads)})" * several
        limits = " to ".join(dict.fromkeys(f"{x:.2f}" for x in (times_ours.min(), times_ours.max())))
        yield (
            f"Attention alone, {dtype}, {mode}{place}: the fastest way of others takes {limits} times as long as ours "
            f"in {count(len(times_ours), 'cases')}."
        )


def farthest(rows: Frame) -> str:
    worst = max(rows.to_dict("records"), key=lambda row: abs(row["exponent"] - row["claimed"]))
    what = f"({worst['quantity']}, {worst['sweep']}, {worst['pass']})."
    if abs(worst["exponent"] - worst["claimed"]) > 0.05:
        return f"**An exponent is {worst['exponent']:.3f} and not {worst['claimed']}** {what}"
    return (
        f"All {len(rows)} exponents of bytes and operations lie within 0.05 of those claimed; farthest is "
        f"{worst['exponent']:.3f} for {worst['claimed']} {what}"
    )


def encoders(rows: Frame, machine: str) -> Iterator[dict[str, Any]]:
    """The cases of whole encoders: title, rows and the name of a picture."""
    for case, mine in rows.groupby(ENCODERS, sort=False, dropna=False):
        name, dtype, allocator, studies, scans, _, width, depth = case
        default = allocator == "default"
        small = "" if (width, depth) == (768, 12) else f" width {width}, {depth} layers"
        yield {
            "title": f"{TITLES[name]}: {count(studies, 'studies')} of {count(scans, 'scans')}, {dtype}"
            + ", the C library's allocator" * default + f",{small}" * bool(small),
            "rows": mine,
            "picture": file_name(f"{name} {studies} {dtype}{small} {'default' * default}", machine),
            "label": f"{TITLES[name]}, {dtype}",
            "case": TITLES[name],
            "allocator": allocator,
        }  # fmt: skip


def packings(rows: Frame) -> list[tuple[str, Frame]]:
    """The cases of packing by their short names."""
    return [(", ".join(case[:3]), mine) for case, mine in rows.groupby(PACKINGS, sort=False)]


def growth(rows: Frame) -> list[tuple[str, Frame]]:
    """The rows of each axis that grows, with the size that a row has on it."""
    slices = [shape[0] // patch[0] for shape, patch in zip(rows["shape"], rows["patch"], strict=True)]
    rows = rows.assign(slices=slices, step=list(map(step, rows.to_dict("records"))))
    cases = []
    for axis, mine in ((axis, rows[rows["case"] == case]) for case, axis in AXES.items()):
        sizes = [count(size, axis) for size in mine[axis]]
        cases.append((axis, mine.assign(grown=mine[axis], size=sizes).sort_values("grown", kind="stable")))
    return [(axis, mine) for axis, mine in cases if len(mine)]


def step(row: Row) -> str:
    """Seconds, times ours and GiB, or why there are none."""
    if row["reason"]:
        return "out of memory" if row["reason"].startswith("out of memory") else "not tried"
    memory = f", {row['memory_gb']:.2g} GiB" if row["memory_gb"] is not None else ""
    ours = f" ({row['times_ours'][0]:.2f})" if row["times_ours"] and row["model"] != "hlip" else ""
    return f"{row['p50_s']:.3g} s{ours}{memory}"


def sizes(rows: Frame, mode: str) -> str:
    """A table of ways and sizes in a mode; those of other modes are in it, too."""
    wide = rows[rows["mode"] == mode].drop_duplicates(["way", "size"]).pivot(index="way", columns="size", values="step")
    wide = wide.reindex(index=rows["way"].unique(), columns=rows["size"].unique())
    return table([f"{mode}: seconds (times ours)", *wide.columns], wide.reset_index().fillna("-").to_numpy().tolist())


def calls(rows: Frame) -> list[tuple[str, Frame]]:
    """The cases of attention by their names, with the rows that were measured."""
    groups = rows[rows["reason"].isna()].groupby(["case", "dtype", "heads", "head_dim"], sort=False)
    return [(f"{case}, {dtype}", mine) for (case, dtype, *_), mine in groups]


def call_facts(row: Row) -> str:
    lengths = " to ".join(dict.fromkeys((str(row["shortest"]), str(row["longest"]))))
    return (
        f"{count(row['groups'], 'groups')} of {lengths} rows, {row['heads']} heads of {row['head_dim']}; compared with "
        f"float64: {row['checked']}. A matrix product reached {row['matmul_flop_per_s'] / 1e9:.4g} GFLOP/s, a copy "
        f"{row['copy_bytes_per_s'] / 1e9:.3g} GB/s."
    )


def layers(rows: Frame) -> Frame:
    """Changes of level, a line for both ways."""
    case = ["case", "dtype", "mode"]
    ours, copies = (rows[rows["way"] == way] for way in ("hlip", "copies"))
    both = copies.merge(ours, on=case, suffixes=("", "_ours"))
    forms = {"p50_s": MILLI, "p50_s_ours": MILLI, "bytes": MEGA, "bytes_ours": MEGA}
    shown = {column: both[column].map(form) for column, form in forms.items()}
    return both.assign(name=both[case].agg(", ".join, axis=1), **shown)


def selected(rows: Frame, kind: str) -> Frame:
    """Rows of a kind of the latest count."""
    return latest(rows).query("kind == @kind")


def exponents(rows: Frame) -> str:
    """Exponents of bytes, with those that are claimed, at each level."""
    rows = rows.assign(cell=[power(row) for row in rows.to_dict("records")])
    groups = rows[rows["quantity"] == "bytes"].groupby(["way", "pass", "sweep"], sort=False)
    return table(["way", "pass", "growing", *rows["level"].unique()], ([*key, *mine["cell"]] for key, mine in groups))


def off(rows: Frame, quantity: str) -> float:
    mine = rows[rows["quantity"] == quantity]
    return float((mine["exponent"] - mine["claimed"]).abs().max())


def machine_code(rows: Frame) -> Frame:
    """Rows of kernels, the newest version first, and whether each spills, is serialised, or is so as dense ones are."""
    rows = rows.assign(version=[versions["triton"] for versions in rows["versions"]])
    order = rows["version"].map(lambda version: tuple(map(int, version.split("."))))
    rows = rows.loc[order.sort_values(ascending=False, kind="stable").index]
    waits = rows["serialised"].map(bool) | rows["warning"].map(bool)
    ratios = rows["loop_instructions"] / rows["dense_loop_instructions"].replace(0, None)
    return rows.assign(
        spill=rows["stack_bytes"] > 0, waits=waits, as_dense=waits & rows["dense_serialised"].map(bool), ratio=ratios,
        times=ratios.map("{:.2f}".format), waiting=waits.map({True: "yes", False: "no"}),
        tile=list(map("{rows}x{streamed}, {warps} warps, {stages} stages".format_map, rows.to_dict("records"))),
    )  # fmt: skip


def totals(rows: Frame) -> list[list[Any]]:
    """For each version and architecture: kernels, and how many spill, are serialised, and are so as dense ones are."""
    flags = ["spill", "waits", "as_dense"]
    return [[*key, len(mine), *mine[flags].sum()] for key, mine in rows.groupby(["version", "arch"], sort=False)]


def longest(rows: Frame) -> str:
    """The loops that have more instructions than those of dense attention, in some version."""
    rows = rows[rows["ratio"].notna()]
    case = rows["kernel"] + " " + rows["head_dim"].astype(str) + " on " + rows["arch"]
    ratios = rows["ratio"].groupby(case, sort=False).max()
    return ", ".join(f"{name} ({most:.2f})" for name, most in ratios.items() if most > 1) or "none"
