"""The only writer of Markdown tables in the package."""

import pytest

from emloc.report.markdown_table import markdown_table


def test_columns_are_aligned():
    assert markdown_table(["method", "F1"], [["lora", "61.2"], ["offload_8b", "."]]) == (
        "| method     | F1   |\n| ---------- | ---- |\n| lora       | 61.2 |\n| offload_8b | .    |"
    )


def test_a_bar_within_a_cell_is_escaped():
    assert markdown_table(["a|b"], [["c"]]).split("\n") == [
        "| a\\|b |",
        "| ---- |",
        "| c    |",
    ]


def test_a_table_without_rows_is_its_header():
    assert markdown_table(["a", "b"], []) == "| a | b |\n| - | - |"


def test_a_row_with_a_missing_cell_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(["a", "b"], [["1"]])
