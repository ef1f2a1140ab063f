"""What `otpo.explain` shows: numbers are the trainer's, text is the responses', and the page escapes everything."""

import html
import io
import random
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import hashed_weights, make_pairs, options
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from otpo import OTPOTrainer
from otpo.explain import ExplainedPair, ExplainedResponse, Piece, draw_picture, explain_rows, render_page, split_pieces
from otpo.explain.heatmap import LABELLED, MOST_PIXELS, png, render_plan
from otpo.explain.picture import MOST_PAIRS
from otpo.explain.pieces import token_labels
from otpo.transport.solve import transport_plan, transport_weights

THAI = "ที่นี่มีเสื้อสีแดงค่ะ น้ำหนัก 400 กรัม"
EMOJI = "👍🏽 👩‍👩‍👧 🇹🇭 🙂"
HOSTILE = "<script>alert(\"x\")</script> & 'q' </span>"
TEXTS = [
    ("Which colour?", f"the red shirt {THAI}", f"the blue box\n{EMOJI}"),
    (HOSTILE, f"red {HOSTILE}", f"blue {HOSTILE} \x1b"),
]


def conversation(rows: list[tuple[str, str, str]]) -> Dataset:
    names = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return Dataset.from_list(
        [
            {name: [{"role": role, "content": text}] for (name, role), text in zip(names.items(), row, strict=True)}
            for row in rows
        ]
    )


def make_trainer(model_folder, other_model_folder, folder, data=None, own=None, **changes) -> OTPOTrainer:
    data = conversation(TEXTS) if data is None else data
    reference = AutoModelForCausalLM.from_pretrained(other_model_folder)
    args = options(folder, max_length=None, **changes)
    return OTPOTrainer(model_folder, reference, args, train_dataset=data, eval_dataset=data, weighting=own)


@pytest.fixture(scope="module")
def trainer(model_folder, other_model_folder, tmp_path_factory) -> OTPOTrainer:
    return make_trainer(model_folder, other_model_folder, tmp_path_factory.mktemp("out"), ot_reg=0.1)


@pytest.fixture(scope="module")
def pairs(trainer) -> list[ExplainedPair]:
    return explain_rows(trainer, [0, 1])


def test_other_weightings_stand_beside(trainer, pairs, model_folder, other_model_folder, tmp_path):
    """Each with the numbers that a trainer with that weighting has."""
    names = ["contrast", "diff", "surprisal", "otpo*diff"]
    shown = explain_rows(trainer, [1], beside=names)[0]
    assert torch.equal(shown.chosen.weights, pairs[1].chosen.weights) and list(shown.beside) == names
    for name, sides in shown.beside.items():
        other = make_trainer(model_folder, other_model_folder, tmp_path, weighting=name, ot_reg=0.1)
        want = explain_rows(other, [1])[0]
        torch.testing.assert_close(sides, (want.chosen.weights, want.rejected.weights), rtol=1e-5, atol=1e-6)
    page = render_page([shown])
    assert all(f"<b>{name}</b>, for comparison" in page for name in names)
    assert "arXiv 2312.00849" in page and "for comparison" not in render_page(pairs)
    with pytest.raises(ValueError, match="`weighting` must be one of"):
        explain_rows(trainer, [1], beside=["otop"])


def test_the_page_says_how_alike_the_states_are(pairs):
    assert f"(length-normalised CHES score) {pairs[0].similarity:.4g}" in render_page(pairs)
    assert pairs[0].numbers()["similarity"] == pairs[0].similarity < 0


def made_up_pair(chosen: int, rejected: int) -> ExplainedPair:
    """A pair with as many tokens as that, whose policy is its reference."""

    def side(count: int) -> ExplainedResponse:
        pieces = [Piece(f"{place} ", range(place, place + 1)) for place in range(count)]
        logps = -torch.rand(count, dtype=torch.float64)
        return ExplainedResponse(pieces, torch.ones(count, dtype=torch.float64), logps, logps, 0.1)

    plan = torch.rand(chosen, rejected, dtype=torch.float64)
    return ExplainedPair("made up", "", side(chosen), side(rejected), plan, False, "uniform")


# Numbers


@pytest.mark.parametrize("sizes", [(7, 4), (1, 5), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("reg", "reg_m", "kind"),
    [
        (1.0, 0.2, {"cost_scale": "release"}),
        (0.05, 0.2, {"cost_scale": "pairwise"}),
        (0.1, 1.0, {}),
        (0.05, 0.2, {"cost": "cosine"}),
    ],
)
def test_marginals_of_the_plan_are_the_weights(sizes, reg, reg_m, kind):
    states = [torch.randn(size, 16, dtype=torch.float64) / 3 for size in sizes]
    masks = [torch.ones(1, size, dtype=torch.bool) for size in sizes]
    settings_ = {"reg": reg, "reg_m": reg_m, "tolerance": 1e-10, **kind}
    plan = transport_plan(*states, **settings_)
    weights = transport_weights(*(state[None] for state in states), *masks, **settings_)
    assert plan.dtype == torch.float64 and plan.shape == sizes and (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), weights.chosen[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(plan.sum(0), weights.rejected[0], rtol=1e-8, atol=0)
    assert float(plan.sum()) == pytest.approx(min(sizes), rel=1e-12)


def test_plan_of_empty_responses_and_bad_options():
    assert transport_plan(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"`reg` must be a positive finite number, got 0"):
        transport_plan(torch.zeros(2, 4), torch.zeros(3, 4), reg=0)
    with pytest.raises(ValueError, match="`cost_scale` must be"):
        transport_plan(torch.zeros(2, 4), torch.zeros(3, 4), cost_scale="big")
    with pytest.raises(ValueError, match="`cost` must be 'euclidean' or 'cosine', got 'l1'"):
        transport_plan(torch.zeros(2, 4), torch.zeros(3, 4), cost="l1")


def test_numbers_are_those_of_a_direct_computation(pairs, tokenizer, model_folder, other_model_folder):
    pair = pairs[0]
    prompt = tokenizer(f"<|user|>{TEXTS[0][0]}<|end|><|assistant|>")["input_ids"]
    states, sides = [], (pair.chosen, pair.rejected)
    for text, side in zip(TEXTS[0][1:], sides, strict=True):
        answer = tokenizer(f"{text}<|end|>")["input_ids"]
        ids = torch.tensor([prompt + answer])
        logps = []
        for folder in (model_folder, other_model_folder):
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                outputs = model(ids, output_hidden_states=True)
            logps.append(outputs.logits[0, len(prompt) - 1 : -1].log_softmax(1)[range(len(answer)), answer])
            if folder == model_folder:
                states.append(outputs.hidden_states[-1][:, len(prompt) - 1 : -1])
        torch.testing.assert_close(side.logps, logps[0].double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(side.reference_logps, logps[1].double(), rtol=1e-4, atol=1e-5)
        expected = 0.1 * (logps[0] - logps[1]).double()
        torch.testing.assert_close(side.contributions(weighted=False), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(side.contributions(weighted=True), expected * side.weights, rtol=1e-4, atol=1e-5)
    masks = [torch.ones(state.shape[:2], dtype=torch.bool) for state in states]
    weights = transport_weights(*states, *masks, reg=0.1, reg_m=0.2)
    torch.testing.assert_close(pair.chosen.weights, weights.chosen[0].double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pair.rejected.weights, weights.rejected[0].double(), rtol=1e-4, atol=1e-5)
    shorter = min(len(side.weights) for side in sides)
    assert float(pair.chosen.weights.sum()) == pytest.approx(shorter, rel=1e-5)
    torch.testing.assert_close(pair.plan.sum(1), pair.chosen.weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pair.plan.sum(0), pair.rejected.weights, rtol=1e-4, atol=1e-6)
    assert pair.plan_gives_weights
    best = pair.top_alignments(3)
    assert best[0][2] == float(pair.plan.max()) == float(pair.plan[best[0][0], best[0][1]])
    assert [mass for *_, mass in best] == sorted((mass for *_, mass in best), reverse=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"ot_reg": 0.05},
        {"weighting": "budget"},
        {"weighting": "ld", "ld_alpha": 0.3},
        {"weighting": "otpo", "ld_alpha": 0.3},
        {"ot_reg": 0.05, "loss_type": ["ipo"]},
        {"ot_reg": 0.05, "loss_type": ["sft", "ipo"]},
        {"ot_reg": 0.05, "loss_type": ["sft", "sigmoid", "ipo"]},
        {"own": hashed_weights},
    ],
    ids=lambda options: ", ".join(options),
)
def test_contributions_sum_to_the_trainers_rewards(model_folder, other_model_folder, tmp_path, changes):
    changes = dict(changes)
    own = changes.pop("own", None)
    trainer = make_trainer(model_folder, other_model_folder, tmp_path, make_pairs(1), own, **changes)
    logged = trainer.evaluate()
    pair = explain_rows(trainer, [0], split="eval")[0]
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        for suffix, weighted in (("", True), ("_unweighted", False)):
            total = float(side.contributions(weighted=weighted).sum())
            assert total == pytest.approx(
                logged[f"eval_rewards/{name}{suffix}"], rel=1e-5, abs=1e-5
            )  # sums of float32
    assert pair.numbers()["margin"] == pytest.approx(logged["eval_rewards/margins"], rel=1e-4, abs=1e-5)
    assert pair.numbers()["ess"] == pytest.approx(logged["eval_weights/ess"], abs=1e-6) or changes.get("ld_alpha")
    assert pair.weighting.startswith("a weighting of your own" if own else changes.get("weighting", "otpo"))
    assert pair.plan_gives_weights == ("ot_reg" in changes)


def test_a_look_leaves_the_trainer_alone(trainer):
    before = torch.get_rng_state(), trainer.model.training, dict(vars(trainer))
    metrics = repr(trainer._metrics)
    trainer.model.train()
    explain_rows(trainer, [1])
    assert trainer.model.training and torch.equal(before[0], torch.get_rng_state())
    assert before[2].keys() == vars(trainer).keys() and repr(trainer._metrics) == metrics
    assert all(not timer.take() for timer in trainer._pair_log.timers.values())


def test_a_look_leaves_the_random_generators_alone(model_folder, other_model_folder, tmp_path):
    def draws(batch):
        return torch.rand_like(batch.logps) + np.random.random() + random.random()

    trainer = make_trainer(model_folder, other_model_folder, tmp_path, own=draws)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    explain_rows(trainer, [0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_no_reference_no_rewards(trainer):
    pair = explain_rows(trainer, [0], reference=False)[0]
    assert not pair.has_reference
    torch.testing.assert_close(pair.chosen.contributions(weighted=False), pair.chosen.logps)
    page = render_page([pair])
    assert "No reference model was given" in page and "reward" not in page.replace("no rewards", "")


def test_rows_are_numbered_as_in_the_users_dataset(model_folder, other_model_folder, tmp_path):
    same = [{"role": "assistant", "content": "the same"}]
    rows = make_pairs(3).to_list()
    rows[1] |= {"chosen": same, "rejected": same}
    data = Dataset.from_list(rows)
    trainer = make_trainer(model_folder, other_model_folder, tmp_path, data, drop_identical_pairs=True)
    pair = explain_rows(trainer, [2])[0]
    assert "".join(piece.text for piece in pair.chosen.pieces) == f"{rows[2]['chosen'][0]['content']}<|end|>"
    for row in (1, 3, -1):
        with pytest.raises(ValueError, match=rf"`rows`: the train dataset has no row {row} .* it has 2"):
            explain_rows(trainer, [row])
    with pytest.raises(ValueError, match=r"`split='test'`: the trainer has the dataset\(s\) \['eval', 'train'\]"):
        explain_rows(trainer, [0], split="test")


# Text


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with a mark for the space before them, and a token for each byte of all else."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁red", "r", "e", "d", "▁r", "▁re"]
    merges = [("▁", "r"), ("▁r", "e"), ("▁re", "d")]
    numbered = {token: place for place, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(numbered, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces = split_pieces(tokenizer, ids)
    assert "".join(piece.text for piece in pieces) == text
    assert [token for piece in pieces for token in piece.tokens] == list(range(len(ids)))


@pytest.mark.parametrize("make", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("text", [THAI, EMOJI, "red e\u0301 ré", "e\u0301" * 3, "क्षि", "\r\n\r\n"], ids=ascii)
def test_pieces_are_whole_graphemes(tokenizer, make, text):
    used = tokenizer if make == "bytes" else sentencepiece_like()
    pieces = split_pieces(used, used(text, add_special_tokens=False)["input_ids"])
    assert "".join(piece.text for piece in pieces) == text
    for piece in pieces:
        assert not re.match(
            "[\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u200d\ufe0f\U0001f3fb-\U0001f3ff]", piece.text
        )
    if text == EMOJI:
        assert [piece.text for piece in pieces][::2] == EMOJI.split(" ")


def test_a_character_that_is_cut_off_is_a_square(tokenizer):
    ids = tokenizer("red 🙂")["input_ids"]
    pieces = split_pieces(tokenizer, ids[:-1])
    assert "".join(piece.text for piece in pieces) == "red □" and pieces[-1].tokens.stop == len(ids) - 1
    assert split_pieces(tokenizer, []) == []


def test_labels_name_each_token(tokenizer):
    ids = tokenizer("red\n🙂 ")["input_ids"]
    labels = token_labels(split_pieces(tokenizer, ids))
    assert len(labels) == len(ids) and labels[-1] == "␣" and "↵" in labels
    assert [label for label in labels if "🙂" in label] == [f"🙂 {part}/4" for part in (1, 2, 3, 4)]


# The page and the picture


def test_page_holds_the_text_and_every_number(pairs):
    page = render_page(pairs, title="<i>", facts={"model": "a & b"})
    cards = re.findall(r'<p class="text">(.*?)</p>', page, re.DOTALL)
    shown = [html.unescape(re.sub(r"<[^>]*>", "", card)) for card in cards]
    assert len(shown) == 12
    assert shown[0] == f"{TEXTS[0][1]}<|end|>" and shown[1] == f"{TEXTS[0][2]}<|end|>"
    assert shown[6] == f"{TEXTS[1][1]}<|end|>" and shown[7] == f"{TEXTS[1][2]}<|end|>".replace("\x1b", "␛")
    assert "\ufffd" not in page
    told = html.unescape("\n".join(re.findall(r'data-n="([^"]*)"', cards[0]))).splitlines()
    assert [float(re.search(r"weight ([\d.e-]+)", line)[1]) for line in told] == [
        pytest.approx(weight, rel=1e-3) for weight in pairs[0].chosen.weights.tolist()
    ]
    assert "linear-gradient" in cards[0]  # a Thai sign of several tokens has the colour of each
    assert "<title>&lt;i&gt;</title>" in page and "a &amp; b" in page


def test_nothing_of_the_data_becomes_markup(pairs):
    page = render_page(pairs)
    assert "<script" not in page and "alert(&quot;x&quot;)" in page
    assert not re.search(r'(?:src|href)="(?!data:)|https?:|@import|url\(', page)
    assert set(re.findall(r"<(\w+)", page)) <= {
        *("html", "head", "meta", "title", "link", "style", "body", "section", "div", "p", "span", "b", "br", "i"),
        *("h1", "h2", "h3", "h4", "details", "summary", "table", "tr", "th", "td", "figure", "figcaption", "img"),
        *("svg", "text", "rect"),
    }


def test_heat_map():
    plan = torch.tensor([[0.0, 1.0], [2.0, 4.0], [0.5, 0.25]])
    short = render_plan(plan, ["a", "<b>", "c"], ["d", "e"])
    assert re.findall(r'fill-opacity="([\d.]+)"', short) == ["0.000", "0.250", "0.500", "1.000", "0.125", "0.062"]
    assert "<title>&lt;b&gt; → e: 4</title>" in short
    alpha = np.asarray(Image.open(io.BytesIO(png(plan / 4))))
    assert alpha.shape == (3, 2, 4) and alpha[..., 3].tolist() == [[0, 64], [128, 255], [32, 16]]
    long = torch.zeros(LABELLED + 1, 2 * MOST_PIXELS)
    long[7, 31] = 3.0
    page = render_plan(long, [""] * len(long), [""] * long.size(1))
    assert f"aspect-ratio:{MOST_PIXELS}/{LABELLED + 1}" in page and "<svg" not in page


@pytest.mark.parametrize("sizes", [(1, 1), (60, 3), (2, 600)], ids=str)
def test_pairs_of_any_length(sizes):
    pair = made_up_pair(*sizes)
    page = render_page([pair])
    assert page.count('class="t"') == 3 * sum(sizes)
    assert "not its row and column sums" in page and "nan" not in page


@pytest.mark.lengthy
def test_picture_is_a_picture(pairs):
    picture = Image.open(io.BytesIO(draw_picture(pairs)))
    picture.load()
    assert picture.format == "PNG" and picture.width == 1000 and picture.height > 1000
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    with pytest.raises(ValueError, match=rf"at most {MOST_PAIRS} pairs, got {MOST_PAIRS + 1}"):
        draw_picture([made_up_pair(1, 1)] * (MOST_PAIRS + 1))
