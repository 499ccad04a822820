"""The errors a caller can branch on. Anything else is a builtin exception.

::

    FireclawError               has .message, .hint and an exit-code-free .code for the API
    ├── ConfigError             the configuration file is wrong (file, line, key)
    ├── NotFoundError           no image, template, machine or agent of that name (nearest name offered)
    ├── ConflictError           it exists already, or its state forbids this
    ├── InvalidError            an argument that can never work (NUL in an argument, bad name ...)
    ├── SetupError              the host lacks something; the hint says how to get it
    ├── CorruptError            stored bytes are not what their digest says
    ├── MachineError            a machine could not do it
    │   ├── VmmError            the VMM process failed (exit status and last log lines kept)
    │   ├── ChannelLostError    the channel ended; what was running may or may not have finished
    │   ├── GuestError          the guest answered with an error of its own
    │   └── GuestTimeoutError   the guest did not answer in time
    ├── ModelError              a model call failed (kind tells how)
    └── IrcError                the IRC server refused us for good

Every message is *the thing, the reason*; ``hint`` is *the next step* where we know it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class FireclawError(Exception):
    """An error with a message for people and a code for programs.

    Attributes:
        message: the thing and the reason, one line.
        hint: the next step, or an empty string.
        code: a stable word for the API, e.g. ``"not-found"``.
    """

    code = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(FireclawError):
    """The configuration file cannot be read or holds something we do not know."""

    code = "config"


class NotFoundError(FireclawError):
    """Nothing of that name exists."""

    code = "not-found"

    @classmethod
    def named(cls, kind: str, name: str, known: Iterable[str]) -> NotFoundError:
        """Build the error for an unknown name, offering the nearest known one.

        Args:
            kind: what was looked for, e.g. ``"template"``.
            name: what the user wrote.
            known: the names that exist.
        """
        import difflib  # noqa: PLC0415 - the hot path of the command line never gets here

        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif names:
            hint = f"known: {', '.join(names)}"
        else:
            hint = f"there is no {kind} yet"
        return cls(f"no {kind} named {name!r}", hint=hint)


class ConflictError(FireclawError):
    """It exists already, or its present state forbids the request."""

    code = "conflict"


class InvalidError(FireclawError):
    """An argument that can never work."""

    code = "invalid"


class SetupError(FireclawError):
    """The host lacks something that Fireclaw needs."""

    code = "setup"


class CorruptError(FireclawError):
    """Stored bytes are not what their digest says."""

    code = "corrupt"


class MachineError(FireclawError):
    """A machine could not do what was asked."""

    code = "machine"


class VmmError(MachineError):
    """The VMM process failed.

    Attributes:
        status: its exit status (negative: killed by that signal), or None if it lives.
        log: its last lines and the console's, for people.
    """

    code = "vmm"

    def __init__(self, message: str, *, hint: str = "", status: int | None = None, log: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.log = log


class ChannelLostError(MachineError):
    """The channel ended; what was running in the guest may or may not have finished."""

    code = "channel-lost"


class GuestError(MachineError):
    """The guest answered with an error of its own.

    Attributes:
        errno: the guest's errno where there was one, else 0.
    """

    code = "guest"

    def __init__(self, message: str, *, hint: str = "", errno: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class GuestTimeoutError(MachineError):
    """The guest did not answer in time."""

    code = "guest-timeout"


class ModelError(FireclawError):
    """A model call failed.

    Attributes:
        kind: ``unreachable``, ``refused``, ``overloaded``, ``context``, ``bad-output``, ``timeout`` or ``budget``.
    """

    code = "model"

    def __init__(self, message: str, *, hint: str = "", kind: str = "unreachable") -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class IrcError(FireclawError):
    """The IRC server refused us in a way that trying again will not mend."""

    code = "irc"
