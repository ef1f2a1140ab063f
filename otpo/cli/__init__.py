"""The console script `otpo` and its commands; see `otpo.cli.main`."""

import sys

if sys.argv[:1] == ["-m"]:  # Python is locating a module of this package to run it as the program
    from .launching.interrupt import leave_while_importing

    leave_while_importing()
