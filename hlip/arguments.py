"""Arguments of a command line: as values that commands share, and from the fields of dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Argument(NamedTuple):
    """Names and settings that `ArgumentParser.add_argument` takes."""

    names: tuple[str, ...]
    settings: dict[str, Any]


class OneOf(NamedTuple):
    """Arguments of which a user gives one; none of them, too, unless it is required."""

    arguments: tuple[Argument, ...]
    required: bool = False


def argument(*names: str, **settings: Any) -> Argument:
    """Hold what `ArgumentParser.add_argument` takes, to be added by `add_arguments`."""
    return Argument(names, settings)


def at_least(least: int) -> Callable[[str], int]:
    """Make a `type` of argparse for whole numbers from `least`."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {value}")
        return value

    return number


def add_arguments(parser: argparse._ActionsContainer, arguments: Iterable[Argument | OneOf]) -> None:
    """Add arguments to a parser, in this order."""
    for item in arguments:
        if isinstance(item, OneOf):
            add_arguments(parser.add_mutually_exclusive_group(required=item.required), item.arguments)
        else:
            parser.add_argument(*item.names, **item.settings)


def field_argument(kind: type, name: str, **settings: Any) -> Argument:
    """Make a flag from a field of a dataclass: its type or its choices, its default, and what the docstring says of it,
    with the default behind it if that is a number.

    Args:
        settings: of `ArgumentParser.add_argument`, in place of these.
    """
    (default,) = (field.default for field in dataclasses.fields(kind) if field.name == name)
    hint = get_type_hints(kind)[name]
    words = choices(hint)
    taken = {"choices": words} if words else {"type": next(iter(get_args(hint)), hint)}
    said = explained(kind)[name] + " (default: %(default)s)" * isinstance(default, (int, float))
    return argument(f"--{name}", **{"default": default, "help": said, **taken, **settings})


def choices(hint: Any) -> tuple[str, ...]:
    """The words that a field of this type can be; none where they cannot be listed."""
    return get_args(hint) if get_origin(hint) is Literal else ()


def explained(kind: type) -> dict[str, str]:
    """The docstring of a dataclass by its fields, from lines such as `name: text`, with % as argparse wants it."""
    lines = re.findall(r"^( +)(\w+): ((?:.|\n\1 {4})+)", kind.__doc__ or "", re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for _, name, text in lines}
