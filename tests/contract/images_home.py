"""The home in which all tests keep the runtime and the images that they build once."""

from __future__ import annotations

import os
from pathlib import Path

from fireclaw.images import Image, ImageStore, Runtime
from fireclaw.paths import Home

_REPOSITORY = Path(__file__).resolve().parents[2]


def shared_home() -> Home:
    """Return the home that test runs share: ``FIRECLAW_TEST_HOME``, or ``.cache/test-home`` of the checkout."""
    base = Path(os.environ.get("FIRECLAW_TEST_HOME") or _REPOSITORY / ".cache/test-home").absolute()
    return Home(base, base / "run", base)


def built() -> tuple[Runtime, Image]:
    """Return the real runtime and the real debian image, after building them where they are missing."""
    store = ImageStore(shared_home())
    return store.build_runtime(print), store.build_image("debian", print)
