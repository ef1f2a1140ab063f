"""Files that are read by GitHub, by libraries of citations and by package indexes."""

import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from otpo import OTPOTrainer, __version__
from otpo.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[0-9]*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KINDS = {"markdown", "input", "textarea", "dropdown", "checkboxes"}
SCHEMAS: dict[Path, str] = dict.fromkeys(FORMS, "github-issue-forms")
SCHEMAS |= {ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml": "github-issue-config"}
SCHEMAS |= {ROOT / "CITATION.cff": "citation-file-format"}


def read(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_it_has_the_form_that_its_readers_know(path):
    """By the schemas that come with check-jsonschema."""
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("check_jsonschema")
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / f"{SCHEMAS[path]}.json"
    validator = jsonschema.validators.validator_for(json.loads(schema.read_text()))(json.loads(schema.read_text()))
    assert not list(validator.iter_errors(read(path)))
    assert list(validator.iter_errors({"nothing": "of it"}))  # the schema refuses something


def test_issue_forms_ask_for_what_is_needed():
    assert len(FORMS) == 3
    for path in FORMS:
        form = read(path)
        assert {"name", "description", "body"} <= form.keys()
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids)) and all(part["type"] in KINDS for part in form["body"])
        assert any(part.get("validations", {}).get("required") for part in form["body"])
    for name in ("bug", "numbers"):
        (form,) = (read(path) for path in FORMS if name in path.stem)
        (environment,) = (part for part in form["body"] if part.get("id") == "environment")
        assert "`otpo env --json`" in environment["attributes"]["label"] and environment["validations"]["required"]
        assert environment["attributes"]["render"] == "json"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_commands_and_pages_that_a_form_names_are_there(path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"otpo ([a-z]+)", text)) <= set(COMMANDS)
    assert all(page.startswith("docs/") for page in re.findall(r"[\w/]+\.md", text))


def test_the_citation_is_the_papers():
    told = read(ROOT / "CITATION.cff")
    assert (told["version"], told["license"], told["title"]) == (__version__, PROJECT["license"], PROJECT["name"])
    paper, bibtex = told["preferred-citation"], OTPOTrainer._paper["citation"]
    names = " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    for text in (paper["title"], names, f"{paper['start']}--{paper['end']}", str(paper["year"])):
        assert f"{text}}}" in bibtex or f"{text}," in bibtex
    assert f"booktitle = {{{paper['collection-title']}}}" in bibtex
    assert OTPOTrainer._paper["id"] in paper["url"]


def test_addresses_are_those_of_the_papers():
    addresses = set(PROJECT["urls"].values())
    assert read(ROOT / "CITATION.cff")["preferred-citation"]["url"] in addresses
    assert all(re.fullmatch(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|github\.com/\w+/\w+)", url) for url in addresses)
    pages = [ROOT / "README.md", *ROOT.glob("examples/recipes/*.yaml")]
    known = "".join(path.read_text(encoding="utf-8") for path in pages)
    assert all(url.removeprefix("https://") in known for url in addresses)
