"""Playbooks for the turn engine: given these events, exactly these commands."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fireclaw.agents.engine import (
    INTERRUPTED,
    MAX_WAITING,
    AskModel,
    CallTool,
    Dismissed,
    Drop,
    EffectBroke,
    Engine,
    Heard,
    ModelFailed,
    Recovered,
    Replied,
    Save,
    Say,
    Tick,
    ToolEnded,
    Wait,
    missing_end,
)
from fireclaw.agents.templates import Limits
from fireclaw.agents.turn import Turn
from fireclaw.llm.chat import ChatReply, Finish, ToolCall
from fireclaw.store.agents import (
    LineRow,
    LineState,
    MessageKind,
    StepKind,
    StepRow,
    StepState,
    TurnRow,
    TurnState,
)

if TYPE_CHECKING:
    from fireclaw.agents.engine import Command, Event

NOW = 1000.0
LIMITS = Limits(steps=4, turn_seconds=100, command_seconds=10)


def line(name: str = "1", text: str = "how are you?", sender: str = "alice", target: str = "#agents") -> LineRow:
    """Make a line as it comes in."""
    return LineRow(name, "a1", sender, "person", target, target, text, LineState.WAITING, NOW)


def call(command: object = "ls", call_id: str = "c1") -> ToolCall:
    """Make a wish to run a command."""
    return ToolCall(call_id, "run_command", {"command": command})


class Book:
    """An engine with what it has said so far."""

    def __init__(self, turn: Turn | None = None, waiting: list[LineRow] | None = None, limits: Limits = LIMITS) -> None:
        self.engine = Engine("a1", 7, limits, ("run_command",), turn=turn, waiting=waiting or [])
        self.now = NOW
        self.commands: list[Command] = []

    def play(self, event: Event, after: float = 0.0) -> list[Command]:
        """Let an event happen, some seconds later."""
        self.now += after
        self.commands = self.engine.handle(event, self.now)
        return self.commands

    def reply(self, text: str = "", *calls: ToolCall, finish: Finish = Finish.STOP, after: float = 0.0) -> None:
        """Let the model reply to the open question."""
        self.play(Replied(self.open_call, ChatReply(text, calls, finish)), after)

    def result(self, output: str = "out", after: float = 0.0) -> None:
        """Let the open call end."""
        self.play(ToolEnded(self.open_call, {"output": output}), after)

    @property
    def open_call(self) -> str:
        """The call that is on its way."""
        turn = self.engine._turn
        assert turn is not None
        assert turn.open_step is not None
        return turn.open_step.call_id

    @property
    def asked(self) -> StepRow:
        """The question to the model in the last answer."""
        (step,) = [command.step for command in self.commands if isinstance(command, AskModel)]
        return step

    @property
    def called(self) -> StepRow:
        """The call in the last answer."""
        (step,) = [command.step for command in self.commands if isinstance(command, CallTool)]
        return step

    @property
    def said(self) -> list[tuple[MessageKind, str]]:
        """What is said in the last answer."""
        return [(command.row.kind, command.row.text) for command in self.commands if isinstance(command, Say)]

    @property
    def saved(self) -> list[LineRow | TurnRow | StepRow]:
        """The rows saved in the last answer."""
        return [command.row for command in self.commands if isinstance(command, Save)]

    @property
    def turn_states(self) -> list[TurnState]:
        """The states of turns in the last answer."""
        return [row.state for row in self.saved if isinstance(row, TurnRow)]


def test_a_line_begins_a_turn() -> None:
    """A line is taken, a turn and its first step are committed, then the model is asked."""
    book = Book()
    commands = book.play(Heard(line()))
    step = StepRow("t1", 0, StepKind.MODEL, StepState.STARTED, {}, {}, NOW)
    turn = TurnRow("t1", "a1", "1", "#agents", TurnState.RUNNING, "", NOW)
    taken = replace(line(), state=LineState.TAKEN)
    assert commands == [
        Save(taken),
        Save(turn),
        Save(step),
        AskModel(step, Turn(turn, taken, [step])),
        Wait(NOW + 5),
    ]


def test_an_answer_ends_the_turn() -> None:
    """The model's words are said to the asker, and the turn is done."""
    book = Book()
    book.play(Heard(line()))
    book.reply("fine\nand you?", after=2)
    assert book.saved[-1] == TurnRow("t1", "a1", "1", "#agents", TurnState.DONE, "fine\nand you?", NOW, NOW + 2)
    assert [command.row.message_id for command in book.commands if isinstance(command, Say)] == ["t1/1/0", "t1/1/1"]
    assert book.said == [(MessageKind.ANSWER, "alice: fine"), (MessageKind.ANSWER, "and you?")]
    assert book.commands[-1] == Wait(None)


def test_a_private_answer_has_no_address() -> None:
    """In a private talk the nick is not put before the answer."""
    book = Book()
    book.play(Heard(line(target="alice")))
    book.reply("fine")
    assert book.said == [(MessageKind.ANSWER, "fine")]


def test_a_call_is_made_and_its_result_told() -> None:
    """A call is committed as started before it is made; its end and the next question are one commit."""
    book = Book()
    book.play(Heard(line()))
    book.reply("", call())
    made = StepRow(
        "t1",
        1,
        StepKind.TOOL,
        StepState.STARTED,
        {"id": "c1", "name": "run_command", "arguments": {"command": "ls"}, "error": "", "asked_by": "t1/0"},
        {},
        NOW,
    )
    assert book.saved[0].state is StepState.DONE
    assert book.saved[1:] == [made]
    assert book.called == made
    book.result("a b")
    assert book.saved == [
        replace(made, state=StepState.DONE, result={"output": "a b"}, finished_at=NOW),
        StepRow("t1", 2, StepKind.MODEL, StepState.STARTED, {}, {}, NOW),
    ]
    assert book.asked.step == 2


def test_calls_of_one_reply_are_made_one_after_the_other() -> None:
    """The second call begins when the first has ended, and the model is asked when all have."""
    book = Book()
    book.play(Heard(line()))
    book.reply("", call("one", "c1"), call("two", "c2"))
    made = []
    for _ in range(2):
        made.append(book.called.request["id"])
        book.result()
    assert made == ["c1", "c2"]
    assert book.asked.step == 3


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        (ToolCall("c1", "rm_rf", {}), "error: there is no tool 'rm_rf'; your tools: run_command"),
        (ToolCall("c1", "run_command", {}), 'error: run_command needs {"command": "..."}'),
        (call(["ls"]), 'error: run_command needs {"command": "..."}'),
        (call("  "), 'error: run_command needs {"command": "..."}'),
        (call("a\0b"), "error: a command cannot hold a NUL byte"),
        (call("x" * 9000), "error: the command is longer than 8192 bytes; write a script file in parts instead"),
        (ToolCall("c1", "run_command", {}, error="error: broken"), "error: broken"),
    ],
)
def test_a_call_that_cannot_be_made_is_answered(wish: ToolCall, told: str) -> None:
    """A bad call is not made; the model is told why on the tool channel and asked again, in the same commit."""
    book = Book()
    book.play(Heard(line()))
    book.reply("", wish)
    refused = book.saved[1]
    assert isinstance(refused, StepRow)
    assert (refused.kind, refused.state, refused.result) == (StepKind.TOOL, StepState.REFUSED, {"output": told})
    assert book.asked.step == 2


def test_the_same_call_is_made_twice_at_most() -> None:
    """The third time the very same call is refused on the tool channel; another one is still made."""
    book = Book(limits=Limits(steps=9))
    book.play(Heard(line()))
    for _ in range(2):
        book.reply("", call())
        book.result()
    book.reply("", call(), call("pwd"))
    refused = book.saved[1]
    assert isinstance(refused, StepRow)
    assert refused.state is StepState.REFUSED
    assert "this very call 2 times" in str(refused.result["output"])
    assert book.called.request["arguments"] == {"command": "pwd"}


def test_the_last_step_offers_no_tools() -> None:
    """At the limit of steps the model is asked without tools; a call that it makes all the same is not made."""
    book = Book()
    book.play(Heard(line()))
    for number in range(3):
        assert book.asked.kind is StepKind.MODEL
        book.reply("", call(str(number)))
        book.result()
    assert book.asked.kind is StepKind.FINAL
    book.reply("I am done", call())
    assert book.turn_states == [TurnState.FAILED]
    assert book.said == [(MessageKind.ANSWER, "alice: I have no answer: the reply held nothing to say or do")]


@pytest.mark.parametrize(
    ("text", "calls", "finish"),
    [
        ("", (), Finish.STOP),
        (" \x01\n", (), Finish.STOP),
        ("", (ToolCall("c1", "", {}),), Finish.TOOL_CALLS),
        ("", (call("rm -rf /tmp/x"),), Finish.LENGTH),
        ("so:", (call("rm -rf /tmp/x"),), Finish.LENGTH),
    ],
)
def test_useless_replies_end_in_a_question_without_tools(
    text: str, calls: tuple[ToolCall, ...], finish: Finish
) -> None:
    """An empty reply, a nameless call or one that was cut off is never executed; after three there are no tools."""
    book = Book(limits=Limits(steps=9))
    book.play(Heard(line()))
    kinds = []
    for _ in range(3):
        kinds.append(book.asked.kind)
        book.reply(text, *calls, finish=finish)
    assert kinds == [StepKind.MODEL] * 3
    assert book.asked.kind is StepKind.FINAL
    book.reply("well, fine")
    assert book.said == [(MessageKind.ANSWER, "alice: well, fine")]


def test_a_cut_off_answer_is_said_and_marked() -> None:
    """Words that the limit of tokens cut off are an answer all the same."""
    book = Book()
    book.play(Heard(line()))
    book.reply("one two", finish=Finish.LENGTH)
    assert book.said == [(MessageKind.ANSWER, "alice: one two …")]


def test_unusable_output_gets_one_chance_without_tools() -> None:
    """What the gateway could not use leads to a final question, and that one's failure to honest words."""
    book = Book()
    book.play(Heard(line()))
    book.play(ModelFailed(book.asked.call_id, "the reply was no JSON", unusable=True))
    assert book.asked.kind is StepKind.FINAL
    book.play(ModelFailed(book.asked.call_id, "the reply was no JSON", unusable=True))
    assert book.said == [(MessageKind.ANSWER, "alice: I have no answer: the reply was no JSON")]
    assert book.turn_states == [TurnState.FAILED]


def test_a_failed_model_is_said_with_its_reason() -> None:
    """When the model cannot be reached, the asker hears why, and the next line gets its turn."""
    book = Book()
    book.play(Heard(line()))
    first = book.asked
    book.play(Heard(line("2", sender="bob")))
    book.play(ModelFailed(first.call_id, "the model server does not answer"))
    assert book.said == [(MessageKind.ANSWER, "alice: I cannot answer: the model server does not answer")]
    assert book.turn_states == [TurnState.FAILED, TurnState.RUNNING]
    assert book.asked.turn_id == "t2"


def test_a_mistake_of_ours_is_said_too() -> None:
    """An effect that broke ends the turn in words."""
    book = Book()
    book.play(Heard(line()))
    book.play(EffectBroke(book.asked.call_id, "KeyError: 'x'"))
    assert book.said == [(MessageKind.ANSWER, "alice: something broke in me: KeyError: 'x'")]
    assert book.turn_states == [TurnState.FAILED]


def test_lines_wait_in_a_bounded_queue() -> None:
    """Lines during a turn are acknowledged; beyond the bound each person is told once that the agent is busy."""
    book = Book()
    book.play(Heard(line("0")))
    first = book.asked
    for number in range(1, MAX_WAITING + 1):
        book.play(Heard(line(str(number), sender="bob")))
        place = "next" if number == 1 else f"number {number} in line"
        assert book.said == [(MessageKind.ACK, f"bob: noted, you are {place}; I am still at work for alice")]
        assert book.saved == [line(str(number), sender="bob")]
    book.play(Heard(line("6", sender="carol")))
    assert book.said == [(MessageKind.ANSWER, "carol: I am busy, and 5 lines wait already; ask again when one is done")]
    assert book.saved == [replace(line("6", sender="carol"), state=LineState.REFUSED)]
    book.play(Heard(line("7", sender="carol")))
    assert book.said == []
    assert book.saved == [replace(line("7", sender="carol"), state=LineState.REFUSED)]
    book.play(ModelFailed(first.call_id, "no"))
    assert book.asked.turn_id == "t1"
    assert book.engine.waiting == MAX_WAITING - 1
    book.play(Heard(line("8", sender="carol")))
    assert book.said[0][0] is MessageKind.ACK


def test_signs_of_life_come_after_five_seconds_and_then_rarely() -> None:
    """A long turn says once after 5 s what it does, and again every 30 s."""
    book = Book()
    book.play(Heard(line()))
    assert book.commands[-1] == Wait(NOW + 5)
    book.play(Tick(), after=5)
    assert book.said == [(MessageKind.SIGN, "is thinking, 5 s")]
    assert book.commands[-1] == Wait(NOW + 35)
    book.reply("", call("make\ttest\x02"))
    book.play(Tick(), after=20)
    assert book.said == []
    book.play(Tick(), after=10)
    assert book.said == [(MessageKind.SIGN, "is running `make test`, 30 s")]
    ids = {command.row.message_id for command in book.commands if isinstance(command, Say)}
    assert ids == {"t1/sign/7.2"}
    book.result()
    book.reply("done")
    book.play(Tick(), after=60)
    assert book.commands == [Wait(None)]


def test_a_turn_ends_at_its_time_limit() -> None:
    """The effect on its way is dropped, and the asker hears what the agent was at."""
    book = Book()
    book.play(Heard(line()))
    book.reply("", call("sleep 999"))
    step = book.called
    book.play(Tick(), after=100)
    assert Drop() in book.commands
    assert book.saved[0] == replace(
        step, state=StepState.FAILED, result={"error": book.said[0][1].removeprefix("alice: ")}, finished_at=NOW + 100
    )
    assert book.said[0][1] == ("alice: I gave up after 100 s, the time limit of a turn, running `sleep 999`, 100 s")
    assert book.turn_states == [TurnState.FAILED]
    assert book.play(ToolEnded(step.call_id, {"output": "late"})) == [Wait(None)]


@pytest.mark.parametrize(("sender", "words"), [("alice", "stopped"), ("bob", "stopped, as bob wants it")])
def test_stop_ends_the_turn_in_words(sender: str, words: str) -> None:
    """On stop the effect is dropped, the asker hears of it, a late reply is ignored, and the next line is taken."""
    book = Book()
    book.play(Heard(line()))
    asked = book.asked
    book.play(Heard(line("2", sender="carol")))
    book.play(Heard(line("3", text="Stop!", sender=sender)))
    assert Drop() in book.commands
    assert book.said == [(MessageKind.ANSWER, f"alice: {words}")]
    assert book.turn_states == [TurnState.STOPPED, TurnState.RUNNING]
    assert replace(line("3", text="Stop!", sender=sender), state=LineState.TAKEN) in book.saved
    book.play(Replied(asked.call_id, ChatReply("late")))
    assert book.said == []
    assert not book.saved


def test_stop_without_a_turn_is_answered() -> None:
    """There is nothing to stop, and the model is not bothered."""
    book = Book()
    book.play(Heard(line(text="stop")))
    assert book.said == [(MessageKind.ANSWER, "alice: there is nothing to stop")]
    assert book.saved == [replace(line(text="stop"), state=LineState.REFUSED)]


def test_a_dismissed_agent_tells_everybody() -> None:
    """Who asked and who waits hears once that the agent goes, and so does who comes later."""
    book = Book()
    book.play(Heard(line()))
    book.play(Heard(line("2", sender="bob")))
    book.play(Heard(line("2b", sender="bob")))
    book.play(Dismissed("carol"))
    assert book.said == [
        (MessageKind.ANSWER, "alice: stopped: I am being destroyed, as carol wants it"),
        (MessageKind.ANSWER, "bob: I am being destroyed, as carol wants it"),
    ]
    assert book.commands[-1] == Wait(None)
    book.play(Heard(line("3")))
    assert book.said == [(MessageKind.ANSWER, "alice: I am being destroyed, as carol wants it")]


def running(*steps: StepRow) -> Turn:
    """Make a turn as it is read back from the store."""
    row = TurnRow("t1", "a1", "1", "#agents", TurnState.RUNNING, "", 0.0)
    return Turn(row, replace(line(), state=LineState.TAKEN), list(steps))


ASKED = StepRow("t1", 0, StepKind.MODEL, StepState.STARTED, {}, {}, 0.0)
TWO_CALLS = replace(
    ASKED,
    state=StepState.DONE,
    result={
        "text": "",
        "tool_calls": [
            {"id": name, "name": "run_command", "arguments": {"command": name}, "error": ""} for name in ("c1", "c2")
        ],
    },
)
CALLED = StepRow(
    "t1",
    1,
    StepKind.TOOL,
    StepState.STARTED,
    {"id": "c1", "name": "run_command", "arguments": {"command": "c1"}, "error": "", "asked_by": "t1/0"},
)


def test_recovery_asks_a_started_model_again() -> None:
    """The question whose answer a crash swallowed is asked again, as the same step."""
    turn = running(ASKED)
    assert Book(turn).play(Recovered()) == [AskModel(ASKED, turn), Wait(NOW + 5)]


def test_recovery_tells_the_model_of_an_interrupted_call() -> None:
    """A call that was on its way is not made again; the calls after it are."""
    book = Book(running(TWO_CALLS, CALLED))
    book.play(Recovered())
    assert book.saved[0] == replace(
        CALLED, state=StepState.INTERRUPTED, result={"output": INTERRUPTED}, finished_at=NOW
    )
    assert book.called.request["id"] == "c2"


def test_recovery_counts_what_was_before() -> None:
    """Steps and useless replies from before the crash count; the time limit begins anew."""
    wasted = [StepRow("t1", number, StepKind.MODEL, StepState.FAILED, {}, {"error": "empty"}) for number in range(2)]
    book = Book(running(*wasted, replace(ASKED, step=2)), limits=Limits(steps=9, turn_seconds=50))
    book.play(Recovered())
    book.reply("")
    assert book.asked.kind is StepKind.FINAL
    book.play(Tick(), after=49)
    assert book.turn_states == []


def test_recovery_takes_up_the_next_line() -> None:
    """With no turn on its way the oldest waiting line gets one, and with none there is nothing to do."""
    assert Book().play(Recovered()) == [Wait(None)]
    book = Book(waiting=[line("1"), line("2")])
    book.play(Recovered())
    assert book.asked.turn_id == "t1"
    assert book.engine.waiting == 1


def test_news_of_a_missing_end_has_one_id_a_line_and_daemon() -> None:
    """The same daemon says it once for a line; another daemon may have to say it again."""
    first, again = (missing_end(line(), 7, "I was restarted", "a1", NOW) for _ in range(2))
    assert first == again
    assert first.text == "alice: I was restarted; the end of my last answer may be missing"
    assert missing_end(line(), 8, "I was restarted", "a1", NOW).message_id != first.message_id
