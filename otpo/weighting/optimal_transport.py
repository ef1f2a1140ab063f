"""OTPO's weighting: the marginals of the transport plan between the two responses of each pair."""

from typing import Unpack

import torch

from otpo.transport.options import TransportKeywords, TransportOptions
from otpo.transport.solve import solve

from .batch import PairBatch, TokenWeights


def otpo(batch: PairBatch, **options: Unpack[TransportKeywords]) -> TokenWeights:
    """Marginals of the unbalanced transport plan between the two responses' hidden states.

    Args:
        batch: B pairs.
        **options: As in [`TransportOptions`].

    Raises:
        ValueError: An option is outside its range, or the kernels were asked for and cannot run.
    """
    return by_transport(batch, options=TransportOptions(**options))


def by_transport(batch: PairBatch, *, options: TransportOptions) -> TokenWeights:
    """The same with options that were checked when they were made: what trains.

    Source: OTPO, arXiv 2505.18720, section 3.
    """
    chosen_states, rejected_states = batch.hidden_states.chunk(2)
    chosen_mask, rejected_mask = batch.mask.chunk(2)
    solved = solve(chosen_states, rejected_states, chosen_mask, rejected_mask, options)
    return TokenWeights(
        torch.cat([solved.chosen, solved.rejected]),
        {"transport/residual": solved.residual.max(), "transport/iterations": solved.iterations.max()},
    )
