"""What MkDocs asks of this project while it builds the site (see `mkdocs.yml`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RESULTS = "benchmarks.md"  # bench/plot.py writes it, so it may not be there
BESIDE = "measuring.md"


def on_config(config: Any) -> Any:
    """Put the page of results, where there is one, behind the page that says how to measure."""
    if (Path(config.docs_dir) / RESULTS).exists():
        for section in (each for entry in config.nav if isinstance(entry, dict) for each in entry.values()):
            places = [i for i, page in enumerate(section) if isinstance(page, dict) and BESIDE in page.values()]
            if places:
                section.insert(places[0] + 1, {"Benchmarks": RESULTS})
    return config
