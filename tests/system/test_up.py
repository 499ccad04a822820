"""``fireclaw up`` on whichever VMM the settings name: an agent on IRC runs commands in its machine, and all ends.

The model is a few lines of ours, so that this runs where there is nothing but Fireclaw, its VMM and ngircd.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

import pytest
from machine_home import kill, private_home, until
from talk_parrot import Parrot
from talk_person import Person

from conftest import command_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Cli

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def cli() -> Iterator[Cli]:
    """The command line on a home of its own, whose model is the parrot; on the software CPU unless told otherwise."""
    with Parrot() as parrot, private_home() as home:
        home.config_file.write_text(f'[machine]\naccel = "tcg"\n\n[model]\nbase_url = "{parrot.base_url}"\n')
        with command_line(home) as cli:
            yield cli


def status(cli: Cli) -> dict[str, Any]:
    """What the daemon says of itself."""
    told: dict[str, Any] = cli.json("status", "--json")
    return told


def machine_of_worker(cli: Cli) -> str:
    """The id of the agent's machine; waits until it has one."""
    return until(
        lambda: "".join(str(agent["machine"]) for agent in status(cli)["agents"]), "it has a machine", seconds=60
    )


def ask(person: Person, command: str) -> str:
    """Have the agent run a command; returns what it answers."""
    before = len(answers(person))
    person.say("#agents", f"worker: please run `{command}`")
    person.wait(lambda: len(answers(person)) > before, "the agent answers")
    return answers(person)[before]


def answers(person: Person) -> list[str]:
    """What the agent has said; its signs of life are not."""
    return [text for text in person.said("worker") if not text.startswith("\x01ACTION")]


def test_an_agent_runs_commands_on_the_vmm_that_is_tried(cli: Cli) -> None:
    """Its answer holds what only its machine knows; a new daemon has agent and machine again, and no word is lost."""
    up = cli("up", "--detach", timeout=240)
    assert up.returncode == 0, up.stderr.decode()
    told = status(cli)
    assert told["vmm"]["kind"] == os.environ.get("FIRECLAW_MACHINE_VMM", "qemu")
    password = (cli.home.secrets / "irc-operator").read_text().strip()
    word = f"heron-{secrets.token_hex(6)}"
    with Person("ann", told["irc"], password) as ann:
        ann.wait(lambda: "381" in ann.commands, "ann is an operator")
        ann.say("#control", "!invoke worker")
        ann.wait(lambda: "worker" in ann.present, "the agent is there")
        machine = machine_of_worker(cli)
        assert cli("exec", "worker", f"echo {word} > /tmp/word.txt").returncode == 0

        assert ask(ann, "cat /tmp/word.txt") == f"ann: it said {word}"

        (started,) = (entry for entry in cli.ledger() if entry.type == "command.started" and entry.agent == "worker")
        assert (started.machine, started.data["argv"]) == (machine, ["/bin/sh", "-c", "cat /tmp/word.txt"])

        kill(cli.daemon_pid)
        ann.wait(lambda: "worker" not in ann.present, "the agent is away")
        assert cli("ps").returncode == 0
        ann.wait(lambda: "worker" in ann.present, "the agent is back")

        assert ask(ann, "echo $(cat /tmp/word.txt) $(hostname)") == f"ann: it said {word} worker"

        assert machine_of_worker(cli) == machine
        ann.say("#control", "!destroy worker")
        ann.wait(lambda: "worker" not in ann.present, "the agent is gone")
    until(lambda: cli.json("ps", "--json") == [], "its machine is gone")
    assert cli("ledger", "verify").returncode == 0
