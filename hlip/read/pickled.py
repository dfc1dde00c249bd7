"""A look at the opcodes of a pickle of tensors, before PyTorch builds anything of it.

`torch.load(weights_only=True)` runs no code, and yet does as a file says: `bytearray(2**31)`, a tensor larger than its
storage, a list within itself. Here the same opcodes run on stand-ins. What passes takes PyTorch no more time and memory
than is in proportion to its opcodes and its storages.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

import torch

MOST_OPCODES = 2**19  # a tensor takes about 35, so this is for 15,000; a checkpoint of our largest model has 1,500
MOST_CALLS = 2**17  # a tensor takes three
MOST_REPEATS = 16  # times the size of the file that all values may have where they share parts, such as tied weights
SLACK = 2**20
MOST_NESTED = 64
MOST_DIMS = 64

# What a file may refer to, written as in a pickle; the numbers are bytes of an item.
STORAGES = {"torch.storage UntypedStorage": 1} | {
    f"torch {name}Storage": itemsize
    for itemsize, names in {
        1: ("Byte", "Char", "Bool"), 2: ("Short", "Half", "BFloat16"), 4: ("Int", "Float"),
        8: ("Long", "Double", "ComplexFloat"), 16: ("ComplexDouble",),
    }.items() for name in names
}  # fmt: skip
DTYPES = {f"torch {name}": value.itemsize for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# ... or the number of arguments
TENSORS = {f"torch._utils _rebuild_tensor{version}": count for version, count in (("", 4), ("_v2", 6), ("_v3", 7))}
PLAIN = {
    "collections OrderedDict",
    "collections Counter",
    "__builtin__ set",
    "_codecs encode",
    "torch Size",
    "torch device",
}
NAMES = {*STORAGES, *DTYPES, *TENSORS, "torch._utils _rebuild_parameter", *PLAIN}

CONSTANTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "NONE", "NEWTRUE", "NEWFALSE",
}  # fmt: skip
TAKEN = {  # from the stack, by opcode
    "APPEND": 1, "SETITEM": 2, "EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "BUILD": 2,
}  # fmt: skip
NOT_WEIGHTS = "it holds more than weights, {}; nothing of it was run"


@dataclass(eq=False, slots=True)
class _Name:
    """Stands for a function, class or dtype."""

    name: str


@dataclass(eq=False, slots=True)
class _Box:
    """Stands for a list ("LIST"), or for the keys and values of a dict ("DICT", "ORDERED")."""

    kind: str
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Storage:
    size: int
    itemsize: int


@dataclass(eq=False, slots=True)
class _Tensor:
    hooks: tuple[Any, ...]


class Pickles:
    """The pickles of one file.

    records: bytes of each storage by its key, where the file says so apart from the pickles.
    """

    def __init__(self, records: Mapping[str, int] | None = None) -> None:
        self.records = records
        self._storages: dict[str, tuple[str, int]] = {}  # type and number of items by key
        self._opcodes = self._calls = self._numbers = 0

    @property
    def size(self) -> int:
        """Bytes of all storages."""
        return sum(STORAGES[kind] * count for kind, count in self._storages.values())

    def check(self, file: IO[bytes]) -> None:
        """Check the pickle at the file's position, and go to its end.

        Raises:
            ValueError: it holds other than tensors and plain values, or makes much of little; says what.
        """
        begin = file.tell()
        try:
            value = self._run(file)
        except (IndexError, KeyError, AttributeError, UnicodeError) as error:  # an empty stack, values never kept
            raise ValueError(f"damaged, or not made by torch.save ({type(error).__name__})") from error
        _measure(value, MOST_REPEATS * (file.tell() - begin) + SLACK, {})
        if self._numbers > MOST_REPEATS * self.size + SLACK:
            raise ValueError(f"its tensors are larger than its data: {self._numbers} of {self.size} bytes")

    def _run(self, file: IO[bytes]) -> Any:
        stack: list[Any] = []
        items: list[Any] = []  # what an opcode takes
        outer: list[list[Any]] = []  # the stacks below each mark
        memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            name, value = opcode.name, cast(Any, argument)
            self._opcodes += 1
            if self._opcodes > MOST_OPCODES:
                raise ValueError(f"a pickle of more than {MOST_OPCODES} opcodes")
            if name in ("APPENDS", "SETITEMS", "TUPLE"):
                items, stack = stack, outer.pop()
            elif name in TAKEN:
                items = _pop(stack, TAKEN[name])
            if name in CONSTANTS:
                stack.append(name == "NEWTRUE" if name.startswith("NEW") else value)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[value] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[value])
            elif name == "MARK":
                outer.append(stack)
                stack = []
            elif name in ("EMPTY_LIST", "EMPTY_DICT"):
                stack.append(_Box(name.removeprefix("EMPTY_")))
            elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
                _fill(stack[-1], name, items)
            elif name in ("TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(tuple(items))
            elif name == "GLOBAL":
                if value not in NAMES:
                    raise ValueError(NOT_WEIGHTS.format(value.replace(" ", ".")))
                stack.append(_Name(value))
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "REDUCE":
                stack.append(self._call(*items))
            elif name == "BUILD":  # state_dict() keeps the modules' versions as an attribute
                match items:
                    case [_Box("ORDERED") as box, _Box("DICT", ["_metadata", _Box() as versions])]:
                        stack.append(box)
                        box.items += ["_metadata", versions]
                    case _:
                        raise ValueError(NOT_WEIGHTS.format("an object with attributes"))
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO" or value != 2:
                raise ValueError(NOT_WEIGHTS.format(f"opcode {name}"))
        raise ValueError("it ends early")

    def _storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", _Name(kind), str() as key, _, int() as count, *views) if kind in STORAGES and count >= 0:
                if views not in ([], [None]):
                    raise ValueError(f"storage {key} is a view of another")
                if self._storages.setdefault(key, (kind, count)) != (kind, count):
                    raise ValueError(f"storage {key} in two sizes or types")
                if self.records is not None and self.records.get(key, -1) < STORAGES[kind] * count:
                    raise ValueError(f"storage {key} is larger than its data")
                self._count()
                return _Storage(STORAGES[kind] * count, STORAGES[kind])
        raise ValueError("a reference to something else than a storage")

    def _call(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Name) else ""
        self._count()
        match name, arguments:
            case "collections OrderedDict", ():
                return _Box("ORDERED")
            case "torch Size", (tuple() as shape,) if _are_sizes(shape):
                return shape
            case "collections Counter", (_Box("DICT") as counts,):
                return counts
            case "__builtin__ set", (_Box("LIST", items) as values,) if all(map(_is_key, items)):
                return values
            case "_codecs encode", (str() as text, "latin1"):
                return text
            case "torch device", (str() as kind, *_):
                return kind
            case "torch._utils _rebuild_parameter", (_Tensor() as tensor, bool(), hooks):
                return _Tensor((*tensor.hooks, hooks))
            case _, (_Storage() as storage, int() as offset, tuple() as shape, tuple() as strides, *more) if (
                TENSORS.get(name) == len(arguments)
            ):
                itemsize = storage.itemsize
                if len(more) == 3:
                    itemsize = DTYPES.get(getattr(more[2], "name", ""), 0)
                if not (
                    _are_sizes(shape) and _are_sizes((offset, *strides)) and len(shape) == len(strides) and itemsize
                ):
                    raise ValueError("a tensor of odd shape or type")
                size = math.prod(shape) * itemsize
                last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
                if size > storage.size or (size and (last + 1) * itemsize > storage.size):
                    raise ValueError(f"a shape larger than its data: {shape} of {storage.size} bytes")
                self._numbers += size
                return _Tensor(tuple(more[1:2]))
        raise ValueError(NOT_WEIGHTS.format(f"a call of {name.replace(' ', '.')}"))

    def _count(self) -> None:
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise ValueError(f"more than {MOST_CALLS // 3} tensors")


def _pop(stack: list[Any], count: int) -> list[Any]:
    """The last values, in the order in which they came."""
    return [stack.pop() for _ in range(count)][::-1]


def _fill(box: Any, name: str, items: list[Any]) -> None:
    """Raises ValueError for keys that are no texts or numbers of 64 bits: the hash of a tuple of tuples may take for
    ever to compute, and that of a longer number may be the same as of all others."""
    is_list = name.startswith("APPEND")
    if not isinstance(box, _Box) or (box.kind == "LIST") != is_list or (not is_list and len(items) % 2):
        raise ValueError("damaged, or not made by torch.save (values out of their place)")
    if not is_list and not all(map(_is_key, items[::2])):
        raise ValueError(NOT_WEIGHTS.format("a dict whose keys are no texts or numbers"))
    box.items += items


def _is_key(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < 2**63)


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return len(values) <= MOST_DIMS and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _measure(value: Any, most: int, measured: dict[int, tuple[int, int] | None], depth: int = 0) -> tuple[int, int]:
    """Size and height of a value if it were written out, with all that it shares.

    measured: of the tuples and boxes so far; None on the way.

    Raises:
        ValueError: larger than `most`, nested too deeply, within itself, or not a plain value.
    """
    match value:
        case str():
            return len(value) + 1, 0
        case _Tensor(hooks):
            if not all(hook is None or (isinstance(hook, _Box) and not hook.items) for hook in hooks):
                raise ValueError(NOT_WEIGHTS.format("a tensor with hooks"))
            return 1, 0
        case _Name(name) if name not in DTYPES:
            raise ValueError(NOT_WEIGHTS.format(name.replace(" ", ".")))
        case tuple() | _Box():
            items = value if isinstance(value, tuple) else value.items
        case _:
            return 1, 0
    if id(value) not in measured:
        if depth > MOST_NESTED:
            raise ValueError("nested too deeply")
        measured[id(value)] = None
        inside = [_measure(item, most, measured, depth + 1) for item in items]
        size, height = 1 + sum(size for size, _ in inside), 1 + max((height for _, height in inside), default=0)
        if size > most:
            raise ValueError(f"values that repeat themselves, to more than {most} bytes")
        measured[id(value)] = size, height
    size_and_height = measured[id(value)]
    if size_and_height is None:
        raise ValueError("a value within itself")
    if depth + size_and_height[1] > 2 * MOST_NESTED:
        raise ValueError("nested too deeply")
    return size_and_height
