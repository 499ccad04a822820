"""The IRC client against a scripted server that does everything wrong, and against a real ngircd."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, TypeVar

import pytest
from ngircd_process import running_ngircd

from fireclaw.errors import InvalidError, IrcError
from fireclaw.irc import (
    Backoff,
    DroppedError,
    Event,
    Identity,
    Invited,
    IrcClient,
    Joined,
    Kicked,
    Kind,
    Lost,
    Message,
    Rate,
    Ready,
    Renamed,
    ServerAddress,
    State,
)
from fireclaw.irc import client as client_module
from fireclaw.irc import session as session_module
from fireclaw.testing.irc_peer import IrcLink, IrcServerPeer, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from ngircd_process import RunningNgircd

E = TypeVar("E")

QUICK = Backoff(first=0.01, longest=0.05)
FAST = Rate(per_second=1000, burst=1000)


class Events:
    """A handler that keeps events and lets a test wait for one."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, event: Event) -> None:
        """Be the handler."""
        self.seen.append(event)
        self._queue.put_nowait(event)

    async def next(self, kind: type[E]) -> E:
        """Wait for the next event of a kind, skipping others."""
        async with asyncio.timeout(10):
            while True:
                event = await self._queue.get()
                if isinstance(event, kind):
                    return event


@pytest.fixture
async def peer() -> AsyncIterator[IrcServerPeer]:
    """A scripted server."""
    async with IrcServerPeer() as server:
        yield server


@pytest.fixture
async def ngircd(tmp_path: Path) -> AsyncIterator[RunningNgircd]:
    """A real server without penalties."""
    async with running_ngircd(tmp_path) as running:
        yield running


@pytest.fixture
def events() -> Events:
    """What the client under test tells."""
    return Events()


def make_client(
    address: ServerAddress,
    events: Events,
    *,
    nick: str = "bot",
    channels: tuple[str, ...] = (),
    rate: Rate = FAST,
    queue_lines: int = 200,
) -> IrcClient:
    """A client that dials again quickly."""
    return IrcClient(
        address,
        Identity(nick, "bot", "A bot"),
        handler=events,
        channels=channels,
        rate=rate,
        backoff=QUICK,
        queue_lines=queue_lines,
    )


@contextlib.asynccontextmanager
async def linked(
    peer: IrcServerPeer,
    events: Events,
    *,
    channels: tuple[str, ...] = (),
    rate: Rate = FAST,
    queue_lines: int = 200,
) -> AsyncIterator[tuple[IrcClient, IrcLink]]:
    """A client that is registered with a scripted server, and the server's end."""
    async with make_client(peer.address, events, channels=channels, rate=rate, queue_lines=queue_lines) as client:
        link = await peer.accept()
        await link.welcome()
        await client.wait_ready()
        yield client, link


async def pong(link: IrcLink) -> None:
    """Answer the next PING that follows a message."""
    token = (await link.expect(r"^PING :(\S+)"))[1]
    await link.send(f":peer.test PONG peer.test :{token}")


# Registration and ends


async def test_it_registers_and_joins(peer: IrcServerPeer, events: Events) -> None:
    """A client gets ready, then joins its channels."""
    async with linked(peer, events, channels=("#agents",)) as (client, link):
        assert (client.state, client.nick, client.server_name) == (State.READY, "bot", "peer.test")
        assert await events.next(Ready) == Ready("bot", "peer.test")
        await link.expect("^JOIN :#agents$")


async def test_a_wrong_password_is_given_up(ngircd: RunningNgircd, events: Events) -> None:
    """A refused password is an error for whoever waits, and nobody dials again."""
    address = ServerAddress("127.0.0.1", ngircd.server.port, "wrong")
    async with make_client(address, events) as client:
        with pytest.raises(IrcError, match="Bad password"):
            await client.wait_ready()
        with pytest.raises(IrcError, match="Bad password"):
            await client.wait_closed()
        assert client.state is State.GAVE_UP
        with pytest.raises(ConnectionError):
            await client.say("#agents", "hello?")
        with pytest.raises(ConnectionError):
            await client.whois("ann")


async def test_closing_while_nobody_listens(events: Events) -> None:
    """A client that cannot connect keeps trying, and can be closed at any time."""
    async with IrcServerPeer() as gone:
        address = gone.address
    client = make_client(address, events)
    client.start()
    assert "cannot connect" in (await events.next(Lost)).reason
    assert "cannot connect" in (await events.next(Lost)).reason
    delivery = await client.say("#agents", "hello?")
    await client.aclose()
    with pytest.raises(ConnectionError):
        await delivery.sent
    with pytest.raises(ConnectionError):
        await client.wait_ready()
    await client.wait_closed()
    assert client.state is State.CLOSED


async def test_no_task_is_left(peer: IrcServerPeer, events: Events) -> None:
    """Closing reaps reader and writer, connected or in the middle of registration."""
    before = asyncio.all_tasks()
    async with linked(peer, events):
        assert len(asyncio.all_tasks()) > len(before)
    assert asyncio.all_tasks() == before
    async with make_client(peer.address, events):
        await (await peer.accept()).expect("^NICK")
    assert asyncio.all_tasks() == before


async def test_a_handler_that_raises_ends_the_client(peer: IrcServerPeer) -> None:
    """A defect in the handler is not hidden: it ends the client and comes out of wait_closed."""

    def broken(event: Event) -> None:
        if isinstance(event, Message):
            raise LookupError("a defect")  # noqa: TRY004 - any error will do

    async with IrcClient(peer.address, Identity("bot", "bot", "Bot"), handler=broken) as client:
        link = await peer.accept()
        await link.welcome()
        await link.send(":ann!~ann@host PRIVMSG bot :hi")
        with pytest.raises(LookupError, match="a defect"):
            await client.wait_closed()
        assert client.state is State.GAVE_UP


async def test_quitting_lets_the_last_words_out(peer: IrcServerPeer, events: Events) -> None:
    """What is queued goes before QUIT, whose reason the server hears."""
    async with linked(peer, events) as (client, link):
        delivery = await client.say("#agents", "goodbye")
        leaving = asyncio.create_task(client.quit("restarting"), name="quit")
        await link.expect("^PRIVMSG #agents :goodbye$")
        await pong(link)
        await link.expect("^QUIT :restarting$")
        link.reset()
        await leaving
        await delivery.confirmed
        assert client.state is State.CLOSED


async def test_a_silent_server_cannot_hold_a_quit(
    peer: IrcServerPeer, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quitting is bounded in time whatever the server does."""
    monkeypatch.setattr(client_module, "_FAREWELL_S", 0.05)
    async with linked(peer, events) as (client, _):
        delivery = await client.say("#agents", "goodbye")
        async with asyncio.timeout(5):
            await client.quit()
        await delivery.sent
        with pytest.raises(ConnectionError):
            await delivery.confirmed


# Deliveries


async def test_a_message_is_sent_then_confirmed(peer: IrcServerPeer, events: Events) -> None:
    """Sent means out; confirmed means that the server answered the PING behind it."""
    async with linked(peer, events) as (client, link):
        delivery = await client.say("#agents", "one\ntwo", Kind.NOTICE)
        await delivery.sent
        await link.expect("^NOTICE #agents :one$")
        await link.expect("^NOTICE #agents :two$")
        assert not asyncio.ensure_future(delivery.confirmed).done()
        await pong(link)
        await delivery.confirmed


async def test_many_messages_share_a_ping(peer: IrcServerPeer, events: Events) -> None:
    """One PING is out at a time; its PONG confirms what went before it and asks for the rest."""
    async with linked(peer, events) as (client, link):
        deliveries = [await client.say("#agents", str(number)) for number in range(5)]
        await deliveries[-1].sent
        await pong(link)
        await deliveries[0].confirmed
        await pong(link)
        await deliveries[-1].confirmed
        assert len([line for line in link.seen if line.startswith("PING")]) == 2


async def test_a_lost_confirmation_is_an_error(peer: IrcServerPeer, events: Events) -> None:
    """A message that was out when the connection broke is sent, not confirmed, and not said again."""
    async with linked(peer, events) as (client, link):
        delivery = await client.say("#agents", "perhaps")
        await link.expect("perhaps")
        link.reset()
        await delivery.sent
        with pytest.raises(ConnectionError, match=r"broke|closed"):
            await delivery.confirmed
        again = await peer.accept()
        await again.welcome()
        later = await client.say("#agents", "later")
        await again.expect("later")
        assert not any("perhaps" in line for line in again.seen)
        await pong(again)
        await later.confirmed


async def test_a_message_cut_in_the_middle_counts_as_sent(peer: IrcServerPeer, events: Events) -> None:
    """When only its first line got out, its end is lost, nothing is repeated, and the next message goes on."""
    async with linked(peer, events, rate=Rate(per_second=0.001, burst=1)) as (client, link):
        cut = await client.say("#agents", "one\ntwo")
        waiting = await client.say("#agents", "three")
        await link.expect("one")
        link.reset()
        await cut.sent
        with pytest.raises(ConnectionError):
            await cut.confirmed
        assert not asyncio.ensure_future(waiting.sent).done()


async def test_what_waits_is_said_on_the_next_connection(peer: IrcServerPeer, events: Events) -> None:
    """A message queued while offline is said once the client is back, exactly once."""
    async with linked(peer, events) as (client, link):
        link.reset()
        await events.next(Lost)
        delivery = await client.say("#agents", "patience")
        again = await peer.accept()
        await again.welcome()
        await again.expect("^PRIVMSG #agents :patience$")
        await pong(again)
        await delivery.confirmed


async def test_the_hook_runs_before_the_first_byte(peer: IrcServerPeer, events: Events) -> None:
    """The caller commits before anything leaves; if it may not, nothing leaves."""
    order: list[str] = []

    def forbid() -> None:
        raise LookupError("not ours any more")

    async with linked(peer, events) as (client, link):
        refused = await client.say("#agents", "never\never", before_send=forbid)
        allowed = await client.say("#agents", "one\ntwo", before_send=lambda: order.append("committed"))
        with pytest.raises(LookupError):
            await refused.sent
        with pytest.raises(LookupError):
            await refused.confirmed
        await allowed.sent
        assert order == ["committed"]
        await link.expect("two")
        assert not any("ever" in line for line in link.seen)


async def test_a_cancelled_waiter_does_not_harm_a_delivery(peer: IrcServerPeer, events: Events) -> None:
    """Who stops waiting takes nothing from those who still do."""
    async with linked(peer, events) as (client, link):
        delivery = await client.say("#agents", "hi")
        await link.expect("hi")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await delivery.confirmed
        await pong(link)
        await delivery.confirmed


async def test_a_full_queue_drops_the_oldest(peer: IrcServerPeer, events: Events) -> None:
    """A thousand lines do not delay a PONG; what was dropped is an error for its owner and a note for people."""
    async with linked(peer, events, rate=Rate(per_second=20, burst=1), queue_lines=3) as (client, link):
        deliveries = [await client.say("#agents", f"line {number}") for number in range(1000)]
        await link.send("PING :now")
        async with asyncio.timeout(1):
            await link.expect("^PONG :now$")
        with pytest.raises(DroppedError):
            await deliveries[1].sent
        await link.expect("line 999")
        assert len([line for line in link.seen if "lines dropped" in line]) == 1


@pytest.mark.parametrize("target", ["#a,#b", "ann\r\nQUIT", "$*", "nick!u@h", ""])
async def test_bad_targets_are_refused(peer: IrcServerPeer, events: Events, target: str) -> None:
    """No text chooses more than one receiver or a second command."""
    async with linked(peer, events) as (client, _):
        with pytest.raises(InvalidError):
            await client.say(target, "hi")
        with pytest.raises(InvalidError):
            await client.whois(target)
        with pytest.raises(InvalidError):
            client.part("#a", "x\r\nQUIT")
        with pytest.raises(InvalidError):
            await client.say("#a", " \n")
        with pytest.raises(InvalidError):
            await client.say("#a", "x\n" * 1000)
    with pytest.raises(InvalidError):
        make_client(peer.address, events, nick=target)


async def test_talk_cannot_become_protocol(peer: IrcServerPeer, events: Events) -> None:
    """Line breaks become lines, CTCP and escapes lose their control characters."""
    async with linked(peer, events) as (client, link):
        await client.say("#a", "one\r\nQUIT :two\0three\x01VERSION\x01\x1b[31m")
        lines = [await link.read_line() for _ in range(3)]
        assert lines == ["PRIVMSG #a :one", "PRIVMSG #a :QUIT :two", "PRIVMSG #a :threeVERSION[31m"]


# Faults


async def test_the_server_going_away_is_survived(peer: IrcServerPeer, events: Events) -> None:
    """An orderly end, a reset and a kill -9 all lead to a new connection with the same channels."""
    async with make_client(peer.address, events, channels=("#agents",)) as client:
        for end in ("error", "close", "reset"):
            link = await peer.accept()
            await link.welcome()
            await client.wait_ready()
            await link.expect("^JOIN :#agents$")
            match end:
                case "error":
                    await link.send("ERROR :Server going down")
                case "close":
                    await link.aclose()
                case "reset":
                    link.reset()
            await events.next(Lost)


async def test_broken_bytes_are_survived(peer: IrcServerPeer, events: Events) -> None:
    """Invalid UTF-8, an 8 KiB line, an endless line and bare line feeds cost nothing but themselves."""
    async with linked(peer, events) as (_, link):
        await link.send_bytes(b":ann!~ann@host PRIVMSG bot :caf\xe9\n")
        assert (await events.next(Message)).text == "caf\ufffd"
        await link.send_bytes(b":ann!~ann@host PRIVMSG bot :" + b"x" * 8192 + b"\r\n")
        assert len((await events.next(Message)).text) == 8192
        await link.send_bytes(b"y" * 100_000 + b"\r\n\n:ann!~ann@host PRIVMSG bot :after\r\n")
        assert (await events.next(Message)).text == "after"


async def test_requests_end_with_their_connection(peer: IrcServerPeer, events: Events) -> None:
    """Whoever waits for an answer hears that it will not come."""
    async with linked(peer, events) as (client, link):
        asking = asyncio.create_task(client.whois("ann"), name="whois")
        await link.expect("^WHOIS :ann$")
        link.reset()
        with pytest.raises(ConnectionError):
            await asking


async def test_a_cancelled_request_leaves_nothing(peer: IrcServerPeer, events: Events) -> None:
    """Cancelling a question forgets it; its late answer harms nobody."""
    async with linked(peer, events) as (client, link):
        asking = asyncio.create_task(client.whois("ann"), name="whois")
        await link.expect("^WHOIS :ann$")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert len(client._answers) == 0
        await link.send(":peer.test 318 bot ann :End of WHOIS")
        await link.send(":ann!~ann@host PRIVMSG bot :hi")
        assert (await events.next(Message)).text == "hi"


async def test_a_refused_operator_is_told(peer: IrcServerPeer, events: Events) -> None:
    """A refused OPER or KILL is an error with the server's words, and no reason to leave."""
    async with linked(peer, events) as (client, link):
        asking = asyncio.create_task(client.oper("fireclaw", "wrong"), name="oper")
        await link.expect("^OPER fireclaw :wrong$")
        await link.send(":peer.test 464 bot :Invalid password")
        with pytest.raises(IrcError, match="'fireclaw': Invalid password"):
            await asking
        freeing = asyncio.create_task(client.kill("ghost", "away"), name="kill")
        await link.expect("^KILL ghost :away$")
        await link.send(":peer.test 481 bot :Permission denied")
        with pytest.raises(IrcError, match="cannot free the nick 'ghost': Permission denied"):
            await freeing
        assert client.state is State.READY


# With a real server


async def test_kill_nine_of_the_server_is_survived(ngircd: RunningNgircd, events: Events) -> None:
    """When the server comes back, so does the client, into its channel, and says what had waited."""
    async with make_client(ngircd.server.address, events, channels=("#agents",)) as client:
        await events.next(Joined)
        ngircd.stop(signal.SIGKILL)
        await events.next(Lost)
        delivery = await client.say("#agents", "are you there?")
        await ngircd.start()
        await events.next(Joined)
        await delivery.confirmed


async def test_a_server_that_hangs_is_left(
    ngircd: RunningNgircd, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is connected but answers nothing is asked, then left."""
    monkeypatch.setattr(session_module, "_SILENCE_S", 0.1)
    async with make_client(ngircd.server.address, events) as client:
        await client.wait_ready()
        ngircd.freeze()
        assert "silent" in (await events.next(Lost)).reason


async def test_leaving_is_quick_whatever_is_queued(tmp_path: Path, events: Events) -> None:
    """With a hundred lines queued, a quit is over in a few seconds, the nick is free, and nothing more is said."""
    async with running_ngircd(tmp_path, max_penalty_s=-1) as ngircd, await connect(ngircd.server.address) as ann:
        await ann.register("ann", "server-pass")
        await ann.send("JOIN #agents")
        await ann.expect(" 366 ")
        client = make_client(ngircd.server.address, events, channels=("#agents",), rate=Rate())
        client.start()
        await events.next(Joined)
        deliveries = [await client.say("#agents", f"line {number}") for number in range(100)]
        async with asyncio.timeout(8):
            await client.quit("restarting")
        await ann.expect(":bot!.* QUIT ")
        said = sum(" PRIVMSG " in line for line in ann.seen)
        sent = await asyncio.gather(*(each.sent for each in deliveries), return_exceptions=True)
        confirmed = await asyncio.gather(*(each.confirmed for each in deliveries), return_exceptions=True)
        assert confirmed.count(None) <= said <= sent.count(None) < 12
        assert said > 0
        await ann.send("NICK bot")
        await ann.expect("NICK :bot")


async def test_a_taken_nick_is_regained(ngircd: RunningNgircd, events: Events) -> None:
    """While somebody holds our nick we have another; when it is free we take it."""
    async with await connect(ngircd.server.address) as holder:
        await holder.register("bot", "server-pass")
        await holder.send("JOIN #agents")
        await holder.expect(" 366 ")
        async with make_client(ngircd.server.address, events, channels=("#agents",)) as client:
            assert (await events.next(Ready)).nick == "bot-1"
            await events.next(Joined)
            await holder.send("QUIT")
            assert (await events.next(Renamed)).is_me
            assert client.nick == "bot"


async def test_long_utf8_arrives_whole(ngircd: RunningNgircd, events: Events) -> None:
    """Two lines of two-byte characters arrive uncut, and every byte of room is used."""
    async with await connect(ngircd.server.address) as ann:
        await ann.register("ann", "server-pass")
        await ann.send("JOIN #agents")
        await ann.expect(" 366 ")
        async with make_client(ngircd.server.address, events, channels=("#agents",)) as client:
            await events.next(Joined)
            room = 510 - len(":bot!~bot@127.0.0.1 PRIVMSG #agents :")
            text = "é" * 300
            await (await client.say("#agents", text)).confirmed
            first = await ann.expect(r"^:bot!\S+ PRIVMSG #agents :(.*)$")
            second = await ann.expect(r"^:bot!\S+ PRIVMSG #agents :(.*)$")
            assert first[1] + second[1] == text
            assert len(first[1].encode()) == room - room % 2
            assert not any("[CUT]" in line for line in ann.seen)


async def test_a_kick_is_forgiven_and_an_invitation_is_told(ngircd: RunningNgircd, events: Events) -> None:
    """We come back after a kick; into a keyed channel we go with its key at the first try."""
    async with await connect(ngircd.server.address) as ann:
        await ann.register("ann", "server-pass")
        await ann.send("JOIN #den", "MODE #den +ik sesame")
        await ann.expect(r"MODE #den \+ik")
        async with make_client(ngircd.server.address, events) as client:
            await client.wait_ready()
            with pytest.raises(IrcError, match="cannot join #den"):
                await client.join("#den")
            await ann.send("INVITE bot #den")
            assert (await events.next(Invited)).channel == "#den"
            await client.join("#den", "sesame")
            assert client.sees("ann")
            await client.join("#den", "sesame")
            await ann.send("KICK #den bot :shoo")
            kick = await events.next(Kicked)
            assert (kick.is_me, kick.final, kick.by.nick) == (True, False, "ann")
            client.part("#den")


async def test_operators_free_nicks(ngircd: RunningNgircd, events: Events) -> None:
    """An operator ends a ghost's connection, and nobody is hurt where there is no ghost."""
    async with (
        await connect(ngircd.server.address) as ghost,
        make_client(ngircd.server.address, events) as client,
    ):
        await ghost.register("ghost", "server-pass")
        await client.wait_ready()
        await client.oper("fireclaw", "oper-pass")
        whois = await client.whois("bot")
        assert whois is not None
        assert (whois.operator, whois.server) == (True, client.server_name)
        await client.kill("ghost", "away")
        await ghost.expect("ERROR :KILLed by bot")
        await client.kill("ghost", "away")
        assert await client.whois("ghost") is None
