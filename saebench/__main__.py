"""`python -m saebench` is the `saebench` command."""

import sys

from saebench.cli import main

if __name__ == "__main__":
    sys.exit(main())
