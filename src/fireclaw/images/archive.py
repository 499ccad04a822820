"""The Debian archive, seen through apt in folders of our own: any host, no root rights, no trace on the host.

apt checks the signatures (with debian-archive-keyring) and the digests; a download that was cut off goes on
with the next call.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fireclaw.errors import SetupError
from fireclaw.images.tool import run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

_SET_MIRROR = "set 'mirror' in the section [images] of fireclaw.toml to the address of a Debian archive"


@dataclass(frozen=True)
class Package:
    """One version of a Debian package.

    Attributes:
        name: its name.
        version: its version.
        sha256: digest of the .deb file, in hex.
        size: of the .deb file, in bytes.
        depends: its Depends field.
    """

    name: str
    version: str
    sha256: str
    size: int
    depends: str

    @property
    def file_name(self) -> str:
        """The name of the .deb in the cache."""
        return f"{self.name}_{self.sha256[:16]}.deb"


class Archive:
    """One suite of the Debian archive, for x86-64.

    Args:
        cache: a folder for lists and packages.
        suite: e.g. ``"bookworm"``.
        mirror: address of the archive, which has its security archive beside it (the same address with
            "-security"); both from the host's own apt sources otherwise.
    """

    hint = f"see whether the network is up, or {_SET_MIRROR}"
    """The next step when the archive cannot be reached."""

    def __init__(self, cache: Path, suite: str, mirror: str | None = None) -> None:
        self._folder = cache / suite
        self._packages = self._folder / "packages"
        self._suite = suite
        self._mirror = mirror

    def sources(self) -> list[str]:
        """Return the apt source lines: the suite, its updates, its security fixes.

        Raises:
            SetupError: no mirror was given and the host's apt knows none.
        """
        if self._mirror:
            main = self._mirror.rstrip("/")
            security = f"{main}-security"
        else:
            main, security = _host_mirrors()
        suites = [(main, self._suite), (main, f"{self._suite}-updates")]
        if security:
            suites.append((security, f"{self._suite}-security"))
        return [f"deb [signed-by={KEYRING}] {uri} {suite} main" for uri, suite in suites]

    def configuration(self) -> str:
        """Return the host's apt settings for downloads (proxies, time-outs), as apt configuration."""
        lines = run(["apt-config", "dump"]).splitlines()
        return "".join(f"{line}\n" for line in lines if line.startswith("Acquire::"))

    def update(self) -> None:
        """Fetch the package lists.

        Raises:
            SetupError: no mirror, no network, or a signature that does not fit.
        """
        for folder in (self._folder / "lists/partial", self._folder / "archives/partial", self._packages):
            folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "sources.list").write_text("\n".join(self.sources()) + "\n")
        (self._folder / "apt.conf").write_text(self.configuration() + self._settings())
        self._apt("apt-get", "update", "-q", "--error-on=any")

    def find(self, names: Sequence[str]) -> list[Package]:
        """Return the newest version of each package, in the order of ``names``.

        Raises:
            SetupError: the lists have no such package.
        """
        stanzas = self._apt("apt-cache", "show", "--no-all-versions", *names).strip().split("\n\n")
        found = {package.name: package for package in map(_parse, stanzas)}
        return [found[name] for name in names]

    def missing(self, packages: Sequence[Package]) -> list[Package]:
        """Return those that the cache does not hold, or holds damaged."""
        return [package for package in packages if not self._holds(package)]

    def fetch(self, package: Package) -> None:
        """Download a package into the cache.

        Raises:
            SetupError: the download failed; what came so far stays, and the next call goes on from there.
        """
        folder = self._folder / "downloads"
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob("*.deb"):
            leftover.unlink()
        self._apt("apt-get", "download", "-q", f"{package.name}={package.version}", cwd=folder)
        (downloaded,) = folder.glob("*.deb")
        downloaded.rename(self.path(package))

    def keep_only(self, packages: Sequence[Package]) -> None:
        """Remove all other packages from the cache."""
        wanted = {package.file_name for package in packages}
        for path in self._packages.iterdir():
            if path.name not in wanted:
                path.unlink()

    def path(self, package: Package) -> Path:
        """Return where the cache keeps the package's .deb."""
        return self._packages / package.file_name

    def _holds(self, package: Package) -> bool:
        try:
            with self.path(package).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256
        except FileNotFoundError:
            return False

    def _apt(self, *argv: str, cwd: Path | None = None) -> str:
        try:
            return run(argv, cwd=cwd, env={"APT_CONFIG": str(self._folder / "apt.conf")})
        except SetupError as error:
            raise SetupError(error.message, hint=error.hint or self.hint) from error

    def _settings(self) -> str:
        """Keep apt within our folder: no lists, pins, hooks or state of the host."""
        folder = self._folder
        return f"""\
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "root"; // root's apt would become _apt, which may not enter our folder
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Dir::Cache "{folder}";
Dir::Cache::archives "{folder}/archives";
Dir::State "{folder}";
Dir::State::lists "{folder}/lists";
Dir::State::status "/dev/null";
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
"""


def choose_mirrors(rows: str) -> tuple[str, str]:
    """Pick the addresses of the Debian archive and of its security archive, each "" where there is none.

    Vendors like to call their own repository ".../debian" too, so the origin must be Debian where it is known,
    and the component "main".

    Args:
        rows: lines of address, component, and origin (or ``$(ORIGIN)`` where apt does not know it).
    """
    main = security = ""
    for row in rows.splitlines():
        uri, component, origin = row.split(maxsplit=2)
        if component != "main" or origin not in {"Debian", "$(ORIGIN)"}:
            continue
        # Cloud hosts say mirror+file:/etc/apt/mirrors/debian-security.list
        if re.search(r"/debian-security(\.list)?(/|$)", uri):
            security = security or uri.rstrip("/")
        elif re.search(r"/debian(\.list)?(/|$)", uri):
            main = main or uri.rstrip("/")
    return main, security


def _host_mirrors() -> tuple[str, str]:
    """Ask the host's apt for its mirrors: it understands every notation of its sources."""
    query = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(COMPONENT) $(ORIGIN)", "Created-By: Packages"]
    # Without lists (containers delete them) apt knows no origins, and says nothing unless told to.
    for rows in (run(query), run([*query, "--no-release-info"])):
        main, security = choose_mirrors(rows)
        if main:
            return main, security
    raise SetupError("this host's apt sources name no Debian archive", hint=_SET_MIRROR)


def _parse(stanza: str) -> Package:
    fields = dict(line.split(": ", 1) for line in stanza.splitlines() if re.match(r"[A-Z][\w-]*: ", line))
    return Package(
        name=fields["Package"],
        version=fields["Version"],
        sha256=fields["SHA256"],
        size=int(fields["Size"]),
        depends=fields.get("Depends", ""),
    )
