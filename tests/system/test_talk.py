"""People and agents on IRC, all of it real: a client of somebody else, ngircd, llama.cpp, machines.

Only the model's words are known beforehand; it is served by a program of somebody else, which Fireclaw knows by one
setting. A word that a test writes into the agent's machine reaches the answer only if the tool's result reached the
model: the rule that says it looks for it there.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
from machine_home import kill, until
from talk_office import furnished

from conftest import assert_nothing_left
from fireclaw.testing.scripted_model import Rule, call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from talk_ii import Ii
    from talk_office import Office

pytestmark = pytest.mark.timeout(180)

WORD = f"heron-{secrets.token_hex(6)}"
WAITING = json.dumps({"command": "until rm ~/go 2>/dev/null; do sleep 0.1; done"})
RULES = [
    Rule(call("run_command", command="cat /tmp/word.txt"), user="read the word", results=0),
    Rule(f"the word is {WORD}", user="read the word", last=WORD, results=1),
    Rule("there is no such word", user="read the word", results=1),
    Rule(call("run_command", **json.loads(WAITING)), user="wait", results=0),
    Rule("I was interrupted", user="wait", last="[interrupted: ", results=1),
    Rule("that took a while", user="wait", results=1),
    Rule(call("run_command", command="echo crane > ~/note"), user="note it", results=0),
    Rule("noted, crane", user="note it", results=1),
    Rule(call("run_command", command="cat ~/note"), user="look it up", results=0),
    Rule("the note says crane", user="look it up", last="crane", results=1),
    Rule(
        "my machine was lost",
        user="look it up",
        last="the machine was lost with all but its workspace",
        results=1,
    ),
    Rule("there is no note", user="look it up", last="No such file", results=1),
    Rule(call("run_command", command="echo egret > file && sync file"), user="file it", results=0),
    Rule("filed, egret", user="file it", results=1),
    Rule(call("run_command", command="cat file"), user="fetch it", results=0),
    Rule("the file says egret", user="fetch it", last="egret", results=1),
    Rule("there is no file", user="fetch it", results=1),
    Rule("worker: what do you think?", user="ask the other one"),
    Rule("hello there", user="hello"),
    Rule("I do not know"),
]


@pytest.fixture(scope="module")
def office() -> Iterator[Office]:
    """An open office."""
    with furnished(RULES) as office:
        done = office.cli("up", "--detach")
        assert done.returncode == 0, done.stderr.decode()
        yield office


@pytest.fixture(scope="module")
def ann(office: Office) -> Iterator[Ii]:
    """An operator, in both channels."""
    with office.person("ann") as ann:
        ann.become_operator(office.irc)
        ann.join("#control", "#agents")
        yield ann


@pytest.fixture(scope="module")
def bob(office: Office) -> Iterator[Ii]:
    """Somebody who is no operator, in both channels."""
    with office.person("bob") as bob:
        bob.join("#control", "#agents")
        yield bob


@pytest.fixture(scope="module")
def worker(office: Office, ann: Ii) -> str:
    """The nick of an agent that ann invoked, with a machine."""
    ann.say("#control", "!invoke worker")
    ann.wait("#control", "notice", "^worker is coming to #agents$")
    ann.wait("#agents", "news", r"^worker\(\S+\) has joined #agents$")
    office.machine_of("worker")
    return "worker"


def test_an_answer_can_be_followed_back_to_its_question(office: Office, ann: Ii, worker: str) -> None:
    """A question is answered with what stands in the agent's machine, and the ledger joins the way by ids."""
    machine = office.machine_of(worker)
    wrote = office.cli("exec", worker, "--", "sh", "-c", f"echo {WORD} > /tmp/word.txt")
    assert (wrote.returncode, wrote.stderr) == (0, b"")

    assert ann.ask(worker, "please read the word") == f"the word is {WORD}"

    line = office.entry("irc.line", text="please read the word")
    assert (line.agent, line.data["sender"], line.data["target"]) == (worker, "ann", "#agents")
    turn = office.entry("turn.started", line_id=line.data["line_id"]).data["turn_id"]
    asked, answered = office.entries("model.call.done", turn_id=turn)
    assert asked.data["gen_ai.request.model"] == "somebody-elses"
    tool = office.entry("tool.call", turn_id=turn)
    assert tool.data["call_id"] == asked.data["call_id"]
    result = office.entry("tool.result", tool_call_id=tool.data["tool_call_id"])
    assert (result.origin, result.machine, result.data["gen_ai.tool.call.result"]) == ("guest", machine, WORD)
    command = office.entry("command.started", command_id=result.data["command_id"])
    assert (command.agent, command.machine) == (worker, machine)
    assert command.data["argv"] == ["/bin/sh", "-c", "cat /tmp/word.txt"]
    assert office.entry("command.done", command_id=result.data["command_id"]).data["status"] == 0
    done = office.entry("turn.done", turn_id=turn)
    assert (done.data["outcome"], done.data["answer"]) == ("done", f"the word is {WORD}")
    said = office.entry("irc.said", line_id=line.data["line_id"])
    assert said.data["text"] == f"ann: the word is {WORD}"
    assert str(said.data["message_id"]).startswith(f"{turn}/")
    order = [line, asked, tool, command, result, answered, done, said]
    assert [entry.seq for entry in order] == sorted(entry.seq for entry in order)


def test_an_answer_without_the_word_in_the_machine_is_another_one(office: Office, ann: Ii, worker: str) -> None:
    """The model knows the word only from the tool: with another one in the file it does not say it."""
    assert office.cli("exec", worker, "--", "sh", "-c", "echo goose > /tmp/word.txt").returncode == 0
    assert ann.ask(worker, "read the word again") == "there is no such word"


def test_the_status_names_everything_that_runs(office: Office, ann: Ii, worker: str) -> None:
    """The documented keys are there; the table for people holds the same."""
    del ann
    status = office.cli.json("status", "--json")
    assert status["daemon"]["pid"] == office.cli.daemon_pid
    assert status["irc"].keys() >= {"host", "port", "server", "password", "operator", "operator_password_file"}
    assert {key: status["model"][key] for key in ("provider", "name", "state")} == {
        "provider": "openai-compatible",
        "name": "somebody-elses",
        "state": "ready",
    }
    assert status["vmm"] == {"kind": "qemu", "accel": "tcg"}
    (agent,) = status["agents"]
    assert agent | {"state": "idle"} == {
        "name": worker,
        "template": "worker",
        "model": "somebody-elses",
        "state": "idle",
        "machine": office.machine_of(worker),
    }
    table = office.cli("status").stdout.decode()
    assert worker in table
    assert str(status["irc"]["port"]) in table


def test_a_private_line_is_answered_privately(ann: Ii, worker: str) -> None:
    """Whoever speaks to the agent alone is answered alone, without an address."""
    before = len(ann.lines("#agents"))
    ann.say(worker, "hello")
    assert ann.wait(worker, "said", "", nick=worker).text == "hello there"
    assert len(ann.lines("#agents")) == before


def test_what_is_not_for_the_agent_is_not_answered(office: Office, ann: Ii, worker: str) -> None:
    """Neither talk among people, nor a longer nick, nor a NOTICE, even a private one, gets an answer."""
    heard, said = len(office.entries("irc.line")), _said_by(ann, worker)
    for words in ("hello everybody", f"{worker}2: hello", f"{worker}s are nice, hello"):
        ann.say("#agents", words)
    ann.command(f"NOTICE #agents :{worker}: hello")
    ann.command(f"NOTICE {worker} :hello")
    ann.say("#agents", f"{worker}: hello, this is the last one")
    ann.wait("#agents", "said", "^ann: hello there$", nick=worker)
    assert [entry.data["text"] for entry in office.entries("irc.line")[heard:]] == ["hello, this is the last one"]
    assert _said_by(ann, worker) == said + 1


def test_a_nick_in_the_middle_of_a_sentence_is_enough(ann: Ii, worker: str) -> None:
    """A whole-word mention by a person is for the agent, whatever its case."""
    ann.say("#agents", f"hello {worker.upper()}, are you there?")
    ann.wait("#agents", "said", "^ann: hello there$", nick=worker)


def test_a_question_during_a_turn_waits_for_it(office: Office, ann: Ii, bob: Ii, worker: str) -> None:
    """A second question is acknowledged by NOTICE while the first is worked on, and both are answered in order."""
    ann.say("#agents", f"{worker}: wait for it")
    until(lambda: office.entries("tool.call", gen_ai__tool__call__arguments=WAITING), "the turn waits")
    bob.say("#agents", f"{worker}: hello")
    assert ann.wait("#agents", "notice", "^bob: ").text == "bob: noted, you are next; I am still at work for ann"
    assert bob.wait("#agents", "notice", "^bob: ").text.startswith("bob: noted")
    assert office.cli("exec", worker, "--", "touch", "/home/agent/go").returncode == 0
    first = ann.wait("#agents", "said", "", nick=worker)
    second = ann.wait("#agents", "said", "", nick=worker)
    assert (first.text, second.text) == ("ann: that took a while", "bob: hello there")


def test_the_overseer_tells_by_notice_what_there_is(ann: Ii, bob: Ii, worker: str) -> None:
    """Anybody may look: lists, templates and help come as NOTICE, and nothing is said aloud."""
    del ann
    for command, pattern in (
        ("!list", rf"^{worker} \(worker, somebody-elses\): idle$"),
        ("!templates", "^worker: does what a shell can do"),
        ("!help", r"^!invoke TEMPLATE \[NAME\] .*!destroy NAME"),
        ("!models", "^\\* openai:somebody-elses: "),
        (f"!cost {worker}", r"^openai:somebody-elses: \$0, \d+ calls"),
        ("!help destroy", r"^!destroy NAME \[keep\]: .*operators only.*Example: !destroy"),
        ("!hepl", "there is no !hepl.*did you mean !help"),
    ):
        bob.say("#control", command)
        bob.wait("#control", "notice", pattern)
    assert not [line for line in bob.lines("#control") if line.nick == "overseer"]


def test_a_living_agent_is_changed(office: Office, worker: str) -> None:
    """A model that is not there changes nothing; one that is there, a persona and new templates hold at once."""
    with office.person("kim") as kim:
        kim.become_operator(office.irc)
        kim.join("#control", "#agents")
        kim.say("#control", f"!model {worker} somebody-elsez")
        kim.wait("#control", "notice", f"^cannot model {worker} somebody-elsez: ")
        kim.say("#control", f"!model {worker} openai:somebody-elses")
        kim.wait("#control", "notice", f"^{worker} thinks with openai:somebody-elses ")
        kim.say("#control", f"!persona {worker} quick")
        kim.wait("#control", "notice", f"^{worker} has the persona of quick ")
        assert kim.ask(worker, "hello") == "hello there"
        for line in (f"!model {worker}", f"!persona {worker}"):
            kim.say("#control", line)
            kim.wait("#control", "notice", f"^{worker} .* from its next turn on$")
        folder = office.home.config / "templates"
        folder.mkdir()
        (folder / "broken.toml").write_text("toolz = 1\n")
        kim.say("#control", "!reload")
        kim.wait("#control", "notice", "^the templates were read anew$")
        kim.wait("#control", "notice", "broken.toml.*toolz")
    (folder / "broken.toml").unlink()
    os.kill(office.cli.daemon_pid, signal.SIGHUP)
    until(lambda: office.entries("templates.loaded", by="SIGHUP"), "the daemon has read them")


def test_an_unknown_template_brings_the_nearest_one(ann: Ii) -> None:
    """A typo in a template's name is answered with the name that was meant."""
    ann.say("#control", "!invoke wroker")
    assert "did you mean 'worker'?" in ann.wait("#control", "notice", "wroker").text


def test_only_an_operator_may_destroy(office: Office, ann: Ii, bob: Ii, worker: str) -> None:
    """Somebody else is refused with the reason and the way, in the channel and in private, and it is recorded."""
    bob.say("#control", f"!destroy {worker}")
    refusal = bob.wait("#control", "notice", "cannot do !destroy").text
    assert "you are not an operator of" in refusal
    assert "type /oper fireclaw PASSWORD, then !destroy again" in refusal
    bob.say("overseer", f"!destroy {worker}")
    until(lambda: len(office.entries("control.refused", line=f"!destroy {worker}")) == 2, "both refusals are recorded")
    for entry in office.entries("control.refused", line=f"!destroy {worker}"):
        assert str(entry.data["sender"]).startswith("bob!")
        assert entry.data["operator"] is False
        assert "not an operator" in str(entry.data["reason"])
    ann.say("#agents", "!destroy worker")  # commands are for #control, not for the room where agents talk
    assert ann.ask(worker, "hello") == "hello there"


def test_agents_do_not_answer_each_other(office: Office, ann: Ii, worker: str) -> None:
    """An agent that names another one gets no answer from it; it is destroyed with its machine."""
    ann.say("#control", "!invoke worker ada")
    ann.wait("#control", "notice", "^ada is coming")
    ann.wait("#agents", "news", r"^ada\(\S+\) has joined")
    heard = len(office.entries("irc.line"))
    assert ann.ask("ada", "ask the other one") == "worker: what do you think?"
    assert ann.ask(worker, "hello") == "hello there"
    assert [entry.agent for entry in office.entries("irc.line")[heard:]] == ["ada", worker]
    machine = office.machine_of("ada")
    ann.say("#control", "!destroy ada")
    ann.wait("#control", "notice", "^ada is gone$")
    ann.wait("", "news", r"^ada\(\S+\) has quit")
    until(lambda: all(each["id"] != machine for each in _machines(office)), "the machine is gone")
    assert [entry.data["by"] for entry in office.entries("agent.destroyed")] == ["ann"]


def test_agents_work_side_by_side(ann: Ii, worker: str) -> None:
    """More agents of a template get names of their own; each answers what it is asked, and ends on its own."""
    for name in ("worker2", "worker3"):
        ann.say("#control", "!invoke worker")
        ann.wait("#control", "notice", f"^{name} is coming")
        ann.wait("#agents", "news", rf"^{name}\(\S+\) has joined")
    for name in (worker, "worker2", "worker3"):
        ann.say("#agents", f"{name}: hello")
    answers = [ann.wait("#agents", "said", "^ann: hello there$") for _ in range(3)]
    assert {answer.nick for answer in answers} == {worker, "worker2", "worker3"}
    for name in ("worker2", "worker3"):
        ann.say("#control", f"!destroy {name}")
        ann.wait("#control", "notice", f"^{name} is gone$")


def test_a_model_server_that_is_away_is_told_and_forgiven(office: Office, ann: Ii, worker: str) -> None:
    """While the server is away the agent says why and ends its turn; once it is back the next question is answered."""
    office.model.kill()
    try:
        answer = ann.ask(worker, "hello, model")
        assert answer.startswith("I cannot answer: ")
        assert office.model.base_url in answer
        assert "connection refused" in answer
        line = office.entry("irc.line", text="hello, model")
        assert office.entry("turn.done", line_id=line.data["line_id"]).data["outcome"] == "failed"
        assert office.cli.json("status", "--json")["model"]["state"] == "failed"
    finally:
        office.model.start()
    assert ann.ask(worker, "hello") == "hello there"
    assert office.cli.json("status", "--json")["model"]["state"] == "ready"


def test_up_is_harmless_where_all_is_up(office: Office, ann: Ii, worker: str) -> None:
    """A second up says where things are, and disturbs nobody."""
    pid = office.cli.daemon_pid
    again = office.cli("up", "--detach")
    assert (again.returncode, again.stdout) == (0, office.cli("status").stdout)
    assert office.cli.daemon_pid == pid
    assert ann.ask(worker, "hello") == "hello there"


def test_a_new_daemon_goes_on_with_its_agents(office: Office, ann: Ii, worker: str) -> None:
    """After a restart agent and overseer have the nicks that squatters held, and the machine is as it was."""
    machine = office.machine_of(worker)
    assert ann.ask(worker, "note it") == "noted, crane"
    pid = office.cli.daemon_pid
    kill(pid, signal.SIGTERM)
    assert "restarting" in ann.wait("", "news", rf"^{worker}\(\S+\) has quit").text
    ann.wait("", "news", r"^overseer\(\S+\) has quit")
    with office.person(worker) as squatter, office.person("overseer"):
        squatter.join("#agents")
        assert office.cli("ps").returncode == 0
        assert office.cli.daemon_pid != pid
        ann.wait("", "news", f"^{worker}-1 changed nick to {worker}$")
    ann.say("#control", "!list")
    ann.wait("#control", "notice", f"^{worker} ")
    assert ann.ask(worker, "look it up") == "the note says crane"
    assert office.machine_of(worker) == machine
    assert office.cli("ledger", "verify").returncode == 0


def test_a_question_survives_the_daemon_that_heard_it(office: Office, ann: Ii, worker: str) -> None:
    """A turn goes on in the next daemon; the model is told that its command was interrupted, and answers once."""
    waiting = len(office.entries("tool.call", gen_ai__tool__call__arguments=WAITING))
    ann.say("#agents", f"{worker}: wait for me")
    until(lambda: len(office.entries("tool.call", gen_ai__tool__call__arguments=WAITING)) > waiting, "the turn waits")
    kill(office.cli.daemon_pid)
    ann.wait("", "news", rf"^{worker}\(\S+\) has quit")
    assert office.cli("ps").returncode == 0
    assert ann.wait("#agents", "said", "^ann: ", nick=worker).text == "ann: I was interrupted"
    assert ann.ask(worker, "hello") == "hello there"
    line = office.entry("irc.line", text="wait for me").data["line_id"]
    assert len(office.entries("irc.said", line_id=line, kind="answer")) == 1


def test_a_machine_that_dies_is_told_and_replaced(office: Office, ann: Ii, worker: str) -> None:
    """The next command fails in words, and the one after it has a new machine with the old workspace."""
    machine = office.machine_of(worker)
    assert ann.ask(worker, "file it") == "filed, egret"
    (vmm,) = office.children("vmm")
    kill(vmm)
    until(lambda: not _machines(office), "its death is seen")
    (agent,) = office.cli.json("status", "--json")["agents"]
    assert agent["machine"] == ""
    assert ann.ask(worker, "look it up") == "my machine was lost"
    assert ann.ask(worker, "look it up again") == "there is no note"
    assert ann.ask(worker, "fetch it") == "the file says egret"
    assert office.machine_of(worker) != machine
    assert office.cli("exec", worker, "--", "true").returncode == 0


def test_down_is_quick_and_up_brings_the_agents_back(office: Office, ann: Ii, worker: str) -> None:
    """Down in the middle of a turn ends all within seconds; the next up has the agent again with its workspace."""
    ann.say("#agents", f"{worker}: wait until all is down")
    line = until(lambda: office.entries("irc.line", text="wait until all is down"), "it is heard")[0].data["line_id"]
    until(lambda: office.entries("tool.call", turn_id=f"t{line}"), "the turn waits")
    began = time.monotonic()
    assert office.cli("down").returncode == 0
    assert time.monotonic() - began < 10
    assert_nothing_left(office.home.data)
    assert office.cli("up", "--detach").returncode == 0
    del office.irc  # a free port was picked anew
    with office.person("zoe") as zoe:
        zoe.join("#agents")
        done = until(lambda: office.entries("turn.done", line_id=line), "the turn ends")
        assert [entry.data["answer"] for entry in done] == ["I was interrupted"]
        until(lambda: any(worker in line.text for line in zoe.lines("") + zoe.lines("#agents")), "the agent is there")
        assert zoe.ask(worker, "look it up") == "there is no note"
        assert zoe.ask(worker, "fetch it") == "the file says egret"
    (drive,) = office.home.workspaces.glob("*.ext4")
    assert office.cli("prune").returncode == 0
    assert drive.exists()
    verified = office.cli("ledger", "verify")
    assert verified.returncode == 0, verified.stdout


def test_ctrl_c_stops_what_up_started_in_the_foreground() -> None:
    """In the foreground up stays; Ctrl-C stops the daemon and all that it started."""
    with furnished(RULES) as office:
        up = office.cli.start("up", stdin=None, start_new_session=True)
        try:
            until(lambda: office.home.lock.exists() and office.cli("status").stdout.count(b": ready"), "all is up")
            irc = office.irc
            os.kill(up.pid, signal.SIGINT)
            _, errors = up.communicate(timeout=60)
        finally:
            up.kill()
            up.wait()
        assert up.returncode == 0, errors.decode()
        assert b"all is stopped" in errors
        assert_nothing_left(office.home.data)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((irc["host"], irc["port"]))


def test_a_port_that_is_taken_fails_up_and_leaves_nothing() -> None:
    """The port is named with the next step, nothing runs afterwards, and up works once the port is free."""
    with furnished(RULES) as office, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        office.cli.env["FIRECLAW_IRC_PORT"] = str(port)
        failed = office.cli("up", "--detach")
        assert failed.returncode == 125
        assert f"port {port} of 127.0.0.1 is taken by another program" in failed.stderr.decode()
        assert f"[irc] port = {port + 1}" in failed.stderr.decode()
        assert office.cli.json("status", "--json")["irc"] is None
        assert _machines(office) == []
        assert [path.name for path in office.home.run.iterdir() if "irc" in path.name] == []
        other.close()
        assert office.cli("up", "--detach").returncode == 0
        assert office.irc["port"] == port


def test_up_without_its_model_server_says_so() -> None:
    """Where the model server is away up fails with its address; asked again it succeeds."""
    with furnished(RULES) as office:
        office.model.kill()
        failed = office.cli("up", "--detach")
        office.model.start()
        assert failed.returncode == 125
        assert re.search(rf"model.*{re.escape(office.model.base_url)}.*refused", failed.stderr.decode())
        assert office.cli("up", "--detach").returncode == 0


def _said_by(person: Ii, nick: str) -> int:
    return sum(line.nick == nick for window in ("#agents", nick) for line in person.lines(window))


def _machines(office: Office) -> list[dict[str, Any]]:
    machines: list[dict[str, Any]] = office.cli.json("ps", "--json")
    return machines


def test_ctrl_c_while_up_waits_for_the_model_stops_everything() -> None:
    """A model server that accepts and says nothing keeps up waiting; Ctrl-C ends it at once, with all that ran."""
    with furnished(RULES) as office, socket.create_server(("127.0.0.1", 0)) as silent:
        office.cli.env["FIRECLAW_MODEL_BASE_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        up = office.cli.start("up", stdin=None, start_new_session=True)
        assert up.stderr is not None
        try:
            connection, _ = silent.accept()
            with connection:
                began = time.monotonic()
                os.kill(up.pid, signal.SIGINT)
                _, errors = up.communicate(timeout=60)
        finally:
            up.kill()
            up.wait()
        assert (up.returncode, b"all is stopped" in errors) == (0, True), errors.decode()
        assert time.monotonic() - began < 8
        assert_nothing_left(office.home.data)


def test_down_after_a_crash_ends_a_server_that_hangs() -> None:
    """An IRC server that was left alone and answers nobody is ended by the first verb, if that is down."""
    with furnished(RULES) as office:
        assert office.cli("up", "--detach").returncode == 0
        (ngircd,) = office.children("ngircd")
        kill(office.cli.daemon_pid)
        os.kill(ngircd, signal.SIGSTOP)
        assert office.cli("down").returncode == 0
        assert_nothing_left(office.home.data)
