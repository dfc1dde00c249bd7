"""Dataclasses from plain values, as JSON and YAML hold them: by the dataclass's own types, and strictly.

No value is converted into another type, and no field is passed over. An error names the field by its path, as in
`windows[1].low: expected a number, got 'x'`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import cattrs
from cattrs.gen import make_dict_structure_fn

from .safe import as_texts, check_keys, is_held, short

T = TypeVar("T")
PLAIN: dict[type, tuple[tuple[type, ...], str]] = {  # the types of values that are taken, and their name
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a finite number"),
    str: ((str,), "a text"),
}

RANGES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda number: number > 0,
    "at least 1": lambda number: number >= 1,
    "0 or more": lambda number: number >= 0,
    "from 0 to 1": lambda number: 0 <= number <= 1,
    "in [0, 1)": lambda number: 0 <= number < 1,
}


class Texts(tuple[str, ...]):
    """The type of a field for texts, of which one may stand alone in place of a list."""


def structure(kind: type[T] | Any, content: Any, where: str = "") -> T:
    """Make a value of a type, such as a dataclass, of plain values.

    Args:
        where: the beginning of the paths in errors.

    Raises:
        ValueError: an unknown or missing field, or a value of another type; names the field by its path.
    """
    try:
        return _converter().structure(content, kind)
    except Exception as error:  # a value of another kind fails anywhere in cattrs, which asks for its attributes
        path, reason = _first(error)
        path = f"{where}.{path}".replace(".[", "[") if where and path else where + path
        raise ValueError(f"{path}: {reason}" if path else reason) from error


def check_types(settings: Any) -> None:
    """Raise ValueError, which names the field, where one of a dataclass holds a value of another type than it says."""
    kinds = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        structure(kinds[field.name], getattr(settings, field.name), field.name)


def check_ranges(settings: Any, fields: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError, which names the field, where one of a dataclass holds a number out of its range, a name in
    `RANGES`. None is in every range; of a tuple, all numbers must be."""
    for wanted, names in fields.items():
        for name in names:
            value = getattr(settings, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(number is None or RANGES[wanted](number) for number in numbers):
                raise ValueError(f"{name} must be {wanted}, got {value}")


@functools.cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    sequence = converter.get_structure_hook(tuple[int, ...])
    for kind in PLAIN:
        converter.register_structure_hook(kind, _plain)
    converter.register_structure_hook(Texts, lambda value, _: tuple(as_texts(value)))
    for is_kind, hook in (
        (dataclasses.is_dataclass, lambda kind: functools.partial(_fields, make_dict_structure_fn(kind, converter))),
        (_made_by(Literal), lambda _: _word),
        (_made_by(tuple), lambda _: functools.partial(_values, sequence)),
        (_made_by(dict), lambda kind: functools.partial(_names, converter.gen_structure_mapping(kind))),
    ):
        converter.register_structure_hook_factory(is_kind, hook)
    return converter


def _made_by(origin: Any) -> Callable[[Any], bool]:
    return lambda kind: get_origin(kind) is origin


def _plain(value: Any, kind: type) -> Any:
    types, name = PLAIN[kind]
    if type(value) not in types or (isinstance(value, (int, float)) and not is_held(value)):
        raise ValueError(f"expected {name}, got {short(value)}")
    return float(value) if kind is float else value


def _word(value: Any, kind: Any) -> Any:
    if value not in (words := get_args(kind)):
        raise ValueError(f"expected one of {', '.join(map(str, words))}, got {short(value)}")
    return value


def _values(build: Any, value: Any, kind: Any) -> Any:
    kinds = get_args(kind)
    count = None if kinds[-1] is ... else len(kinds)
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        raise ValueError(f"expected a list{f' of {count} values' if count else ''}, got {short(value)}")
    return build(value, kind)


def _names(build: Any, value: Any, kind: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected names with values, got {short(value)}")
    return build(value, kind)


def _fields(build: Any, value: Any, kind: Any) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"expected fields, got {short(value)}")
    check_keys(map(str, value), [field.name for field in dataclasses.fields(kind)])
    return build(value, kind)


def _first(error: BaseException) -> tuple[str, str]:
    """The path of the first field that an error is about, and the reason."""
    if isinstance(error, cattrs.BaseValidationError):
        inner = error.exceptions[0]
        path, reason = _first(inner)
        notes = [note for note in getattr(inner, "__notes__", ()) if hasattr(note, "type")]
        for note in notes[:1]:
            name = getattr(note, "name", getattr(note, "index", ""))
            name = f"[{name}]" if isinstance(name, int) else str(name)
            path = f"{name}.{path}".replace(".[", "[") if path else name
        return path, reason
    return "", "is missing" if isinstance(error, KeyError) else str(error)
