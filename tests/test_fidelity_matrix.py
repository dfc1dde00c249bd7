"""Each released model against a second implementation, in one figure for what it embeds, learns, reads and sees."""

from __future__ import annotations

import pytest

from fidelity_matrix import COLUMNS, LIMITS, figures
from published import RELEASED


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_its_second_implementation(name: str) -> None:
    found = figures(name)
    assert list(found) == list(COLUMNS)
    assert {column: figure for column, figure in found.items() if not figure <= LIMITS[column]} == {}
