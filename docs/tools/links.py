"""What MkDocs does not do itself: links from docs/ to files beside it, their pictures, and the changelog.

Pages are written as they are read in the repository: `../benchmarks/README.md` is a file there. On the site such a
link goes to the repository's address where `repo_url` has one, and is plain text where it has none; a picture is
copied. A link to a file that is not there stops the build, as a link within docs/ does.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PICTURES = {".png", ".svg", ".jpg"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[\w.-]+)?\)")
INCLUDE = re.compile(r"<!-- include: (\S+) -->")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """MkDocs asks this of each page before it is rendered."""
    folder = (DOCS / page.file.src_uri).parent
    included = INCLUDE.search(markdown)
    if included:
        source = (folder / included[1]).resolve()
        markdown, folder = source.read_text(encoding="utf-8"), source.parent
    return rewrite(markdown, page.file.src_uri, folder, config, files)


def rewrite(markdown: str, page: str, folder: Path, config: Any, files: Files) -> str:
    """The page with its links to files outside of docs/ replaced; code stays as it is.

    Args:
        markdown: The page's text.
        page: Its path below docs/.
        folder: Where its links start from; another one than the page's, where the text is a file's from elsewhere.
        config: MkDocs' configuration.
        files: The site's files; pictures are added.

    Raises:
        PluginError: A link leads to no file.
    """

    def replace(match: re.Match[str]) -> str:
        mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = (folder / target).resolve()
        if path.is_relative_to(DOCS):
            inside = os.path.relpath(path, (DOCS / page).parent)
            return f"{mark}[{text}]({inside}{anchor})"
        if not path.is_relative_to(ROOT) or not path.exists():
            raise PluginError(f"docs/{page}: the link to `{target}` leads to no file of the repository.")
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in PICTURES:
            uri = f"pictures/{path.name}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
            return f"{mark}[{text}]({os.path.relpath(DOCS / uri, (DOCS / page).parent)})"
        if not config.repo_url:
            return f'<span title="{name}">{text}</span>'
        kind = "tree" if path.is_dir() else "blob"
        return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{name}{anchor})"

    parts = CODE.split(markdown)  # every second part is code, of which a link's text may be a piece
    held = parts[1::2]
    plain = "".join(part if not n % 2 else f"\x00{n // 2}\x00" for n, part in enumerate(parts))
    return re.sub(r"\x00(\d+)\x00", lambda found: held[int(found[1])], LINK.sub(replace, plain))
