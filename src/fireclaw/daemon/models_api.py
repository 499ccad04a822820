"""The part of the HTTP API that shows and fetches models, and shows what they cost.

=======  ==================================  ==================================================================
method   path                                what
=======  ==================================  ==================================================================
GET      /v1/models                          ``models`` there and to be had; ``problems`` on the way
POST     /v1/models/NAME/pull                a job that fetches one; its last event has its whole name, ``model``
GET      /v1/cost                            what was spent, summed up ``by`` agent, model, day or person
=======  ==================================  ==================================================================
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fireclaw.errors import InvalidError
from fireclaw.store.spending import NANO, CostBy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request

    from fireclaw.daemon.job import Job, Say
    from fireclaw.llm.fetch import Progress
    from fireclaw.llm.gateway import Gateway
    from fireclaw.store.spending import CostRow, Spending

    StartJob = Callable[[str, Callable[[Say], Awaitable[dict[str, Any]]]], Job]

_PROGRESS_S: Final = 1.0  # between two lines of progress of the same kind


def model_routes(gateway: Gateway, spending: Spending, start_job: StartJob) -> list[Route]:
    """Build the routes.

    Args:
        gateway: the way to models.
        spending: what was spent.
        start_job: starts a job of a name, or joins the one that runs.
    """

    async def show(request: Request) -> Response:  # noqa: ARG001 - the form of an endpoint
        return JSONResponse(asdict(await gateway.list_models()))

    async def pull(request: Request) -> Response:
        name = request.path_params["name"]

        async def work(say: Say) -> dict[str, Any]:
            return {"model": await gateway.pull(name, ProgressLines(say))}

        return _stream(start_job(f"pull {name}", work).follow())

    async def cost(request: Request) -> Response:
        word = request.query_params.get("by", CostBy.AGENT.value)
        if word not in list(CostBy):
            raise InvalidError(f"by: must be one of {', '.join(CostBy)}, not {word!r}")
        return JSONResponse({"by": word, "rows": [_row(row) for row in spending.summary(CostBy(word))]})

    return [
        Route("/v1/models", show, methods=["GET"]),
        Route("/v1/models/{name:path}/pull", pull, methods=["POST"]),
        Route("/v1/cost", cost, methods=["GET"]),
    ]


class ProgressLines:
    """Turns the progress of a fetch into lines: each new thing, and of the same thing not too many.

    Args:
        say: takes a line.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._text = ""
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        """Take a progress."""
        now = time.monotonic()
        is_news = progress.text != self._text or (progress.total and progress.done >= progress.total)
        if is_news or now - self._last >= _PROGRESS_S:
            self._text, self._last = progress.text, now
            size = f": {progress.done / 1e6:.0f} of {progress.total / 1e6:.0f} MB" if progress.total else ""
            self._say(progress.text + size)


def _row(row: CostRow) -> dict[str, Any]:
    values = asdict(row)
    nanodollars = values.pop("nanodollars")
    return values | {"price_usd": nanodollars / NANO}


def _stream(events: AsyncIterator[dict[str, Any]]) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        async for event in events:
            yield json.dumps(event).encode() + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")
