"""The overseer's verbs: one table for parser, help and rights. Sans-I/O.

A command is a line that starts with ``!`` and a letter. What a verb does is in ``overseer.py``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from fireclaw.errors import InvalidError

_OPTIONAL = "["
_COMMAND = re.compile(r"!([A-Za-z][\w-]*)(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Verb:
    """One row of the table.

    Attributes:
        name: the word after the exclamation mark.
        syntax: its parameters; those in brackets may be left out, those in small letters are words as they stand.
        example: a whole line that works.
        help: what it does, one sentence.
        mutating: whether only an operator may.
    """

    name: str
    syntax: str
    example: str
    help: str
    mutating: bool = False

    @property
    def usage(self) -> str:
        """The verb with its parameters, as people type it."""
        return f"!{self.name} {self.syntax}".rstrip()


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "invoke",
            "TEMPLATE [NAME]",
            "!invoke worker ada",
            "makes an agent from a template and lets it join #agents",
            mutating=True,
        ),
        Verb(
            "destroy",
            "NAME [keep]",
            "!destroy ada",
            "ends an agent and its machine, for good; with keep, its memory and /workspace wait for the next ada",
            mutating=True,
        ),
        Verb(
            "approve",
            "NAME CODE [no]",
            "!approve ada 3f2c",
            "lets an agent run the command that it asked about, or with no, not",
            mutating=True,
        ),
        Verb(
            "model",
            "NAME [MODEL]",
            "!model ada ollama:qwen2.5",
            "gives an agent another model from its next turn on; without MODEL, the one that its template chooses",
            mutating=True,
        ),
        Verb(
            "persona",
            "NAME [TEMPLATE]",
            "!persona ada researcher",
            "gives an agent the persona of another template; without TEMPLATE, that of its own",
            mutating=True,
        ),
        Verb(
            "reload",
            "[NAME]",
            "!reload",
            "reads the templates anew, for all agents or for one; each has what is new with its next turn",
            mutating=True,
        ),
        Verb("list", "", "!list", "shows the agents and what they are doing"),
        Verb("templates", "", "!templates", "shows the templates that !invoke can use"),
        Verb("models", "", "!models", "shows the models that are here and those that can be fetched"),
        Verb("cost", "[NAME]", "!cost ada", "shows what the models cost: by agent, or one agent's by model"),
        Verb("help", "[VERB]", "!help invoke", "shows the verbs, or one with its syntax and an example"),
    )
}


@dataclass(frozen=True)
class Command:
    """A line that was understood.

    Attributes:
        verb: the row of the table.
        args: the parameters that were given, as many as the syntax allows.
    """

    verb: Verb
    args: tuple[str, ...]

    def arg(self, index: int) -> str | None:
        """The parameter at a place, None where it was left out."""
        return self.args[index] if index < len(self.args) else None


def is_command(text: str) -> bool:
    """Whether a line addresses the overseer at all."""
    return _COMMAND.fullmatch(text) is not None


def parse_command(text: str) -> Command:
    """Read a command.

    Raises:
        InvalidError: no such verb (the nearest is offered), or the wrong parameters (the syntax and an example are
            shown).
    """
    match = _COMMAND.fullmatch(text)
    if match is None:
        raise InvalidError(f"{text!r} is not a command", hint="!help")
    verb = find_verb(match[1])
    args = tuple((match[2] or "").split())
    wanted = verb.syntax.split()
    least = sum(not word.startswith(_OPTIONAL) for word in wanted)
    fixed = [(word.strip("[]"), arg) for word, arg in zip(wanted, args, strict=False) if word.islower()]
    if not least <= len(args) <= len(wanted) or any(word != arg.lower() for word, arg in fixed):
        raise InvalidError(f"the syntax is: {verb.usage}", hint=f"for example: {verb.example}")
    return Command(verb, args)


def find_verb(name: str) -> Verb:
    """Find a verb by its name, with or without its exclamation mark.

    Raises:
        InvalidError: there is none; the nearest one is offered.
    """
    name = name.removeprefix("!").lower()
    if verb := VERBS.get(name):
        return verb
    near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
    raise InvalidError(f"there is no !{name}", hint=f"did you mean !{near[0]}?" if near else "!help lists the verbs")


def help_text(verb: Verb | None) -> str:
    """What ``!help`` answers.

    Args:
        verb: the one asked for, None for the list.
    """
    if verb is None:
        usages = " · ".join(verb.usage for verb in VERBS.values())
        return f"{usages} — !help VERB tells more"
    who = " (operators only)" if verb.mutating else ""
    return f"{verb.usage}: {verb.help}{who}. Example: {verb.example}"
