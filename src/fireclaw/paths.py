"""Where everything lives. Standard library only: the command line's hot path imports it.

``FIRECLAW_HOME`` moves all of it; otherwise root uses /var/lib, /run and /etc, and a person the XDG folders.
"""

from __future__ import annotations

import os
from pathlib import Path

from fireclaw.errors import SetupError

# unix(7): sun_path is 108 bytes with its NUL. The longest socket we make is <run>/m/<12 hex>/api.
_SOCKET_PATH_MAX = 107
_LONGEST_SOCKET = "/m/0123456789ab/api"


class Home:
    """The folders of one Fireclaw. Not a dataclass: that would cost every ``fireclaw run`` 6 ms.

    Attributes:
        data: what must survive a reboot (store, ledger, images, snapshots, models, secrets).
        run: sockets and per-machine folders; gone after a reboot.
        config: the configuration folder with ``fireclaw.toml``.
    """

    def __init__(self, data: Path, run: Path, config: Path) -> None:
        self.data = data
        self.run = run
        self.config = config

    @classmethod
    def find(cls) -> Home:
        """Find the folders from the environment.

        Raises:
            SetupError: the run folder is so deep that socket paths would exceed 108 bytes.
        """
        env = os.environ
        if home := env.get("FIRECLAW_HOME"):
            base = Path(home).absolute()
            found = cls(base, base / "run", base)
        elif os.geteuid() == 0:
            found = cls(Path("/var/lib/fireclaw"), Path("/run/fireclaw"), Path("/etc/fireclaw"))
        else:
            user = Path.home()
            data = Path(env.get("XDG_DATA_HOME") or user / ".local/share") / "fireclaw"
            run = Path(env["XDG_RUNTIME_DIR"]) / "fireclaw" if env.get("XDG_RUNTIME_DIR") else data / "run"
            found = cls(data, run, Path(env.get("XDG_CONFIG_HOME") or user / ".config") / "fireclaw")
        if len(os.fsencode(found.run)) + len(_LONGEST_SOCKET) > _SOCKET_PATH_MAX:
            raise SetupError(
                f"the folder {str(found.run)!r} is too long for unix sockets (108 bytes at most)",
                hint="set FIRECLAW_HOME to a shorter path",
            )
        return found

    @property
    def socket(self) -> Path:
        """The API socket, 0600."""
        return self.run / "api.sock"

    @property
    def irc_place(self) -> Path:
        """Where the managed IRC server listens; it exists as long as one may run."""
        return self.run / "irc.json"

    @property
    def irc_settings(self) -> Path:
        """The IRC server's own configuration, with its passwords."""
        return self.run / "ngircd.conf"

    @property
    def lock(self) -> Path:
        """Held by the one daemon of this home (flock); holds its pid."""
        return self.run / "daemon.lock"

    @property
    def start_lock(self) -> Path:
        """Held while a daemon is being started (flock), so that only one is."""
        return self.run / "start.lock"

    @property
    def database(self) -> Path:
        """The store."""
        return self.data / "fireclaw.db"

    @property
    def ledger(self) -> Path:
        """The hash-chained record."""
        return self.data / "ledger.jsonl"

    @property
    def memo(self) -> Path:
        """Facts about this host that were found out once."""
        return self.data / "host.json"

    @property
    def log(self) -> Path:
        """The daemon's own log."""
        return self.data / "daemon.log"

    @property
    def runtimes(self) -> Path:
        """Runtimes, one folder a digest."""
        return self.data / "runtimes"

    @property
    def images(self) -> Path:
        """Images, one folder a digest, and the names that point to them."""
        return self.data / "images"

    @property
    def snapshots(self) -> Path:
        """Snapshots, one folder a key."""
        return self.data / "snapshots"

    @property
    def vmms(self) -> Path:
        """VMM programs that we fetched, one folder a release."""
        return self.data / "vmms"

    @property
    def jails(self) -> Path:
        """Where the jailer makes root folders: on the file system of images and snapshots, which are linked in."""
        return self.data / "jails"

    @property
    def workspaces(self) -> Path:
        """Workspace drives of machines."""
        return self.data / "workspaces"

    @property
    def models(self) -> Path:
        """Model files by digest."""
        return self.data / "models"

    @property
    def secrets(self) -> Path:
        """Passwords and keys, 0600 files in a 0700 folder."""
        return self.data / "secrets"

    @property
    def machines(self) -> Path:
        """Per-machine folders with sockets, console and log."""
        return self.run / "m"

    @property
    def config_file(self) -> Path:
        """The configuration file; it may not exist."""
        return self.config / "fireclaw.toml"

    def make(self) -> None:
        """Make the folders (0700) where they are missing.

        Raises:
            SetupError: one cannot be made, with the reason, or is another user's, who could put his files in it.
        """
        for folder in (self.data, self.run, self.secrets, self.machines, self.workspaces):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                owner = folder.stat().st_uid
            except OSError as error:
                raise SetupError(
                    f"cannot make the folder {str(folder)!r}: {error.strerror}",
                    hint="set FIRECLAW_HOME to a folder you may write to",
                ) from error
            if owner != os.geteuid():
                raise SetupError(
                    f"the folder {str(folder)!r} belongs to user {owner}, not to you ({os.geteuid()})",
                    hint="set FIRECLAW_HOME to a folder of your own",
                )
