"""What a training step does beside the loss: scoring, row layouts, hidden states, checks, metrics, times."""
