"""The part of the HTTP API that shows and changes what agents remember.

=======  ==================================  ==================================================================
method   path                                what
=======  ==================================  ==================================================================
GET      /v1/agents/NAME/memory              the newest version, and which scopes there are
POST     /v1/agents/NAME/memory              write: ``content``, and ``base``, the version that was looked at
GET      /v1/agents/NAME/memory/log          the versions, newest first
GET      /v1/agents/NAME/memory/diff         two versions compared: ``old`` and ``new``
POST     /v1/agents/NAME/memory/restore      make ``version`` the newest again
=======  ==================================  ==================================================================

``scope``, in the query or the body, names the document: empty for the shared one.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fireclaw.errors import InvalidError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from fireclaw.agents.memory import Memory

_BODY_MAX: Final = 1 << 16
_BY: Final = "operator"  # whoever can open the API's socket is one


def memory_routes(memory_of: Callable[[str], Memory]) -> list[Route]:
    """Build the routes.

    Args:
        memory_of: finds an agent's memory; raises NotFoundError.
    """

    async def show(request: Request) -> Response:
        memory, scope = memory_of(request.path_params["name"]), request.query_params.get("scope", "")
        newest = next(iter(memory.log(scope)), None)
        return JSONResponse(
            {
                "scope": scope,
                "version": newest.version if newest else 0,
                "content": newest.content if newest else "",
                "scopes": memory.scopes(),
            }
        )

    async def write(request: Request) -> Response:
        body = await _body(request)
        row = memory_of(request.path_params["name"]).write(
            _text(body, "scope"), _text(body, "content"), by=_BY, reason="edited", base=_number(body, "base")
        )
        return JSONResponse(asdict(row))

    async def log(request: Request) -> Response:
        memory, scope = memory_of(request.path_params["name"]), request.query_params.get("scope", "")
        return JSONResponse({"versions": [asdict(row) for row in memory.log(scope)]})

    async def diff(request: Request) -> Response:
        memory, query = memory_of(request.path_params["name"]), request.query_params
        return JSONResponse({"diff": memory.diff(query.get("scope", ""), _number(query, "old"), _number(query, "new"))})

    async def restore(request: Request) -> Response:
        body = await _body(request)
        memory = memory_of(request.path_params["name"])
        return JSONResponse(asdict(memory.restore(_text(body, "scope"), _number(body, "version"), by=_BY)))

    base = "/v1/agents/{name}/memory"
    return [
        Route(base, show, methods=["GET"]),
        Route(base, write, methods=["POST"]),
        Route(f"{base}/log", log, methods=["GET"]),
        Route(f"{base}/diff", diff, methods=["GET"]),
        Route(f"{base}/restore", restore, methods=["POST"]),
    ]


async def _body(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > _BODY_MAX:
            raise InvalidError(f"the request's body is larger than {_BODY_MAX} bytes")
    try:
        body = json.loads(data)
    except ValueError as error:
        raise InvalidError(f"the request's body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidError("the request's body is not an object")
    return body


def _text(body: Any, name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str):
        raise InvalidError(f"{name!r} must be a text")
    return value


def _number(values: Any, name: str) -> int:
    value = str(values.get(name, ""))
    if not value.isdecimal():
        raise InvalidError(f"{name!r} must be the number of a version")
    return int(value)
