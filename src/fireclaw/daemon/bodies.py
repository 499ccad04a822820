"""What the API's requests and answers look like. Requests are checked here, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from fireclaw.errors import InvalidError

_NAME = r"^[A-Za-z0-9\[\]\\`_^{|}][A-Za-z0-9\[\]\\`_^{|}.-]{0,62}$"  # host names, and IRC nicks, which are wider
_ARGUMENTS_MAX = 4096
_VARIABLES_MAX = 4096
_TIMEOUT_MAX = 30 * 24 * 3600


def _text(value: object) -> str:
    """Check a string that reaches a guest's execve.

    Not pydantic's own ``str``: an argument may hold any bytes, as surrogate escapes, and that type refuses them.
    """
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004 - pydantic turns ValueError alone into its report
    if "\0" in value:
        raise ValueError("holds a NUL byte, which no argument, variable or path can hold")
    return value


def _variable_name(name: str) -> str:
    if not name or "=" in name:
        raise ValueError("a variable's name must not be empty or hold '='")
    return name


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("must be an absolute path")
    return path


def _not_empty(argv: list[str]) -> list[str]:
    if not argv[0]:
        raise ValueError("the command's name is empty")
    return argv


Text = Annotated[str, PlainValidator(_text)]
MachineName = Annotated[str, Field(pattern=_NAME)]
ImageName = Annotated[str, Field(min_length=1, max_length=128)]  # an unknown one is the images' to refuse
Argv = Annotated[list[Text], Field(min_length=1, max_length=_ARGUMENTS_MAX), AfterValidator(_not_empty)]
Environment = Annotated[dict[Annotated[Text, AfterValidator(_variable_name)], Text], Field(max_length=_VARIABLES_MAX)]

Request = TypeVar("Request", bound="Body")


class Body(BaseModel):
    """A request's body: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ExecRequest(Body):
    """A command for a machine that exists.

    Attributes:
        argv: the command and its arguments; bytes that are not UTF-8 as surrogate escapes.
        env: variables to set.
        cwd: the working directory; None: the image's default.
        user: ``name``, ``uid`` or ``uid:gid``; None: the image's default.
        timeout_s: kill the command after that many seconds; None: never.
    """

    argv: Argv
    env: Environment = Field(default_factory=dict)
    cwd: Annotated[Text, AfterValidator(_absolute)] | None = None
    user: Text | None = None
    timeout_s: float | None = Field(None, gt=0, le=_TIMEOUT_MAX)


class RunRequest(ExecRequest):
    """A command for a new machine that ends with it.

    Attributes:
        image: the image's name.
    """

    image: ImageName = "debian"


class CreateRequest(Body):
    """A machine with a name.

    Attributes:
        name: its name.
        image: the image's name.
    """

    name: MachineName
    image: ImageName = "debian"


class UpRequest(Body):
    """What ``up`` is to do.

    Attributes:
        stay: keep the answer open until the daemon ends, and say then why.
    """

    stay: bool = False


class InstallRequest(Body):
    """What Firecracker is installed from.

    Attributes:
        file: an archive, a folder or a program on this host; None: upstream's release is fetched.
    """

    file: Annotated[Text, AfterValidator(_absolute)] | None = None


class Empty(Body):
    """No settings."""


@dataclass(frozen=True)
class Exit:
    """How a command ended.

    Attributes:
        status: its exit status; 128+N when signal N ended it.
        timed_out: it ran out of time and was killed.
        reason: a sentence for the person where the status alone does not tell, e.g. why it was not executed.
    """

    status: int
    timed_out: bool = False
    reason: str = ""


@dataclass(frozen=True)
class MachineInfo:
    """One row of ``fireclaw ps``.

    Attributes:
        id: the machine's id.
        name: its name, or an empty string.
        purpose: ``run``, ``named``, ``agent``, ``template`` or ``probe``.
        image: the image's name.
        state: ``making``, ``running`` or ``stopping``.
        vmm: ``firecracker`` or ``qemu``.
        accel: ``kvm`` or ``tcg``.
        memory_mib: its memory.
        created_at: seconds since 1970.
    """

    id: str
    name: str
    purpose: str
    image: str
    state: str
    vmm: str
    accel: str
    memory_mib: int
    created_at: float


@dataclass(frozen=True)
class IrcStatus:
    """The managed IRC server: what a person needs to join.

    Attributes:
        host: its address.
        port: its port.
        server: its name.
        password: the password to connect with.
        operator: the operator's name for ``/oper``.
        operator_password_file: the file with the operator's password, 0600.
    """

    host: str
    port: int
    server: str
    password: str
    operator: str
    operator_password_file: str


@dataclass(frozen=True)
class AgentStatus:
    """One agent.

    Attributes:
        name: its nick.
        template: the template it was made from.
        model: the model it thinks with.
        state: a word for people, e.g. ``idle`` or ``working``.
        machine: its machine's id; empty while it has none.
    """

    name: str
    template: str
    model: str
    state: str
    machine: str


@dataclass(frozen=True)
class ModelStatus:
    """The way to models.

    Attributes:
        provider: where the default model runs: ``llama.cpp``, the embedded server, ``ollama``, ``anthropic``, or
            ``openai-compatible``, a configured one.
        name: the default model's name.
        state: ``off``, ``fetching``, ``loading``, ``ready`` or ``failed``.
        detail: progress, or the reason of a failure.
    """

    provider: str
    name: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class VmmStatus:
    """What runs the machines.

    Attributes:
        kind: ``firecracker`` or ``qemu``; ``unknown`` before the first machine.
        accel: ``kvm`` or ``tcg``; ``unknown`` before the first machine.
    """

    kind: str
    accel: str


@dataclass(frozen=True)
class Status:
    """What runs. The API adds the daemon's own part.

    Attributes:
        irc: None while it does not run.
        agents: all of them.
        model: the way to models.
        vmm: what runs the machines.
    """

    irc: IrcStatus | None
    agents: list[AgentStatus]
    model: ModelStatus
    vmm: VmmStatus


def check_body(kind: type[Request], value: Any) -> Request:
    """Check a request's body.

    Args:
        kind: what it must be.
        value: the parsed JSON.

    Raises:
        InvalidError: names the first field that is wrong, and why.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"])
        reason = details["msg"].removeprefix("Value error, ").replace("Input should", "must")
        raise InvalidError(f"{place.lstrip('.') or 'the request'}: {reason}") from error
