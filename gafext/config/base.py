"""Base class of the configurations: reads a JSON object and refuses settings that gafext does not support."""

from __future__ import annotations

import reprlib
from dataclasses import MISSING, asdict, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from gafext.errors import CheckpointError

ConfigType = TypeVar("ConfigType", bound="Config")
Ints = tuple[int, ...]

# Larger values mean a damaged file: no network has so many stages, no schedule so many timesteps.
_MOST_ENTRIES = {int: 64, str: 64, float: 100_000}
_LARGEST_INT, _LARGEST_FLOAT = 2**31, 1e30

_short = reprlib.Repr()
"""repr() for error messages, shortened: a damaged file can hold values of any depth and length."""
_short.maxstring = _short.maxother = 200
_short.maxtuple = _short.maxlist = _short.maxdict = 16


def _fits(value: Any, hint: Any) -> bool:
    """Return True if a JSON value, with lists as tuples, has the annotated type and a plausible size."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return isinstance(value, tuple) and len(value) <= _MOST_ENTRIES[kind] and all(_fits(v, kind) for v in value)
    if hint is float:  # the comparison is False for NaN
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_FLOAT
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_INT
    return isinstance(value, hint)


def _is_one_of(value: Any, allowed: tuple) -> bool:
    """Return True if `value` is in `allowed`, where True and 1 are different."""
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)


def _is_off(value: Any) -> bool:
    """Return whether a setting is None or False, or that for every level."""
    values = value if isinstance(value, tuple) and value else (value,)
    return all(part is None or part is False for part in values)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Config:
    """Base of the configurations: reads a JSON object and refuses settings that gafext does not support."""

    class_name: ClassVar[str]
    only: ClassVar[dict[str, tuple]] = {}
    """Keys of the published format that are not fields, with the supported values of each."""
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Keys of the published format that do not affect inference."""
    may_be_empty: ClassVar[bool] = False
    """A file with its class name alone is complete: all values are defaults."""

    @classmethod
    def from_dict(cls: type[ConfigType], values: dict[str, Any], *, source: str = "config") -> ConfigType:
        """Build a configuration from a JSON object.

        Args:
            values: the content of the file; unknown keys are ignored if they are None or False, or lists of these, or
                start with "_".
            source: path of the file, for errors.

        Raises:
            CheckpointError: missing or unknown keys, wrong types or values out of range; the message lists all.
        """
        names = {field.name for field in fields(cls)}
        problems, known = [], {}
        for key, value in values.items():
            value = _as_tuple(value)
            if key in names:
                known[key] = value
            elif key in cls.only:
                if not _is_one_of(value, cls.only[key]):
                    problems.append(f"{key}={_short.repr(value)}: expected one of {list(cls.only[key])}")
            elif not (key.startswith("_") or key in cls.without_effect or _is_off(value)):
                problems.append(f"{key}={_short.repr(value)} is not known here")
        missing = cls._missing_fields(values, known)
        if missing:
            got = _short.repr(", ".join(values))[1:-1]
            problems.append(f"expected the fields {', '.join(missing)}, got {got or 'none'}")
        hints = get_type_hints(cls)
        problems += [
            f"{key}={_short.repr(value)}: expected {hints[key]}"
            for key, value in known.items()
            if not _fits(value, hints[key])
        ]
        problems += [  # the eps of a normalisation
            f"{key}={value}: expected over 0 and below 1"
            for key, value in known.items()
            if key.endswith("_eps") and _fits(value, float) and not 0 < value < 1
        ]
        if problems:
            raise CheckpointError(f"{source}: " + "; ".join(problems))
        try:
            return cls(**known)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from None

    @classmethod
    def _missing_fields(cls, values: dict[str, Any], known: dict[str, Any]) -> list[str]:
        """List the unknown fields without a default; all that have a value, if the file holds its class name alone."""
        empty = bool(values) and not cls.may_be_empty and all(value is None for value in known.values())
        return [
            field.name
            for field in fields(cls)
            if field.name not in known and (field.default is MISSING or (empty and field.default is not None))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `from_dict` reads."""
        return {"_class_name": self.class_name, **asdict(self)}


def require(condition: bool, text: str) -> None:
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(text)


def require_counts(config: Config, most: int, *names: str) -> None:
    """Require each of these fields to be from 1 to `most`."""
    for name in names:
        value = getattr(config, name)
        require(value is not None and 0 < value <= most, f"{name}={value}: expected 1 to {most}")


def require_either(config: Config, name: str, *known: str) -> None:
    """Require a field to have one of two values."""
    value = getattr(config, name)
    require(value in known, f"{name}={value!r}: expected {' or '.join(map(repr, known))}")
