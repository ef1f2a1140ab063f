"""The console script `otpo` and its commands; see `otpo.cli.main`."""
