"""``fireclaw memory``: what an agent remembers, what it remembered before, and taking things back."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode

from fireclaw.cli.parser import Parser
from fireclaw.cli.start import request
from fireclaw.cli.terminal import clean, print_table, say
from fireclaw.errors import FireclawError, InvalidError
from fireclaw.paths import Home

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

_ACTIONS: Final = ("show", "edit", "log", "diff", "restore")


def memory(arguments: Sequence[str]) -> int:
    """Show, change and restore what an agent remembers."""
    parser = Parser(
        "memory",
        "Show and change what an agent remembers; each change is a version that can be compared and restored.",
        usage="NAME [show | edit | log | diff [OLD [NEW]] | restore VERSION] [--private WHO]",
        examples="  fireclaw memory ada\n  fireclaw memory ada diff 3\n  fireclaw memory ada restore 3\n"
        "  echo 'the build host is b1' | fireclaw memory ada edit",
    )
    parser.add_argument("name", help="the agent")
    parser.add_argument("action", nargs="?", default="show", choices=_ACTIONS)
    parser.add_argument("versions", nargs="*", type=int, metavar="VERSION", help="as 'log' shows them")
    parser.add_argument("--private", default="", metavar="WHO", help="what it learnt in the private talk with WHO")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args(arguments)
    expected = {"diff": range(3), "restore": range(1, 2)}.get(options.action, range(1))
    if len(options.versions) not in expected:
        raise InvalidError(f"{options.action} takes another number of versions", hint="see 'fireclaw memory --help'")
    acts = {"show": _show, "edit": _edit, "log": _log, "diff": _diff, "restore": _restore}
    return acts[options.action](options)


def _get(options: Namespace, what: str = "", **query: object) -> Any:
    target = f"{_target(options)}{what}?{urlencode({'scope': options.private, **query})}"
    with request(Home.find(), "GET", target) as connection:
        return connection.read_json()


def _post(options: Namespace, what: str, **body: object) -> Any:
    data = json.dumps({"scope": options.private, **body}).encode()
    with request(Home.find(), "POST", f"{_target(options)}{what}", data) as connection:
        return connection.read_json()


def _target(options: Namespace) -> str:
    return f"/v1/agents/{quote(options.name, safe='')}/memory"


def _show(options: Namespace) -> int:
    found = _get(options)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    if not found["content"]:
        say("nothing is remembered here")
    for line in found["content"].splitlines():
        print(clean(line))
    if others := [scope for scope in found["scopes"] if scope not in {"", options.private}]:
        say(f"there are private talks, too; --private with one of: {', '.join(others)}")
    return 0


def _log(options: Namespace) -> int:
    versions = _get(options, "/log")["versions"]
    if options.json:
        print(json.dumps(versions, indent=2))
        return 0
    print_table(
        ["version", "when", "who", "characters", "why"],
        [
            [
                str(each["version"]),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(each["saved_at"])),
                each["author"],
                str(len(each["content"])),
                each["reason"],
            ]
            for each in versions
        ],
    )
    return 0


def _diff(options: Namespace) -> int:
    newest = _get(options)["version"]
    old = options.versions[0] if options.versions else max(0, newest - 1)
    new = options.versions[1] if len(options.versions) > 1 else newest
    found = _get(options, "/diff", old=old, new=new)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for line in found["diff"].splitlines():
        print(clean(line))
    return 0


def _restore(options: Namespace) -> int:
    saved = _post(options, "/restore", version=options.versions[0])
    say(f"version {options.versions[0]} holds again, as version {saved['version']}")
    return 0


def _edit(options: Namespace) -> int:
    found = _get(options)
    content = _edited(found["content"]) if sys.stdin is not None and sys.stdin.isatty() else _from_stdin()
    if content.strip() == found["content"]:
        say("nothing was changed")
        return 0
    saved = _post(options, "", content=content, base=found["version"])
    say(f"saved as version {saved['version']}")
    return 0


def _from_stdin() -> str:
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidError("the text on standard input is not UTF-8") from error


def _edited(content: str) -> str:
    """Let the person's editor change a text."""
    import subprocess  # noqa: PLC0415 - slow to import

    editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    with tempfile.TemporaryDirectory(prefix="fireclaw-") as folder:
        file = Path(folder) / "MEMORY.md"
        file.write_text(f"{content}\n", "utf-8")
        try:
            done = subprocess.run([*editor, str(file)], check=False)
        except OSError as error:
            raise FireclawError(
                f"cannot start the editor {editor[0]!r}: {error.strerror}", hint="set EDITOR"
            ) from error
        if done.returncode:
            raise FireclawError(f"the editor ended with status {done.returncode}; nothing was changed")
        return file.read_text("utf-8")
