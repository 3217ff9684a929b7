"""What configurations share: reading a JSON object and refusing what the network here would not honour."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from gafext.errors import CheckpointError

Ints = tuple[int, ...]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value (lists already made tuples) has the annotated type."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Config:
    """Base of the configurations: reads a JSON object and refuses what the network here would not honour."""

    class_name: ClassVar[str]
    only: ClassVar[dict[str, tuple]] = {}
    """Keys of the published format of which these values alone are supported."""
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Keys that change no number at inference."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config") -> Config:
        """Build from a JSON object; a key with an unknown effect, a wrong type or a bad value is an error."""
        names = {field.name for field in fields(cls)}
        problems, known = [], {}
        for key, value in values.items():
            value = _as_tuple(value)
            if key in names:
                known[key] = value
            elif key in cls.only:
                if value not in cls.only[key]:
                    problems.append(f"{key}={value!r}: expected one of {list(cls.only[key])}")
            elif not (key.startswith("_") or key in cls.without_effect or value is None or value is False):
                problems.append(f"{key}={value!r} is not known here")
        hints = get_type_hints(cls)
        problems += [
            f"{key}={value!r}: expected {hints[key]}" for key, value in known.items() if not _fits(value, hints[key])
        ]
        if problems:
            raise CheckpointError(f"{source}: " + "; ".join(problems))
        try:
            return cls(**known)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        return {"_class_name": self.class_name, **asdict(self)}


def require(condition: bool, text: str) -> None:
    """Raise a ValueError with this text unless the condition holds."""
    if not condition:
        raise ValueError(text)
