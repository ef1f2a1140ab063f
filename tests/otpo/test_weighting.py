import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from helpers import option_dict, options
from trl import DPOConfig
from weighting_helpers import make_batch

from otpo import OTPOConfig
from otpo.cli import explain
from otpo.cli.running.identity import run_identity
from otpo.registry import Option, zero_to_one_or_none
from otpo.transport import TransportOptions
from otpo.weighting import WEIGHTINGS, PairBatch, TokenWeights, budget, d2po, ld, length, otpo, sampo, uniform
from otpo.weighting.registry import (
    WeightingKind,
    default_note,
    own_defaults,
    registered_option,
    registered_options,
    weightings_help,
    weightings_table,
)

BATCH = make_batch([6, 1, 4, 2, 5, 4])  # pairs (6, 2), (1, 5), (4, 4)


def test_uniform_is_ones():
    assert uniform(BATCH).eq(1).all()


def test_budget_sums_to_the_shorter_length():
    total = (budget(BATCH) * BATCH.mask).sum(1)
    torch.testing.assert_close(total, torch.tensor([2.0, 1, 4, 2, 1, 4]))


def test_length_sums_to_one():
    torch.testing.assert_close((length(BATCH) * BATCH.mask).sum(1), torch.ones(6))


def test_ld_discounts_past_the_shorter_response():
    got = ld(BATCH, alpha=0.25)
    assert got[0][BATCH.mask[0]].tolist() == [1, 1, 0.25, 0.25, 0.25, 0.25]
    assert got[4][BATCH.mask[4]].tolist() == [1, 0.25, 0.25, 0.25, 0.25]
    assert got[3][BATCH.mask[3]].tolist() == [1, 1]


def test_d2po_decays_from_the_first_token():
    got = d2po(BATCH, gamma=0.5)
    assert got[0][BATCH.mask[0]].tolist() == [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert got[3][BATCH.mask[3]].tolist() == [1, 0.5]
    assert d2po(BATCH, gamma=1.0).eq(uniform(BATCH)).all()


def test_sampo_takes_the_shorter_number_of_tokens_of_each():
    got = sampo(BATCH)
    assert got.sum(1).tolist() == [2, 1, 4, 2, 1, 4]
    assert got[~BATCH.mask].eq(0).all()


def test_sampo_draws_by_seed_and_step_and_content_alone():
    base = sampo(BATCH, seed=1)
    torch.testing.assert_close(base, sampo(BATCH, seed=1))
    draws = {tuple(sampo(BATCH, seed=seed)[0].tolist()) for seed in range(30)}
    steps = {tuple(sampo(dataclasses.replace(BATCH, step=step), seed=1)[0].tolist()) for step in range(30)}
    assert len(draws) > 8 and len(steps) > 8  # 15 subsets are possible
    shifted = PairBatch(
        *(torch.roll(t, 1, 1) for t in (BATCH.mask, BATCH.token_ids, BATCH.logps, BATCH.hidden_states))
    )
    torch.testing.assert_close(torch.roll(base, 1, 1), sampo(shifted, seed=1))
    alone = [0, 3]
    pair = PairBatch(*(t[alone] for t in (BATCH.mask, BATCH.token_ids, BATCH.logps, BATCH.hidden_states)))
    torch.testing.assert_close(base[alone], sampo(pair, seed=1))


def test_sampo_is_fair():
    """Each of six tokens is drawn with probability 1/3; 4 standard deviations of 3000 draws are 0.034."""
    draws = torch.stack([sampo(BATCH, seed=seed)[0][BATCH.mask[0]] for seed in range(3000)])
    assert (draws.mean(0) - 1 / 3).abs().max() < 0.035


def test_otpo_reports_its_solver():
    got = otpo(BATCH, reg=0.1)
    assert isinstance(got, TokenWeights)
    torch.testing.assert_close(got.values.sum(1), torch.tensor([2.0, 1, 4, 2, 1, 4]))
    assert 0 <= got.metrics["transport/residual"] <= 1e-6
    assert got.metrics["transport/iterations"] >= 1


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_every_name_survives_empty_responses(name, tmp_path):
    batch = make_batch([3, 0, 0, 2])  # both pairs have an empty side
    answer = WEIGHTINGS[name](options(tmp_path, weighting=name, ld_alpha=0.5))(batch)
    values = answer.values if isinstance(answer, TokenWeights) else answer
    assert values.shape == batch.mask.shape
    assert values.isfinite().all()


def test_names_take_their_options(tmp_path):
    args = options(tmp_path, ot_reg=0.05, ot_reg_m=0.7, ot_cost_scale="pairwise", ot_max_iterations=50, seed=11)
    want = otpo(BATCH, reg=0.05, reg_m=0.7, cost_scale="pairwise", max_iterations=50).values
    torch.testing.assert_close(WEIGHTINGS["otpo"](args)(BATCH).values, want)
    torch.testing.assert_close(WEIGHTINGS["sampo"](args)(BATCH), sampo(BATCH, seed=11))
    args = options(tmp_path, ot_reg=0.05, ot_cost="cosine", d2po_gamma=0.7)
    torch.testing.assert_close(WEIGHTINGS["otpo"](args)(BATCH).values, otpo(BATCH, reg=0.05, cost="cosine").values)
    torch.testing.assert_close(WEIGHTINGS["d2po"](args)(BATCH), d2po(BATCH, gamma=0.7))


def test_the_cost_is_named_unless_it_is_euclidean(tmp_path):
    described = [options(tmp_path, ot_cost=cost).describe_weighting() for cost in ("euclidean", "cosine")]
    assert described == [
        "otpo, ot_reg 1, ot_reg_m 0.2, ot_cost_scale release",
        "otpo, ot_reg 1, ot_reg_m 0.2, ot_cost cosine",
    ]


def test_the_line_that_describes_a_weighting_names_the_options_that_matter(tmp_path):
    cases = {
        "uniform": {},
        "sampo": {"seed": 3},
        "ld, ld_alpha 0.25": {"ld_alpha": 0.25},
        "d2po, d2po_gamma 0.7": {"d2po_gamma": 0.7, "hidden_layer": 0},
        "otpo, ot_reg 0.05, ot_reg_m 0.2, ot_cost_scale pairwise, hidden_layer -2": {
            "ot_reg": 0.05,
            "ot_cost_scale": "pairwise",
            "hidden_layer": -2,
            "ot_solver": "torch",
        },
    }
    for line, changes in cases.items():
        assert options(tmp_path, weighting=line.split(",")[0], **changes).describe_weighting() == line


# The registry


def test_the_page_has_the_table_of_the_registry():
    page = Path(__file__).parents[2] / "docs" / "weightings.md"
    assert weightings_table() in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_an_entry_says_what_its_function_takes(name):
    kind = WEIGHTINGS[name]
    assert kind.help and kind.source and not kind.help.endswith(".")
    taken = [taken for taken in inspect.signature(kind.load()).parameters.values() if taken.kind == taken.KEYWORD_ONLY]
    bundled = {option.keyword for option in kind.options if option.bundled}
    own = {option.keyword for option in kind.options if not option.bundled}
    if kind.bundle is None:
        assert not bundled and own == {keyword.name for keyword in taken}
    else:
        assert (own - {None}) | {"options"} == {keyword.name for keyword in taken}
        assert bundled == {entry.name for entry in dataclasses.fields(TransportOptions)}


def test_the_options_of_the_config_are_those_of_the_registry():
    declared, entries = registered_options(), {entry.name: entry for entry in dataclasses.fields(OTPOConfig)}
    for name, option in declared.items():
        assert entries[name].default == (None if own_defaults(name) else option.default)
        own = name not in {entry.name for entry in dataclasses.fields(DPOConfig)}
        assert not own or entries[name].metadata["help"] == option.help + default_note(option)
    inherited = {entry.name for entry in dataclasses.fields(DPOConfig)}
    of_steps = {"drop_identical_pairs", "row_layout", "compile_layers", "tokens_per_batch"}
    assert set(entries) - inherited - set(declared) == {"weighting", *of_steps}
    help = entries["weighting"].metadata["help"]
    assert help == weightings_help() and all(f"'{name}'" in help for name in WEIGHTINGS)


def test_the_options_of_explain_are_those_of_the_registry():
    parser = explain.make_parser()
    text = " ".join(parser.format_help().split())
    for name, option in registered_options().items():
        (action,) = [action for action in parser._actions if action.dest == name]
        assert action.default is None and action.type is option.kind
        assert " ".join(option.help.removesuffix(".").split()) in " ".join(action.help.split())
    assert weightings_help().removesuffix(".") in text


def share(batch: PairBatch, *, share: float) -> torch.Tensor:
    return torch.full_like(batch.logps, share)


def test_a_new_weighting_is_one_function_and_one_entry(monkeypatch, tmp_path):
    """What `d2po` needed: all that is said of it elsewhere comes from its entry."""
    option = Option(
        "share", float, None, "Weight of all with 'share'.", "share", zero_to_one_or_none, "Set it within [0, 1]."
    )
    monkeypatch.setitem(WEIGHTINGS, "share", WeightingKind(share, "`share|`", "nobody", (option,)))

    @dataclasses.dataclass
    class Config(OTPOConfig):
        share: float | None = registered_option("share")

    def make(**changes):
        return Config(**option_dict(tmp_path, weighting="share", **changes))

    args = make(share=0.25)
    assert WEIGHTINGS["share"](args)(BATCH).eq(0.25).all()
    assert args.describe_weighting() == "share, share 0.25"
    with pytest.raises(ValueError, match=r"`share` must be within \[0, 1\], got 2"):
        make(share=2)
    with pytest.raises(ValueError, match=r"`weighting='share'` needs `share`, got None\. Set it within \[0, 1\]\."):
        make()
    assert explain.make_parser().parse_args(["--share", "0.5"]).share == 0.5
    assert (
        "Weight of all with 'share'" in explain.make_parser().format_help() and "'share' (share|)" in weightings_help()
    )
    assert "| `share` | `share\\|` | `share` | nobody |\n" in weightings_table()
    assert "share" in run_identity([Config], {"weighting": "share", "share": 0.5})
    assert "share" not in run_identity([Config], {"weighting": "otpo", "share": 0.5})


def test_unset_options_have_the_weightings_own_defaults(tmp_path):
    contrast = options(tmp_path, weighting="contrast")
    assert (contrast.ot_cost, contrast.ot_reg, contrast.hidden_layer) == ("cosine", 0.1, 0.8)
    assert (contrast.ot_reg_m, contrast.ot_tolerance) == (0.2, 1e-6)  # shared by both
    release = options(tmp_path)
    assert (release.weighting, release.ot_cost, release.ot_reg, release.hidden_layer) == ("otpo", "euclidean", 1.0, -1)
    given = options(tmp_path, weighting="contrast", ot_reg=0.5, hidden_layer=-1)
    assert (given.ot_cost, given.ot_reg, given.hidden_layer) == ("cosine", 0.5, -1)
    first = options(tmp_path, weighting="otpo*contrast")
    assert first.ot_cost == "cosine"  # the first factor that has a default of its own


def test_another_weighting_keeps_what_was_set(tmp_path):
    release = options(tmp_path, ot_reg_m=0.3, ot_reg=0.5)
    other = release.with_weighting("contrast")
    assert (other.ot_reg, other.ot_reg_m, other.ot_cost, other.hidden_layer) == (0.5, 0.3, "cosine", 0.8)
    assert (release.weighting, release.ot_cost, release.hidden_layer) == ("otpo", "euclidean", -1)
    back = other.with_weighting("otpo")
    assert (back.ot_reg, back.ot_cost, back.hidden_layer) == (0.5, "euclidean", -1)
    with pytest.raises(ValueError, match="needs `ld_alpha`"):
        release.with_weighting("ld")


def test_unset_options_and_their_defaults_are_one_run(tmp_path):
    """Also where a checkpoint was written when the defaults were those of the class, or names none of them."""
    written = {"weighting": "otpo", "ot_reg": 1.0, "ot_cost": "euclidean", "hidden_layer": -1}
    unset = {"weighting": "otpo", "ot_reg": None, "ot_cost": None, "hidden_layer": None}
    assert run_identity([OTPOConfig], unset) == run_identity([OTPOConfig], written)
    contrast = run_identity([OTPOConfig], {**unset, "weighting": "contrast"})
    assert contrast["ot_cost"] == "cosine" and contrast["hidden_layer"] == 0.8
    assert contrast != run_identity([OTPOConfig], {**written, "weighting": "contrast"})
    assert run_identity([OTPOConfig], {"weighting": "otpo"}) == {"weighting": "otpo"}


def test_options_that_were_changed_later_count_as_set(tmp_path):
    release = options(tmp_path)
    release.ot_reg = 0.5
    other = release.with_weighting("contrast")
    assert (other.ot_reg, other.ot_cost, other.hidden_layer) == (0.5, "cosine", 0.8)
