"""Kinds of values a key can hold: how numbers are read, and how a kind is put into words."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, BeforeValidator, Strict
from pydantic.fields import FieldInfo

from ..common.registry import Entry, Registry
from .numbers import WHOLE_LIMIT, read_number
from .sizes import SIZE_WORDS, read_size

MOST_CENTROIDS = 2**30


def read_whole(value: object) -> int:
    """A whole number; `1e3` is one, `1.5` and `True` are not."""
    number = read_number(value)
    if number != int(number) or abs(number) >= WHOLE_LIMIT:
        raise ValueError
    return int(number)


def read_real(value: object) -> float:
    """A finite floating-point number."""
    try:
        return float(read_number(value))
    except OverflowError as error:
        raise ValueError from error


def check_centroids(k: int) -> int:
    """Refuse a number of centroids whose codes would not fill a whole number of bits."""
    if not 2 <= k <= MOST_CENTROIDS:
        raise ValueError(f"a power of two from 2 to {MOST_CENTROIDS}")
    below = 1 << (k.bit_length() - 1)
    if k != below:
        raise ValueError(f"a power of two; the nearest are {below} and {2 * below}")
    return k


@dataclass(frozen=True)
class OneOf:
    """Accepts the names in a registry, and `more`."""

    registry: Registry[Any]
    more: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """What is accepted."""
        return [*self.more, *self.registry]

    def __call__(self, name: str) -> str:
        """Refuse other names."""
        if name not in self.names:
            raise ValueError(f"one of {', '.join(self.names)}")
        return name


def names_of(registry: Registry[Any], *more: str) -> Any:
    """The type of a key that holds a name in `registry`, or one of `more`."""
    return Annotated[str, Strict(), AfterValidator(OneOf(registry, more))]


@dataclass(frozen=True)
class Listed:
    """Marks text that names an entry which depends on the task: the help lists the names, the command checks them.

    Attributes:
        entries: task (None: any) -> the entries that fit.
    """

    entries: Callable[[str | None], Mapping[str, Entry]]


def listed(entries: Callable[[str | None], Mapping[str, Entry]]) -> Any:
    """The type of a key that holds the name of one of `entries`, which depend on the task."""
    return Annotated[str, Strict(), Listed(entries)]


def is_listed(field: FieldInfo) -> bool:
    """Whether a field names an entry that depends on the task."""
    return any(isinstance(limit, Listed) for limit in field.metadata)


def choices(field: FieldInfo, task: str | None = None) -> dict[str, str]:
    """The registered names that a field accepts, with what each is; empty where it holds no single name."""
    return _choices(tuple(field.metadata), task)


def _choices(limits: tuple[Any, ...], task: str | None) -> dict[str, str]:
    entries: Mapping[str, Entry] = {}
    for limit in limits:
        if isinstance(limit, Listed):
            entries = limit.entries(task)
        elif isinstance(limit, AfterValidator) and isinstance(limit.func, OneOf):
            entries = limit.func.registry.entries
    return {name: entry.about for name, entry in entries.items()}


def meaning_of(field: FieldInfo, task: str | None = None) -> str:
    """The description of a field, and what each of the registered names is that it accepts."""
    told = "; ".join(f"{name}: {about}" for name, about in choices(field, task).items())
    return f"{field.description or ''} {told + '.' if told else ''}".strip()


def _one_of(limits: tuple[Any, ...]) -> OneOf | None:
    """The registry that a kind's names come from, if they do."""
    return next(
        (limit.func for limit in limits if isinstance(limit, AfterValidator) and isinstance(limit.func, OneOf)), None
    )


Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]
Whole = Annotated[int, BeforeValidator(read_whole)]
Natural = Annotated[int, BeforeValidator(read_whole), Ge(0)]
Positive = Annotated[int, BeforeValidator(read_whole), Ge(1)]
Real = Annotated[float, BeforeValidator(read_real)]
RealFromZero = Annotated[float, BeforeValidator(read_real), Ge(0)]
RealAboveZero = Annotated[float, BeforeValidator(read_real), Gt(0)]
Size = Annotated[int, BeforeValidator(read_size)]
Centroids = Annotated[int, BeforeValidator(read_whole), AfterValidator(check_centroids)]

_WORDS: dict[Any, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
_SHORT: dict[Any, str] = {bool: "True|False", int: "int", float: "float", str: "text"}


def is_text(field: FieldInfo) -> bool:
    """Whether a field holds one text (or null): a path, or the name of something."""
    kind = field.annotation
    return kind is str or (
        get_origin(kind) in (Union, UnionType) and set(map(_bare, get_args(kind))) <= {str, NoneType}
    )


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def describe(field: FieldInfo) -> str:
    """What a field accepts, in words: `a whole number, at least 1`."""
    return _describe(field.annotation, tuple(field.metadata))


def _describe(kind: Any, limits: tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _describe(arguments[0], (*arguments[1:], *limits))
    if origin in (Union, UnionType):
        words = " or ".join(_describe(option) for option in arguments if option is not NoneType)
        return f"{words}, or null" if NoneType in arguments else words
    if _measures_size(limits):
        return SIZE_WORDS
    named = _one_of(limits)
    if named is not None:
        return f"one of {', '.join(named.names)}"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        count = "" if Ellipsis in arguments else f" of {len(arguments)}"
        return f"a list{count} with items: {_describe(arguments[0])}" + _bounds(limits)
    if origin is dict:
        return "a mapping from layer names to their own settings"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return (
            "a group: [{parents: [names]}, {children: [names]}]"
            if "parents" in kind.model_fields
            else "a mapping of keys to values"
        )
    return (_WORDS.get(kind) or "a value") + _bounds(limits)


def is_size(field: FieldInfo) -> bool:
    """Whether a field holds a number of bytes."""
    return _measures_size(tuple(field.metadata))


def _measures_size(limits: tuple[Any, ...]) -> bool:
    return any(isinstance(limit, BeforeValidator) and limit.func is read_size for limit in limits)


def _bounds(limits: tuple[Any, ...]) -> str:
    words = []
    for limit in limits:
        match limit:
            case Ge(ge=low):
                words.append(f"at least {low}")
            case Gt(gt=low):
                words.append(f"above {low}")
            case Le(le=high):
                words.append(f"at most {high}")
            case Lt(lt=high):
                words.append(f"below {high}")
            case MinLen(min_length=few):
                words.append(f"at least {few}")
            case AfterValidator(func=func) if func is check_centroids:
                words.append("a power of two")
    return "".join(f", {word}" for word in words)


def short_kind(field: FieldInfo, task: str | None = None) -> str:
    """The same as a few characters for the help: `int`, `sgd|adam`, `list of int`; names only of what is for `task`."""
    return _short(field.annotation, tuple(field.metadata), task)


def _short(kind: Any, limits: tuple[Any, ...] = (), task: str | None = None) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _short(arguments[0], arguments[1:], task)
    if _measures_size(limits):
        return "size"
    named = _one_of(limits)
    names = named.names if named is not None else list(_choices(limits, task))
    if names:
        return "|".join(names)
    if origin in (Union, UnionType):
        return "|".join("null" if option is NoneType else _short(option) for option in arguments)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_short(arguments[0])}"
    return _SHORT.get(kind) or "group"


class _Shortener(reprlib.Repr):
    """Shows a value in one short line, written as in a settings file."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60
        self.maxlist = self.maxtuple = self.maxdict = 4
        self.maxlevel = 3

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: ARG002 (of reprlib)
        """YAML's word for nothing."""
        return "null"


def shown(value: object) -> str:
    """`value` as it appears in an error message: one line, at most about a hundred characters."""
    try:
        text = _Shortener().repr(value)
    except ValueError:  # an integer with thousands of digits has no decimal text
        text = type(value).__name__
    return text if len(text) <= 120 else text[:117] + "..."
