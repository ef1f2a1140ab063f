"""Rounds of a model's own pairs and alignment, as `examples/iterate.py` runs them; and steps that are printed."""
