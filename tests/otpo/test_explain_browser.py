"""The page in a real headless Chromium: nothing goes wrong, nothing is fetched, it fits a phone, light and dark."""

import io

import pytest
from browser import NAMES, Browser, find_browser
from helpers import make_pairs, options
from PIL import Image

from otpo import OTPOTrainer
from otpo.explain import explain_rows, render_page

EXECUTABLE = find_browser()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason=f"no Chromium on PATH (looked for {', '.join(NAMES)}); on Debian: apt-get install chromium-headless-shell",
)
CHOSEN = "ที่นี่มีเสื้อสีแดงค่ะ 👍🏽 👩‍👩‍👧 🇹🇭\n\nthe red shirt costs $10 <b>&amp;</b> " + "x" * 300
REJECTED = "น้ำหนัก 400 กรัม <script>document.title = 'hit'</script>" + " the blue box ships today" * 30


@pytest.fixture(scope="module")
def page(model_folder, tmp_path_factory):
    """A page of a hostile pair of many tokens, whose plan is pixels, and of a short one, whose plan has labels."""
    rows = make_pairs(2).to_list()
    rows[0]["chosen"][0]["content"], rows[0]["rejected"][0]["content"] = CHOSEN, REJECTED
    folder = tmp_path_factory.mktemp("page")
    data = type(make_pairs(1)).from_list(rows)
    trainer = OTPOTrainer(model_folder, args=options(folder, max_length=None, ot_reg=0.05), train_dataset=data)
    path = folder / "page.html"
    path.write_text(render_page(explain_rows(trainer, [0, 1]), facts={"model": "a/b"}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with Browser(str(EXECUTABLE)) as running:
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 1280])
def test_it_fits_and_nothing_goes_wrong(browser, page, width, scheme):
    browser.faults.clear()
    browser.requests.clear()
    browser.open(page, width=width, scheme=scheme, touch=width < 1000)
    # Everything open, so that what is folded away has to fit too.
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.title") == "Token weights"
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.faults == [] and browser.requests == [page.as_uri()]

    # The scheme is really another one, and the text stands out from its ground.
    ground, ink = (
        sum(map(int, browser.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g)")[:3])) / 765
        for name in ("backgroundColor", "color")
    )
    assert (ground > 0.9 and ink < 0.2) if scheme == "light" else (ground < 0.2 and ink > 0.8)
    picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    assert picture.width == width and len(picture.getcolors(1 << 24)) > 50
    assert abs(sum(picture.getpixel((2, 2))) / 765 - ground) < 0.02


def test_text_colours_and_numbers(browser, page):
    browser.open(page, width=1280)
    texts = browser.evaluate("[...document.querySelectorAll('.text')].map(one => one.textContent)")
    assert texts[0] == f"{CHOSEN}<|end|>" and texts[1] == f"{REJECTED}<|end|>"
    # Every token has a colour: one, or a gradient of several.
    colours = browser.evaluate(
        "[...document.querySelectorAll('.text:first-of-type .t')].map(one => getComputedStyle(one)).map("
        "style => style.backgroundImage === 'none' ? style.backgroundColor : style.backgroundImage)"
    )
    assert len(set(colours)) > 20 and all("rgb" in colour for colour in colours)
    # The whole Thai word is as wide as its tokens together: marks stand on their letters, not beside them.
    widths = browser.evaluate(
        """(() => { const tokens = [...document.querySelectorAll('.text .t')].slice(0, 8);
        const plain = document.createElement('span'); plain.textContent = tokens.map(t => t.textContent).join('');
        tokens[0].parentNode.append(plain);
        return [tokens.reduce((sum, t) => sum + t.getBoundingClientRect().width, 0),
                plain.getBoundingClientRect().width]; })()"""
    )
    assert widths[0] == pytest.approx(widths[1], rel=0.02) and widths[0] > 10


def test_a_token_under_the_pointer_shows_its_numbers(browser, page):
    browser.open(page, width=1280)
    box = browser.evaluate("(({x, y, width, height}) => [x + width / 2, y + height / 2])"
                           "(document.querySelector('.text .t').getBoundingClientRect())")  # fmt: skip
    shown = "getComputedStyle(document.querySelector('.text .t'), '::after').content"
    assert "weight" not in browser.evaluate(shown)
    browser.hover(*box)
    told = browser.evaluate(shown)
    assert all(word in told for word in ("token 1", "weight", "log-prob.", "reference", "reward DPO", "reward OTPO"))
    assert browser.evaluate("document.documentElement.scrollWidth") <= 1280


def test_the_heat_maps_are_there(browser, page):
    browser.open(page, width=375)
    long = browser.evaluate("(one => [one.naturalWidth, one.getBoundingClientRect().width])(document.images[0])")
    assert long[0] > 48 and 200 < long[1] <= 375
    cells = browser.evaluate("document.querySelectorAll('svg rect').length")
    labels = browser.evaluate("document.querySelectorAll('svg text').length")
    assert cells > 0 and labels > 0
    sizes = browser.evaluate(
        "[...document.querySelectorAll('svg rect')].map(one => one.getBoundingClientRect().width)"
    )
    assert min(sizes) == pytest.approx(16, abs=0.1)
