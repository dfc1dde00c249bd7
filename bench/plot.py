"""Draw everything that the benchmarks have measured: `docs/benchmarks.md` and its figures.

    python bench/plot.py
    python bench/plot.py --results bench/results --out docs

Reads `attention.jsonl`, `encoder.jsonl`, `layer.jsonl`, `packing.jsonl`, `io.jsonl` and `static.jsonl`, as far as they
are there, and `check-*.json`, reports of `check.py`. Of every case its latest run is shown. Machines, and numbers of
threads, have sections of their own. Nothing is measured here; what is slower than something else is shown like all the
rest, and listed where we lose.
"""

from __future__ import annotations

from pathlib import Path

from benchlib.checkpage import markdown, read_check
from benchlib.options import command, refusals
from benchlib.report import read
from hlip.output import write_text


def main() -> None:
    parser = command(__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("bench/results"), help="folder of the .jsonl files (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page (default: %(default)s)")
    args = parser.parse_args()
    page = args.out / "benchmarks.md"
    with refusals(parser, "viz"):
        from benchlib.page import render

        rows = {path.stem: read(path) for path in sorted(args.results.glob("*.jsonl"))}
        sections = [render(rows, args.out / "figures")]
        sections += [markdown(read_check(path), 2) for path in sorted(args.results.glob("check-*.json"))]
        if not any(sections):
            raise ValueError(f"{args.results}: no results; make bench measures some")
    write_text(page, "\n".join(sections))
    print(page)


if __name__ == "__main__":
    main()
