"""``python -m fireclaw.daemon`` is the daemon; the command line starts it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fireclaw.daemon.process import main

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from fireclaw.config import Config
    from fireclaw.daemon.api import Supervisor
    from fireclaw.paths import Home


def _open_supervisor(home: Home, config: Config) -> AbstractAsyncContextManager[Supervisor]:
    # Late: whatever goes wrong while half of Fireclaw is imported shall reach the log and the client.
    from fireclaw.daemon.supervisor import open_supervisor  # noqa: PLC0415

    return open_supervisor(home, config)


if __name__ == "__main__":
    sys.exit(main(_open_supervisor))
