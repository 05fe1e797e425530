"""The report page in a real browser, as wide as a desk and as narrow as a phone."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import MISSING, REQUIRED, browser, measure
from reported import write_run

from emloc.report.rows import rows_of
from emloc.report.write import write_report

WIDTHS = (1300, 420)
CELLS = {
    "zero_shot": "",
    "lora": "",
    "emloc": "",
    "loram_rand": "",
    "svd_r90_nf4_sequential_covariance": "emloc_covariance",
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """A report on several tasks and seeds, with all kinds of figures and the paper's numbers."""
    folder = tmp_path_factory.mktemp("runs") / "table3_nlp"
    for index, (cell, method) in enumerate(CELLS.items()):
        for seed in (0, 1):
            write_run(folder, cell, 0.3 + index / 50 + seed / 100, seed, method=method)
    write_run(folder, "emloc", 0.4, task="mathqa")
    write_report(folder, rows_of(folder), folder / "report")
    return folder / "report"


@pytest.fixture(scope="module")
def measured(pages, tmp_path_factory) -> dict[int, dict]:
    """Width -> measurements."""
    place = tmp_path_factory.mktemp("browser")
    page = pages / "report.html"
    return dict(zip(WIDTHS, measure([(page, w) for w in WIDTHS], place), strict=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_page_or_its_box(measured, width):
    found = measured[width]
    assert found["width"] == width
    assert found["scrollWidth"] <= width
    assert found["overflowing"] == []
    assert found["scrolled"] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_cell_of_every_table_is_seen(measured, width):
    assert measured[width]["cells"] > 60
    assert measured[width]["unseen"] == []


def test_tables_are_cards_only_where_they_do_not_fit(measured):
    assert measured[1300]["cards"] == 0
    assert measured[420]["cards"] >= 1


@pytest.mark.parametrize(("width", "folder"), [(1300, "figures"), (420, "figures/narrow")])
def test_every_figure_is_loaded_in_the_form_of_its_screen(measured, pages, width, folder):
    images = measured[width]["images"]
    stems = {Path(source).stem for source, _, _ in images}
    assert {"training_curve", "score_memory", "correction_llama3_8b_gsm8k"} <= stems
    for source, natural_width, alt in images:
        path = Path(unquote(urlsplit(source).path))
        assert path.parent == pages / folder
        assert natural_width > 0
        assert " against " in alt


def test_every_link_leads_to_a_file_or_a_part_of_the_page(measured):
    found = measured[1300]
    targets = [urlsplit(link) for link in found["links"]]
    assert len(targets) > 20
    assert [link for link in targets if not Path(unquote(link.path)).exists()] == []
    assert {link.fragment for link in targets if link.fragment} <= {*found["ids"]}


def test_the_console_is_silent(measured):
    assert measured[1300]["console"] == []


def test_a_page_that_hides_columns_or_files_is_noticed(pages, tmp_path):
    """Without its script a table is wider than a phone, and an image may be missing."""
    text = (pages / "report.html").read_text()
    text = re.sub(r"<script>.*</script>", "<script>missing()</script>", text, flags=re.DOTALL)
    (tmp_path / "broken.html").write_text(text)
    (found,) = measure([(tmp_path / "broken.html", 420)], tmp_path)
    assert found["scrolled"] != []
    assert found["overflowing"] != []
    assert all(width == 0 for _, width, _ in found["images"])
    assert any("missing is not defined" in line for line in found["console"])


def test_a_missing_browser_skips_the_test_unless_it_is_required(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=re.escape(MISSING)):
        browser()
    monkeypatch.setenv(REQUIRED, "required")
    with pytest.raises(pytest.fail.Exception, match=re.escape(MISSING)):
        browser()
