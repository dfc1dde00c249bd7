"""Tells volumes of a DICOM series apart: slices at the same places, by what their headers say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from .scan import ScanError

# Elements of single slices, and of frames of enhanced files, that tell volumes apart: the surest first.
ELEMENTS = (
    ("EchoTime", "EffectiveEchoTime"),
    ("InversionTime", "InversionTimes"),
    ("DiffusionBValue",),
    ("DiffusionGradientOrientation",),
    ("ComplexImageComponent",),
    ("ImageType", "FrameType"),
    ("TemporalPositionIdentifier", "TemporalPositionIndex"),
    ("TriggerTime", "NominalCardiacTriggerDelayTime"),
    ("StackID",),
    ("ConvolutionKernel",),
    ("AcquisitionNumber", "FrameAcquisitionNumber"),
    ("AcquisitionTime", "FrameAcquisitionDateTime"),
    ("ContentTime",),
)
# Where vendors keep the b-value: creator of the private block, its group, and the element within.
B_VALUES = (
    ("SIEMENS MR HEADER", 0x0019, 0x0C),
    ("GEMS_PARM_01", 0x0043, 0x39),
    ("Philips Imaging DD 001", 0x2001, 0x03),
    ("Image Private Header", 0x0065, 0x09),  # of United Imaging
)
GE_OFFSET = 10**9  # is added to b-values by some of GE's software

Mark = tuple[Any, ...]  # what an element says, in a form that can be sorted


class Placed(Protocol):
    """A slice: what its header says, an entry for every one of `ELEMENTS`, and how it is numbered."""

    @property
    def marks(self) -> tuple[Mark, ...]: ...

    @property
    def number(self) -> tuple[float, float, int]: ...


S = TypeVar("S", bound=Placed)


def marks_of(*headers: Any) -> tuple[Mark, ...]:
    """Read every one of `ELEMENTS` from the first of these data sets that has it."""
    return tuple(_mark(_value(headers, names)) for names in ELEMENTS)


def _value(headers: Sequence[Any], names: Sequence[str]) -> Any:
    for header in headers:
        for name in names:
            if name in header:
                try:
                    return header[name].value
                except Exception:  # pydicom raises nearly every type there is; a damaged element tells nothing apart
                    return None
    return next(filter(None, map(_private_b_value, headers)), None) if "DiffusionBValue" in names else None


def _private_b_value(header: Any) -> str | None:
    for creator, group, element in B_VALUES:
        try:
            value = header.private_block(group, creator)[element].value
            first = value if isinstance(value, (str, bytes, int, float)) else value[0]
            return str(float(first) % GE_OFFSET)
        except Exception:  # as above, or the header is not of this vendor
            continue
    return None


def _mark(value: Any) -> Mark:
    if value is None:
        return ()
    values = [value] if isinstance(value, (str, bytes, int, float)) or not hasattr(value, "__iter__") else list(value)
    try:
        return tuple((0, float(item), "") for item in values)
    except (TypeError, ValueError):
        return tuple((1, 0.0, str(item)) for item in values)


def split_volumes(path: Any, places: Sequence[Sequence[S]]) -> list[list[S]]:
    """Volumes, each with a slice at every place, in the order in which they are numbered.

    Volumes are told apart by elements that have the same values at all places, as often at one as at the next. Slices
    that are alike in these are told apart by their numbers, if no number occurs twice.

    Args:
        places: slices by place; everywhere as many.

    Raises:
        ScanError: nothing tells slices at one place apart. `ambiguous`
    """
    groups = [places]
    for k in range(len(ELEMENTS)):
        groups = [part for group in groups for part in _by_mark(group, k)]
    volumes: list[list[S]] = []
    for group in groups:
        count = len(group[0])
        numbers = [item.number for place in group for item in place]
        if count > 1 and len(set(numbers)) < len(numbers):
            raise ScanError(
                path, f"{count} slices at every place, which nothing in their headers tells apart", "ambiguous"
            )
        ordered = [sorted(place, key=lambda item: item.number) for place in group]
        volumes += [[place[t] for place in ordered] for t in range(count)]
    return sorted(volumes, key=lambda volume: (min(item.number for item in volume), volume[0].marks))


def _by_mark(group: Sequence[Sequence[S]], k: int) -> list[Sequence[Sequence[S]]]:
    """The group's parts by the values of an element; the group itself, where places have other values."""
    counts = [Counter(item.marks[k] for item in place) for place in group]
    if any(count != counts[0] for count in counts):
        return [group]
    return [[[item for item in place if item.marks[k] == mark] for place in group] for mark in counts[0]]
