"""READMEs, CONTRIBUTING and CHANGELOG: links resolve, and tables name every choice."""

import re
import tomllib

import pytest
from documents import (
    DOCUMENTS,
    FOLDERS,
    ROOT,
    anchors,
    choices_in,
    links,
    make_targets,
    name_of,
    table_below,
)

from emloc.config.paths import CONF, EXPERIMENTS

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
SETTINGS = CONF / "README.md"
LONGEST = 200  # lines of the first README


def choices_of(group):
    return {path.stem for path in (CONF / group).glob("[!_]*.yaml")}


@every_document
def test_links_lead_to_files_and_headings_that_exist(document):
    for link in links(document):
        assert link.path.exists(), link.target
        if link.anchor:
            assert link.path.suffix == ".md", link.target
            assert link.anchor in anchors(link.path), link.target


@every_document
def test_names_of_files_in_the_text_exist(document):
    """Those that begin with a folder of the repository, and are no pattern."""
    code = re.findall(r"`([^`\n]+)`", document.read_text())
    path = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]+")
    missing = [word for word in code if path.fullmatch(word) and not (ROOT / word).exists()]
    assert missing == []


@every_document
def test_make_targets_exist(document):
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert make_targets(document) <= known


def test_the_tests_above_see_links_anchors_and_targets():
    readme = DOCUMENTS[0]
    assert any(link.path.suffix == ".png" for link in links(readme))
    assert any(link.anchor for link in links(readme))
    assert make_targets(readme) == {"run", "test"}


def test_the_first_readme_is_short_and_leads_to_all_others():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= LONGEST
    targets = {link.path for link in links(readme)}
    assert {ROOT / folder / "README.md" for folder in FOLDERS} <= targets
    assert {ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "LICENSE"} <= targets


def test_the_first_readme_has_one_figure():
    assert len([one for one in links(ROOT / "README.md") if one.path.suffix == ".png"]) == 1


def test_every_group_is_described_with_all_its_choices():
    rows = {row[0].strip().strip("`"): row[1] for row in table_below(SETTINGS, "## Groups")}
    groups = {folder.name for folder in CONF.iterdir() if any(folder.glob("*.yaml"))} - {"local"}
    launchers = {f"hydra/{folder.name}" for folder in (CONF / "hydra").iterdir()}
    assert set(rows) == groups | launchers
    elsewhere = {"method", "task", "stage", "hydra/launcher"}  # joblib's settings are a plug-in's
    for group in rows.keys() - elsewhere:
        assert choices_in(rows[group]) == choices_of(group), group
    assert choices_of("hydra/launcher") <= choices_in(rows["hydra/launcher"])


@pytest.mark.parametrize(
    ("group", "heading"), [("method", "## Every method is three choices"), ("task", "## Data sets")]
)
def test_every_method_and_data_set_is_described(group, heading):
    names = [choices_in(row[0]) for row in table_below(SETTINGS, heading)]
    assert set().union(*names) == choices_of(group)


def test_every_experiment_is_described():
    text = (EXPERIMENTS / "README.md").read_text()
    assert [path.stem for path in EXPERIMENTS.glob("*.yaml") if f"{path.stem}`" not in text] == []


def test_modules_lie_where_the_table_of_old_places_says():
    rows = table_below(ROOT / "tests" / "README.md", "### Where modules lay before")
    assert len(rows) > 50
    for row in rows:
        place = row[1].strip().strip("`")
        assert any((ROOT / "emloc").glob(place)), place


def test_a_source_archive_holds_all_documents():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    archived = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {name_of(document).split("/")[0] for document in DOCUMENTS} <= set(archived)
