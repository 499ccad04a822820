"""The turn engine of one agent: events in, commands out. Sans-I/O; ``agent`` carries the commands out.

The rule that makes a crash harmless: whoever runs the engine commits all rows of one answer of ``handle`` in one
transaction, and only then begins the effects in it. A row that says ``started`` therefore stands before each effect,
and an engine that is made from the rows after a crash (event ``Recovered``) knows all there is to know: a model call
is made again, and so is a tool call that changes nothing, or something only in the commit that ends it; any other is
told to the model as interrupted.

One line is worked on at a time. A turn asks the model, makes the calls that the model wants, and asks again, until the
model answers, the steps or the time run out, somebody says stop, or the model fails; each of these ends in words to
whoever asked. A call may need an operator's yes first: its step is then ``asked``, nothing has begun, and it waits for
``Decided`` or for its time to run out. While a turn waits for people or for another agent its own clock stands still.

A line may also be work that another agent handed over: nothing is said then, the end goes to that agent (``Settle``).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

from fireclaw.agents.approvals import matching
from fireclaw.agents.events import (
    Decided,
    Dismissed,
    EffectBroke,
    Event,
    Heard,
    ModelFailed,
    Recovered,
    Replied,
    Tick,
    ToolEnded,
)
from fireclaw.agents.orders import AskApproval, AskModel, CallTool, Command, Drop, Save, Say, Settle, Wait
from fireclaw.agents.speech import lines_of, one_line
from fireclaw.agents.tools import POLLING, REPEATABLE, refusal
from fireclaw.agents.turn import ROLE_HANDOFF, Turn, request_of, result_of
from fireclaw.irc.message import is_channel
from fireclaw.llm.chat import Finish
from fireclaw.store.agents import (
    LineRow,
    LineState,
    MessageKind,
    MessageRow,
    MessageState,
    StepKind,
    StepRow,
    StepState,
    TurnRow,
    TurnState,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fireclaw.agents.outfit import Outfit
    from fireclaw.llm.chat import ChatReply, ToolCall

MAX_WAITING = 5  # lines that wait for their turn; more are refused in words
MAX_WASTED = 3  # useless replies in a row before the model is asked without tools
MAX_SAME_CALL = 2  # times that the very same call is made in a turn
FIRST_SIGN_S = 5.0
NEXT_SIGN_S = 30.0

INTERRUPTED = "[interrupted: the agent's host program was restarted while this ran; it may or may not have finished]"


class Engine:
    """One agent's mind at work.

    ::

        engine = Engine(agent_id, epoch, outfit, turn=None, waiting=[])
        commands = engine.handle(Recovered(), now)
        commands = engine.handle(Heard(line), now)      # Save(line), Save(turn), Save(step), AskModel, Wait

    Attributes:
        outfit: what turns that begin from now on are made with; the one on its way keeps its own.

    Args:
        agent_id: whose.
        epoch: the daemon's; names what is said in it.
        outfit: what turns that begin are made with.
        turn: the turn that ran when the last daemon ended.
        waiting: the lines that waited then, oldest first.
    """

    def __init__(
        self,
        agent_id: str,
        epoch: int,
        outfit: Outfit,
        *,
        turn: Turn | None,
        waiting: Sequence[LineRow],
    ) -> None:
        self._agent_id = agent_id
        self._epoch = epoch
        self.outfit = outfit
        self._turn = turn
        self._waiting = list(waiting)
        self._told_busy: set[str] = set()
        self._began = 0.0
        self._parked_at: float | None = None  # since when the turn waits for people or another agent
        self._sign_at = 0.0
        self._signs = 0
        self._dismissed = ""
        self._now = 0.0
        self._out: list[Command] = []

    @property
    def is_working(self) -> bool:
        """Whether a turn runs."""
        return self._turn is not None

    @property
    def waiting(self) -> int:
        """How many lines wait for their turn."""
        return len(self._waiting)

    @property
    def asked(self) -> StepRow | None:
        """The step that waits for an operator's yes."""
        step = self._turn.open_step if self._turn else None
        return step if step is not None and step.state is StepState.ASKED else None

    @property
    def turn(self) -> Turn | None:
        """The turn that runs."""
        return self._turn

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take an event in and return what is to be done, in order.

        Args:
            event: what happened.
            now: seconds since the epoch.
        """
        self._now = now
        self._out = []
        match event:
            case Heard():
                self._hear(event.line)
            case Replied():
                self._take_reply(event.call_id, event.reply)
            case ModelFailed():
                self._take_model_failure(event)
            case ToolEnded():
                self._take_result(event)
            case Decided():
                self._take_decision(event)
            case EffectBroke():
                if step := self._ending(event.call_id):
                    self._end_step(step, StepState.FAILED, {"error": event.reason})
                    self._end(TurnState.FAILED, f"something broke in me: {event.reason}")
            case Tick():
                self._tick()
            case Dismissed():
                self._dismiss(event.by)
            case Recovered():
                self._recover()
            case _:
                assert_never(event)
        self._out.append(Wait(min(self._sign_at, self._deadline) if self._turn else None))
        return self._out

    # Lines

    def _hear(self, line: LineRow) -> None:
        if self._dismissed:
            self._refuse(line, f"I am being destroyed, as {self._dismissed} wants it")
        elif _is_stop(line.text):
            self._stop(line)
        elif self._turn is None:
            self._begin(line)
        elif len(self._waiting) < MAX_WAITING:
            self._queue(line, self._turn)
        elif line.sender in self._told_busy and line.role != ROLE_HANDOFF:
            self._out.append(Save(replace(line, state=LineState.REFUSED)))
        else:
            self._told_busy.add(line.sender)
            self._refuse(line, f"I am busy, and {MAX_WAITING} lines wait already; ask again when one is done")

    def _queue(self, line: LineRow, turn: Turn) -> None:
        self._waiting.append(line)
        self._out.append(Save(replace(line, state=LineState.WAITING)))
        ahead = "next" if len(self._waiting) == 1 else f"number {len(self._waiting)} in line"
        words = f"noted, you are {ahead}; I am still at work for {turn.line.sender}"
        self._say(line, f"{line.line_id}/ack", MessageKind.ACK, words)

    def _refuse(self, line: LineRow, words: str) -> None:
        self._out.append(Save(replace(line, state=LineState.REFUSED)))
        if line.role == ROLE_HANDOFF:
            self._out.append(Settle(line, done=False, words=words))
        self._say(line, f"{line.line_id}/refused", MessageKind.ANSWER, words)

    def _stop(self, line: LineRow) -> None:
        if self._turn is None:
            self._refuse(line, "there is nothing to stop")
            return
        self._out.append(Save(replace(line, state=LineState.TAKEN)))
        same = line.sender == self._turn.line.sender
        self._cut_short(TurnState.STOPPED, "stopped" if same else f"stopped, as {line.sender} wants it")

    def _dismiss(self, by: str) -> None:
        self._dismissed = by
        waiting, self._waiting = self._waiting, []
        told = set()
        if self._turn is not None:
            told.add((self._turn.line.sender, self._turn.line.target))
            self._cut_short(TurnState.STOPPED, f"stopped: I am being destroyed, as {by} wants it")
        for line in waiting:
            if (line.sender, line.target) in told and line.role != ROLE_HANDOFF:
                self._out.append(Save(replace(line, state=LineState.REFUSED)))
            else:
                told.add((line.sender, line.target))
                self._refuse(line, f"I am being destroyed, as {by} wants it")

    # Turns

    def _begin(self, line: LineRow) -> None:
        line = replace(line, state=LineState.TAKEN)
        turn_id = f"t{line.line_id}"
        row = TurnRow(turn_id, self._agent_id, line.line_id, line.conversation, TurnState.RUNNING, "", self._now)
        self._turn = Turn(row, line, self.outfit)
        self._start_clocks()
        self._out += [Save(line), Save(row)]
        self._ask()

    def _recover(self) -> None:
        if self._turn is None:
            self._begin_next()
            return
        self._start_clocks()
        step = self._turn.open_step
        if step is None:
            self._advance()
        elif step.state is StepState.ASKED:
            self._parked_at = self._now
            self._out.append(AskApproval(step, self._turn))
        elif step.kind is StepKind.TOOL and step.request["name"] in REPEATABLE:
            self._call(step)
        elif step.kind is StepKind.TOOL:
            self._end_step(step, StepState.INTERRUPTED, {"output": INTERRUPTED})
            self._advance()
        else:
            self._out.append(AskModel(step, self._turn))

    def _start_clocks(self) -> None:
        self._began = self._now
        self._parked_at = None
        self._sign_at = self._now + FIRST_SIGN_S

    @property
    def _deadline(self) -> float:
        if asked := self.asked:
            return asked.started_at + self._working.outfit.approvals.seconds
        return math.inf if self._parked_at is not None else self._began + self._working.outfit.limits.turn_seconds

    def _go_on(self) -> None:
        """Let the turn's clock go on after a wait, as if the wait had not been."""
        if self._parked_at is not None:
            self._began += self._now - self._parked_at
            self._parked_at = None

    def _end(self, state: TurnState, answer: str) -> None:
        """End the turn with these words, and take up the next line."""
        turn = self._working
        self._out.append(Save(replace(turn.row, state=state, answer=answer, finished_at=self._now)))
        number = len(turn.steps)
        if turn.line.role == ROLE_HANDOFF:
            self._out.append(Settle(turn.line, done=state is TurnState.DONE, words=answer))
        for part, text in enumerate(lines_of(answer, address=_address(turn.line))):
            self._say_line(turn.line, f"{turn.row.turn_id}/{number}/{part}", MessageKind.ANSWER, text)
        self._turn = None
        self._told_busy.clear()
        self._begin_next()

    def _begin_next(self) -> None:
        if self._waiting:
            self._begin(self._waiting.pop(0))

    def _cut_short(self, state: TurnState, answer: str) -> None:
        """End the turn in the middle of a step."""
        if step := self._working.open_step:
            self._end_step(step, StepState.FAILED, {"error": answer})
            self._out.append(Drop())
        self._end(state, answer)

    # Steps

    def _ask(self, *, final: bool = False) -> None:
        """Ask the model; at the end of its chances without tools, so that it can only answer."""
        turn = self._working
        final = final or turn.model_steps >= turn.outfit.limits.steps - 1 or turn.wasted >= MAX_WASTED
        step = self._start_step(StepKind.FINAL if final else StepKind.MODEL, {})
        self._out.append(AskModel(step, turn))

    def _advance(self) -> None:
        """Make the next call that the model wants, or tell it how all of them went."""
        turn = self._working
        for call in turn.pending:
            if reason := self._objection(turn, call):
                step = self._start_step(StepKind.TOOL, self._request(call), save=False)
                self._end_step(step, StepState.REFUSED, {"output": reason})
                continue
            if pattern := matching(turn.outfit.approvals.commands, call.name, call.arguments):
                self._ask_approval(turn, {**self._request(call), "needs_approval": pattern})
            else:
                self._call(self._start_step(StepKind.TOOL, self._request(call)))
            return
        self._ask()

    def _objection(self, turn: Turn, call: ToolCall) -> str:
        """Say why a call is not made, in words for the model; empty where it is."""
        if reason := call.error or refusal(call.name, call.arguments, turn.outfit.names):
            return reason
        if turn.was_denied(call):
            return "refused: this very call was refused already; do something else, or say that you may not"
        if call.name not in POLLING and turn.times_made(call) >= MAX_SAME_CALL:
            return f"refused: you made this very call {MAX_SAME_CALL} times; use what it gave, or do something else"
        return ""

    def _call(self, step: StepRow) -> None:
        if step.request["name"] == "handoff":
            self._parked_at = self._now
        self._out.append(CallTool(step, self._working))

    def _ask_approval(self, turn: Turn, request: Mapping[str, object]) -> None:
        step = self._start_step(StepKind.TOOL, request, state=StepState.ASKED)
        self._parked_at = self._now
        self._out.append(AskApproval(step, turn))
        minutes = -(-turn.outfit.approvals.seconds // 60)
        words = f"an operator must say yes to `{_command_of(step)}`; I wait up to {minutes} min"
        self._say(turn.line, f"{step.call_id}/asked", MessageKind.ACK, words)

    def _request(self, call: ToolCall) -> dict[str, object]:
        steps = self._working.steps
        asked_by = next(step.call_id for step in reversed(steps) if step.kind is not StepKind.TOOL)
        return {**request_of(call), "asked_by": asked_by}

    def _start_step(
        self,
        kind: StepKind,
        request: Mapping[str, object],
        *,
        state: StepState = StepState.STARTED,
        save: bool = True,
    ) -> StepRow:
        turn = self._working
        number = len(turn.steps)
        step = StepRow(turn.row.turn_id, number, kind, state, request, {}, self._now)
        turn.put(step)
        if save:
            self._out.append(Save(step))
        return step

    def _end_step(self, step: StepRow, state: StepState, result: Mapping[str, object]) -> None:
        ended = replace(step, state=state, result={**step.result, **result}, finished_at=self._now)
        self._working.put(ended)
        self._out.append(Save(ended))

    def _ending(self, call_id: str) -> StepRow | None:
        """Return the open step if it is the one meant: a result may come after its turn was stopped."""
        step = self._turn.open_step if self._turn else None
        return step if step is not None and step.call_id == call_id else None

    @property
    def _working(self) -> Turn:
        assert self._turn is not None, "no turn runs"
        return self._turn

    # Results

    def _take_reply(self, call_id: str, reply: ChatReply) -> None:
        step = self._ending(call_id)
        if step is None:
            return
        # A cut-off call is never made, even where its JSON happens to be whole; a final step offered no tools.
        may_call = step.kind is StepKind.MODEL and reply.finish is not Finish.LENGTH
        calls = [call for call in reply.tool_calls if call.name] if may_call else []
        words = "" if reply.tool_calls and not calls else reply.text
        if calls:
            self._end_step(step, StepState.DONE, result_of(reply, calls))
            self._advance()
        elif lines_of(words):
            self._end_step(step, StepState.DONE, result_of(reply, []))
            self._end(TurnState.DONE, words + (" …" if reply.finish is Finish.LENGTH else ""))
        else:
            self._waste(step, "the reply held nothing to say or do", final=False)

    def _take_model_failure(self, event: ModelFailed) -> None:
        step = self._ending(event.call_id)
        if step is None:
            return
        if event.unusable:
            # The gateway has asked again already; what is left to try is a question without tools.
            self._waste(step, event.reason, final=True)
        else:
            self._end_step(step, StepState.FAILED, {"error": event.reason})
            self._end(TurnState.FAILED, f"I cannot answer: {event.reason}")

    def _waste(self, step: StepRow, reason: str, *, final: bool) -> None:
        """Go on after a reply that was of no use."""
        self._end_step(step, StepState.FAILED, {"error": reason})
        if step.kind is StepKind.FINAL:
            self._end(TurnState.FAILED, f"I have no answer: {reason}")
        else:
            self._ask(final=final)

    def _take_result(self, event: ToolEnded) -> None:
        if step := self._ending(event.call_id):
            self._go_on()
            self._out += [Save(row) for row in event.rows]
            self._end_step(step, StepState.FAILED if event.failed else StepState.DONE, event.result)
            self._advance()

    def _take_decision(self, event: Decided) -> None:
        step = self.asked
        if step is None or step.call_id != event.call_id:
            return
        self._go_on()
        if event.approved:
            step = replace(step, state=StepState.STARTED, result={"approved_by": event.by}, started_at=self._now)
            self._working.put(step)
            self._out.append(Save(step))
            self._call(step)
        else:
            words = f"refused: {event.by}, an operator, said no; do not try it in another way"
            self._end_step(step, StepState.REFUSED, {"output": words, "denied_by": event.by})
            self._advance()

    # Time

    def _tick(self) -> None:
        if self._turn is None:
            return
        if self._now >= self._deadline and (step := self.asked):
            self._expire(step)
        elif self._now >= self._deadline:
            seconds = self._turn.outfit.limits.turn_seconds
            words = f"I gave up after {seconds} s, the time limit of a turn, {_doing(self._turn, self._now)}"
            self._cut_short(TurnState.FAILED, words)
        elif self._now >= self._sign_at:
            self._sign_at = self._now + NEXT_SIGN_S
            self._signs += 1
            message_id = f"{self._turn.row.turn_id}/sign/{self._epoch}.{self._signs}"
            self._say_line(self._turn.line, message_id, MessageKind.SIGN, f"is {_doing(self._turn, self._now)}")

    def _expire(self, step: StepRow) -> None:
        """Go on without a yes that did not come in time."""
        turn = self._working
        self._go_on()
        words = f"refused: no operator said yes within {turn.outfit.approvals.seconds} s; say so"
        self._end_step(step, StepState.REFUSED, {"output": words, "denied_by": ""})
        self._say(
            turn.line, f"{step.call_id}/expired", MessageKind.ACK, f"nobody said yes to `{_command_of(step)}` in time"
        )
        self._advance()

    # Words

    def _say(self, line: LineRow, message_id: str, kind: MessageKind, words: str) -> None:
        self._say_line(line, message_id, kind, lines_of(words, address=_address(line))[0])

    def _say_line(self, line: LineRow, message_id: str, kind: MessageKind, text: str) -> None:
        if line.role == ROLE_HANDOFF:
            return
        row = MessageRow(
            message_id, self._agent_id, line.line_id, line.target, kind, text, MessageState.QUEUED, self._now
        )
        self._out.append(Say(row))


def missing_end(line: LineRow, epoch: int, reason: str, agent_id: str, now: float) -> MessageRow:
    """Say that words of ours may not have arrived; one for each line and daemon, however many are missing.

    Args:
        line: what they answered.
        epoch: the daemon's that says so.
        reason: what happened.
        agent_id: who says it.
        now: seconds since the epoch.
    """
    words = f"{reason}; the end of my last answer may be missing"
    (text,) = lines_of(words, address=_address(line))
    return MessageRow(
        f"{line.line_id}/missing/{epoch}",
        agent_id,
        line.line_id,
        line.target,
        MessageKind.ANSWER,
        text,
        MessageState.QUEUED,
        now,
    )


def _address(line: LineRow) -> str:
    return line.sender if is_channel(line.target) else ""


def _is_stop(text: str) -> bool:
    return text.strip().rstrip("!.").lower() == "stop"


def _doing(turn: Turn, now: float) -> str:
    """Say what a turn is at: "running `make test`, 40 s"."""
    step = turn.open_step
    if step is None:
        return "at work"
    seconds = f"{max(0.0, now - step.started_at):.0f} s"
    if step.kind is not StepKind.TOOL:
        return f"thinking, {seconds}"
    if step.state is StepState.ASKED:
        return f"waiting for an operator's yes to `{_command_of(step)}`, {seconds}"
    name = str(step.request["name"])
    if name == "run_command":
        return f"running `{_command_of(step)}`, {seconds}"
    if name == "handoff":
        return f"waiting for {one_line(str(_argument(step, 'to')), 30)}, {seconds}"
    return f"using {name}, {seconds}"


def _command_of(step: StepRow) -> str:
    return one_line(str(_argument(step, "command")), 80)


def _argument(step: StepRow, name: str) -> object:
    arguments = step.request["arguments"]
    return arguments.get(name, "") if isinstance(arguments, dict) else ""
