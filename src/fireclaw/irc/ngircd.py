"""The managed IRC server: ngircd's configuration, its command line, and whether it is up and ours.

The process is started by the layer above, through the gate that records it first; this module says with what::

    server = NgircdServer(name=server_name(host), port=6667, password=..., operator_password=...)
    check_port(server.port)
    server.write_config(path, uid)
    fd = os.open(path, os.O_RDONLY)
    start(server.argv(fd), fds=[fd], user=uid, stdout=/dev/null, stderr=/dev/null)
    await server.wait_ready(timeout_s)

It outlives the daemon. Its output therefore goes to /dev/null: a pipe that nobody reads would stop it once full,
and a file would grow without bound (26.1 can write 160,000 lines a second about a dead client). SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fireclaw.errors import ConflictError, InvalidError, SetupError
from fireclaw.irc.client import ServerAddress
from fireclaw.irc.message import LineBuffer, parse_line

if TYPE_CHECKING:
    from pathlib import Path

LOOPBACK = "127.0.0.1"
NETWORK = "FireclawNet"
CONTROL = "#control"
AGENTS = "#agents"
NICK_MAX = 24

_DOMAIN = "fireclaw.local"
_SERVER_NAME_MAX = 63
_PASSWORD_BYTES = 18  # 24 characters; ngircd takes 64
_PROBE_S = 2.0
_RETRY_S = 0.02
_NOT_REGISTERED = "451"

# Every line is there because its default bites; the numbers were measured with 26.1.
_CONFIG = """\
# Written by Fireclaw at each start; changes are lost.
[Global]
Name = {name}
Network = {network}
Info = Fireclaw
AdminInfo1 = Fireclaw
AdminEMail = root@localhost
# Agents and people of this host only; no unix sockets in ngircd.
Listen = {listen}
Ports = {port}
Password = {password}
MotdPhrase = Talk to agents in {agents}, command them in {control}: !help

[Limits]
ConnectRetry = 15
MaxConnections = 600
# The default is 5, and all of us come from one address.
MaxConnectionsIP = 0
MaxJoins = 50
# The default is 9.
MaxNickLength = {nick_max}
MaxPenaltyTime = {max_penalty}
# A silent client holds its nick for the sum of the two.
PingTimeout = 60
PongTimeout = 20

[Options]
AllowedChannelTypes = #
DNS = no
Ident = no
# The default folder is read even with -f, and an empty value does not prevent it. This one exists everywhere,
# needs no rights, and never holds a *.conf.
IncludeDir = /proc/self/fd
OperCanUseMode = yes
# The default is yes, and then Password above is ignored.
PAM = no
RequireAuthPing = yes

[Operator]
Name = {operator}
Password = {operator_password}

[Channel]
Name = {control}
Topic = Commands for the overseer: !help
Modes = +nt

[Channel]
Name = {agents}
Topic = Agents and people
Modes = +nt
"""


@dataclass(frozen=True)
class NgircdServer:
    """One managed server.

    Attributes:
        name: its name in IRC, see :func:`server_name`.
        port: TCP port on loopback.
        password: what a client needs to connect.
        operator_password: what ``/oper`` needs, with the name ``operator``.
        operator: the name for ``/oper``.
        max_penalty_s: most seconds that ngircd holds a client's commands back; -1 is its own rule, 0 switches
            penalties off.
    """

    name: str
    port: int
    password: str = field(repr=False)
    operator_password: str = field(repr=False)
    operator: str = "fireclaw"
    max_penalty_s: int = -1

    @property
    def address(self) -> ServerAddress:
        """Where clients connect."""
        return ServerAddress(LOOPBACK, self.port, self.password)

    def config(self) -> str:
        """The configuration file.

        Raises:
            InvalidError: a value holds a line break or starts a comment.
        """
        values = {
            "name": self.name,
            "password": self.password,
            "operator": self.operator,
            "operator_password": self.operator_password,
        }
        for key, value in values.items():
            # ngircd has no quoting: the rest of the line is the value.
            if not re.fullmatch(r"[!-~]{1,64}", value) or value[0] in "#;":
                raise InvalidError(f"the {key} of the IRC server must be 1 to 64 printable ASCII characters")
        return _CONFIG.format(
            **values,
            network=NETWORK,
            listen=LOOPBACK,
            port=self.port,
            control=CONTROL,
            agents=AGENTS,
            nick_max=NICK_MAX,
            max_penalty=self.max_penalty_s,
        )

    def write_config(self, path: Path, uid: int | None = None) -> None:
        """Write the configuration, 0600 from its first byte, in place of an older one.

        Args:
            path: where.
            uid: the only one who may read it, where we are root; None for ourselves.

        Raises:
            InvalidError: see :meth:`config`.
        """
        text = self.config()
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            if uid is not None:
                os.fchown(fd, uid, uid)
            file.write(text)

    @staticmethod
    def argv(config_fd: int) -> list[str]:
        """The command line.

        Args:
            config_fd: the configuration, open and inherited. By /dev/fd it is readable for an unprivileged
                server even where the folders above it are not; a HUP reads it again.
        """
        return ["ngircd", "--nodaemon", "--config", f"/dev/fd/{config_fd}"]

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until this very server answers on its port.

        Raises:
            SetupError: another server answers there, or nothing does in time.
        """
        found = ""
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := await find_server_name(self.port)):  # noqa: ASYNC110 - nothing signals it
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            raise SetupError(
                f"the IRC server did not answer on {LOOPBACK}:{self.port} within {timeout_s:g} s",
                hint="its own words: ngircd --nodaemon --config FILE, with the file in the run folder",
            ) from None
        if found != self.name:
            raise SetupError(f"{LOOPBACK}:{self.port} is another IRC server, {found}", hint=_other_port_hint(self.port))


def server_name(host: str) -> str:
    """Make the server's name from the host's: ``My_Box.lan`` is ``my-box.fireclaw.local``."""
    label = re.sub(r"[^a-z0-9]+", "-", host.partition(".")[0].lower()).strip("-")
    return f"{label[: _SERVER_NAME_MAX - len(_DOMAIN) - 1].strip('-') or 'host'}.{_DOMAIN}"


def check_port(port: int) -> None:
    """Check that the server will be able to listen.

    Raises:
        ConflictError: something listens there.
        SetupError: this user may not listen there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ngircd does
        try:
            probe.bind((LOOPBACK, port))
            probe.listen()
        except PermissionError as error:
            raise SetupError(
                f"port {port} of {LOOPBACK} may not be used: {error.strerror}", hint=_other_port_hint(port)
            ) from error
        except OSError as error:
            raise ConflictError(
                f"port {port} of {LOOPBACK} is taken by another program", hint=_other_port_hint(port)
            ) from error


def _other_port_hint(port: int) -> str:
    return (
        f"set another one in fireclaw.toml: [irc] port = {port + 1}; "
        "or, where the system's own ngircd has it: sudo systemctl disable --now ngircd"
    )


async def find_server_name(port: int) -> str:
    """Ask whatever listens on a loopback port for its IRC server name, without registering.

    Returns:
        The name; empty where nothing listens or it does not talk IRC.
    """
    try:
        async with asyncio.timeout(_PROBE_S):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            try:
                # ngircd answers every command of a stranger with 451, its name in front.
                writer.write(b"PING :who\r\n")
                return await _read_name(reader)
            finally:
                writer.transport.abort()
    except OSError:
        return ""


async def _read_name(reader: asyncio.StreamReader) -> str:
    lines = LineBuffer()
    while data := await reader.read(4096):
        for raw in lines.feed(data):
            line = parse_line(raw)
            if line is not None and line.command == _NOT_REGISTERED and line.prefix is not None:
                return line.prefix.nick
    return ""


def load_password(path: Path) -> str:
    """Read a password from its 0600 file; make both where the file is missing.

    Raises:
        SetupError: the file is empty or others may read it.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        password = path.read_text().strip()
        if path.stat().st_mode & 0o077 or not password:
            raise SetupError(
                f"the password file {str(path)!r} is empty or readable for others",
                hint="remove it, and a new one will be made; or chmod 600",
            ) from None
        return password
    with os.fdopen(fd, "w") as file:
        password = secrets.token_urlsafe(_PASSWORD_BYTES)
        file.write(password + "\n")
    return password
