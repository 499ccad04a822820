"""Killing at random moments whatever takes part in a talk: daemon, machine, IRC server, model server.

Each round asks questions, and makes and ends another agent, while two of them die. Then it looks: the next verb works,
the agent is back and answers, each question that it heard has exactly one answer or one honest word that there is none,
nothing was said twice, and no machine is there without its agent.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import pytest
from machine_home import rows, until
from talk_office import furnished
from talk_person import Person

from fireclaw.testing.scripted_model import Rule, call

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from talk_office import Office

ROUNDS = int(os.environ.get("FIRECLAW_SOAK_ROUNDS", "3"))
QUESTIONS = 3  # a round
KILLS = 2  # a round
SECONDS = 2.5  # in which they come
NICKS = ("ann", "bob", "carol", "dave")

pytestmark = pytest.mark.timeout(60 + 60 * ROUNDS)


def rules() -> list[Rule]:
    """A tool call for each question, then an answer of its own: another one where the call was interrupted."""
    script = [Rule(call("run_command", command="sleep 0.3; echo result"), user="question", results=0)]
    for number in range(ROUNDS * (QUESTIONS + 1)):
        asked = f"question {number}?"
        script += [
            Rule(f"answer {number}, by hand", user=asked, last="result"),
            Rule(f"answer {number}, by heart", user=asked),
        ]
    return script


def test_a_talk_survives_kills_at_random_moments() -> None:
    """Whatever is killed whenever, no question is lost or answered twice, and nothing is left behind."""
    seed = int(os.environ.get("FIRECLAW_SOAK_SEED") or random.randrange(1 << 32))
    print(f"seed {seed}")  # noqa: T201 - shown when it fails
    chance = random.Random(seed)
    with furnished(rules(), FIRECLAW_IRC_PORT=str(free_port())) as office:
        assert office.cli("up", "--detach").returncode == 0
        password = (office.home.secrets / "irc-operator").read_text().strip()
        with ExitStack() as stack:
            # The overseer takes twelve commands a minute from a person.
            ann, *others = (stack.enter_context(Person(nick, office.irc, password)) for nick in NICKS)
            for person in (ann, *others):
                person.wait(partial(_is_operator, person), "everybody is an operator")
            ann.say("#control", "!invoke worker")
            talk = Talk(office, ann, others, chance)
            for number in range(ROUNDS):
                talk.play_round(number)
            talk.close()


class Talk:
    """The rounds of one test."""

    def __init__(self, office: Office, ann: Person, others: Sequence[Person], chance: random.Random) -> None:
        self._office = office
        self._ann = ann
        self._others = others
        self._chance = chance
        self._numbers = count()
        self._victims = self._choose()

    def play_round(self, number: int) -> None:
        """Ask while things die; then all must be well again."""
        victims = [next(self._victims) for _ in range(KILLS)]
        deeds = [*victims, *["ask"] * QUESTIONS, "!invoke worker guest", "!destroy guest"]
        plan = sorted((self._chance.uniform(0, SECONDS), deed) for deed in deeds)
        print(f"round {number}: {plan}")  # noqa: T201 - the same
        self._wait_present()
        operator = self._others[number % len(self._others)]
        began = time.monotonic()
        asked = []
        for moment, deed in plan:
            # The moment itself is what the seed decides.
            time.sleep(max(0.0, began + moment - time.monotonic()))
            if deed == "ask":
                asked.append(self._ask())
            elif deed.startswith("!"):
                operator.say("#control", deed)
            else:
                self._kill(deed)
        self._recover()
        self._check_answers(asked, set(victims))
        self._check_guest(operator)

    def close(self) -> None:
        """What is dead is pruned, once, and the record is whole."""
        cli = self._office.cli
        assert cli("prune").returncode == 0
        again = cli("prune")
        assert (again.returncode, again.stdout) == (0, b"")
        verified = cli("ledger", "verify")
        assert verified.returncode == 0, verified.stdout

    def _choose(self) -> Iterator[str]:
        while True:
            victims = ["daemon", "vmm", "ngircd", "model"]
            self._chance.shuffle(victims)
            yield from victims

    def _kill(self, victim: str) -> None:
        if victim == "model":
            self._office.model.kill()
            return
        if victim == "daemon" and self._chance.random() < 0.5:
            # The narrowest moment: a line is out, and its confirmation is not in.
            said = len(self._ann.said("worker"))
            self._ann.watch(lambda: len(self._ann.said("worker")) > said, SECONDS)
        pids = [self._office.cli.daemon_pid] if victim == "daemon" else self._office.children(victim)
        for pid in pids:
            with suppress(ProcessLookupError):  # its death was a consequence of the one before
                os.kill(pid, signal.SIGKILL)

    def _ask(self) -> int:
        number = next(self._numbers)
        self._ann.say("#agents", f"worker: question {number}?")
        return number

    def _wait_present(self) -> None:
        self._ann.wait(lambda: {"ann", "worker", "overseer"} <= self._ann.present, "everybody is there")

    def _recover(self) -> None:
        """The next verb works, and the agent comes back and answers."""
        office = self._office
        if not office.model.is_running:
            office.model.start()
        verb = office.cli("ps")
        assert verb.returncode == 0, verb.stderr.decode()
        self._wait_present()
        last = self._ask()
        self._ann.wait(lambda: self._times_answered()[last] == 1, f"question {last} is answered")

    def _check_answers(self, asked: list[int], victims: set[str]) -> None:
        for number in asked:
            lines = [entry.data["line_id"] for entry in self._office.entries("irc.line", text=f"question {number}?")]
            # Whose daemon or server died leaves the channel for all to see, and hears nothing meanwhile.
            assert len(lines) == 1 or (not lines and victims & {"daemon", "ngircd"}), f"question {number}: {lines}"
            for line in lines:
                ends = until(partial(self._ends_of, line), f"question {number} has an end")
                assert len(ends) == 1, f"question {number}: {ends}"
                assert ends[0] in self._ann.said("worker") or "ngircd" in victims, f"ann did not see {ends[0]!r}"
        assert max(self._times_answered().values()) == 1

    def _check_guest(self, operator: Person) -> None:
        """The other agent is whole or not there at all; whole, it can be ended."""
        told = len(operator.said("overseer", "NOTICE"))
        operator.say("#control", "!help")  # what this person commanded before is done when this is answered
        operator.wait(lambda: any("!help VERB" in text for text in operator.said("overseer", "NOTICE")[told:]), "help")
        if "guest" in self._agents():
            operator.wait(lambda: "guest" in operator.present, "the guest is there")
            operator.say("#control", "!destroy guest")
        until(lambda: self._agents() == ["worker"], "the guest is gone")
        until(lambda: len(self._office.cli.json("ps", "--json")) <= 1, "its machine is gone")

    def _agents(self) -> list[str]:
        return [str(agent["name"]) for agent in self._office.cli.json("status", "--json")["agents"]]

    def _times_answered(self) -> Counter[int]:
        """How often ann saw the answer to each question."""
        words = [text.split() for text in self._ann.said("worker")]
        return Counter(int(each[2].rstrip(",")) for each in words if each[1] == "answer")

    def _ends_of(self, line_id: object) -> list[str]:
        """What was said at last to whoever said a line, without the messages that perhaps did not arrive."""
        query = f"SELECT text FROM outbox WHERE line_id = '{line_id}' AND kind = 'answer' AND state = 'confirmed'"
        return [text for (text,) in rows(self._office.home, query)]


def _is_operator(person: Person) -> bool:
    return "381" in person.commands


def free_port() -> int:
    """A port that is free now; kept over all deaths, as the default port is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
