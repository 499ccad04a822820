"""One agent at work: carries out what its engine decides, with its mind, hands and voice.

Everything happens on the event loop's thread, in one place: ``_handle`` gives the engine an event, commits the rows
of its answer in one transaction, records them, and only then begins the effects. An effect is one task; when it ends
it dispatches its result. So between two commits at most one effect is on its way, and a process that is killed at any
moment leaves rows from which the next daemon can go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
from functools import partial
from typing import TYPE_CHECKING

from fireclaw.agents import audit
from fireclaw.agents.addressing import addressed_text
from fireclaw.agents.approvals import approval_of
from fireclaw.agents.context import fit
from fireclaw.agents.engine import Engine
from fireclaw.agents.events import Decided, Dismissed, EffectBroke, Heard, ModelFailed, Recovered, Replied, Tick
from fireclaw.agents.models import pick_model
from fireclaw.agents.orders import AskApproval, AskModel, CallTool, Drop, Save, Say, Settle, Wait
from fireclaw.agents.speaker import Speaker
from fireclaw.agents.speech import one_line
from fireclaw.agents.turn import ROLE_PERSON, Turn, exchanges, past_turn, person_of, question
from fireclaw.errors import ConflictError, FireclawError, ModelError, NotFoundError
from fireclaw.irc.message import fold
from fireclaw.llm.chat import ChatRequest
from fireclaw.store.agents import LineRow, LineState, StepKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Sequence

    from fireclaw.agents.approvals import Approval
    from fireclaw.agents.events import Event
    from fireclaw.agents.handoff import Switchboard
    from fireclaw.agents.hands import LateHands
    from fireclaw.agents.memory import Memory
    from fireclaw.agents.orders import Command
    from fireclaw.agents.outfit import Outfit
    from fireclaw.agents.ports import Mind, Record, Voice
    from fireclaw.agents.toolbox import Toolbox
    from fireclaw.irc.events import Message
    from fireclaw.store.agents import AgentRow, Notebook, Row, StepRow
    from fireclaw.store.handoffs import HandoffRow

log = logging.getLogger(__name__)

TEMPERATURE = 0.2
MAX_PAST_TURNS = 20


class Agent:
    """An agent of this daemon.

    ::

        agent = Agent(row, template, …)
        agent.start()                        # goes on where the last daemon ended
        agent.speak_with(voice)
        agent.hear(message)                  # what IRC brings
        agent.reload(outfit)                 # for its next turn
        agent.decide(code, approved=True, by="alice")
        await agent.dismiss("alice")         # the end: the turn is stopped in words
        await agent.aclose()                 # or only of this daemon's part: the turn stays open

    Args:
        row: who it is.
        outfit: what its turns are made with.
        notebook: its rows.
        mind: the way to models.
        hands: its machine.
        toolbox: its tools at work.
        memory: what it remembers.
        switchboard: where the results of what was handed to it go.
        announce: tells the operators something.
        models: the names of the models that can be asked now.
        record: the ledger's ``append``.
        clock: seconds since the epoch.
        ours: folded nicks of programs of ours, to whom it does not listen.
    """

    def __init__(
        self,
        row: AgentRow,
        outfit: Outfit,
        *,
        notebook: Notebook,
        mind: Mind,
        hands: LateHands,
        toolbox: Toolbox,
        memory: Memory,
        switchboard: Switchboard,
        announce: Callable[[str], None],
        models: Callable[[], Sequence[str]],
        record: Record,
        clock: Callable[[], float],
        ours: Container[str],
    ) -> None:
        self.row = row
        self.failure = ""
        self._notebook = notebook
        self._mind = mind
        self._hands = hands
        self._toolbox = toolbox
        self._memory = memory
        self._switchboard = switchboard
        self._announce = announce
        self._models = models
        self._record = record
        self._clock = clock
        self._ours = ours
        self._heard = 0
        self._speaker = Speaker(row.name, notebook, self._save, clock)
        self._engine = Engine(
            row.agent_id,
            notebook.epoch,
            outfit,
            turn=_running_turn(notebook, outfit),
            waiting=notebook.waiting(),
        )
        self._effect: asyncio.Task[None] | None = None
        self._warming: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def state(self) -> str:
        """What it is doing, in one word or the reason why nothing."""
        if self.failure:
            return f"failed: {self.failure}"
        return "working" if self._engine.is_working else "idle"

    @property
    def waiting(self) -> int:
        """How many lines wait for their turn."""
        return self._engine.waiting

    @property
    def approval(self) -> Approval | None:
        """The question to the operators that it waits with."""
        step, turn = self._engine.asked, self._engine.turn
        return approval_of(step, person_of(turn.line)) if step is not None and turn is not None else None

    @property
    def outfit(self) -> Outfit:
        """What its next turn is made with."""
        return self._engine.outfit

    @property
    def model(self) -> str:
        """The model that it asks next; empty: the default."""
        return _model_of(self.outfit, self._models())

    def start(self) -> None:
        """Settle what an earlier daemon left, and go on with its turn."""
        self._guarded(self._speaker.recover)
        self._dispatch(Recovered())

    def warm(self) -> None:
        """Have the model read what every prompt begins with: the first answer comes the sooner."""
        outfit = self.outfit
        request = ChatRequest(
            agent=self.row.name,
            turn_id="",
            step=0,
            call_id=f"{self.row.agent_id}/warm",
            messages=outfit.fixed,
            tools=outfit.tools,
            max_tokens=1,
            temperature=TEMPERATURE,
            model=self.model,
        )
        self._warming = asyncio.create_task(self._mind.warm(request), name=f"warm {self.row.name}")

    def speak_with(self, voice: Voice) -> None:
        """Begin to say what stands in the outbox."""
        self._speaker.start(voice)

    def hear(self, message: Message) -> None:
        """Take in what was said where the agent can hear it; what is not for it is let go."""
        text = addressed_text(message, self.row.name, self._ours)
        if text is None:
            return
        self._heard += 1
        line = LineRow(
            line_id=self._line_id(message),
            agent_id=self.row.agent_id,
            sender=message.sender.nick,
            role=ROLE_PERSON,
            target=message.reply_to,
            conversation=str(message.sender) if message.is_private else fold(message.target, "ascii"),
            text=text,
            state=LineState.WAITING,
            received_at=self._clock(),
        )
        self._dispatch(Heard(line))

    def take(self, line: LineRow) -> None:
        """Take in work that another agent handed over; its line is committed."""
        self._dispatch(Heard(line))

    def reload(self, outfit: Outfit) -> None:
        """Make the next turns with this; the one on its way ends with the old."""
        self._engine.outfit = outfit
        if not self._closed and (self._warming is None or self._warming.done()):
            self.warm()

    def decide(self, code: str, *, approved: bool, by: str) -> Approval:
        """Say yes or no to the command that waits for it.

        Args:
            code: of the question; somebody may have the one before in mind.
            approved: yes.
            by: which operator.

        Raises:
            NotFoundError: nothing waits.
            ConflictError: another command waits.
        """
        approval = self.approval
        if approval is None:
            raise NotFoundError(f"{self.row.name} does not wait for a yes", hint="its time may have run out")
        if code.lower() != approval.code:
            raise ConflictError(
                f"{self.row.name} waits with {approval.code}, not {code}: {approval.command}",
                hint=f"!approve {self.row.name} {approval.code}",
            )
        self._dispatch(Decided(approval.call_id, approved, by))
        return approval

    async def dismiss(self, by: str, *, seconds: float = 3.0) -> None:
        """Stop the turn in words, for good, and wait a little until they are said."""
        self._dispatch(Dismissed(by))
        await self._speaker.drain(seconds)

    async def aclose(self) -> None:
        """End this daemon's part. What was begun stays as it is for the next one, what still comes is committed."""
        self._closed = True
        self._halt()
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.wait([self._warming])
        if self._effect is not None:
            await asyncio.wait([self._effect])
        await self._speaker.aclose()
        await self._hands.aclose()

    # The one place where things happen

    def _dispatch(self, event: Event) -> None:
        self._guarded(lambda: self._handle(event))

    def _guarded(self, act: Callable[[], None]) -> None:
        """Act, unless something went wrong before; what goes wrong now ends this agent here, not its caller."""
        if self.failure:
            return
        try:
            act()
        except (FireclawError, sqlite3.Error):
            assert self.failure, "only _save() raises these"
        except Exception as error:
            log.exception("%s broke", self.row.name)
            self._fail(f"{type(error).__name__}: {error}")

    def _handle(self, event: Event) -> None:
        commands = self._engine.handle(event, self._clock())
        rows: list[Row] = [command.row for command in commands if isinstance(command, Save | Say)]
        results = [row for command in commands if isinstance(command, Settle) if (row := self._result(command))]
        self._save([*rows, *results], [audit.heard(event.line)] if isinstance(event, Heard) else [])
        for row in results:
            self._switchboard.tell(row)
        for command in commands:
            self._carry_out(command)

    def _result(self, command: Settle) -> HandoffRow | None:
        return self._switchboard.settled(command.line, done=command.done, words=command.words)

    def _save(self, rows: list[Row], first: Sequence[audit.Event] = ()) -> None:
        """Commit rows and record them. What cannot be committed and recorded is not done: the agent stops.

        Raises:
            NotOursError: another daemon owns the agent now.
            SetupError: the ledger cannot be written.
            sqlite3.Error: the store cannot.
        """
        try:
            if rows:
                self._notebook.commit(rows)
            for event in (*first, *filter(None, map(audit.changed, rows))):
                machine = self._hands.machine_id
                self._record(event.type, event.data, agent=self.row.name, machine=machine, origin=event.origin)
        except (FireclawError, sqlite3.Error) as error:
            log.error("%s stops: %s", self.row.name, error)  # noqa: TRY400 (the message is the reason)
            self._fail(str(error))
            raise

    def _carry_out(self, command: Command) -> None:
        match command:
            case Save() | Settle():
                pass
            case Say():
                self._speaker.wake()
            case AskModel():
                self._begin(command.step, partial(self._think, command.step, command.turn))
            case CallTool():
                self._begin(command.step, partial(self._toolbox.use, command.step, command.turn))
            case AskApproval():
                self._ask_operators()
            case Drop():
                self._drop()
            case Wait():
                self._wait(command.until)

    def _halt(self) -> None:
        self._drop()
        self._wait(None)

    def _fail(self, reason: str) -> None:
        self.failure = one_line(reason, 200)
        self._halt()

    def _wait(self, until: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if until is not None and not self._closed:
            delay = max(0.0, until - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._dispatch, Tick())

    # Effects

    def _begin(self, step: StepRow, effect: Callable[[], Awaitable[Event]]) -> None:
        if not self._closed:
            self._effect = asyncio.create_task(self._finish(step, effect), name=f"{self.row.name} {step.call_id}")

    def _drop(self) -> None:
        if self._effect is not None and self._effect is not asyncio.current_task():
            self._effect.cancel()

    async def _finish(self, step: StepRow, effect: Callable[[], Awaitable[Event]]) -> None:
        try:
            event = await effect()
        except Exception as error:  # a mistake of ours: the turn must not hang, and whoever asked must hear of it
            log.exception("%s: step %s broke", self.row.name, step.call_id)
            event = EffectBroke(step.call_id, one_line(f"{type(error).__name__}: {error}", 200))
        self._dispatch(event)

    async def _think(self, step: StepRow, turn: Turn) -> Event:
        try:
            reply = await self._mind.chat(self._request(step, turn))
        except ModelError as error:
            return ModelFailed(step.call_id, one_line(str(error), 300), unusable=error.kind == "bad-output")
        return Replied(step.call_id, reply)

    def _ask_operators(self) -> None:
        approval = self.approval
        if approval is not None and not self._closed:
            verb = f"{self.row.name} {approval.code}"
            self._announce(
                f"{self.row.name} wants to run `{approval.command}` for {approval.asked_by}: !approve {verb}"
                f", or !approve {verb} no"
            )

    def _request(self, step: StepRow, turn: Turn) -> ChatRequest:
        """Build the prompt.

        Raises:
            ModelError: it does not fit.
        """
        notebook, conversation, outfit = self._notebook, turn.row.conversation, turn.outfit
        past = [
            past_turn(row, notebook.line(row.line_id), notebook.steps(row.turn_id))
            for row in notebook.history(conversation, MAX_PAST_TURNS)
        ]
        messages = fit(
            (*outfit.fixed, *self._memory.messages(conversation)),
            past,
            question(turn.line),
            exchanges(turn.steps),
            outfit.prompt_tokens,
            ordinal=notebook.turns(conversation) - len(past),
        )
        return ChatRequest(
            agent=self.row.name,
            turn_id=step.turn_id,
            step=step.step,
            call_id=step.call_id,
            messages=messages,
            tools=outfit.tools if step.kind is StepKind.MODEL else (),
            max_tokens=outfit.reply_tokens,
            temperature=TEMPERATURE,
            model=_model_of(outfit, self._models()),
            person=person_of(turn.line),
            budget=outfit.budget,
        )

    def _line_id(self, message: Message) -> str:
        """Name a line: the same line for the same agent has the same id, whoever computes it."""
        parts = (self.row.agent_id, self._notebook.epoch, self._heard, message.sender, message.target, message.raw)
        return hashlib.sha256("\n".join(map(str, parts)).encode(errors="replace")).hexdigest()[:16]


def _model_of(outfit: Outfit, available: Sequence[str]) -> str:
    return outfit.model or pick_model(outfit.models, available) or ""


def _running_turn(notebook: Notebook, outfit: Outfit) -> Turn | None:
    row = notebook.running()
    return Turn(row, notebook.line(row.line_id), outfit, notebook.steps(row.turn_id)) if row else None
