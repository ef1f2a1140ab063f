"""Explained pairs as one HTML page that needs nothing else: no network, no script, light and dark, any width.

Everything that comes from data is escaped, and the page's own policy forbids scripts and requests.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files

from torch import Tensor

from otpo.weighting.registry import looks_at

from .heatmap import LABELLED, MOST_PIXELS, render_plan
from .pairs import ExplainedPair, ExplainedResponse
from .pieces import token_labels

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CONTROLS = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}

Shade = Callable[[float], tuple[str, float]]
"""From a token's number to the name of a colour and its strength in [0, 1]."""
Rule = tuple[str, bool]
"""A way to count tokens: its name, and whether it takes the weights."""


def render_page(
    pairs: Sequence[ExplainedPair], *, title: str = "Token weights", facts: Mapping[str, str] | None = None
) -> str:
    """The page, as text to be written in UTF-8.

    Args:
        pairs: What is shown, in order.
        title: Its heading.
        facts: What was looked at, by name, such as the model; stands under the heading.
    """
    lines = [f"<b>{_text(name)}</b> {_text(value)}" for name, value in (facts or {}).items()]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<title>{_text(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{_style()}</style></head>\n'
        f'<body><h1>{_text(title)}</h1>\n<p class="quiet">{"<br>".join(lines)}</p>\n'
        f"{''.join(map(_pair, pairs))}</body></html>\n"
    )


def _pair(pair: ExplainedPair) -> str:
    shown = "Reward" if pair.has_reference else "Log-probability"
    note = (
        f"What each token adds to its response's reward, beta {pair.chosen.beta:g}. Blue raises it, orange lowers it."
        if pair.has_reference
        else "No reference model was given, so these are no rewards but the policy's log-probabilities, in nats."
    )
    told = looks_at(pair.weighting.split(",")[0])
    told = pair.weighting if told is None else f"{pair.weighting}: {told}"
    sides, rules = {"Chosen": pair.chosen, "Rejected": pair.rejected}, _rules(pair)
    largest = max((float(values.abs().max()) for values in _all_contributions(pair) if len(values)), default=0.0)
    return (
        f"<section><h2>{_text(pair.name)}</h2>\n<details><summary>Prompt</summary>"
        f'<p class="prompt card">{_text(pair.prompt)}</p></details>\n'
        f"{_summary(pair, shown)}\n<h3>Weights</h3>\n"
        f'<p class="quiet">{_text(told)}. Point at a token, or tap it, for its numbers.</p>\n'
        f'<div class="sides">{"".join(_weights(name, side, rules) for name, side in sides.items())}</div>\n'
        f"{_beside(pair)}"
        f'<h3>{shown} by token</h3>\n<p class="quiet">{note}</p>\n<div class="sides">'
        + "".join(_contributions(name, side, rule, largest, rules) for name, side in sides.items() for rule in rules)
        + f"</div>\n{_plan(pair)}\n"
        + "".join(_numbers(name, side, rules) for name, side in sides.items())
        + "</section>\n"
    )


def _rules(pair: ExplainedPair) -> list[Rule]:
    """How tokens are counted: each once, as DPO does, and by their weights."""
    name = pair.weighting.split(",")[0]
    return [("DPO", False), ("OTPO" if name == "otpo" else name, True)]


def _all_contributions(pair: ExplainedPair) -> list[Tensor]:
    return [side.contributions(weighted=rule) for side in (pair.chosen, pair.rejected) for rule in (False, True)]


def _summary(pair: ExplainedPair, shown: str) -> str:
    rules = _rules(pair)
    rows = []
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        weights = side.weights
        mean = float(weights.mean()) if len(weights) else 0.0
        concentration = f"{float(weights.max()) / mean:.2f}" if mean > 0 else ""
        totals = [f"{float(side.contributions(weighted=rule).sum()):+.4g}" for _, rule in rules]
        rows.append([name, str(len(weights)), f"{float(weights.sum()):.4g}", concentration, *totals])
    numbers = pair.numbers()
    margins = [f"{numbers['margin_unweighted']:+.4g}", f"{numbers['margin']:+.4g}"]
    rows.append(["margin", "", "", "", *margins])
    heads = ["", "tokens", "sum of weights", "largest over mean", *(f"{shown.lower()}, {rule}" for rule, _ in rules)]
    alike = (
        f'<p class="quiet">Similarity of the hidden states (length-normalised CHES score) {pair.similarity:.4g}: the '
        "nearer to zero, or the further above, the sooner training lowers the chosen response's likelihood, too.</p>"
    )
    return _table(heads, rows) + ("" if math.isnan(pair.similarity) else alike)


def _weights(name: str, side: ExplainedResponse, rules: Sequence[Rule]) -> str:
    low, high = (float(side.weights.min()), float(side.weights.max())) if len(side.weights) else (0.0, 0.0)
    span = high - low

    def shade(weight: float) -> tuple[str, float]:
        return "weight", (weight - low) / span if span > 1e-9 * high else 0.0

    ends = f"{low:.3g}", f"{high:.3g}"
    return _card(name, side, side.weights, shade, _scale(("weight", 0.0), ("weight", 1.0), *ends), rules)


def _beside(pair: ExplainedPair) -> str:
    """The same tokens under other weightings, one below the other."""
    shown = []
    for weighting, weights in pair.beside.items():
        sides = {
            f"{name}, {weighting}": replace(side, weights=own)
            for name, side, own in zip(("Chosen", "Rejected"), (pair.chosen, pair.rejected), weights, strict=True)
        }
        rules = [("DPO", False), (weighting, True)]
        shown.append(
            f'<p class="quiet"><b>{_text(weighting)}</b>, for comparison: {_text(looks_at(weighting) or "")}.</p>\n'
            f'<div class="sides">{"".join(_weights(name, side, rules) for name, side in sides.items())}</div>\n'
        )
    return "".join(shown)


def _contributions(name: str, side: ExplainedResponse, rule: Rule, largest: float, rules: Sequence[Rule]) -> str:
    def shade(value: float) -> tuple[str, float]:
        return "more" if value > 0 else "less", abs(value) / largest if largest else 0.0

    values = side.contributions(weighted=rule[1])
    scale = _scale(("less", 1.0), ("more", 1.0), f"-{largest:.3g}", f"+{largest:.3g}", middle=True)
    return _card(f"{name}, {rule[0]}: {float(values.sum()):+.4g}", side, values, shade, scale, rules)


def _card(
    heading: str, side: ExplainedResponse, values: Tensor, shade: Shade, scale: str, rules: Sequence[Rule]
) -> str:
    listed = values.tolist()
    facts = _facts(side, rules)
    spans = []
    for piece in side.pieces:
        paint = _paint([shade(listed[place]) for place in piece.tokens])
        told = "&#10;".join(_text(facts[place]) for place in piece.tokens)
        kind = "t nl" if piece.text.startswith("\n") else "t"
        spans.append(
            f'<span class="{kind}" tabindex="0" data-n="{told}" style="background:{paint}">{_text(piece.text)}</span>'
        )
    text = "".join(spans)
    return f'<div class="card"><h4>{_text(heading)}</h4><p class="text">{text}</p>{scale}</div>'


def _facts(side: ExplainedResponse, rules: Sequence[Rule]) -> list[str]:
    """A line of numbers for each token."""
    columns = _columns(side, rules)
    rows = zip(*columns.values(), strict=True)
    return [
        f"token {place}, {name}: " + ", ".join(f"{head} {value:.4g}" for head, value in zip(columns, row, strict=True))
        for place, (name, row) in enumerate(zip(token_labels(side.pieces), rows, strict=True), start=1)
    ]


def _columns(side: ExplainedResponse, rules: Sequence[Rule]) -> dict[str, list[float]]:
    columns = {"weight": side.weights, "log-prob.": side.logps}
    if side.reference_logps is not None:
        columns["reference"] = side.reference_logps
    kind = "log-prob." if side.reference_logps is None else "reward"
    columns |= {f"{kind} {rule}": side.contributions(weighted=weighted) for rule, weighted in rules}
    return {name: values.tolist() for name, values in columns.items()}


def _paint(shades: Sequence[tuple[str, float]]) -> str:
    """A background: one colour, or one for each token side by side where a piece has several."""
    colours = [f"rgb(var(--{name})/calc({alpha:.3f}*var(--strength)))" for name, alpha in shades]
    if len(colours) == 1:
        return colours[0]
    stops = [f"{colour} {100 * k / len(colours):.0f}% {100 * (k + 1) / len(colours):.0f}%" for k, colour in
             enumerate(colours)]  # fmt: skip
    return f"linear-gradient(90deg,{','.join(stops)})"


def _scale(left: tuple[str, float], right: tuple[str, float], low: str, high: str, *, middle: bool = False) -> str:
    ends = [_paint([end]) for end in (left, right)]
    between = ",transparent" if middle else ""
    bar = f"linear-gradient(90deg,{ends[0]}{between},{ends[1]})"
    return f'<p class="scale quiet">{low}<i style="background:{bar}"></i>{high}</p>'


def _plan(pair: ExplainedPair) -> str:
    labels = token_labels(pair.chosen.pieces), token_labels(pair.rejected.pieces)
    plan = pair.plan
    told = (
        "Its row and column sums are the weights."
        if pair.plan_gives_weights
        else "This weighting does not use it: the weights are not its row and column sums."
    )
    if max(plan.shape) > MOST_PIXELS:
        told += f" A pixel is the largest entry of a block; the picture has at most {MOST_PIXELS} of them a side."
    elif max(plan.shape) > LABELLED:
        told += f" Above {LABELLED} tokens a side, a pixel is a pair of tokens."
    rows = [
        [f"{chosen + 1}", labels[0][chosen], f"{rejected + 1}", labels[1][rejected], f"{mass:.4g}"]
        for chosen, rejected, mass in pair.top_alignments()
    ]
    heads = ["chosen token", "", "rejected token", "", "mass"]
    return (
        f"<h3>Transport plan</h3>\n<figure><figcaption>Chosen tokens down, rejected tokens across. {told}</figcaption>"
        f'<div class="scroll" tabindex="0">{render_plan(plan, *labels)}</div></figure>\n'
        f"<h3>Top aligned pairs of tokens</h3>\n{_table(heads, rows, names=(1, 3))}"
    )


def _numbers(name: str, side: ExplainedResponse, rules: Sequence[Rule]) -> str:
    columns = _columns(side, rules)
    values = zip(*columns.values(), strict=True)
    labels = token_labels(side.pieces, longest=24)
    rows = [
        [str(place), label, *(f"{value:.4g}" for value in row)]
        for place, (label, row) in enumerate(zip(labels, values, strict=True), start=1)
    ]
    table = _table(["", "token", *columns], rows, names=(1,))
    return f"<details><summary>All numbers of the {name.lower()} response</summary>{table}</details>\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], names: Sequence[int] = ()) -> str:
    def cell(tag: str, place: int, value: str) -> str:
        kind = ' class="name"' if place in names else ""
        return f"<{tag}{kind}>{_text(value)}</{tag}>"

    lines = [
        "<tr>" + "".join(cell(tag, place, value) for place, value in enumerate(row)) + "</tr>"
        for tag, row in [("th", heads), *(("td", row) for row in rows)]
    ]
    return f'<div class="scroll" tabindex="0"><table>{"".join(lines)}</table></div>'


def _text(text: str) -> str:
    """Escaped text; control characters, which HTML has no place for, by their pictures."""
    return html.escape(text.translate(_CONTROLS))


@cache
def _style() -> str:
    return files("otpo.explain").joinpath("page.css").read_text(encoding="utf-8")
