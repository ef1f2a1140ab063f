"""An explained pair as a PNG, drawn by matplotlib: the weights on the text, the plan, the rewards by token."""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import regex

from otpo.weighting.registry import looks_at

from .pairs import ExplainedPair, ExplainedResponse
from .pieces import Piece, token_labels

# Fonts by preference: the first for all that it has, the others for what it lacks. matplotlib draws no coloured emoji.
FONTS = (
    "DejaVu Sans",
    "Noto Sans Thai",
    "Noto Sans Thai Looped",
    "Loma",
    "Garuda",
    "Waree",
    "Leelawadee UI",
    "Tahoma",
    "Thonburi",
    "Noto Sans CJK SC",
    "Noto Emoji",
    "Symbola",
)
MOST_PAIRS = 20
_WEIGHT, _PLAIN = "#2563eb", "#9ca3af"
_WIDTH, _MARGIN, _PLOTS, _LINE = 1000.0, 20.0, 560.0, 26.0  # pixels
_DPI, _SIZE = 100, 11  # pixels an inch, points
_MOST_PIECES = 600
_LABELLED = 48


def draw_picture(pairs: Sequence[ExplainedPair], *, weights_only: bool = False) -> bytes:
    """A PNG of the pairs, one under the other, on white.

    Under a pair's weights stand those of the weightings beside it, for the same tokens, each with what it looks at.

    A character that no installed font of [`FONTS`] has is written as its code point, and the picture says so; coloured
    emoji are among these. Of a response, the first 600 pieces of text are shown.

    Args:
        pairs: What is drawn.
        weights_only: Whether plan, alignments and rewards are left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are more than 20 pairs, which is too much for one picture.
    """
    if len(pairs) > MOST_PAIRS:
        raise ValueError(
            f"A picture holds at most {MOST_PAIRS} pairs, got {len(pairs)}. Take fewer `rows`, or a page."
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install 'otpo[plots]'`.") from error

    with _fonts() as known:
        layouts = [_Layout(pair, known, weights_only) for pair in pairs]
        height = sum(layout.height + (0.0 if weights_only else _PLOTS) for layout in layouts)
        figure = Figure(figsize=(_WIDTH / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        top = height
        for layout in layouts:
            # One unit of the text's axes is one pixel, as it was measured.
            box = (_MARGIN / _WIDTH, (top - layout.height) / height, 1 - 2 * _MARGIN / _WIDTH, layout.height / height)
            layout.draw(figure.add_axes(box))
            top -= layout.height
            if weights_only:
                continue
            edges = {"top": (top - 30) / height, "bottom": (top - _PLOTS + 90) / height}
            grid = figure.add_gridspec(2, 2, left=0.1, right=0.98, wspace=0.2, hspace=0.6, **edges)
            _draw_plan(figure.add_subplot(grid[:, 0]), layout.pair, known)
            for row, (name, side) in enumerate((("chosen", layout.pair.chosen), ("rejected", layout.pair.rejected))):
                _draw_rewards(figure.add_subplot(grid[row, 1]), name, side, known)
            top -= _PLOTS
        held = io.BytesIO()
        figure.savefig(held, format="png")
    return held.getvalue()


class _Layout:
    """Where the pieces of a pair's texts stand, in pixels from the top left."""

    def __init__(self, pair: ExplainedPair, known: frozenset[int], weights_only: bool) -> None:
        self.pair = pair
        self._words: list[tuple[float, float, str, bool]] = []  # x, y, text, whether it is a heading
        self._boxes: list[tuple[float, float, float, float]] = []  # x, y, width, strength
        self._missing = False
        self._ruler = _Ruler()
        width = _WIDTH - 2 * _MARGIN
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}

        # The pair's own weights, then those beside them.
        y = self._named(f"{pair.name}: {pair.weighting}", pair.weighting.split(",")[0], _LINE, width)
        for name, side in sides.items():
            y += _LINE
            self._words.append((0.0, y, _range(name, side) if weights_only else _heading(name, side), True))
            y = self._flow(side, known, y + _LINE, width)
        for weighting, weights in pair.beside.items():
            y = self._named(weighting, weighting, y + 1.5 * _LINE, width)
            for (name, side), own in zip(sides.items(), weights, strict=True):
                y += _LINE
                side = replace(side, weights=own)
                self._words.append((0.0, y, _range(name, side), True))
                y = self._flow(side, known, y + _LINE, width)

        # What the plan aligns.
        if not weights_only:
            y = self._alignments(known, y + _LINE, width)
        if self._missing:
            y += _LINE
            self._words.append((0.0, y, "Characters that no font here has are written as their code points.", False))
        self.height = y + _LINE

    def _named(self, heading: str, weighting: str, y: float, width: float) -> float:
        """A heading, and below it what the weighting looks at, where that is known; returns the last line's y."""
        self._words.append((0.0, y, heading, True))
        told = looks_at(weighting)
        if told is None:
            return y
        x, y = 0.0, y + _LINE
        for word in told.split():
            x, y = self._place(f"{word} ", [], x, y, width)
        return y

    def _alignments(self, known: frozenset[int], y: float, width: float) -> float:
        """The most of the plan, token by token, from a heading at `y` on."""
        self._words.append((0.0, y, "most mass of the transport plan", True))
        y, x = y + _LINE, 0.0
        labels = token_labels(self.pair.chosen.pieces), token_labels(self.pair.rejected.pieces)
        for chosen, rejected, mass in self.pair.top_alignments(8):
            text = self._drawable(f"{labels[0][chosen]} → {labels[1][rejected]}  {mass:.3g}", known)
            x, y = self._place(f"{text}     ", [], x, y, width)
        return y

    def _flow(self, side: ExplainedResponse, known: frozenset[int], y: float, width: float) -> float:
        """Sets the pieces in lines from `y` on, and returns the last line's y."""
        values = side.weights.tolist()
        low, high = min(values, default=0.0), max(values, default=0.0)
        span = high - low if high - low > 1e-9 * high else float("inf")
        x = 0.0
        for piece in side.pieces[:_MOST_PIECES]:
            text = self._drawable(piece.text, known)
            strengths = [(values[token] - low) / span for token in piece.tokens]
            first, *others = text.split("\n")
            x, y = self._place(first or " ", strengths, x, y, width)
            for line in others:
                x, y = 0.0, y + _LINE
                if line:
                    x, y = self._place(line, strengths, x, y, width)
        left = len(side.pieces) - _MOST_PIECES
        if left > 0:
            y += _LINE
            self._words.append((0.0, y, f"… and {left} more", False))
        return y

    def _drawable(self, text: str, known: frozenset[int]) -> str:
        drawable = _drawable(text, known)
        self._missing |= "U+" in drawable and "U+" not in text
        return drawable

    def _place(self, text: str, strengths: list[float], x: float, y: float, width: float) -> tuple[float, float]:
        size = self._ruler.width(text)
        if x and x + size > width:
            x, y = 0.0, y + _LINE
        self._words.append((x, y, text, False))
        part = size / max(1, len(strengths))
        self._boxes += [(x + part * place, y, part, strength) for place, strength in enumerate(strengths)]
        return x + size, y

    def draw(self, axes: Any) -> None:
        from matplotlib.patches import Rectangle

        axes.set(xlim=(0, _WIDTH - 2 * _MARGIN), ylim=(self.height, 0))
        axes.axis("off")
        for x, y, width, strength in self._boxes:
            corner = (x, y - 0.75 * _LINE)
            axes.add_patch(Rectangle(corner, width, _LINE - 4, color=_WEIGHT, alpha=0.7 * strength, linewidth=0))
        for x, y, text, heading in self._words:
            weight = "bold" if heading else "normal"
            axes.text(x, y, text, fontsize=_SIZE, weight=weight, parse_math=False, va="baseline")


def _heading(name: str, side: ExplainedResponse) -> str:
    dpo, weighted = (float(side.contributions(weighted=rule).sum()) for rule in (False, True))
    kind = "log-probability" if side.reference_logps is None else "reward"
    return f"{name}, {len(side.weights)} tokens: {kind} {weighted:+.4g}, of DPO {dpo:+.4g}"


def _range(name: str, side: ExplainedResponse) -> str:
    ends = (float(side.weights.min()), float(side.weights.max())) if len(side.weights) else (0.0, 0.0)
    return f"{name}, {len(side.weights)} tokens: from {ends[0]:.3g} (white) to {ends[1]:.3g} (blue)"


def _draw_plan(axes: Any, pair: ExplainedPair, known: frozenset[int]) -> None:
    axes.imshow(pair.plan.numpy(), cmap="Blues", vmin=0.0, aspect="auto", interpolation="nearest")
    axes.set_title("Transport plan: chosen tokens down, rejected across", fontsize=10)
    for axis, side in ((axes.yaxis, pair.chosen), (axes.xaxis, pair.rejected)):
        _label(axis, side.pieces, known)


def _draw_rewards(axes: Any, name: str, side: ExplainedResponse, known: frozenset[int]) -> None:
    """Bars of each token's contribution, DPO's beside those of the weights."""
    kind = "Log-probability" if side.reference_logps is None else "Reward"
    places = range(len(side.weights))
    for shift, colour, label, weighted in ((-0.2, _PLAIN, "DPO", False), (0.2, _WEIGHT, "weighted", True)):
        heights = side.contributions(weighted=weighted).tolist()
        axes.bar([place + shift for place in places], heights, width=0.4, color=colour, label=label)
    axes.axhline(0.0, color="black", linewidth=0.5)
    axes.set_title(f"{kind} by token, {name}", fontsize=10)
    _label(axes.xaxis, side.pieces, known)
    axes.legend(fontsize=8, frameon=False)


def _label(axis: Any, pieces: Sequence[Piece], known: frozenset[int]) -> None:
    labels = [_drawable(label, known) for label in token_labels(pieces, longest=8)]
    if len(labels) > _LABELLED:
        return
    axis.set_ticks(range(len(labels)), labels, fontsize=7, parse_math=False)
    if axis.axis_name == "x":
        axis.set_tick_params(rotation=90)


def _drawable(text: str, known: frozenset[int]) -> str:
    """The text with what no font has written as code points, and what is invisible left out where it is missing."""
    parts = []
    for grapheme in regex.findall(r"\X", text):
        missing = [character for character in grapheme if ord(character) not in known and character not in "\n\t"]
        if not missing:
            parts.append(grapheme)
        elif regex.fullmatch(r"[\p{Cf}\p{Cc}\p{Mn}]+", "".join(missing)):
            parts.append("".join(character for character in grapheme if character not in missing))
        else:
            parts.append(f"[U+{ord(missing[0]):04X}]")
    return "".join(parts).replace("\t", "    ")


class _Ruler:
    """Measures texts in the fonts that are set while it is made."""

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import RendererAgg
        from matplotlib.font_manager import FontProperties

        self._renderer, self._font = RendererAgg(1, 1, _DPI), FontProperties(size=_SIZE)
        self._bars = self._ink("||")

    def width(self, text: str) -> float:
        """Pixels that a text takes, spaces at its ends included."""
        return self._ink(f"|{text}|") - self._bars

    def _ink(self, text: str) -> float:
        return self._renderer.get_text_width_height_descent(text, self._font, False)[0]


@contextmanager
def _fonts() -> Iterator[frozenset[int]]:
    """Sets the fonts that are installed inside the block, and gives the code points that they have."""
    import matplotlib
    from matplotlib import font_manager

    manager = font_manager.fontManager
    listed = {entry.fname for entry in manager.ttflist}
    for path in set(font_manager.findSystemFonts()) - listed:  # installed since matplotlib made its list
        with suppress(RuntimeError):  # a kind that it can't draw
            manager.addfont(path)
    installed = set(manager.get_font_names())
    names = [name for name in FONTS if name in installed]
    known: set[int] = set()
    for name in names:
        known |= set(font_manager.get_font(manager.findfont(name)).get_charmap())
    quiet = logging.getLogger("matplotlib.font_manager")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # bold of a font that has none is drawn in the normal weight
    try:
        with matplotlib.rc_context({"font.family": names}):
            yield frozenset(known)
    finally:
        quiet.setLevel(level)
