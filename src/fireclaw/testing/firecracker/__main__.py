"""``python -m fireclaw.testing.firecracker``: a fake Firecracker without a script."""

from __future__ import annotations

import sys

from fireclaw.testing.firecracker.program import main
from fireclaw.testing.firecracker.script import Script

sys.exit(main(Script()))
