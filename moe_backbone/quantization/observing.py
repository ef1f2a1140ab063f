"""What goes into each expert and linear layer, document by document: how many rows, and how large they get.

One pass over the candidates tells all of it. A draw is a choice of documents then, and what it would have seen is a
maximum over them: any number of draws are compared without running the model again.

Shapes: N documents, B documents of a batch, L layers with experts, E experts, S other linear layers, R rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tapping import Places, Rows, tapped

PRODUCTS = ("gate_up", "down")


@dataclass(frozen=True)
class Observations:
    """What documents bring to the matrices of a model, on the host.

    Attributes:
        layers: Number of each layer with experts.
        linears: Name of each other linear layer.
        tokens_N: Tokens of each document, int64.
        rows_NLE: Rows that each document brings to each expert, int32.
        largest: By product, `"gate_up"` and `"down"`: the largest absolute value in those rows `(N, L, E)`, float32;
            0 where there are none.
        sums: By product: the sum over those rows of each row's largest absolute value `(N, L, E)`, float32.
        linear_NS: The largest absolute value that goes into each other linear layer, float32.
    """

    layers: tuple[int, ...]
    linears: tuple[str, ...]
    tokens_N: Tensor
    rows_NLE: Tensor
    largest: dict[str, Tensor]
    sums: dict[str, Tensor]
    linear_NS: Tensor


class _Observer:
    """The tap that counts; `start` begins a batch, and `found` is what came of it."""

    def __init__(self, places: Places):
        self.places = places
        self._place = {layer: place for place, layer in enumerate(places.layers)}
        self._linear = {name: place for place, name in enumerate(places.linears)}

    def start(self, documents_T: Tensor, count: int) -> None:
        """Begins a batch of `count` documents; a token of none of them has the number `count`."""
        self._documents_T, self._count = documents_T, count
        shape = (count, len(self.places.layers), self.places.num_experts)
        device = documents_T.device
        self.rows = torch.zeros(shape, dtype=torch.int32, device=device)
        self.largest = {name: torch.zeros(shape, device=device) for name in PRODUCTS}
        self.sums = {name: torch.zeros(shape, device=device) for name in PRODUCTS}
        self.linears = torch.zeros(count, len(self._linear), device=device)

    def keeps(self) -> Tensor | None:
        return self._documents_T < self._count

    def gate_up(self, layer: int, rows: Rows) -> Tensor:
        place, experts = self._place[layer], self.places.num_experts
        cells_R = self._cells(rows)
        counts = torch.bincount(cells_R, minlength=(self._count + 1) * (experts + 1))
        self.rows[:, place] = counts.view(-1, experts + 1)[:-1, :-1].int()
        return self._note("gate_up", place, rows, cells_R)

    def down(self, layer: int, rows: Rows) -> Tensor:
        return self._note("down", self._place[layer], rows, self._cells(rows))

    def linear(self, name: str, values: Tensor) -> Tensor:
        flat = values.reshape(-1, values.shape[-1])
        if len(flat) != len(self._documents_T):
            raise ValueError(
                f"{name} takes {len(flat)} rows where the batch has {len(self._documents_T)} tokens, so they can't be "
                "told apart by document. A model with such a layer isn't covered."
            )
        largest_T = flat.abs().amax(-1).float()
        per_document = largest_T.new_zeros(self._count + 1)
        per_document.scatter_reduce_(0, self._documents_T, largest_T, "amax")
        self.linears[:, self._linear[name]] = per_document[:-1]
        return values

    def _cells(self, rows: Rows) -> Tensor:
        """Document and expert of each row as one number."""
        return self._documents_T[rows.tokens_R] * (self.places.num_experts + 1) + rows.experts_R

    def _note(self, product: str, place: int, rows: Rows, cells_R: Tensor) -> Tensor:
        largest_R = rows.values_RX.abs().amax(-1).float()
        cells = (self._count + 1) * (self.places.num_experts + 1)
        for reduce, found in (("amax", self.largest), ("sum", self.sums)):
            reduced = largest_R.new_zeros(cells).scatter_reduce_(0, cells_R, largest_R, reduce)
            found[product][:, place] = reduced.view(self._count + 1, -1)[:-1, :-1]
        return rows.values_RX


@torch.no_grad()
def observe(
    model: Any, places: Places, batches: Iterable[Sequence[Sequence[int]]], done: Callable[[int], None] | None = None
) -> Observations:
    """Runs documents through a model and notes what goes into its matrices.

    Args:
        model: Of transformers, in evaluation mode.
        places: Of [`moe_backbone.quantization.tapping.find_places`].
        batches: Token ids of the documents of each batch; a document has one token or more.
        done: Called after each batch with the number of its documents.

    Raises:
        ValueError: There are no documents, or values that are not finite.
    """
    observer = _Observer(places)
    found: list[tuple[Tensor, ...]] = []
    tokens: list[int] = []
    with tapped(model, places, observer):
        for batch in batches:
            ids, mask = padded(batch, model.device)
            numbers = torch.arange(len(batch), device=ids.device)[:, None].expand_as(ids)
            observer.start(numbers.masked_fill(mask == 0, len(batch)).flatten(), len(batch))
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
            tensors = (observer.rows, *observer.largest.values(), *observer.sums.values(), observer.linears)
            found.append(tuple(it.cpu() for it in tensors))
            tokens += [len(document) for document in batch]
            if done is not None:
                done(len(batch))
    if not found:
        raise ValueError("There are no documents to calibrate with.")
    rows, gate_up, down, gate_up_sum, down_sum, linears = (torch.cat(parts) for parts in zip(*found, strict=True))
    for name, values in (("gate_up", gate_up), ("down", down), ("linear", linears)):
        wrong = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"Document {wrong[0]} and {len(wrong) - 1} more bring values that are not finite to the {name} "
                "matrices. Load the model in bfloat16 or float32."
            )
    return Observations(
        layers=places.layers,
        linears=tuple(places.linears),
        tokens_N=torch.tensor(tokens),
        rows_NLE=rows,
        largest={"gate_up": gate_up, "down": down},
        sums={"gate_up": gate_up_sum, "down": down_sum},
        linear_NS=linears,
    )


def padded(documents: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `(B, longest)` of documents, padded with token 0 behind their ends."""
    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, document in enumerate(documents):
        ids[place, : len(document)] = torch.tensor(document)
        mask[place, : len(document)] = 1
    return ids.to(device), mask.to(device)
