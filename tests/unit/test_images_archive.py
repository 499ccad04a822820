"""Choosing mirrors, and recipes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import NotFoundError
from fireclaw.images.archive import Archive, Package, choose_mirrors
from fireclaw.images.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path


def test_the_hosts_debian_is_told_from_vendors() -> None:
    """Only what says it is Debian counts, though vendors call their archives the same."""
    rows = """\
http://vendor.example/linux/debian/ stable Vendor CE
http://other.example/debian/ main Other
http://mirror.example/debian/ main Debian
http://mirror.example/debian-security/ main Debian
http://second.example/debian/ main Debian
"""
    assert choose_mirrors(rows) == ("http://mirror.example/debian", "http://mirror.example/debian-security")


def test_an_unknown_origin_is_believed() -> None:
    """Where apt has no lists it knows no origins; the signature decides later."""
    assert choose_mirrors("http://mirror.example/debian/ main $(ORIGIN)") == ("http://mirror.example/debian", "")


def test_mirror_lists_of_cloud_hosts_are_understood() -> None:
    """An address may be a file with mirrors in it."""
    rows = """\
mirror+file:/etc/apt/mirrors/debian-security.list main Debian
mirror+file:/etc/apt/mirrors/debian.list main Debian
"""
    assert choose_mirrors(rows) == (
        "mirror+file:/etc/apt/mirrors/debian.list",
        "mirror+file:/etc/apt/mirrors/debian-security.list",
    )


@pytest.mark.parametrize("rows", ["", "http://mirror.example/ubuntu/ main Ubuntu"])
def test_a_host_without_debian_has_no_mirror(rows: str) -> None:
    """Another distribution's archive is no substitute."""
    assert choose_mirrors(rows) == ("", "")


def test_a_given_mirror_serves_suite_updates_and_security(tmp_path: Path) -> None:
    """A mirror given by the user replaces the host's, and its security archive is beside it."""
    lines = Archive(tmp_path, "bookworm", "http://mirror.example/debian/").sources()

    assert [line.split("] ")[1] for line in lines] == [
        "http://mirror.example/debian bookworm main",
        "http://mirror.example/debian bookworm-updates main",
        "http://mirror.example/debian-security bookworm-security main",
    ]
    assert all("signed-by=" in line for line in lines)


def test_the_cache_knows_whole_packages_and_drops_old_ones(tmp_path: Path) -> None:
    """A package is in the cache when its bytes are right; what no set names any more goes."""
    archive = Archive(tmp_path, "bookworm")
    whole, damaged, old = (
        Package(name, "1", hashlib.sha256(name.encode()).hexdigest(), 4, "") for name in ("whole", "damaged", "old")
    )
    archive.path(whole).parent.mkdir(parents=True)
    for package, data in ((whole, b"whole"), (damaged, b"dam"), (old, b"old")):
        archive.path(package).write_bytes(data)

    assert archive.missing([whole, damaged]) == [damaged]
    archive.keep_only([whole, damaged])
    assert archive.missing([whole, old]) == [old]


def test_the_debian_recipe_is_found() -> None:
    """The default image has a recipe, with a user for the agent."""
    recipe = Recipe.find("debian")

    assert (recipe.suite, recipe.user) == ("bookworm", "agent")
    assert len(recipe.digest) == 64


def test_an_unknown_recipe_offers_the_nearest() -> None:
    """A misspelt recipe name is answered with the right one."""
    with pytest.raises(NotFoundError, match="did you mean 'debian'"):
        Recipe.find("debain")
