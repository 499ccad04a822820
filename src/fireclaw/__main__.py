"""``python -m fireclaw`` is the command line."""

import sys

from fireclaw.cli import main

if __name__ == "__main__":
    sys.exit(main())
