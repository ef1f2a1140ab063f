"""Which transport solver runs: the Triton kernels where they can, plain torch elsewhere, and never in silence.

This module decides; a solver's module, and Triton with it, is imported only when it is about to be used.
"""

from torch import Tensor
from transformers.utils import logging

from otpo.registry import alternatives

from .options import TransportOptions
from .registry import SOLVERS, Solver, solver_names

logger = logging.get_logger(__name__)


def choose_solver(options: TransportOptions, chosen: Tensor, rejected: Tensor) -> Solver:
    """The name of the solver that will run for these hidden states `(B, M, D)` and `(B, N, D)`.

    `"auto"` takes the first solver for the device of the states. Where something stands in its way it warns once,
    with the reason, and takes the next.

    Raises:
        ValueError: The solver that is asked for, or each, can't run.
    """
    asked = (chosen, rejected, options)
    if options.solver != "auto":
        obstacle = SOLVERS[options.solver].find_obstacle(*asked)
        if obstacle is not None:
            others = alternatives(name for name in solver_names() if name != options.solver)
            raise ValueError(
                f"`solver='{options.solver}'` cannot run: {obstacle}. Change that, or set it to {others}."
            )
        return options.solver
    obstacles = []
    for name, kind in SOLVERS.items():
        if kind.devices is not None and chosen.device.type not in kind.devices:
            continue
        obstacle = kind.find_obstacle(*asked)
        if obstacle is None:
            for title, reason in obstacles:
                logger.warning_once(f"Transport runs in {kind.title}, not in {title}: {reason}.")
            return name
        obstacles.append((kind.title, obstacle))
    raise ValueError(f"`solver='auto'` finds no solver that can run: {obstacles}.")
