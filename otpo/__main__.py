"""`python -m otpo`, which is the console script `otpo`."""

import sys

from otpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
