"""Each released model against a second implementation, in one figure for what it embeds, learns, reads and sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from fidelity_matrix import COLUMNS, LIMITS, figures
from published import RELEASED


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_its_second_implementation(name: str) -> None:
    found = figures(name)
    assert list(found) == list(COLUMNS)
    assert {column: figure for column, figure in found.items() if not figure <= LIMITS[column]} == {}


def test_the_page_lists_every_model() -> None:
    page = (Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `") and line.count("|") == 8]
    assert [row[0].strip(" `") for row in rows] == list(RELEASED)
    limits = list(LIMITS.values())
    assert all(float(figure) <= limit for row in rows for figure, limit in zip(row[1:], limits, strict=True))
