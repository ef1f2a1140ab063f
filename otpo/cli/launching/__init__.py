"""Processes of a run: the launcher, the engine that runs, expert parallelism, Ctrl-C."""
