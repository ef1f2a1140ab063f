"""Packed rows: several documents in a row of fixed length, none of which sees another.

TRL's best-fit packing chooses which documents share a row. It cuts a document longer than a row, and each part counts
as a document of its own. A part of one token has no label.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from trl import pack_dataset

from moe_backbone.model.mtp import IGNORED


def pack_documents(documents: Dataset | IterableDataset, sequence_length: int) -> Dataset | IterableDataset:
    """Packs documents, which have `input_ids`, into rows of `input_ids` and `seq_lengths`; best-fit-decreasing."""
    ids: Any = documents.select_columns(["input_ids"])
    return pack_dataset(ids, sequence_length, strategy="bfd_split")


class PackedCollator:
    """Makes a batch of packed rows.

    Args:
        pad_token_id: Token that fills a row behind its last document. Padding is a document of its own.
        sequence_length: Tokens of a row, L.
        flatten: Whether to join the rows to a single one, which attention by lengths needs.
        tell_ends: Whether to say where the documents of the joined row end, so that nobody has to look for them.
    """

    def __init__(self, pad_token_id: int, sequence_length: int, *, flatten: bool = False, tell_ends: bool = True):
        self.pad_token_id = pad_token_id
        self.sequence_length = sequence_length
        self.flatten = flatten
        self.tell_ends = tell_ends

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch of B rows.

        Args:
            rows: Rows with `input_ids` and `seq_lengths`, the lengths of their documents.

        Returns:
            `input_ids`, `position_ids`, `labels` and `router_mask`, `[B, L]` each, `[1, B * L]` when flattened.
            Positions start at 0 in each document. Labels are -100 at padding and at each document's first token. The
            batch has no attention mask, since transformers finds the documents by their positions. When ends are told,
            it has `cu_seq_lens_q` and `cu_seq_lens_k`, int32: 0 and where each document ends; and `max_length_q` and
            `max_length_k`, which are L, a bound of the documents' lengths that is the same in each batch.
        """
        # By numpy, whose small operations and reading of lists take the host a fraction of torch's time.
        size = (len(rows), self.sequence_length)
        places = np.arange(self.sequence_length)
        input_ids = np.full(size, self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros(size, dtype=np.int64)
        router_mask = np.zeros(size, dtype=np.int64)
        for row, ids, positions, mask in zip(rows, input_ids, position_ids, router_mask, strict=True):
            tokens = len(row["input_ids"])
            ids[:tokens] = row["input_ids"]
            mask[:tokens] = 1
            lengths = np.append(np.asarray(row["seq_lengths"], dtype=np.int64), self.sequence_length - tokens)
            if lengths.sum() != self.sequence_length:
                raise ValueError(f"`seq_lengths` add up to {lengths[:-1].sum()}, and `input_ids` has {tokens} tokens.")
            positions[:] = places - np.repeat(lengths.cumsum() - lengths, lengths)
        begins = position_ids == 0
        labels = np.where(begins | (router_mask == 0), IGNORED, input_ids)
        arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "router_mask": router_mask}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if not self.flatten:
            return batch
        joined: dict[str, Any] = {name: value.view(1, -1) for name, value in batch.items()}
        if not self.tell_ends:
            return joined
        ends = torch.from_numpy(np.append(np.flatnonzero(begins), begins.size).astype(np.int32))
        bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        bounds |= {"max_length_q": self.sequence_length, "max_length_k": self.sequence_length}
        return joined | bounds
