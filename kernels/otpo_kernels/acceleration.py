"""Settings of Anderson acceleration that the transport solvers in Triton and in plain torch share; no Triton here."""

MEMORY = 8
"""Steps remembered. Our choice: on stiff transport problems 8 takes two thirds of the sweeps of 4."""

RIDGE = 1e-10
"""Added to the unit diagonal of the normal equations."""

RESTART = 10.0
"""The memory is dropped when the residual exceeds the best one so far by this factor."""
