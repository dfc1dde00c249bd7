"""How the reference reads this project's docstrings (see `mkdocs.yml`): what Griffe's Google style does not know."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

# `name: meaning`, or of several names; what goes on in the next line is indented. Sections begin with a capital.
FIELD = re.compile(r"^(?P<names>[a-z_][a-z0-9_]*(?:, [a-z_][a-z0-9_]*)*): (?P<meaning>\S.*)$")


def as_list(text: str) -> str:
    """The text with its runs of fields as Markdown lists."""
    found: list[str] = []
    within = False
    for line in text.splitlines():
        field = FIELD.match(line)
        if (field and not within) or (within and not field and not line.startswith("    ") and line):
            found.append("")
        within = bool(field) or (within and (line.startswith("    ") or not line))
        names = "".join(f"`{name}`, " for name in field["names"].split(", "))[:-2] if field else ""
        found.append(f"- {names}: {field['meaning']}" if field else line)
    return "\n".join(found)


class Fields(Extension):
    """Fields of classes, as this project writes them, become lists."""

    def on_class(self, *, cls: Any, **_: Any) -> None:
        if cls.docstring:
            cls.docstring.value = as_list(cls.docstring.value)
