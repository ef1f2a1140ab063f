"""What the routers' losses take and refuse."""

import pytest
import torch

from moe_backbone.model.router import load_balancing_loss


def test_a_load_of_other_layers_is_refused():
    logits, experts = [torch.randn(6, 4)] * 3, [torch.zeros(6, 2, dtype=torch.long)]
    with pytest.raises(ValueError, match=r"of \[1, 4\], and the logits are of 3 layers with 4 experts"):
        load_balancing_loss(logits, experts)
    with pytest.raises(ValueError, match=r"of \[3, 5\]"):
        load_balancing_loss(logits, experts * 3, load=torch.ones(3, 5))


def test_losses_of_bfloat16_logits_are_computed_in_float32():
    logits = [torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)).bfloat16()]
    experts = [logits[0].float().topk(2).indices]
    wide = load_balancing_loss([each.float() for each in logits], experts)
    assert load_balancing_loss(logits, experts) == wide and wide.dtype == torch.float32
