"""The command lines of Firecracker and its jailer: one table each, and their ways of refusing.

Both take ``--name value`` and ``--flag`` and nothing else: no ``=``, no abbreviations, no positional arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Instance ids: these and alphanumerics, and as long as this.
_ID_EXTRA: Final = "-"
_ID_LENGTH: Final = 64


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: without its dashes.
        takes_value: a word follows it.
        required: it must be there.
        many: it may be there more than once.
        needs: another option that must be there with it.
        forbids: another option that must not.
    """

    name: str
    takes_value: bool = True
    required: bool = False
    many: bool = False
    needs: str = ""
    forbids: str = ""


class ArgumentError(Exception):
    """The command line is wrong.

    Attributes:
        debug: the error in the words of a Rust programmer, as the program's last line on stderr has it.
    """

    def __init__(self, text: str, debug: str) -> None:
        super().__init__(text)
        self.debug = debug


class IdError(Exception):
    """The instance's id is wrong; ``debug`` as above."""

    def __init__(self, text: str, debug: str) -> None:
        super().__init__(text)
        self.debug = debug


@dataclass(frozen=True)
class Arguments:
    """A command line that was read.

    Attributes:
        values: words by option; a flag's is empty.
        rest: what stood behind ``--``.
    """

    values: Mapping[str, tuple[str, ...]]
    rest: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: str = "") -> str:
        """An option's word, or the default."""
        return self.values.get(name, (default,))[-1]


def read(words: Sequence[str], options: Iterable[Option]) -> Arguments:
    """Read a command line.

    Raises:
        ArgumentError: an option is unknown, twice there, without its word, missing, or in the wrong company.
    """
    table = {option.name: option for option in options}
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    words, rest = words[:end], tuple(words[end + 1 :])
    for alone in ("--help", "--version"):  # these make all others unimportant, even wrong ones
        if alone in words:
            return Arguments({alone[2:]: ("",)}, rest)
    values: dict[str, tuple[str, ...]] = {}
    remaining = iter(words)
    for word in remaining:
        option = table.get(word[2:]) if word.startswith("--") else None
        if option is None:
            name = word.removeprefix("--")
            raise ArgumentError(
                f"Found argument '{name}' which wasn't expected, or isn't valid in this context.",
                f'UnexpectedArgument("{name}")',
            )
        if option.name in values and not option.many:
            raise ArgumentError(
                f"The argument '{option.name}' was provided more than once.", f'DuplicateArgument("{option.name}")'
            )
        values[option.name] = (
            *values.get(option.name, ()),
            _value(option, next(remaining, None)) if option.takes_value else "",
        )
    _check_company(values, table.values())
    return Arguments(values, rest)


def _value(option: Option, word: str | None) -> str:
    if word is None or word.startswith("--"):
        raise ArgumentError(
            f"The argument '{option.name}' requires a value, but none was supplied.", f'MissingValue("{option.name}")'
        )
    return word


def _check_company(values: Mapping[str, object], options: Iterable[Option]) -> None:
    for option in sorted(options, key=lambda option: option.name):
        missing = option.name if option.required and option.name not in values else ""
        if option.name in values and option.needs and option.needs not in values:
            missing = option.needs
        if missing:
            raise ArgumentError(f"Argument '{missing}' required, but not found.", f'MissingArgument("{missing}")')
        if option.name in values and option.forbids in values:
            raise ArgumentError(
                f"Argument '{option.forbids}' cannot be used together with argument '{option.name}'.",
                f'ForbiddenArgument("{option.name}", "{option.forbids}")',
            )


def check_id(name: str) -> None:
    """See that an instance's id has the right letters and length.

    Raises:
        IdError: it has not.
    """
    if not 1 <= len(name) <= _ID_LENGTH:
        raise IdError(
            f"Invalid len ({len(name)});  the length must be between 1 and {_ID_LENGTH}",
            f"InvalidLen({len(name)}, 1, {_ID_LENGTH})",
        )
    for place, letter in enumerate(name):
        if not (letter.isalnum() or letter in _ID_EXTRA):
            raise IdError(f"Invalid char ({letter}) at position {place}", f"InvalidChar('{letter}', {place})")
