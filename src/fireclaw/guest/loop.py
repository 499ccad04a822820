"""A small epoll loop with callbacks.

Not asyncio: its subprocess and stream classes cost 3-7 ms a command under a software CPU and halve the throughput.
"""

from __future__ import annotations

import os
import select
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Callback = Callable[[], None]

_READ = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR


class Loop:
    """Calls back when a descriptor is ready, or when another thread asks."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._calls: deque[Callback] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._running = False
        self.add_reader(self._wake, self._woken)

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call back while ``fd`` can be read."""
        known = fd in self._readers or fd in self._writers
        self._readers[fd] = callback
        self._update(fd, known=known)

    def remove_reader(self, fd: int) -> None:
        """Stop that; nothing happens if there was no reader."""
        if self._readers.pop(fd, None) is not None:
            self._update(fd, known=True)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call back while ``fd`` can be written."""
        known = fd in self._readers or fd in self._writers
        self._writers[fd] = callback
        self._update(fd, known=known)

    def remove_writer(self, fd: int) -> None:
        """Stop that; nothing happens if there was no writer."""
        if self._writers.pop(fd, None) is not None:
            self._update(fd, known=True)

    def _update(self, fd: int, *, known: bool) -> None:
        events = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        if not events:
            self._epoll.unregister(fd)
        elif known:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)

    def call_from_thread(self, callback: Callback) -> None:
        """Call back in the loop's thread; may be called from any thread."""
        self._calls.append(callback)
        os.eventfd_write(self._wake, 1)

    def _woken(self) -> None:
        os.eventfd_read(self._wake)
        for _ in range(len(self._calls)):  # one that asks to be called again lets the descriptors have a turn first
            self._calls.popleft()()

    def run(self) -> None:
        """Run until ``stop``."""
        self._running = True
        while self._running:
            for fd, events in self._epoll.poll():
                # A callback may have removed what a later event of this round speaks of.
                if events & _READ and (callback := self._readers.get(fd)):
                    callback()
                if events & ~select.EPOLLIN and (callback := self._writers.get(fd)):
                    callback()

    def stop(self) -> None:
        """Let ``run`` return after this round; call it from the loop's thread."""
        self._running = False

    def close(self) -> None:
        """Give the loop's own descriptors back."""
        os.close(self._wake)
        self._epoll.close()
