"""Runtimes and images: what machines boot and what workloads see.

The daemon uses ``ImageStore`` and knows nothing below it::

    store       ImageStore: find, build, verify, prune
    ├── shelf       finished folders, locks, temporary folders
    ├── runtime     kernel + initrd + Python and guestd, from packages that are only unpacked
    │   └── kernel, initrd, modules, cpio
    ├── debian      an image from a recipe, by mmdebstrap
    │   └── recipe
    ├── archive     the Debian archive through apt
    ├── squashfs    packing
    ├── tool        starting programs
    ├── background  builds that nobody waits for when the daemon ends
    └── host        what the host must have installed
"""

from fireclaw.images.host import SystemPackage, install_command, missing_packages
from fireclaw.images.store import Image, ImageStore, Runtime

__all__ = ["Image", "ImageStore", "Runtime", "SystemPackage", "install_command", "missing_packages"]
