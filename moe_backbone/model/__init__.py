"""The Compass models: configuration, layers, heads, presets, and their code inside checkpoints."""
