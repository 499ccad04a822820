"""Recipes: how a named image is made, as TOML files in ``data/images``."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from importlib.resources import files

from fireclaw.errors import NotFoundError

_FOLDER = files("fireclaw") / "data" / "images"
_SUFFIX = ".toml"


@dataclass(frozen=True)
class Recipe:
    """A Debian image to be made.

    Attributes:
        name: what people call it.
        digest: SHA-256 of the recipe's bytes, in hex: another recipe makes another image.
        suite: the Debian suite.
        variant: mmdebstrap's name for the base set of packages.
        packages: what comes on top.
        user: the unprivileged user, uid 1000.
        epoch: no file is newer (seconds since 1970).
        exclude: paths of packages that are left out, as dpkg's globs.
        include: paths that stay though an exclusion matches.
    """

    name: str
    digest: str
    suite: str
    variant: str
    packages: tuple[str, ...]
    user: str
    epoch: int
    exclude: tuple[str, ...]
    include: tuple[str, ...]

    @classmethod
    def find(cls, name: str) -> Recipe:
        """Load a recipe that comes with Fireclaw.

        Raises:
            NotFoundError: there is none of that name.
        """
        if name not in names():
            raise NotFoundError.named("image recipe", name, names())
        data = (_FOLDER / f"{name}{_SUFFIX}").read_bytes()
        table = tomllib.loads(data.decode())
        return cls(
            name=name,
            digest=hashlib.sha256(data).hexdigest(),
            suite=table["suite"],
            variant=table["variant"],
            packages=tuple(table["packages"]),
            user=table["user"],
            epoch=table["epoch"],
            exclude=tuple(table["exclude"]),
            include=tuple(table["include"]),
        )


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in _FOLDER.iterdir() if path.name.endswith(_SUFFIX))
