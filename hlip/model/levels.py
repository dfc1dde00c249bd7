"""The attention level of every layer."""

from __future__ import annotations

from typing import Any, Literal, get_args

from hlip_kernels import Level

Pattern = Literal["slice", "scan", "study", "slice+scan", "scan+study", "slice+scan+study"]


def level_pattern(pattern: Pattern, depth: int, subsets: int = 4) -> tuple[Level, ...]:
    """The attention level of every layer.

    The layers are cut into `subsets` equal runs. Each run ends with the pattern's levels from fine to coarse,
    one layer each; what comes before attends at the finest level.

    >>> level_pattern("scan+study", 6, subsets=2)
    ('scan', 'scan', 'study', 'scan', 'scan', 'study')

    Raises:
        ValueError: unknown pattern, or a depth that does not divide into such runs.

    Source: HLIP (arXiv 2505.21862), section 3.1.
    """
    if pattern not in get_args(Pattern):
        raise ValueError(f"unknown level pattern {pattern!r}; there are {', '.join(get_args(Pattern))}")
    levels: list[Any] = pattern.split("+")
    if subsets < 1 or depth % subsets or depth // subsets < len(levels):
        raise ValueError(f"{depth} layers do not divide into {subsets} runs that hold the levels {pattern}")
    run = [levels[0]] * (depth // subsets - len(levels)) + levels
    return tuple(run * subsets)


def place_levels(
    fine: Level, coarse: Level, depth: int, count: int, place: Literal["first", "last", "even"] = "even"
) -> tuple[Level, ...]:
    """The attention level of every layer, `count` of them coarse: the first ones, the last ones, or evenly spaced with
    the last layer among them.

    >>> place_levels("scan", "study", 6, 2)
    ('scan', 'scan', 'study', 'scan', 'scan', 'study')

    Raises:
        ValueError: `count` not from 0 to `depth`, unknown level or place.

    Source: the ablations of HLIP (arXiv 2505.21862).
    """
    if not 0 <= count <= depth:
        raise ValueError(f"count must be from 0 to the depth of {depth}, got {count}")
    if fine not in get_args(Level) or coarse not in get_args(Level):
        raise ValueError(f"levels must be of {', '.join(get_args(Level))}, got {fine!r} and {coarse!r}")
    if place == "even":
        chosen = {(i + 1) * depth // count - 1 for i in range(count)}
    elif place in ("first", "last"):
        chosen = set(range(count) if place == "first" else range(depth - count, depth))
    else:
        raise ValueError(f"place must be first, last or even, got {place!r}")
    return tuple(coarse if i in chosen else fine for i in range(depth))
