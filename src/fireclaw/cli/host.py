"""``fireclaw setup`` and ``fireclaw doctor``: making this host ready, and finding out why it is not."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from fireclaw.cli.office import watch
from fireclaw.cli.parser import Parser
from fireclaw.cli.terminal import clean, say
from fireclaw.paths import Home

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fireclaw.daemon.doctor import Check

_COLOURS: Final = {"ok": "32", "warn": "33", "fail": "31"}


def setup(arguments: Sequence[str]) -> int:
    """Build what machines boot from and fetch the model, or install Firecracker."""
    parser = Parser(
        "setup",
        "Build the runtime and the default image, and fetch the model. What is there already is kept.\n"
        "With --vmm: install a VMM, and nothing else.",
        examples="  fireclaw setup\n"
        "  fireclaw setup --vmm firecracker\n"
        "  fireclaw setup --vmm firecracker --file firecracker-v1.16.1-x86_64.tgz",
    )
    parser.add_argument("--vmm", choices=["firecracker"], help="install this VMM: its pinned release, by checksum")
    parser.add_argument(
        "--file", metavar="PATH", help="what to install it from: a downloaded archive, a folder or a program"
    )
    options = parser.parse_args(arguments)
    if options.file is not None and options.vmm is None:
        parser.error("--file says what a VMM is installed from, and there is no --vmm")
    target, body = "/v1/setup", {}
    if options.vmm is not None:
        target = f"/v1/vmms/{options.vmm}"
        # The daemon works in another folder than we do.
        body = {"file": None if options.file is None else os.path.abspath(options.file)}  # noqa: PTH100 - keeps links
    try:
        for _ in watch(Home.find(), target, body):
            say("ready")
    except KeyboardInterrupt:
        say(f"the daemon goes on with it; '{shlex.join(['fireclaw', 'setup', *arguments])}' shows how far it is")
        raise
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Check this host."""
    parser = Parser(
        "doctor",
        "Check this host; exit status 1 when something does not work. Starts and changes nothing.",
        examples="  fireclaw doctor\n  fireclaw doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args(arguments)
    # The one verb that works without the API: it must not need what it examines.
    from fireclaw.daemon.doctor import State, run_checks  # noqa: PLC0415 - needs more than the standard library

    checks = run_checks(Home.find())
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _print_checks(checks)
    return int(any(check.state is State.FAIL for check in checks))


def _print_checks(checks: Sequence[Check]) -> None:
    colour = sys.stdout is not None and sys.stdout.isatty()
    width = max(len(check.name) for check in checks)
    for check in checks:
        state = f"{check.state:<4}"
        if colour:
            state = f"\x1b[{_COLOURS[check.state]}m{state}\x1b[0m"
        print(f"{state}  {check.name:<{width}}  {clean(check.reason)}")
        if check.remedy:
            print(f"      {'':<{width}}  -> {clean(check.remedy)}")
