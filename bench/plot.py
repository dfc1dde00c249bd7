"""Draw everything that the benchmarks have measured: `docs/benchmarks.md` and its figures.

    python bench/plot.py
    python bench/plot.py --results bench/results --out docs

Reads `attention.jsonl`, `encoder.jsonl`, `layer.jsonl`, `packing.jsonl`, `io.jsonl` and `static.jsonl`, as far as they
are there, and `check-*.json`, reports of `check.py`. Of every case its latest run is shown. Machines, and numbers of
threads, have sections of their own. Nothing is measured here; what is slower than something else is shown like all the
rest, and listed where we lose.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchlib.checkpage import markdown, read_check
from benchlib.options import command
from benchlib.report import read, write_text


def main() -> int:
    parser = command(__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("bench/results"), help="folder of the .jsonl files (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page (default: %(default)s)")
    args = parser.parse_args()
    try:
        rows = {path.stem: read(path) for path in sorted(args.results.glob("*.jsonl"))}
        checks = [markdown(read_check(path), 2) for path in sorted(args.results.glob("check-*.json"))]
        from benchlib.page import render

        text = render(rows, args.out / "figures")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except ImportError as error:
        needed = f"the page needs pandas and matplotlib ({error}): pip install 'hlip-kernels[viz]'"
        parser.exit(2, f"{parser.prog}: {needed}\n")
    page = args.out / "benchmarks.md"
    if not text and not checks:
        parser.exit(2, f"{parser.prog}: {args.results}: no results; make bench measures some\n")
    write_text(page, "\n".join([text, *checks]))
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
