"""``fireclaw models``: the models that agents can think with, and fetching one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fireclaw.cli.office import watch
from fireclaw.cli.parser import Parser
from fireclaw.cli.start import request
from fireclaw.cli.terminal import print_table, say
from fireclaw.errors import InvalidError
from fireclaw.paths import Home

if TYPE_CHECKING:
    from collections.abc import Sequence


def models(arguments: Sequence[str]) -> int:
    """List the models, or fetch one."""
    parser = Parser(
        "models",
        "List the models that agents can think with, or fetch one: of the embedded catalogue, or by a running Ollama.",
        usage="[--json] | pull NAME",
        examples="  fireclaw models\n  fireclaw models pull qwen2.5-coder-1.5b\n  fireclaw models pull ollama:llama3.1",
    )
    parser.add_argument("action", nargs="?", choices=["pull"], help="fetch the model NAME")
    parser.add_argument("name", nargs="?", metavar="NAME", help="with or without its provider, e.g. ollama:qwen2.5")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args(arguments)
    if options.action is None:
        return _list(as_json=options.json)
    if options.name is None:
        raise InvalidError("which model?", hint="see 'fireclaw models'")
    return _pull(options.name, as_json=options.json)


def _list(*, as_json: bool) -> int:
    with request(Home.find(), "GET", "/v1/models") as connection:
        found = connection.read_json()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    print_table(
        ["", "name", "state", "tools", "context", "size", "where", "note"],
        [_row(model) for model in found["models"]],
    )
    for problem in found["problems"]:
        say(problem)
    return 0


def _row(model: dict[str, Any]) -> list[str]:
    state = "running" if model["running"] else "installed" if model["installed"] else "-"
    return [
        "*" if model["is_default"] else "",
        model["name"],
        state,
        model["tools"] or "?",
        f"{model['context'] >> 10}k" if model["context"] else "?",
        f"{model['size'] / 1e9:.1f} GB" if model["size"] else "-",
        model["where"],
        model["note"],
    ]


def _pull(name: str, *, as_json: bool) -> int:
    try:
        for event in watch(Home.find(), f"/v1/models/{quote(name, safe=':')}/pull"):
            if as_json:
                print(json.dumps({"model": event["model"]}))
            else:
                say(f"{event['model']} is here")
    except KeyboardInterrupt:
        say("the daemon goes on with it; the same command shows how far it is")
        raise
    return 0
