"""Which flash kernels run, and what FlashAttention-4's functions are told; they are a stand-in in float64 here."""

import math
from types import SimpleNamespace

import pytest
import torch
from flash_in_float64 import backward, forward

from otpo_kernels import flash
from otpo_kernels.flash import OWN, Segments, attend_within, flash_backward, flash_forward, flash_kernels

GPU = torch.device("cuda", 0)


@pytest.fixture
def fourth(monkeypatch):
    """FlashAttention-4's two functions by what is documented of them, and the options of each call."""
    calls = []

    def run(query, key, value, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, **options):
        assert options.pop("return_lse")
        calls.append(dict(options))
        left = options["window_size_left"]
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found = forward(
            *(query, key, value, *ends, 0.0, options["causal"], False),
            scale=softmax_scale,
            window_size_left=-1 if left is None else left,
        )
        output, log_mass, *_ = found
        return output, log_mass.masked_fill(log_mass == math.inf, -math.inf), None, None, None

    def run_backward(
        *tensors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, deterministic, **options
    ):
        query, key, value, output, grad, log_mass = tensors
        left = options["window_size_left"]
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return backward(
            *(grad, query, key, value, output, log_mass, *ends, 0.0, options["causal"]),
            scale=softmax_scale,
            window_size_left=-1 if left is None else left,
        )

    monkeypatch.setattr(flash, "_fourth", lambda: SimpleNamespace(_flash_attn_fwd=run, _flash_attn_bwd=run_backward))
    return calls


def parts(queries, keys):
    torch.manual_seed(0)
    return [torch.randn(rows, heads, 8, dtype=torch.float64) for rows, heads in ((queries, 4), (keys, 2), (keys, 2))]


def torchs(monkeypatch):
    monkeypatch.setattr(
        flash, "_aten", SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    )


@pytest.mark.parametrize(("causal", "left"), [(True, -1), (True, 2), (False, -1)])
def test_both_kinds_of_kernels_are_told_the_same(fourth, monkeypatch, causal, left):
    ends_q, ends_k = (
        torch.tensor(ends, dtype=torch.int32) for ends in ([0, 4, 5, 9], [0, 4, 4 if not causal else 5, 9])
    )
    segments = Segments(ends_q, ends_k, 4, 5, causal, left)
    query, key, value = parts(9, 9)
    grad = torch.randn_like(query)
    torchs(monkeypatch)
    found = []
    for reason in ("nobody", None):
        monkeypatch.setattr(flash, "why_not_fourth", lambda *_, reason=reason: reason)
        output, log_mass = flash_forward(query, key, value, segments, 0.3)
        found.append((output, log_mass, *flash_backward(grad, query, key, value, output, log_mass, segments, 0.3)))
    assert fourth == [
        {
            "causal": causal,
            "window_size_left": left if left >= 0 else None,
            "window_size_right": 0 if left >= 0 else None,
        }
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    if not causal:  # the second segment's query sees no key
        assert (found[0][1][:, 4] == -math.inf).all() and not found[0][0][4].any()


def test_attention_within_segments_has_its_gradients(fourth, monkeypatch):
    monkeypatch.setattr(flash, "why_not_fourth", lambda *_: None)
    ends = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    leaves = [part.requires_grad_() for part in parts(9, 9)]
    assert torch.autograd.gradcheck(lambda *given: attend_within(*given, ends, 5), leaves)
    assert len(fourth) > 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"environ": "torch"}, f"{OWN}=torch"),
        ({"head_dim": 256}, "heads of 256 numbers"),
        ({"head_dim": 32}, "heads of 32 numbers"),
        ({"capability": (8, 0)}, "capability 9 alone"),
        ({"version": None}, "is not installed"),
        ({"version": "4.0.0b12"}, "4.0.0b12 is older than 4.0.0b36"),
        ({"broken": True}, "can't be imported: OSError: no such library"),
        ({"functions": {"_flash_attn_fwd": 1}}, "has no _flash_attn_bwd"),
    ],
)
def test_why_torchs_own_kernels_run(monkeypatch, changes, says):
    def load():
        if changes.get("broken"):
            raise OSError("no such library")
        return SimpleNamespace(**changes.get("functions", {}))

    version = changes.get("version", "4.0.0b36")
    monkeypatch.setenv(OWN, changes.get("environ", "auto"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: changes.get("capability", (9, 0)))
    monkeypatch.setattr(flash, "_version", lambda: version)
    monkeypatch.setattr(flash, "_broken", flash._broken.__wrapped__)
    monkeypatch.setattr(flash, "_fourth", load)
    said = flash_kernels(GPU, changes.get("head_dim", 128))
    assert said == "torch's kernels" if version is None else says in said
    assert says in flash.why_not_fourth(GPU, changes.get("head_dim", 128))


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv(OWN, "fa3")
    with pytest.raises(ValueError, match=f"`{OWN}=fa3` is not known. Set it to torch or auto"):
        flash.why_not_fourth(GPU, 128)
