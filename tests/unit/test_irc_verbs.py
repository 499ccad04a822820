"""The overseer's table of verbs: what is a command, what it needs, what its help says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.errors import InvalidError
from fireclaw.irc.verbs import VERBS, Verb, find_verb, help_text, is_command, parse_command


@pytest.mark.parametrize("verb", VERBS.values(), ids=list(VERBS))
def test_each_example_works(verb: Verb) -> None:
    """The example of each verb is a command of that verb, with parameters as its syntax has them."""
    command = parse_command(verb.example)
    assert command.verb is verb
    assert len(command.args) <= len(verb.syntax.split())


@pytest.mark.parametrize("verb", VERBS.values(), ids=list(VERBS))
def test_help_of_a_verb_is_one_line(verb: Verb) -> None:
    """Help shows syntax and example in one line, and says where only operators may."""
    text = help_text(verb)
    assert verb.usage in text
    assert verb.example in text
    assert ("operators only" in text) == verb.mutating
    assert len(text.encode()) <= 400


def test_help_lists_every_verb() -> None:
    """The list fits in one line and leaves nothing out."""
    text = help_text(None)
    assert all(verb.usage in text for verb in VERBS.values())
    assert len(text.encode()) <= 400


@pytest.mark.parametrize("verb", ["invoke", "destroy", "approve", "model", "persona", "reload"])
def test_what_changes_something_is_for_operators(verb: str) -> None:
    """The verbs that make, change and end agents are marked as such."""
    assert VERBS[verb].mutating


@pytest.mark.parametrize("text", ["!list", "!destroy ada", "!LIST", "!no-such thing"])
def test_commands_start_with_an_exclamation_mark(text: str) -> None:
    """A mark and a letter at line start make a command."""
    assert is_command(text)


@pytest.mark.parametrize("text", ["", "!", "!!", "! list", " !list", "ada: !list", "list", "!1", "wow!list"])
def test_other_lines_are_talk(text: str) -> None:
    """Anything else is not for the overseer, an exclamation in the middle of a sentence least of all."""
    assert not is_command(text)


def test_parameters_may_be_left_out_where_the_syntax_says_so() -> None:
    """The name of an agent may be chosen or not."""
    assert parse_command("!invoke worker").arg(1) is None
    assert parse_command("!Invoke  worker   ada ").args == ("worker", "ada")
    assert parse_command("!destroy ada KEEP").arg(1) == "KEEP"


@pytest.mark.parametrize(
    "text",
    [
        "!destroy",
        "!destroy a b",
        "!destroy a keep b",
        "!approve a 12ab yes",
        "!invoke",
        "!invoke a b c",
        "!list all",
    ],
)
def test_misuse_shows_the_syntax(text: str) -> None:
    """Too few parameters, too many, or other words than there are, are answered with the syntax and an example."""
    with pytest.raises(InvalidError) as caught:
        parse_command(text)
    verb = find_verb(text.split(maxsplit=1)[0])
    assert verb.usage in caught.value.message
    assert verb.example in caught.value.hint


@pytest.mark.parametrize(("typed", "near"), [("!lst", "!list"), ("!destory ada", "!destroy"), ("!halp", "!help")])
def test_a_typo_gets_the_nearest_verb(typed: str, near: str) -> None:
    """A slip of the finger is told what was probably meant."""
    with pytest.raises(InvalidError, match=f"did you mean {near}"):
        parse_command(typed)


def test_an_unknown_verb_gets_the_list() -> None:
    """Where nothing is near, the list is."""
    with pytest.raises(InvalidError, match="!help lists the verbs"):
        parse_command("!xyzzyqqq")


@given(st.text(max_size=60))
def test_any_text_is_judged(text: str) -> None:
    """Whatever somebody types is a command, a mistake with an answer, or talk."""
    try:
        command = parse_command(text)
    except InvalidError as error:
        outcome = error.hint
    else:
        outcome = command.verb.name
    assert outcome
    assert is_command(text) or outcome == "!help"
