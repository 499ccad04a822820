"""The command line: ``main`` finds the verb and runs it. It knows only the daemon's API.

A verb lives in the module of its family and is imported when it is called, so that ``run`` and ``exec``, which
programs call in loops, load nothing but the standard library's small parts.

Standard output is the command's or the answer's; everything of ours goes to standard error. Exit status 125 is ours.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

from fireclaw.errors import FireclawError, InvalidError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FAILED: Final = 125

# Verb: the module and function that do it, and what it does.
VERBS: Final = {
    "run": ("run:run", "run a command in a machine of its own"),
    "exec": ("run:exec_", "run a command in a machine that exists"),
    "ps": ("machines:ps", "list the machines"),
    "prune": ("machines:prune", "remove what dead machines and builds left behind"),
    "up": ("office:up", "start the IRC server, the model and the agents"),
    "down": ("office:down", "stop everything"),
    "status": ("office:status", "show what runs"),
    "template": ("template:template", "list, show, make and check what agents are made of"),
    "memory": ("memory:memory", "show, change and restore what an agent remembers"),
    "models": ("models:models", "list the models that agents can think with, or fetch one"),
    "cost": ("cost:cost", "show what the agents' models came to"),
    "setup": ("host:setup", "build what machines boot from and fetch the model"),
    "doctor": ("host:doctor", "check this host"),
    "ledger": ("ledger:ledger", "verify or show the record of what happened"),
}

_HELP: Final = """\
usage: fireclaw VERB [OPTIONS] ...

AI agents on IRC, each with a microVM of its own, and any command in a throw-away microVM.

verbs:
{verbs}

examples:
  fireclaw run "uname -a"                 one string: through the machine's shell
  fireclaw run --timeout 5 -- ./job 1 2   words after --: as they are
  fireclaw up                             then join #agents with any IRC client

'fireclaw VERB --help' explains a verb. FIRECLAW_HOME moves all of Fireclaw's files.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; the process's own when None.

    Returns:
        The exit status.
    """
    _fill_standard_descriptors()
    try:
        status = _dispatch(sys.argv[1:] if arguments is None else list(arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
    except FireclawError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has left. What is still buffered must not be complained about at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
    except Exception:  # noqa: BLE001 - a traceback's usual status, 1, would pass for the command's own
        sys.excepthook(*sys.exc_info())
        return _fail("this is a mistake in Fireclaw; please report it with the lines above")
    return status


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else ""
    if verb in {"-h", "--help"}:
        print(_help(), end="")
        return 0
    if verb == "--version":
        from fireclaw import __version__  # noqa: PLC0415 - only here

        print(f"fireclaw {__version__}")
        return 0
    if not verb:
        raise InvalidError("no verb given", hint="see 'fireclaw --help'")
    return _find(verb)(arguments[1:])


def _find(verb: str) -> Callable[[Sequence[str]], int]:
    if verb not in VERBS:
        raise _unknown(verb)
    module, _, function = VERBS[verb][0].partition(":")
    found: Callable[[Sequence[str]], int] = getattr(importlib.import_module(f"fireclaw.cli.{module}"), function)
    return found


def _unknown(verb: str) -> InvalidError:
    import difflib  # noqa: PLC0415 - not on the hot path

    near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "see 'fireclaw --help'"
    return InvalidError(f"no verb named {verb!r}", hint=hint)


def _help() -> str:
    return _HELP.format(verbs="\n".join(f"  {verb:<9} {about}" for verb, (_, about) in VERBS.items()))


def _fail(message: str) -> int:
    from fireclaw.cli.terminal import say  # noqa: PLC0415 - loaded already by every verb

    say(message)
    return FAILED


def _fill_standard_descriptors() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr.

    Otherwise the next file that we open, the daemon's socket for one, becomes descriptor 0, 1 or 2.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
