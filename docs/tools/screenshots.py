"""Makes docs/pictures: pages of `otpo explain` as a headless Chromium shows them.

    make demo
    python docs/tools/screenshots.py

The models are the demo's, of `runs/demo`, and the pair is typed. `--demo` names another folder.
The browser is what tests/browser.py finds on the path, such as `chromium-headless-shell`.
"""

import argparse
import sys
import tempfile
from base64 import b64decode
from collections.abc import Sequence
from contextlib import chdir
from io import BytesIO
from pathlib import Path

from PIL import Image

from otpo.cli.explain import main as main_of_explain

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs/pictures"
WIDTH = 900
PROMPT = (
    "Balora J4628 (belt)\nMaterial: silk\nColour: blue\nOrigin: Japan\n\nI want to know the colour before I order."
)
CHOSEN = "The belt is blue and made of silk."
REJECTED = "The belt is pink and made of silk, and it comes from Japan."
BESIDE = ["contrast", "diff", "uniform", "budget", "length", "d2po", "sampo", "confpo", "surprisal"]

sys.path[:0] = [str(ROOT / "tests")]
from browser import NAMES, Browser, find_browser  # noqa: E402 - the tests' helper


def explain(folder: Path, page: Path, *beside: str) -> None:
    """Writes the pair's page by the demo's models, which it names as one who ran the demo sees them."""
    words = ["--model_name_or_path", "runs/demo/align", "--reference", "runs/demo/sft", "--ot_reg", "0.05"]
    words += ["--prompt", PROMPT, "--chosen", CHOSEN, "--rejected", REJECTED, "--use_cpu", "true"]
    with chdir(folder):
        if main_of_explain([*words, "--beside", *beside, "--output", str(page)]):
            raise SystemExit("`otpo explain` made no page.")


def shoot(browser: Browser, page: Path, picture: Path, top: str, bottom: str) -> None:
    """A picture of the page's whole width between two heights, which are JavaScript's to find."""
    browser.open(page, width=WIDTH, height=1000)
    start, end = browser.evaluate(f"[{top}, {bottom}].map(Math.round)")
    clip = {"x": 0, "y": start, "width": WIDTH, "height": end - start, "scale": 1}
    taken = browser.tab("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    # A page has few colours: a palette makes its picture a third as large.
    Image.open(BytesIO(b64decode(taken["data"]))).convert("RGB").quantize(128).save(picture, optimize=True)
    print(f"{picture}  {picture.stat().st_size // 1024} KiB")


def above(text: str) -> str:
    """JavaScript for a little above the first heading that begins so."""
    found = f"[...document.querySelectorAll('h2, h3')].find(one => one.textContent.startsWith('{text}'))"
    return f"{found}.getBoundingClientRect().top + scrollY - 16"


def main(argv: Sequence[str] | None = None) -> int:
    """Makes all pictures and returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "runs/demo", metavar="FOLDER", help="(runs/demo)")
    parser.add_argument("--output", type=Path, default=PICTURES, metavar="FOLDER", help="(docs/pictures)")
    options = parser.parse_args(argv)
    demo, output = options.demo.resolve(), options.output.resolve()
    if not (demo / "align").is_dir():
        parser.error(f"`--demo {demo}` has no folder `align`. Run `make demo` first.")
    executable = find_browser()
    if executable is None:
        parser.error(f"there is no browser on the path; one of {', '.join(NAMES)} is needed")
    output.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made, Browser(executable, seconds=60) as browser:
        folder = Path(made)
        (folder / "runs").mkdir()
        (folder / "runs/demo").symlink_to(demo)
        few, many = folder / "few.html", folder / "many.html"
        explain(folder, few, *BESIDE[:2])
        explain(folder, many, *BESIDE)
        below = "document.querySelector('figure').getBoundingClientRect().bottom + scrollY"
        shoot(browser, few, output / "explain.png", "0", above("Transport plan"))
        shoot(browser, many, output / "weightings.png", above("Weights"), above("Reward by token"))
        shoot(browser, many, output / "plan.png", above("Transport plan"), below)
    return 0


if __name__ == "__main__":
    sys.exit(main())
