"""A fake Firecracker and a fake jailer: programs that look, from outside, like Firecracker v1.16.1.

They are protocol-only: the API's bytes, phases and exact texts, the vsock handshake, snapshots as files, exits, and
what is left behind. The guest end is the real guestd on this host, or whatever a ``Script`` says. A test suite holds
them to the real program::

    programs = install(tmp_path / "programs", Script(guest=Guest.PANIC, guest_after_s=1))
    # now start programs / "firecracker" with --api-sock and so on
"""

from __future__ import annotations

from fireclaw.testing.firecracker.install import install, runs_for_others
from fireclaw.testing.firecracker.script import Connect, Guest, Script

__all__ = ["Connect", "Guest", "Script", "install", "runs_for_others"]
