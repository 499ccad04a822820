"""Playbooks for the turn engine: given these events, exactly these commands."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fireclaw.agents.approvals import matching
from fireclaw.agents.engine import INTERRUPTED, MAX_WAITING, Engine, missing_end
from fireclaw.agents.events import (
    Decided,
    Dismissed,
    EffectBroke,
    Heard,
    ModelFailed,
    Recovered,
    Replied,
    Tick,
    ToolEnded,
)
from fireclaw.agents.orders import AskApproval, AskModel, CallTool, Drop, Save, Say, Settle, Wait
from fireclaw.agents.outfit import Outfit
from fireclaw.agents.templates import Approvals, Limits
from fireclaw.agents.tools import TOOLS
from fireclaw.agents.turn import ROLE_HANDOFF, Turn
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
from fireclaw.store.memory import MemoryRow

if TYPE_CHECKING:
    from fireclaw.agents.events import Event
    from fireclaw.agents.orders import Command

NOW = 1000.0
LIMITS = Limits(steps=4, turn_seconds=100, command_seconds=10)
ADVICE = "write a script file in parts and run it"
FORM = 'Right: {"command": "..."} (and, if needed: timeout_s, background)'
OUTFIT = Outfit((TOOLS["run_command"],), LIMITS)


def line(name: str = "1", text: str = "how are you?", sender: str = "alice", target: str = "#agents") -> LineRow:
    """Make a line as it comes in."""
    return LineRow(name, "a1", sender, "person", target, target, text, LineState.WAITING, NOW)


def call(command: object = "ls", call_id: str = "c1") -> ToolCall:
    """Make a wish to run a command."""
    return ToolCall(call_id, "run_command", {"command": command})


class Book:
    """An engine with what it has said so far."""

    def __init__(
        self,
        turn: Turn | None = None,
        waiting: list[LineRow] | None = None,
        limits: Limits = LIMITS,
        outfit: Outfit = OUTFIT,
    ) -> None:
        if turn is not None:
            turn.outfit = replace(turn.outfit, limits=limits)
        self.engine = Engine("a1", 7, replace(outfit, limits=limits), turn=turn, waiting=waiting or [])
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
    def saved(self) -> list[LineRow | TurnRow | StepRow | MemoryRow]:
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
        AskModel(step, Turn(turn, taken, OUTFIT, [step])),
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
    assert isinstance(book.saved[0], StepRow)
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
        (ToolCall("c1", "run_command", {}), f'error: run_command needs "command". {FORM}'),
        (call(["ls"]), f'error: "command" of run_command must be a text, not ["ls"]. {FORM}'),
        (call("  "), f'error: "command" of run_command is empty. {FORM}'),
        (call("a\0b"), 'error: "command" of run_command cannot hold a NUL byte'),
        (
            call("x" * 9000),
            f'error: "command" of run_command is longer than 8192 bytes; {ADVICE} instead',
        ),
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
    return Turn(row, replace(line(), state=LineState.TAKEN), OUTFIT, list(steps))


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


# Operators


GUARDED = replace(OUTFIT, approvals=Approvals(commands=("rm *",), seconds=60))


def asking(book: Book) -> StepRow:
    """Let the model want a command that needs a yes; return its step."""
    book.play(Heard(line()))
    book.reply("", call("rm -rf build"))
    (step,) = [command.step for command in book.commands if isinstance(command, AskApproval)]
    return step


def test_a_guarded_command_waits_for_a_yes() -> None:
    """Nothing has begun: the step is committed as asked, the asker is told, and the turn's clock stands still."""
    book = Book(outfit=GUARDED)
    step = asking(book)
    assert step.state is StepState.ASKED
    assert step.request["needs_approval"] == "rm *"
    assert step in book.saved
    assert not [command for command in book.commands if isinstance(command, CallTool)]
    assert book.said == [
        (MessageKind.ACK, "alice: an operator must say yes to `rm -rf build`; I wait up to 1 min"),
    ]
    assert book.engine.asked == step
    book.play(Tick(), after=50)
    assert book.said == [(MessageKind.SIGN, "is waiting for an operator's yes to `rm -rf build`, 50 s")]
    book.play(Decided(step.call_id, approved=True, by="carol"))
    started = replace(step, state=StepState.STARTED, result={"approved_by": "carol"}, started_at=NOW + 50)
    assert book.saved == [started]
    assert book.called == started
    book.play(Tick(), after=99)
    assert book.turn_states == [], "the wait did not count"
    book.result("gone")
    ended = book.saved[0]
    assert isinstance(ended, StepRow)
    assert ended.result == {"approved_by": "carol", "output": "gone"}


def test_a_no_is_told_to_the_model_and_not_asked_again() -> None:
    """The model hears who said no; the very same call is then refused without asking anybody."""
    book = Book(outfit=GUARDED)
    step = asking(book)
    book.play(Decided(step.call_id, approved=False, by="carol"))
    refused = book.saved[0]
    assert isinstance(refused, StepRow)
    assert refused.state is StepState.REFUSED
    assert str(refused.result["output"]).startswith("refused: carol, an operator, said no")
    book.reply("", call("rm -rf build"))
    again = book.saved[1]
    assert isinstance(again, StepRow)
    assert again.state is StepState.REFUSED
    assert "refused already" in str(again.result["output"])
    assert book.play(Decided(step.call_id, approved=True, by="mallory")) == book.commands
    assert not book.saved


def test_a_yes_that_does_not_come_ends_in_a_word() -> None:
    """At the end of the wait the asker and the model are told, and the turn goes on."""
    book = Book(outfit=GUARDED)
    step = asking(book)
    assert book.commands[-1] == Wait(NOW + 5)
    book.play(Tick(), after=60)
    assert book.said == [(MessageKind.ACK, "alice: nobody said yes to `rm -rf build` in time")]
    refused = book.saved[0]
    assert isinstance(refused, StepRow)
    assert refused.result == {"output": "refused: no operator said yes within 60 s; say so", "denied_by": ""}
    assert book.asked.step == 2
    assert book.play(Decided(step.call_id, approved=True, by="carol"))[:-1] == []


def test_a_wait_for_a_yes_survives_a_restart() -> None:
    """A new daemon asks the operators again; the time runs on from when they were asked first."""
    first = Book(outfit=GUARDED)
    step = asking(first)
    row = TurnRow("t1", "a1", "1", "#agents", TurnState.RUNNING, "", NOW)
    turn = Turn(row, replace(line(), state=LineState.TAKEN), GUARDED, [TWO_CALLS, replace(step, step=1)])
    book = Book(turn, outfit=GUARDED)
    assert book.play(Recovered(), after=59) == [AskApproval(step, turn), Wait(NOW + 60)]
    book.play(Tick(), after=1)
    assert book.said[0][1] == "alice: nobody said yes to `rm -rf build` in time"


def test_stop_ends_a_wait_for_a_yes() -> None:
    """A command that nobody wants any more cannot be approved any more."""
    book = Book(outfit=GUARDED)
    step = asking(book)
    book.play(Heard(line("2", text="stop")))
    assert book.turn_states == [TurnState.STOPPED]
    assert book.play(Decided(step.call_id, approved=True, by="carol")) == [Wait(None)]


@pytest.mark.parametrize(
    ("command", "pattern"),
    [
        ("rm -rf /", "rm *"),
        ("cd x && rm  -rf\ty", "rm *"),
        ("a; rm b", "rm *"),
        ("echo $(rm b)", "rm *"),
        ("x | sudo -n git push origin", "*git push*"),
        ("echo rm", ""),
        ("ls", ""),
    ],
)
def test_patterns_find_a_command_within_a_line(command: str, pattern: str) -> None:
    """A pattern is held against the line and against each command in it."""
    assert matching(("rm *", "*git push*"), "run_command", {"command": command}) == pattern
    assert matching(("rm *",), "write_file", {"content": command}) == ""


# What is changed meanwhile, what is made again


def test_a_turn_keeps_its_outfit() -> None:
    """What is changed during a turn holds for the next one: tools, limits, all of it."""
    book = Book()
    book.play(Heard(line()))
    book.play(Heard(line("2")))
    book.engine.outfit = replace(OUTFIT, tools=(), model="other")
    book.reply("", call())
    assert book.called.request["name"] == "run_command"
    book.result()
    book.reply("done")
    (asked,) = [command for command in book.commands if isinstance(command, AskModel)]
    assert asked.turn.outfit.model == "other"
    book.reply("", call())
    refused = book.saved[1]
    assert isinstance(refused, StepRow)
    assert refused.result["output"] == "error: there is no tool 'run_command'; your tools: none"


def test_recovery_makes_again_what_can_be_made_again() -> None:
    """A call that changes nothing, or only together with its end, is made again, not told as interrupted."""
    saving = replace(CALLED, request={**CALLED.request, "name": "save_memory", "arguments": {"text": "x"}})
    turn = running(TWO_CALLS, saving)
    assert Book(turn).play(Recovered()) == [CallTool(saving, turn), Wait(NOW + 5)]


def test_what_a_call_changes_is_committed_with_its_end() -> None:
    """The rows that a tool returns stand in the same answer as the end of its step; a late one's are let go."""
    book = Book()
    book.play(Heard(line()))
    book.reply("", call())
    row = MemoryRow("worker", "", 1, "x", "worker", "", NOW)
    step = book.called
    book.play(ToolEnded(step.call_id, {"output": "saved"}, rows=(row,)))
    assert book.saved[0] == row
    assert isinstance(book.saved[1], StepRow)
    assert book.play(ToolEnded(step.call_id, {"output": "saved"}, rows=(row,)))[:-1] == []


def test_a_look_may_be_repeated() -> None:
    """Looking at a command in the background is not the same call again: its result changes."""
    tools = (TOOLS["run_command"], TOOLS["check_command"])
    book = Book(outfit=replace(OUTFIT, tools=tools), limits=Limits(steps=9))
    book.play(Heard(line()))
    for _ in range(4):
        book.reply("", ToolCall("c1", "check_command", {"handle": "job-1"}))
        assert book.called.request["name"] == "check_command"
        book.result("running")


# Work that was handed over


def handed(name: str = "1") -> LineRow:
    """Make a line that another agent handed over."""
    text = '{"asked_by": "alice", "task": "count", "context": "", "done_when": "counted"}'
    return replace(line(name, text, sender="boss"), role=ROLE_HANDOFF)


def test_the_result_of_a_handoff_goes_to_the_sender_only() -> None:
    """Nothing is said in the channel, not even a sign of life; the end is settled in the turn's last commit."""
    book = Book()
    book.play(Heard(handed()))
    book.play(Tick(), after=6)
    assert book.said == []
    book.reply("it is 7")
    assert book.said == []
    taken = replace(handed(), state=LineState.TAKEN)
    assert Settle(taken, done=True, words="it is 7") in book.commands
    assert book.turn_states == [TurnState.DONE]


def test_a_handoff_that_cannot_be_done_is_settled_too() -> None:
    """A failing model, a full queue and a destruction all reach the sender."""
    book = Book()
    book.play(Heard(handed()))
    book.play(ModelFailed(book.asked.call_id, "no server"))
    assert (
        Settle(replace(handed(), state=LineState.TAKEN), done=False, words="I cannot answer: no server")
        in book.commands
    )
    book.play(Heard(line("0")))
    for number in range(1, MAX_WAITING + 1):
        book.play(Heard(handed(str(number))))
        assert book.said == []
    for name in ("6", "7"):
        book.play(Heard(handed(name)))
        (settled,) = [command for command in book.commands if isinstance(command, Settle)]
        assert settled.words.startswith("I am busy")
    book.play(Dismissed("carol"))
    settles = [command for command in book.commands if isinstance(command, Settle)]
    assert [each.line.line_id for each in settles] == [str(number) for number in range(1, MAX_WAITING + 1)]


def test_waiting_for_a_colleague_does_not_count() -> None:
    """The turn of the one who handed something over does not run out while the other works."""
    book = Book(outfit=replace(OUTFIT, tools=(TOOLS["handoff"],)))
    book.play(Heard(line()))
    wish = {"to": "bert", "task": "t", "context": "c", "done_when": "d"}
    book.reply("", ToolCall("c1", "handoff", wish))
    step = book.called
    book.play(Tick(), after=500)
    assert book.said == [(MessageKind.SIGN, "is waiting for bert, 500 s")]
    book.play(ToolEnded(step.call_id, {"output": "done"}))
    book.play(Tick(), after=99)
    assert book.turn_states == []
    book.play(Tick(), after=2)
    assert book.turn_states == [TurnState.FAILED]
