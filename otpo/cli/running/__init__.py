"""A run from its options to its folder: the shared command, checkpoints, identity, card and report."""
