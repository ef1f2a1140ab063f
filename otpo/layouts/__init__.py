"""How the rows of a micro-batch are laid out for the model: padded, packed, or with each pair's shared prompt once.

In the order of a batch: `choice` (which layout a run takes, and why not more), `collator` (plans are made on the
host), `plan` (which token stands where, as pure functions), `attention` and `lengths_attention` (tokens see their own
row alone), `scoring` (the model is called and its answers come back as padded rows).
"""
