"""The turn engine under anything that can happen, crashes included: what must hold whatever the order is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fireclaw.agents.engine import MAX_WAITING, Engine
from fireclaw.agents.events import Decided, EffectBroke, Heard, ModelFailed, Recovered, Replied, Tick, ToolEnded
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
    StepRow,
    StepState,
    TurnRow,
    TurnState,
)
from fireclaw.store.memory import MemoryRow

if TYPE_CHECKING:
    from fireclaw.agents.events import Event

OUTFIT = Outfit(
    (TOOLS["run_command"], TOOLS["save_memory"], TOOLS["handoff"]),
    Limits(steps=4, turn_seconds=100),
    Approvals(commands=("rm *",), seconds=50),
)
WISHES = st.sampled_from(
    [
        ToolCall("c", "run_command", {"command": "ls"}),
        ToolCall("c", "run_command", {"command": "rm x"}),
        ToolCall("c", "run_command", {}),
        ToolCall("c", "save_memory", {"text": "x"}),
        ToolCall("c", "handoff", {"to": "b", "task": "t", "context": "c", "done_when": "d"}),
        ToolCall("c", "nothing", {}),
        ToolCall("c", "", {}),
    ]
)


class Life(RuleBasedStateMachine):
    """An engine with the rows that were committed, as a store would have them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.number = 0
        self.lines: dict[str, LineRow] = {}
        self.turns: dict[str, TurnRow] = {}
        self.steps: dict[str, StepRow] = {}
        self.ended: Counter[str] = Counter()
        self.under_way: StepRow | None = None  # the effect that runs
        self.engine = Engine("a", 1, OUTFIT, turn=None, waiting=[])
        self.play(Recovered())

    def play(self, event: Event) -> None:
        """Let an event happen; commit what comes of it, and take up the effect."""
        commands = self.engine.handle(event, self.now)
        assert isinstance(commands[-1], Wait)
        assert sum(isinstance(command, Wait) for command in commands) == 1
        if any(isinstance(command, Drop) for command in commands):
            self.under_way = None
        for command in commands:
            if isinstance(command, Save):
                self.commit(command.row)
            elif isinstance(command, Settle):
                assert command.line.role == ROLE_HANDOFF
                assert command.words
                self.ended[command.line.line_id] += 1
            elif isinstance(command, Say):
                line = self.lines[command.row.line_id]
                assert line.role != ROLE_HANDOFF, "work that was handed over is not talked about"
                if command.row.kind is MessageKind.ANSWER:
                    self.ended[line.line_id] += 1
        effects = [command for command in commands if isinstance(command, AskModel | CallTool)]
        asked = [command for command in commands if isinstance(command, AskApproval)]
        assert len(effects) + len(asked) <= 1
        for effect in effects:
            assert self.under_way is None, "one effect at a time"
            assert self.steps[effect.step.call_id] == effect.step, "it is committed before it begins"
            assert effect.step.state is StepState.STARTED
            self.under_way = effect.step
        for question in asked:
            assert self.steps[question.step.call_id].state is StepState.ASKED

    def commit(self, row: LineRow | TurnRow | StepRow | MemoryRow) -> None:
        """Write a row as the store does."""
        if isinstance(row, LineRow):
            before = self.lines[row.line_id]
            assert before.state is LineState.WAITING, "a line is taken or refused once"
            self.lines[row.line_id] = row
        elif isinstance(row, TurnRow):
            known = self.turns.get(row.turn_id)
            assert known is None or known.state is TurnState.RUNNING, "a turn ends once"
            self.turns[row.turn_id] = row
        elif isinstance(row, StepRow):
            known_step = self.steps.get(row.call_id)
            assert known_step is None or known_step.state in {StepState.ASKED, StepState.STARTED}
            self.steps[row.call_id] = row

    @rule(handed=st.booleans(), text=st.sampled_from(["hello", "stop"]), sender=st.sampled_from("xy"))
    def hear(self, handed: bool, text: str, sender: str) -> None:
        """Somebody says something, or hands something over."""
        self.number += 1
        name = str(self.number)
        role = ROLE_HANDOFF if handed else "person"
        record = '{"asked_by": "x", "task": "t", "context": "", "done_when": ""}'
        line = LineRow(name, "a", sender, role, "#c", "#c", record if handed else text, LineState.WAITING, self.now)
        self.lines[name] = line
        self.play(Heard(line))

    @precondition(lambda self: self.under_way is not None and self.under_way.kind != "tool")
    @rule(calls=st.lists(WISHES, max_size=3), text=st.sampled_from(["", "words"]), cut=st.booleans())
    def reply(self, calls: list[ToolCall], text: str, cut: bool) -> None:
        """The model replies."""
        assert self.under_way is not None
        step, self.under_way = self.under_way, None
        finish = Finish.LENGTH if cut else Finish.STOP
        self.play(Replied(step.call_id, ChatReply(text, tuple(calls), finish)))
        if cut:
            assert self.under_way is None or self.under_way.kind != "tool", "a call that was cut off is not made"

    @precondition(lambda self: self.under_way is not None and self.under_way.kind != "tool")
    @rule(unusable=st.booleans())
    def fail(self, unusable: bool) -> None:
        """The model fails."""
        assert self.under_way is not None
        step, self.under_way = self.under_way, None
        self.play(ModelFailed(step.call_id, "no", unusable))

    @precondition(lambda self: self.under_way is not None and self.under_way.kind == "tool")
    @rule(failed=st.booleans())
    def end_call(self, failed: bool) -> None:
        """A tool call ends."""
        assert self.under_way is not None
        step, self.under_way = self.under_way, None
        rows = (MemoryRow("a", "", 1, "x", "a", "", self.now),) if step.request["name"] == "save_memory" else ()
        self.play(ToolEnded(step.call_id, {"output": "out"}, failed, rows))

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def break_effect(self) -> None:
        """An effect breaks."""
        assert self.under_way is not None
        step, self.under_way = self.under_way, None
        self.play(EffectBroke(step.call_id, "KeyError"))

    @precondition(lambda self: self.engine.asked is not None)
    @rule(approved=st.booleans(), late=st.booleans())
    def decide(self, approved: bool, late: bool) -> None:
        """An operator decides, about this call or an earlier one."""
        asked = self.engine.asked
        assert asked is not None
        self.play(Decided("other" if late else asked.call_id, approved, "op"))
        assert (self.engine.asked == asked) == late

    @rule(seconds=st.sampled_from([1.0, 6.0, 51.0, 101.0]))
    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.play(Tick())

    @rule()
    def crash(self) -> None:
        """The daemon is killed; another one goes on from the rows."""
        self.under_way = None
        running = [turn for turn in self.turns.values() if turn.state is TurnState.RUNNING]
        turn = None
        if running:
            (row,) = running
            steps = [step for step in self.steps.values() if step.turn_id == row.turn_id]
            turn = Turn(row, self.lines[row.line_id], OUTFIT, sorted(steps, key=lambda step: step.step))
        waiting = [line for line in self.lines.values() if line.state is LineState.WAITING]
        self.engine = Engine("a", 2, replace(OUTFIT), turn=turn, waiting=waiting)
        self.play(Recovered())

    @invariant()
    def something_goes_on(self) -> None:
        """A turn that runs has an effect under way or waits for an operator, and lines wait only behind a turn."""
        running = [turn for turn in self.turns.values() if turn.state is TurnState.RUNNING]
        waiting = [line for line in self.lines.values() if line.state is LineState.WAITING]
        assert len(running) <= 1
        assert bool(running) == self.engine.is_working == (self.under_way is not None or self.engine.asked is not None)
        assert len(waiting) == self.engine.waiting <= MAX_WAITING
        assert running or not waiting

    @invariant()
    def everybody_is_told_once(self) -> None:
        """A line of which something came has its end; one that waits or is worked on has none yet."""
        for name, line in self.lines.items():
            turn = self.turns.get(f"t{name}")
            is_open = line.state is LineState.WAITING or (turn is not None and turn.state is TurnState.RUNNING)
            is_silent = line.state is LineState.REFUSED or (line.state is LineState.TAKEN and turn is None)
            if is_open:
                assert not self.ended[name]
            elif line.role == ROLE_HANDOFF:
                assert self.ended[name] == 1
            elif not is_silent:  # busy is said once to each person, and a stop's answer is that of the turn it ends
                assert self.ended[name] >= 1


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
