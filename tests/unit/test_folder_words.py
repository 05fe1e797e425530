"""Words of settings that become names of folders."""

import pytest

from emloc.config.compose import compose
from emloc.config.folder_words import LONGEST, file_name, require_word, safe_word
from emloc.config.run_folder import folder_name
from emloc.errors import ConfigError


@pytest.mark.parametrize("word", ["demo", "a b:c", "Qwen2.5-0.5B", "..a", "é", "n" * LONGEST])
def test_the_name_of_one_folder_stays_as_it_is(word):
    require_word("name", word, "demo")
    assert safe_word(word) == word


@pytest.mark.parametrize(
    "word",
    ["", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", "a\x00b", "a\nb", "é" * LONGEST, "\ud800"],
)
def test_a_word_that_is_no_name_of_a_folder_is_refused_in_one_line(word, tmp_path):
    with pytest.raises(ConfigError, match=r"^name='.*; set name=demo$") as caught:
        require_word("name", word, "demo")
    assert "\n" not in str(caught.value)
    folder = tmp_path / safe_word(word)
    folder.mkdir()
    assert folder.resolve().parent == tmp_path
    assert "/" not in file_name(word)


@pytest.mark.parametrize("key", ["method", "model", "task"])
def test_the_folder_of_a_run_lies_directly_in_its_experiment(key):
    config = compose()
    if key == "method":
        config.method = "../../x"
    else:
        config[key].name = "../../x"
    assert ".._.._x" in folder_name(config)
    assert "/" not in folder_name(config)
