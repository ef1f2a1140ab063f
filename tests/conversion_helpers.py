"""Conversions of folders, and models that answer alike."""

import torch
from compass_helpers import token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from moe_backbone.conversion.exporting import export_model
from moe_backbone.conversion.importing import import_model
from moe_backbone.conversion.tensors import read_tensors

CLOSE = {"rtol": 0, "atol": 1e-5}


def exported(folder, out, **changes):
    return export_model(AutoConfig.from_pretrained(folder), read_tensors(folder), out, **changes)


def imported(folder, out, **changes):
    return import_model(AutoConfig.from_pretrained(folder), read_tensors(folder), out, **changes)


def loaded(folder, auto=AutoModelForCausalLM, **changes):
    """The model, if its files had all that it needs and nothing else."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, **changes)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


@torch.no_grad()
def assert_same_answers(left, right):
    """Logits over odd lengths and padding on both sides, and greedy answers, token by token."""
    for rows, length in ((1, 1), (2, 7), (3, 19)):
        ids = token_ids(rows, length)
        torch.testing.assert_close(left(ids).logits, right(ids).logits, **CLOSE)
        for padded in (slice(0, length // 3), slice(length - length // 3, length)):
            mask = torch.ones_like(ids)
            mask[0, padded] = 0
            got, want = (model(ids, attention_mask=mask).logits for model in (left, right))
            torch.testing.assert_close(got[mask == 1], want[mask == 1], **CLOSE)
    ids = token_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert left.generate(ids, **options).tolist() == right.generate(ids, **options).tolist()
