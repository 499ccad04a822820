"""The settings: one table that reads the configuration file and the environment, and writes the documentation.

The table is the pydantic models below. Each field is a key of ``fireclaw.toml`` in its section, an environment
variable (``FIRECLAW_IRC_PORT`` for ``port`` in ``[irc]``) and a row of docs/configuration.md, which
``python -m fireclaw.config`` prints. The environment wins over the file, the file over the default.

The daemon reads the settings when it starts; the command line does not import this module.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fireclaw.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

    from fireclaw.paths import Home

_FILE_MAX = 1 << 20  # bytes; a configuration is a page, not a database


def _absolute(value: object) -> Path:
    # A relative path would mean another file for each folder that the daemon is started from.
    if not isinstance(value, str | Path) or not (path := Path(value).expanduser()).is_absolute():
        raise ValueError("must be an absolute path, or one that starts with ~")
    return path


AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MachineConfig(_Section):
    """What a machine gets."""

    memory_mib: int = Field(default=256, ge=96, le=65536, description="Memory of a machine, in MiB.")
    vcpus: int = Field(default=1, ge=1, le=32, description="Virtual processors of a machine.")
    vmm: Literal["auto", "firecracker", "qemu"] = Field(
        default="auto",
        description="What runs machines: `firecracker` and `qemu` insist on it, `auto` takes Firecracker where it is"
        " installed and a machine has booted on it, otherwise QEMU, and says which and why.",
    )
    accel: Literal["auto", "kvm", "tcg"] = Field(
        default="auto",
        description="How machines are accelerated: `kvm` insists on KVM, `tcg` is software only, which QEMU alone can"
        " do, `auto` tries KVM by booting a machine on it and says so when it falls back.",
    )


class ImagesConfig(_Section):
    """Where images come from."""

    mirror: str | None = Field(
        default=None,
        pattern=r"^(https?|file|copy)://?\S+$",
        description="The Debian mirror to build from, as in `sources.list`; otherwise the host's own.",
    )


class IrcConfig(_Section):
    """The managed IRC server."""

    port: int = Field(default=6667, ge=0, le=65535, description="Its port on the loopback; 0 picks a free one.")


class ModelConfig(_Section):
    """The model that the agents think with."""

    base_url: str | None = Field(
        default=None,
        pattern=r"^https?://\S+$",
        description="An OpenAI-compatible server, e.g. `http://127.0.0.1:8000/v1`; otherwise a running Ollama or the"
        " embedded one.",
    )
    name: str | None = Field(
        default=None,
        min_length=1,
        description="The default model, with or without its provider (`ollama:qwen2.5`, `anthropic:NAME`, `embedded`,"
        " which ignores Ollama); otherwise the first of `base_url`'s server, the best of a running Ollama, or the"
        " embedded one that suits this host.",
    )
    api_key_file: AbsolutePath | None = Field(
        default=None, description="A file that holds the server's key and nothing else."
    )
    context: int = Field(default=4096, ge=1024, le=1 << 20, description="Context of one call, in tokens.")


class DaemonConfig(_Section):
    """The daemon itself."""

    idle_minutes: int = Field(
        default=10,
        ge=1,
        le=10080,
        description="Minutes after which a daemon that nobody needs ends; `fireclaw up` keeps it.",
    )


class Config(_Section):
    """All settings. Frozen: a change needs a new daemon."""

    machine: MachineConfig = MachineConfig()
    images: ImagesConfig = ImagesConfig()
    irc: IrcConfig = IrcConfig()
    model: ModelConfig = ModelConfig()
    daemon: DaemonConfig = DaemonConfig()


def load_config(home: Home, environ: Mapping[str, str] | None = None) -> Config:
    """Read the configuration file and the environment.

    Args:
        home: its ``config_file`` is read; a missing file is an empty one.
        environ: the environment; the process's own when None.

    Raises:
        ConfigError: the file is unreadable or not TOML, or a key or a value is wrong; names file, line and key.
    """
    file = _read_file(home.config_file)
    variables = _read_environment(os.environ if environ is None else environ)
    return Config.model_validate({name: file.get(name, {}) | variables.get(name, {}) for name in _sections()})


def settings_table() -> str:
    """Write the table of all settings as Markdown, as it stands in docs/configuration.md."""
    lines: list[str] = []
    for section, model in _sections().items():
        lines += [f"### [{section}]", "", f"{model.__doc__}", ""]
        lines += ["| key | value | default | environment variable | meaning |", "|---|---|---|---|---|"]
        for key, field in model.model_fields.items():
            default = "none" if field.default is None else f"`{field.default}`"
            lines.append(
                f"| `{key}` | {_kind(field)} | {default} | `{_variable(section, key)}` | {field.description} |"
            )
        lines.append("")
    return "\n".join(lines)


def _sections() -> dict[str, type[_Section]]:
    sections: dict[str, type[_Section]] = {}
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, _Section)
        sections[name] = field.annotation
    return sections


def _variable(section: str, key: str) -> str:
    return f"FIRECLAW_{section}_{key}".upper()


def _kind(field: FieldInfo) -> str:
    """Name a field's type for people, with its limits."""
    kind = next(part for part in (get_args(field.annotation) or (field.annotation,)) if part is not type(None))
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    if kind is not int:
        return "path" if get_origin(kind) is Annotated else "text"
    low = next(limit.ge for limit in field.metadata if hasattr(limit, "ge"))
    high = next(limit.le for limit in field.metadata if hasattr(limit, "le"))
    return f"{low} to {high}"


def _read_file(path: Path) -> dict[str, dict[str, Any]]:
    """Read and check the file; the result holds only what the file sets."""
    try:
        text = _read_text(path)
    except FileNotFoundError:
        return {}
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason, line = _syntax_error(str(error), text)
        raise ConfigError(
            f"{path}, line {line}: not TOML: {reason}", hint="see docs/configuration.md for examples"
        ) from error
    try:
        # Strict: a quoted number in the file is a mistake, and guessing hides the next one.
        checked = Config.model_validate(raw, strict=True)
    except ValidationError as error:
        details = error.errors()[0]
        line = _line_of(text, [str(part) for part in details["loc"]])
        raise _refusal(f"{path}, line {line}: ", details) from error
    return checked.model_dump(exclude_unset=True)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_MAX + 1)
        if len(data) > _FILE_MAX:
            raise ConfigError(f"{path}: larger than {_FILE_MAX} bytes", hint="is it the right file?")
        return data.decode()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="mend its permissions or remove it") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8", hint="save the file as UTF-8") from error


def _read_environment(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Collect and check the variables that name a setting."""
    known = {
        _variable(section, key): (section, key) for section, model in _sections().items() for key in model.model_fields
    }
    prefixes = tuple(_variable(section, "") for section in _sections())
    found: dict[str, dict[str, Any]] = {}
    for variable, value in environ.items():
        if variable in known:
            section, key = known[variable]
            found.setdefault(section, {})[key] = value
        elif variable.startswith(prefixes):
            raise ConfigError(f"environment variable {variable}: no such setting", hint=_nearest(variable, known))
    try:
        checked = Config.model_validate_strings(found)
    except ValidationError as error:
        details = error.errors()[0]
        section, key = (str(part) for part in details["loc"][:2])
        raise _refusal(f"environment variable {_variable(section, key)}: ", details) from error
    return checked.model_dump(exclude_unset=True)


def _refusal(where: str, details: ErrorDetails) -> ConfigError:
    """Turn pydantic's first complaint into the thing, the reason and the next step."""
    path = [str(part) for part in details["loc"]]
    if details["type"] == "extra_forbidden":
        section = _sections().get(path[0])
        if section is None:
            return ConfigError(f"{where}unknown section [{path[0]}]", hint=_nearest(path[0], _sections()))
        return ConfigError(f"{where}unknown key {'.'.join(path)!r}", hint=_nearest(path[-1], section.model_fields))
    reason = details["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should be ", "must be ").replace("String should ", "must ")
    if details["type"] == "model_type":
        reason = f"must be a section: [{path[0]}]"
    return ConfigError(f"{where}{'.'.join(path[:2])} {reason}, not {details['input']!r}")


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _syntax_error(message: str, text: str) -> tuple[str, int]:
    """Split tomllib's message, which carries the place in its words, into reason and line."""
    place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if place is None:
        return message, 1
    line = int(place[1]) if place[1] else text.count("\n") + (not text.endswith("\n"))
    return message[: place.start()], max(line, 1)


def _line_of(text: str, path: list[str]) -> int:
    """Find the line of a key. tomllib keeps no places, so this reads headers and keys again, line by line.

    Finds ``key = …`` under ``[section]``, ``section.key = …`` and ``section = {…}``; otherwise the section's header.
    """
    section, best = "", 1
    dotted = ".".join(path[:2])
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([^\[\]]+?)\s*\]", line):
            section = _plain(header[1])
            if section == dotted:
                return number
            if section == path[0]:
                best = number
        elif key := re.match(r"\s*([\w\-\"'.\s]+?)\s*=", line):
            name = f"{section}.{_plain(key[1])}".lstrip(".")
            if name == dotted:
                return number
            if name == path[0]:
                best = number
    return best


def _plain(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


if __name__ == "__main__":
    print(settings_table(), end="")  # noqa: T201 - what docs/configuration.md is made with
