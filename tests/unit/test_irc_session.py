"""The IRC session as a state machine: lines and time in, events and commands out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.irc.events import (
    Close,
    Invited,
    Joined,
    Kicked,
    Message,
    Parted,
    Pong,
    Quit,
    Ready,
    Renamed,
    Reply,
    Retry,
    Send,
    Whois,
    WhoisEnd,
)
from fireclaw.irc.message import Kind, Prefix
from fireclaw.irc.session import Identity, Session

if TYPE_CHECKING:
    from fireclaw.irc.events import Output

ANN = Prefix("ann", "~ann", "host")


class Play:
    """A session with a hand-turned clock; lines in, what it answers out."""

    def __init__(self, nick: str = "bot", channels: dict[str, str] | None = None) -> None:
        self.now = 100.0
        self.channels = channels if channels is not None else {}
        self.session = Session(Identity(nick, "bot", "A bot"), self.channels, lambda: self.now)

    def hear(self, *lines: str) -> list[Output]:
        """Feed lines."""
        return [output for line in lines for output in self.session.receive(line.encode())]

    def wait(self, seconds: float) -> list[Output]:
        """Let time pass."""
        self.now += seconds
        return self.session.tick()

    def wait_for_deadline(self) -> list[Output]:
        """Let time pass until the session wants to be called."""
        return self.wait(self.session.deadline - self.now)

    def registered(self, nick: str = "bot", isupport: str = "CASEMAPPING=ascii NICKLEN=24") -> Play:
        """Go through registration."""
        self.session.start("")
        self.hear(f":srv 001 {nick} :Welcome", f":srv 005 {nick} {isupport} :are supported", f":srv 376 {nick} :End")
        return self

    def joined(self, channel: str, names: str = "") -> Play:
        """Go into a channel."""
        self.hear(f":{self.session.me.nick}!~bot@here JOIN {channel}")
        if names:
            self.hear(f":srv 353 {self.session.me.nick} = {channel} :{names}")
        return self


def sent(outputs: list[Output]) -> list[str]:
    """The lines that go out."""
    return [output.data.decode().rstrip("\r\n") for output in outputs if isinstance(output, Send)]


# Registration


def test_registration_opens_with_cap_and_password() -> None:
    """CAP comes first, the password before the nick, and all of it overtakes the queue."""
    out = Play().session.start("s3cret")
    assert sent(out) == ["CAP LS :302", "PASS :s3cret", "NICK :bot", "USER bot 0 * :A bot"]
    assert all(output.urgent for output in out if isinstance(output, Send))


def test_no_password_no_pass() -> None:
    """A server without a password is not sent an empty one."""
    assert not any(line.startswith("PASS") for line in sent(Play().session.start("")))


@pytest.mark.parametrize(
    ("lines", "answers"),
    [
        ([":srv CAP * LS :multi-prefix"], ["CAP :END"]),
        ([":srv CAP * LS :"], ["CAP :END"]),
        ([":srv CAP * LS * :a b", ":srv CAP * LS :message-tags=x c"], ["CAP REQ :message-tags"]),
        ([":srv CAP * LS :message-tags", ":srv CAP * ACK :message-tags"], ["CAP REQ :message-tags", "CAP :END"]),
        ([":srv CAP * LS :message-tags", ":srv CAP * NAK :message-tags"], ["CAP REQ :message-tags", "CAP :END"]),
        ([":srv 421 * CAP :Unknown command"], []),
        ([":srv CAP"], []),
    ],
)
def test_capabilities_are_optional(lines: list[str], answers: list[str]) -> None:
    """What is offered and useful is asked for; an empty list, a refusal and an old server end well."""
    play = Play()
    play.session.start("")
    assert sent(play.hear(*lines)) == answers
    assert play.hear(":srv 001 bot :Welcome", ":srv 422 bot :No MOTD") == [Ready("bot", "srv")]


def test_ping_before_welcome_is_answered_at_once() -> None:
    """A server that wants a PONG before it registers us gets it, ahead of the queue."""
    play = Play()
    play.session.start("")
    assert play.hear("PING :cookie") == [Send(b"PONG :cookie\r\n", urgent=True)]


def test_ready_joins_the_channels_with_their_keys() -> None:
    """Once introduced we join what we want to be in, the key in the first JOIN."""
    play = Play(channels={"#a": "", "#b": "key"})
    play.session.start("")
    assert play.hear(":srv 001 bot :Welcome") == []
    out = play.hear(":srv 376 bot :End")
    assert out[0] == Ready("bot", "srv")
    assert sent(out) == ["JOIN :#a", "JOIN #b :key"]
    assert play.hear(":srv 376 bot :End of a MOTD that somebody asked for") == []


def test_taken_nicks_get_a_number() -> None:
    """433, 436 and 437 before the welcome pick the next nick like it, within the length."""
    play = Play("a" * 30)
    play.session.start("")
    tries = [sent(play.hear(f":srv {code} * x :in use")) for code in (433, 436, 437)]
    assert tries == [[f"NICK :{'a' * 28}-{n}"] for n in (1, 2, 3)]
    assert play.hear(f":srv 001 {'a' * 28}-3 :Welcome", ":srv 376 x :End") == [Ready("a" * 28 + "-3", "srv")]


def test_too_many_taken_nicks_come_back_later() -> None:
    """After ten taken nicks the session ends, for a long while."""
    play = Play()
    play.session.start("")
    *_, last = [play.hear(":srv 433 * bot :in use") for _ in range(11)]
    assert [type(output) for output in last] == [Close]
    assert isinstance(last[0], Close)
    assert last[0].retry is Retry.LATER


def test_a_long_nick_is_cut_and_a_bad_one_given_up() -> None:
    """432 first means too long, which nine characters mend; a second one means never."""
    play = Play("researcher-one")
    play.session.start("")
    assert sent(play.hear(":srv 432 * researcher-one :too long")) == ["NICK :researche"]
    (close,) = play.hear(":srv 432 * researche :Erroneous")
    assert isinstance(close, Close)
    assert close.retry is Retry.NEVER


@pytest.mark.parametrize(
    ("line", "retry"),
    [
        (":srv 464 * :Invalid password", Retry.NEVER),
        (":srv 465 * :You are banned", Retry.NEVER),
        ("ERROR :Access denied: Bad password?", Retry.NEVER),
        ("ERROR :Connection refused, too many connections from your IP address", Retry.LATER),
        ("ERROR :Server going down", Retry.SOON),
        ("ERROR", Retry.SOON),
    ],
)
def test_refusals_tell_when_to_come_back(line: str, retry: Retry) -> None:
    """A wrong password is for good, a crowd passes slowly, a restart quickly."""
    play = Play()
    play.session.start("")
    (close,) = play.hear(line)
    assert isinstance(close, Close)
    assert close.retry is retry


def test_after_registration_nothing_is_for_good() -> None:
    """A KILL whose reason speaks of a bad password, or a refused OPER, does not end the nick for ever."""
    play = Play().registered()
    assert play.hear(":srv 464 bot :Invalid password") == [Reply(464, ("Invalid password",))]
    (close,) = play.hear("ERROR :KILLed by ann: Bad password")
    assert close == Close("KILLed by ann: Bad password", Retry.LATER)
    assert play.hear(":ann!a@b KILL bot :ann (out)") == [Close("killed: ann (out)", Retry.LATER)]


def test_a_server_that_never_welcomes_is_left() -> None:
    """Registration has 30 seconds."""
    play = Play()
    play.session.start("")
    assert play.session.deadline == play.now + 30
    assert play.wait(29) == []
    (close,) = play.wait(1)
    assert isinstance(close, Close)


# Time


def test_silence_is_asked_then_ended() -> None:
    """A minute of silence brings a PING, another minute the end; any line is a sign of life."""
    play = Play().registered()
    assert play.wait_for_deadline() == [Send(b"PING :alive\r\n", urgent=True)]
    assert play.hear(":srv PONG srv :alive") == []
    assert play.session.deadline == play.now + 60
    assert sent(play.wait(60)) == ["PING :alive"]
    assert play.wait(59) == []
    (close,) = play.wait(1)
    assert close == Close("the server has been silent for 120 s")


def test_pongs_are_events() -> None:
    """The answer to somebody's own PING comes out with its token."""
    assert Play().registered().hear(":srv PONG srv :said7") == [Pong("said7")]


def test_the_wanted_nick_is_asked_for_each_minute() -> None:
    """With another nick we ask each minute, and stop once we have it."""
    play = Play().registered("bot-1")
    assert play.session.deadline == play.now + 60
    assert "NICK :bot" in sent(play.wait(60))
    assert play.hear(":srv 433 bot-1 bot :in use") == [Reply(433, ("bot", "in use"))]
    assert "NICK :bot" in sent(play.wait(60))
    assert play.hear(":bot-1!~bot@here NICK :bot") == [Renamed(Prefix("bot-1", "~bot", "here"), "bot", is_me=True)]
    play.hear("PING :x")
    assert sent(play.wait(59.5)) == []


@pytest.mark.parametrize("line", [":bot!~x@y QUIT :bye", ":bot!~x@y NICK :other"])
def test_a_freed_nick_is_taken_at_once(line: str) -> None:
    """When the holder of our nick leaves it, we do not wait for the minute."""
    assert sent(Play().registered("bot-1").hear(line)) == ["NICK :bot"]


def test_a_nick_that_cannot_fit_is_not_asked_for() -> None:
    """A server with short nicks is not asked each minute for a long one."""
    play = Play("researcher").registered("researche", "NICKLEN=9")
    assert sent(play.wait(60)) == ["PING :alive"]
    assert play.session.regain_nick() == []


# People and channels


def test_our_mask_is_learned_from_our_join() -> None:
    """Until our JOIN comes back the longest mask is assumed; then the true one is known."""
    play = Play().registered()
    assert len(str(play.session.me)) == len("bot!@") + 20 + 63
    assert play.hear(":bot!~bot@here JOIN :#a") == [Joined(Prefix("bot", "~bot", "here"), "#a", is_me=True)]
    assert str(play.session.me) == "bot!~bot@here"
    assert play.session.is_in("#A")


def test_people_are_seen_through_shared_channels() -> None:
    """NAMES, JOIN, PART, KICK, QUIT and NICK keep the list of those whose changes we hear of."""
    play = Play().registered().joined("#a", "bot @+ann ~bob")
    sees = play.session.sees
    assert (sees("ANN"), sees("bob"), sees("cat")) == (True, True, False)
    play.hear(":cat!c@h JOIN #a", ":ann!~ann@host NICK :anna", ":bob!b@h PART #a")
    assert (sees("ann"), sees("anna"), sees("bob"), sees("cat")) == (False, True, False, True)
    play.hear(":anna!~ann@host KICK #a cat :out", ":anna!~ann@host QUIT :bye")
    assert (sees("anna"), sees("cat")) == (False, False)
    play.hear(":cat!c@h JOIN #a", ":bot!~bot@here PART #a")
    assert not sees("cat")
    assert not play.session.is_in("#a")


def test_comings_and_goings_are_events() -> None:
    """Each says who, where, why, and whether it was we; a netsplit is told from a death."""
    play = Play().registered().joined("#a")
    assert play.hear(
        ":ann!~ann@host JOIN #a",
        ":ann!~ann@host PART #a :lunch",
        ":ann!~ann@host QUIT :a.example b.example",
        ":ann!~ann@host QUIT :gone home",
        ":ann!~ann@host NICK anna",
        ":ann!~ann@host INVITE bot :#secret",
        ":ann!~ann@host KICK #a bob",
    ) == [
        Joined(ANN, "#a", is_me=False),
        Parted(ANN, "#a", "lunch", is_me=False),
        Quit(ANN, "a.example b.example", is_netsplit=True),
        Quit(ANN, "gone home", is_netsplit=False),
        Renamed(ANN, "anna", is_me=False),
        Invited(ANN, "#secret"),
        Kicked("bob", "#a", ANN, "", is_me=False),
    ]


def test_one_kick_is_forgiven_two_are_not() -> None:
    """After a kick we come back once, five seconds later; after a second one soon after we stay out."""
    play = Play(channels={"#A": "key"}).registered().joined("#a")
    assert play.hear(":ann!~ann@host KICK #a bot :shoo") == [Kicked("bot", "#a", ANN, "shoo", is_me=True)]
    assert play.session.deadline == play.now + 5
    assert sent(play.wait(5)) == ["JOIN #A :key"]
    play.joined("#a")
    assert play.hear(":ann!~ann@host KICK #a bot :shoo") == [Kicked("bot", "#a", ANN, "shoo", is_me=True, final=True)]
    assert sent(play.wait(30)) == []
    assert play.channels == {}


def test_a_kick_long_after_is_the_first_again() -> None:
    """Ten minutes later a kick is forgiven again."""
    play = Play(channels={"#a": ""}).registered().joined("#a")
    for _ in range(2):
        play.hear(":ann!~ann@host KICK #a bot")
        assert "JOIN :#a" in sent(play.wait(5))
        play.joined("#a")
        play.now += 600
        play.hear("PING :x")


# What is said


def test_messages_are_cleaned_and_addressed() -> None:
    """A message tells sender, place and kind; its text is clean and its bytes are kept."""
    play = Play().registered()
    (channel,) = play.hear(":ann!~ann@host PRIVMSG #a :\x02hi\x02 bot")
    assert channel == Message(ANN, "#a", "hi bot", "\x02hi\x02 bot", Kind.PRIVMSG)
    assert isinstance(channel, Message)
    assert (channel.is_private, channel.reply_to, channel.is_notice) == (False, "#a", False)
    (direct,) = play.hear(":ann!~ann@host NOTICE bot :psst")
    assert isinstance(direct, Message)
    assert (direct.is_private, direct.reply_to, direct.is_notice) == (True, "ann", True)
    (action,) = play.hear(":ann!~ann@host PRIVMSG #a :\x01ACTION waves\x01")
    assert isinstance(action, Message)
    assert (action.kind, action.text) == (Kind.ACTION, "waves")
    (tagged,) = play.hear("@bot=;x=y :ann!~ann@host PRIVMSG #a :beep")
    assert isinstance(tagged, Message)
    assert tagged.is_bot


def test_what_nobody_said_is_no_message() -> None:
    """Our own echo, a server's notice, a CTCP reply and a line without text are not messages."""
    play = Play().registered().joined("#a")
    assert play.hear(":bot!~bot@new.host PRIVMSG #a :me", ":srv NOTICE bot :stats") == []
    assert play.session.me.host == "new.host"
    assert play.hear(":ann!~ann@host NOTICE bot :\x01PING 1\x01", ":ann!~ann@host PRIVMSG #a") == []


def test_ctcp_is_answered_by_notice_and_seldom() -> None:
    """VERSION, PING and CLIENTINFO get one NOTICE in two seconds; other requests, and those to a channel, none."""
    play = Play().registered()
    assert sent(play.hear(":ann!~ann@host PRIVMSG bot :\x01PING 12 34\x01")) == ["NOTICE ann :\x01PING 12 34\x01"]
    assert sent(play.hear(":ann!~ann@host PRIVMSG bot :\x01VERSION\x01")) == []
    play.now += 2
    assert sent(play.hear(":ann!~ann@host PRIVMSG bot :\x01version\x01")) == ["NOTICE ann :\x01VERSION Fireclaw\x01"]
    play.now += 2
    assert (
        play.hear(":ann!~ann@host PRIVMSG bot :\x01DCC SEND x\x01", ":ann!~ann@host PRIVMSG #a :\x01VERSION\x01") == []
    )


# WHOIS


def test_whois_is_collected() -> None:
    """The lines of a WHOIS become one event; several at once do not mix."""
    play = Play().registered()
    out = play.hear(
        ":srv 311 bot ann ~ann host * :Ann",
        ":srv 311 bot bob ~bob elsewhere * :Bob",
        ":srv 312 bot Ann srv :Fireclaw",
        ":srv 313 bot ann :is an IRC operator",
        ":srv 330 bot bob bobby :is logged in as",
        ":srv 335 bot bob :is an IRC Bot",
        ":srv 312 bot bob other.srv :Elsewhere",
        ":srv 318 bot ann :End",
        ":srv 318 bot BOB :End",
    )
    assert out == [
        WhoisEnd("ann", Whois("ann", "~ann", "host", "srv", operator=True, account="", bot=False)),
        WhoisEnd("BOB", Whois("bob", "~bob", "elsewhere", "other.srv", operator=False, account="bobby", bot=True)),
    ]


def test_whois_of_nobody() -> None:
    """Nobody of that nick is an answer, too."""
    assert Play().registered().hear(":srv 401 bot zoe :No such nick", ":srv 318 bot zoe :End") == [
        Reply(401, ("zoe", "No such nick")),
        WhoisEnd("zoe", None),
    ]


# Anything


_COMMANDS = ["001", "005", "311", "312", "318", "353", "376", "401", "433", "464", "CAP", "ERROR", "INVITE", "JOIN"]
_COMMANDS += ["KICK", "KILL", "NICK", "NOTICE", "PART", "PING", "PONG", "PRIVMSG", "QUIT"]
_PARAMS = ["bot", "#a", "ann", ":x", ":", "LS", "*", "ACK", ":\x01PING", ":\x01VERSION\x01"]
_WORDS = st.sampled_from(_COMMANDS + _PARAMS)


@given(
    st.lists(st.builds(lambda words, tail: " ".join(words).encode() + tail, st.lists(_WORDS), st.binary(max_size=40)))
)
def test_any_server_is_survived(lines: list[bytes]) -> None:
    """No sequence of lines makes the session raise, and what it sends is always whole lines."""
    play = Play().registered().joined("#a")
    for line in lines:
        for prefix in (b"", b":srv ", b":ann!~ann@host ", b":bot!~bot@here "):
            for output in play.session.receive(prefix + line):
                if isinstance(output, Send):
                    assert output.data.endswith(b"\r\n")
                    assert output.data.count(b"\n") == 1
    play.wait(1000)
