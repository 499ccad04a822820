"""``fireclaw template``: the recipes of agents. It reads the files themselves: no daemon is needed to check one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fireclaw.cli.parser import Parser
from fireclaw.cli.terminal import clean, print_table, say
from fireclaw.errors import ConfigError, ConflictError, InvalidError, SetupError
from fireclaw.paths import Home

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from fireclaw.agents.templates import Templates


def template(arguments: Sequence[str]) -> int:
    """List, show, make and check templates."""
    parser = Parser(
        "template",
        "List, show, make and check the templates that agents are made of.",
        usage="ls | show NAME | new NAME [--from NAME] | check [NAME|FILE ...]",
        examples="  fireclaw template ls\n  fireclaw template new librarian --from researcher\n"
        "  fireclaw template check",
    )
    parser.add_argument("action", choices=["ls", "show", "new", "check"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a template; for check also a TOML file")
    parser.add_argument("--from", dest="base", default="worker", metavar="NAME", help="what a new one is copied from")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args(arguments)
    return {"ls": _ls, "show": _show, "new": _new, "check": _check}[options.action](options)


def _load() -> Templates:
    from fireclaw.agents.templates import Templates  # noqa: PLC0415 - needs more than the standard library

    return Templates.load(_folder())


def _folder() -> Path:
    return Home.find().config / "templates"


def _one_name(options: Namespace) -> str:
    if len(options.names) != 1:
        raise InvalidError(f"{options.action} needs one name", hint="see 'fireclaw template --help'")
    return str(options.names[0])


def _ls(options: Namespace) -> int:
    templates = _load()
    if options.json:
        print(json.dumps([each.model_dump(mode="json", exclude={"persona"}) for each in templates.all()], indent=2))
    else:
        print_table(
            ["name", "tools", "models", "description"],
            [
                [each.name, str(len(each.tools)), ", ".join(each.models) or "-", each.description]
                for each in templates.all()
            ],
        )
    return _tell(templates.problems())


def _show(options: Namespace) -> int:
    templates = _load()
    found = templates.get(_one_name(options))
    if options.json:
        print(json.dumps(found.model_dump(mode="json"), indent=2))
        return 0
    for file in templates.files(found.name):
        print(clean(f"# {file}"))
        for line in file.read_text("utf-8").splitlines():
            print(clean(line))
        print()
    return 0


def _new(options: Namespace) -> int:
    from fireclaw.agents.templates import read_template  # noqa: PLC0415

    name, folder = _one_name(options), _folder()
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,23}", name):
        raise InvalidError(f"{name!r} cannot be the name of an agent", hint="letters, digits, '-', '_'; 24 at most")
    templates = _load()
    base = templates.get(options.base)
    recipe, persona = (file.read_text("utf-8") for file in templates.files(base.name))
    # The recipe is sound, so its name stands in a line of its own, in one kind of quotes or the other.
    recipe = re.sub(
        rf"^(\s*)name\s*=\s*([\"']){base.name}\2", rf'\1name = "{name}"', recipe, count=1, flags=re.MULTILINE
    )
    recipe = recipe.replace(f"{base.name}.md", f"{name}.md")
    target = folder / f"{name}.toml"
    if target.exists() or target.with_suffix(".md").exists():
        raise ConflictError(f"there is a template {str(target)!r} already", hint="edit it, or choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".md").write_text(persona, "utf-8")
        target.write_text(recipe, "utf-8")
    except OSError as error:
        raise SetupError(f"cannot write {str(target)!r}: {error.strerror}") from error
    read_template(target, folder)
    print(target)
    print(target.with_suffix(".md"))
    return 0


def _check(options: Namespace) -> int:
    problems: dict[str, ConfigError] = {}
    templates = _load()
    names = [name for name in options.names if not name.endswith(".toml")]
    for name in names or ([] if options.names else [each.name for each in templates.all()]):
        try:
            templates.get(name)
        except ConfigError as error:
            problems[name] = error
        else:
            print(f"{name}: good")
    if not options.names:
        problems |= templates.problems()
    for file in (Path(name) for name in options.names if name.endswith(".toml")):
        _check_file(file, problems)
    return _tell(problems)


def _check_file(file: Path, problems: dict[str, ConfigError]) -> None:
    from fireclaw.agents.templates import read_template  # noqa: PLC0415

    try:
        read_template(file, file.parent)
    except ConfigError as error:
        problems[str(file)] = error
    else:
        print(clean(f"{file}: good"))


def _tell(problems: dict[str, ConfigError]) -> int:
    for problem in problems.values():
        say(str(problem))
    return int(bool(problems))
