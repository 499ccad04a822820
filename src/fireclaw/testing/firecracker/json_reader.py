"""JSON read into known shapes, with the errors that Firecracker's reader (serde_json) has for what does not fit.

Clients see these texts when they send a field that this version does not know. The reader works in one pass, so that
the first wrong thing in a body is the one that is reported, at the place where the original notices it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

_DECODER: Final = json.JSONDecoder()
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS: Final = {"n": ("null", None), "t": ("true", True), "f": ("false", False)}
_BITS: Final = {"u8": 8, "u16": 16, "u32": 32, "u64": 64, "usize": 64}
_EXPECTED: Final = {"bool": "a boolean", "string": "a string", "path": "path string"}

Version: TypeAlias = tuple[int, ...]


class BodyError(Exception):
    """The body is not what it should be."""


@dataclass(frozen=True)
class Scalar:
    """``bool``, ``string``, ``path``, ``u8``, ``u16``, ``u32``, ``u64``, ``usize``, or ``any`` for any JSON."""

    name: str


@dataclass(frozen=True)
class Choice:
    """One of a few words.

    Attributes:
        words: them.
        complaint: what is said about another one; empty for the usual.
        folded: upper and lower case are the same.
    """

    words: tuple[str, ...]
    complaint: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Sequence:
    """A list of one kind."""

    item: Kind


@dataclass(frozen=True)
class Field:
    """A field of an object.

    Attributes:
        name: its name.
        kind: what it holds.
        required: it must be there.
        default: what it is when it is not.
        nullable: it may be null.
        since: the first version that knows it.
    """

    name: str
    kind: Kind
    required: bool = False
    default: Any = None
    nullable: bool = False
    since: Version = ()


@dataclass(frozen=True)
class Struct:
    """An object with known fields.

    Attributes:
        name: as error texts have it.
        fields: in the order of error texts.
        closed: other fields are errors.
    """

    name: str
    fields: tuple[Field, ...]
    closed: bool = True


Kind: TypeAlias = "Scalar | Choice | Sequence | Struct"


def read(raw: bytes, kind: Kind, version: Version) -> Any:
    """Read a body.

    Args:
        raw: the body.
        kind: what it should be.
        version: fields that are younger are unknown.

    Raises:
        BodyError: it is something else.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise BodyError("invalid unicode code point at line 1 column 1") from None
    reader = _Reader(text, version)
    value = reader.value(kind)
    reader.end()
    return value


class _Reader:
    def __init__(self, text: str, version: Version) -> None:
        self._text = text
        self._at = 0
        self._version = version

    def end(self) -> None:
        if self._peek():
            raise self._error("trailing characters", ahead=1)

    def value(self, kind: Kind) -> Any:
        if isinstance(kind, Struct):
            return self._struct(kind)
        if isinstance(kind, Sequence):
            return self._sequence(kind)
        if isinstance(kind, Choice):
            return self._choice(kind)
        if kind.name == "any":
            return self._anything()
        return self._scalar(kind.name)

    def _error(self, text: str, *, ahead: int = 0) -> BodyError:
        place = min(self._at + ahead, len(self._text))
        line = self._text.count("\n", 0, place) + 1
        column = place - (self._text.rfind("\n", 0, place) + 1)
        return BodyError(f"{text} at line {line} column {column}")

    def _peek(self) -> str:
        """The next character that is no space; empty at the end."""
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return self._text[self._at : self._at + 1]

    def _need(self, what: str) -> str:
        letter = self._peek()
        if not letter:
            raise self._error(f"EOF while parsing {what}")
        return letter

    def _struct(self, struct: Struct) -> dict[str, Any]:
        if self._need("a value") != "{":
            raise self._mismatch(f"struct {struct.name}")
        known = {each.name: each for each in struct.fields if each.since <= self._version}
        found: dict[str, Any] = {}
        for key in self._keys():
            if key in found:
                raise self._error(f"duplicate field `{key}`")
            if key in known:
                self._colon()
                found[key] = self._field(known[key])
            elif struct.closed:
                raise self._error(f"unknown field `{key}`, {_expected(tuple(known))}")
            else:
                self._colon()
                self._anything()
        for each in known.values():
            if each.required and each.name not in found:
                raise self._error(f"missing field `{each.name}`")
            found.setdefault(each.name, each.default)
        return {name: found[name] for name in known}

    def _field(self, field: Field) -> Any:
        if field.nullable and self._peek() == "n":
            return self._word()
        return self.value(field.kind)

    def _keys(self) -> Any:
        """The keys of an object, each when its turn comes; the caller reads the value in between."""
        self._at += 1
        if self._need("an object") == "}":
            self._at += 1
            return
        while True:
            if self._need("an object") != '"':
                raise self._error("trailing comma" if self._peek() == "}" else "key must be a string", ahead=1)
            yield self._string()
            letter = self._need("an object")
            self._at += 1
            if letter == "}":
                return
            if letter != ",":
                raise self._error("expected `,` or `}`")

    def _colon(self) -> None:
        if self._need("an object") != ":":
            raise self._error("expected `:`", ahead=1)
        self._at += 1

    def _sequence(self, sequence: Sequence) -> list[Any]:
        if self._need("a value") != "[":
            raise self._mismatch("a sequence")
        return list(self._items(sequence.item))

    def _items(self, kind: Kind) -> Any:
        self._at += 1
        if self._need("a list") == "]":
            self._at += 1
            return
        while True:
            yield self.value(kind)
            letter = self._need("a list")
            self._at += 1
            if letter == "]":
                return
            if letter != ",":
                raise self._error("expected `,` or `]`")
            if self._need("a value") == "]":
                raise self._error("trailing comma", ahead=1)

    def _choice(self, choice: Choice) -> str:
        if self._need("a value") != '"':
            raise self._error("expected value", ahead=1)
        word = self._string()
        folded = word.lower() if choice.folded else word
        if folded in choice.words:
            return folded
        if choice.complaint:  # it is the object around it that notices, when it has ended
            if self._peek() == "}":
                self._at += 1
            raise self._error(choice.complaint)
        raise self._error(f"unknown variant `{word}`, {_expected(choice.words)}")

    def _scalar(self, name: str) -> Any:
        expected = _EXPECTED.get(name, name)
        letter = self._need("a value")
        if name == "bool" and letter in "tf":
            return self._word()
        if name in ("string", "path") and letter == '"':
            return self._string()
        if name in _BITS and (letter == "-" or letter.isdecimal()):
            return self._integer(name)
        raise self._mismatch(expected)

    def _integer(self, name: str) -> int:
        number = self._number()
        if isinstance(number, float):
            raise self._error(f"invalid type: floating point `{number}`, expected {name}")
        if not 0 <= number < 1 << _BITS[name]:
            raise self._error(f"invalid value: integer `{number}`, expected {name}")
        return number

    def _mismatch(self, expected: str) -> BodyError:
        """The error for a value of another kind; scalars are read first, lists and objects are not."""
        letter = self._peek()
        if letter == "{":
            return self._error(f"invalid type: map, expected {expected}")
        if letter == "[":
            return self._error(f"invalid type: sequence, expected {expected}")
        found = self._anything()
        if found is None:
            return self._error(f"invalid type: null, expected {expected}")
        if isinstance(found, bool):
            return self._error(f"invalid type: boolean `{str(found).lower()}`, expected {expected}")
        if isinstance(found, str):
            return self._error(f"invalid type: string {json.dumps(found)}, expected {expected}")
        kind = "floating point" if isinstance(found, float) else "integer"
        return self._error(f"invalid type: {kind} `{found}`, expected {expected}")

    def _anything(self) -> Any:
        letter = self._need("a value")
        if letter == "{":
            found = {}
            for key in self._keys():
                self._colon()
                found[key] = self._anything()
            return found
        if letter == "[":
            return list(self._items(Scalar("any")))
        if letter == '"':
            return self._string()
        if letter == "-" or letter.isdecimal():
            return self._number()
        if letter in _WORDS:
            return self._word()
        raise self._error("expected value", ahead=1)

    def _word(self) -> bool | None:
        word, value = _WORDS[self._text[self._at]]
        for letter in word:
            if self._at == len(self._text):
                raise self._error("EOF while parsing a value")
            self._at += 1
            if self._text[self._at - 1] != letter:
                raise self._error("expected ident")
        return value

    def _number(self) -> int | float:
        match = _NUMBER.match(self._text, self._at)
        if match is None:
            raise self._error("invalid number", ahead=2)
        self._at = match.end()
        return float(match[0]) if match[1] or match[2] else int(match[0])

    def _string(self) -> str:
        try:
            text, self._at = _DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated"):
                self._at = len(self._text)
                raise self._error("EOF while parsing a string") from None
            self._at = error.pos
            if error.msg.startswith("Invalid control"):
                raise self._error("control character (\\u0000-\\u001F) found while parsing a string") from None
            raise self._error("invalid escape") from None
        return str(text)


def _expected(words: tuple[str, ...]) -> str:
    quoted = [f"`{word}`" for word in words]
    if not quoted:
        return "there are no fields"
    if len(quoted) <= 2:
        return f"expected {' or '.join(quoted)}"
    return f"expected one of {', '.join(quoted)}"
