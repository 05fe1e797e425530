"""The scorers of written answers: each rule as a table of answers with their scores."""

import importlib
import pkgutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import emloc.tasks.metrics
from emloc.tasks.metrics import Scorer, anls, exact, relaxed_accuracy, squad, vqa_accuracy
from emloc.tasks.scorers import scorer_key

NAMES = {
    "anls": {"anls"},
    "exact": {"accuracy"},
    "multiple_choice": {"accuracy"},
    "relaxed_accuracy": {"relaxed_accuracy"},
    "squad": {"em", "f1"},
    "vqa_accuracy": {"vqa_accuracy"},
}
ANSWERS = st.text(max_size=12) | st.lists(
    st.sampled_from(["the", "a", "cat", "Don't", "dont", "7", "7%", "0", "1,000", ".", "ß", "İ"])
).map(" ".join)


def scorer(module: str) -> Scorer:
    return importlib.import_module(f"emloc.tasks.metrics.{module}").score


def test_the_list_of_scorers_is_complete():
    assert {module.name for module in pkgutil.iter_modules(emloc.tasks.metrics.__path__)} == {
        *NAMES
    }


@pytest.mark.parametrize("module", NAMES)
def test_a_scorer_returns_its_metrics_by_name(module):
    """Eleven references say B, which is also the label of a choice."""
    assert scorer(module)("B", ["B"] * 11, ["A: x", "B: y"]) == dict.fromkeys(NAMES[module], 1.0)


@pytest.mark.parametrize("module", NAMES)
def test_without_a_reference_there_is_no_score(module):
    with pytest.raises(ValueError, match="reference"):
        scorer(module)("B", [], ["A: x", "B: y"])


@given(st.sampled_from(sorted(NAMES)), ANSWERS, st.lists(ANSWERS, min_size=4, max_size=11))
def test_every_score_is_between_0_and_1(module, prediction, references):
    if module == "multiple_choice":
        references = ["B", "C"]
    scores = scorer(module)(prediction, references, ["A: cat", "B: the cat", "C: 7%"])
    assert all(0 <= value <= 1 for value in scores.values())


@given(
    st.sampled_from(sorted({*NAMES} - {"multiple_choice", "vqa_accuracy"})),
    st.lists(ANSWERS, min_size=1),
    st.data(),
)
@example("relaxed_accuracy", ["nan"], None)
@example("relaxed_accuracy", ["-0"], None)
@example("squad", ["the"], None)
def test_a_reference_itself_scores_1(module, references, data):
    prediction = data.draw(st.sampled_from(references)) if data else references[0]
    assert set(scorer(module)(prediction, references).values()) == {1.0}


@given(ANSWERS, st.lists(ANSWERS, max_size=6))
def test_vqa_accuracy_is_1_from_four_matching_references_and_less_below(answer, others):
    """VQA accuracy is soft: an answer that only one person gave scores below 1."""
    references = [answer] * 4 + others
    assert vqa_accuracy.score(answer, references) == {"vqa_accuracy": 1.0}
    others = [f"{other} not so" for other in others]
    references = [f"so {answer} it is"] * 3 + others + ["no"] * (7 - len(others))
    assert vqa_accuracy.score(references[0], references) == {"vqa_accuracy": 0.9}


@pytest.mark.parametrize(
    ("prediction", "references", "right"),
    [
        ("red", ["red"], 1),
        (" Red\n", ["red "], 1),
        ("RED", ["blue", "Red"], 1),
        ("reddish", ["red"], 0),
        ("red.", ["red"], 0),
        ("dark  red", ["dark red"], 0),
        ("", ["red"], 0),
        ("", [""], 1),
        ("STRASSE", ["Straße"], 1),
        ("Été", ["été"], 1),
    ],
)
def test_exact_match_ignores_only_case_and_outer_spaces(prediction, references, right):
    assert exact.score(prediction, references) == {"accuracy": right}


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        # Within 5% of the label, above and below, for both signs.
        ("100", "100", 1),
        ("105", "100", 1),
        ("95", "100", 1),
        ("21", "20", 1),
        ("19", "20", 1),
        ("2.1", "2", 0),  # floats: 2.1 - 2 is more than 0.1, as in the rule of lmms-eval
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-105", "-100", 1),
        ("-100", "100", 0),
        ("2.42", "2.4", 1),
        ("1e2", "100", 1),
        ("0", "100", 0),
        # 5% of the label, not of the answer: 95.2 / 100 would be within 5% of 100.
        ("100", "95.2", 0),
        # A percentage is divided by 100, in answer and label.
        ("62", "62%", 0),
        ("62%", "62", 0),
        ("62%", "62%", 1),
        ("0.62", "62%", 1),
        ("62 %", "0.62", 1),
        ("64%", "62%", 1),
        ("66%", "62%", 0),
        ("62%%", "62%", 0),
        # Zero allows no relative tolerance and is compared as text.
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("0.001", "0", 0),
        ("0%", "0%", 1),
        ("0", "0%", 0),
        # Texts that are no numbers must be equal.
        ("1,000", "1,000", 1),
        ("1000", "1,000", 0),
        ("1,000", "1000", 0),
        ("1,050", "1,000", 0),
        ("$5", "5", 0),
        ("5 years", "5", 0),
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
        (" Great Britain ", "great britain", 1),
        ("Côte d'Ivoire", "côte d'ivoire", 1),
        ("", "5", 0),
        ("", "", 1),
        ("%", "5", 0),
        # Words that a parser would read as numbers.
        ("NaN", "nan", 1),
        ("inf", "infinity", 0),
        ("5", "nan", 0),
        ("inf", "5", 0),
    ],
)
def test_relaxed_accuracy(prediction, target, right):
    assert relaxed_accuracy.score(prediction, [target]) == {"relaxed_accuracy": right}


def test_relaxed_accuracy_uses_the_best_reference():
    assert relaxed_accuracy.score("62", ["blue", "61"]) == {"relaxed_accuracy": 1}


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("invoice", ["invoice"], 1),
        ("  InVoice ", ["invoice"], 1),
        ("total\n  amount", ["Total amount"], 1),
        ("invoise", ["invoice"], 1 - 1 / 7),
        ("invoic", ["invoice"], 1 - 1 / 7),
        # Half of the characters are enough, as in the official script, and slightly less is wrong.
        ("abcd", ["abxy"], 1 / 2),
        ("ab", ["abcd"], 1 / 2),
        ("abcdefg", ["abcwxyz"], 0),
        ("abc", ["abcdefg"], 0),
        ("abc", ["abx"], 1 - 1 / 3),
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("abc", ["abcde"], 1 - 2 / 5),
        # Collapsed spaces do not add to the length of the answer.
        ("abcdefg" + " " * 40, ["abcwxyz"], 0),
        ("no", ["yes"], 0),
        ("the answer is invoice", ["invoice"], 0),
        ("1,000", ["1000"], 1 - 1 / 5),
        # The closest reference counts, at any position.
        ("$5.00", ["five dollars", "$5.00", "5"], 1),
        ("$5.0", ["five", "$5.00"], 1 - 1 / 5),
        ("", ["x"], 0),
        ("x", [""], 0),
        ("", [""], 1),
        ("", ["x", "  "], 1),
        ("São Paulo", ["são paulo"], 1),
        ("Sao Paulo", ["São Paulo"], 1 - 1 / 9),
        ("東京都", ["東京"], 1 - 1 / 3),
    ],
)
def test_anls(prediction, references, expected):
    assert anls.score(prediction, references) == pytest.approx({"anls": expected})


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("rain", "shine", 3), ("ab", "ba", 2)],
)
def test_the_edit_distance_counts_single_characters(first, second, edits):
    assert anls.edit_distance(first, second) == anls.edit_distance(second, first) == edits


@given(*[st.text("abc ", max_size=7)] * 3)
def test_the_edit_distance_is_a_distance(a, b, c):
    distance = anls.edit_distance
    assert (distance(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))
    assert distance(a, c) <= distance(a, b) + distance(b, c)


@pytest.mark.parametrize(
    ("prediction", "reference", "em", "f1"),
    [
        ("cat", "cat", 1, 1),
        ("The cat.", "a Cat", 1, 1),
        ('63 "', '63 """', 1, 1),
        ("the black cat", "black dog", 0, 1 / 2),
        ("black", "black cat", 0, 2 / 3),
        ("dog", "cat", 0, 0),
        # Words are counted with repetition: as sets these two would be equal.
        ("no no", "no", 0, 2 / 3),
        ("no no no yes", "no no yes yes", 0, 3 / 4),
        ("cat black", "black cat", 0, 1),
        # Punctuation is removed without a space, articles only as whole words.
        ("$1,000.00", "100000", 1, 1),
        ("well-known", "wellknown", 1, 1),
        ("theatre", "atre", 0, 0),
        ("4.5 out of 5", "4.5", 0, 2 / 5),
        # Nothing is left of both texts, or of one.
        ("", "", 1, 1),
        ("the", "-", 1, 1),
        ("", "cat", 0, 0),
        ("cat", "?!", 0, 0),
        ("CAFÉ", "café", 1, 1),
        ("«cat»", "cat", 0, 0),
    ],
)
def test_squad(prediction, reference, em, f1):
    assert squad.score(prediction, [reference]) == pytest.approx({"em": em, "f1": f1})


def test_em_and_f1_each_use_their_best_reference():
    assert squad.score("black cat", ["dog", "the black cat", "cat"]) == {"em": 1, "f1": 1}
    assert squad.score("black cat", ["dog", "cat"]) == pytest.approx({"em": 0, "f1": 2 / 3})


@given(ANSWERS, ANSWERS)
def test_f1_is_symmetric_and_is_1_if_em_is_1(first, second):
    there, back = squad.score(first, [second]), squad.score(second, [first])
    assert there == back
    assert there["f1"] >= there["em"]


@pytest.mark.parametrize(("people", "expected"), enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]))
def test_vqa_accuracy_averages_over_leaving_out_each_person(people, expected):
    references = ["nokia"] * people + [f"other {index}" for index in range(10 - people)]
    assert vqa_accuracy.score("Nokia", references) == {"vqa_accuracy": expected}


@pytest.mark.parametrize("people", [0, 1, 3])
def test_too_few_references_are_refused(people):
    with pytest.raises(ValueError, match=f"vqa_accuracy: {people} references"):
        vqa_accuracy.score("nokia", ["nokia"] * people)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Nokia", "nokia"),
        ("  new \n\t york ", "new york"),
        # Articles are removed, numbers up to ten become digits.
        ("The cat on a mat", "cat on mat"),
        ("theatre", "theatre"),
        ("None", "0"),
        ("zero one ten", "0 1 10"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        # A missing apostrophe is restored: one, two and three of them.
        ("dont", "don't"),
        ("don't", "don't"),
        ("Isnt it", "isn't it"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("twas 5 oclock", "'twas 5 o'clock"),
        ("ill well hell shell", "ill well hell shell"),
        ("bob's", "bob's"),
        # Punctuation separates two words, unless it stands beside a space somewhere in the text.
        ("ec-agg", "ec agg"),
        ("red/blue", "red blue"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("t-shirt- blue", "tshirt blue"),
        ("t-shirt -blue", "tshirt blue"),
        ("what?!", "what"),
        ('"stop"', "stop"),
        ("10:30", "10:30"),
        ("50%", "50%"),
        # A number with thousands separators removes all punctuation of the text.
        ("1,000", "1000"),
        ("1,000,000", "1000000"),
        ("1,000-ab", "1000ab"),
        # A period before a digit stays.
        ("3.5", "3.5"),
        (".5", ".5"),
        ("U.S.A.", "usa"),
        ("v1.a", "v1a"),
        ("", ""),
        ("the", ""),
        ("CAFÉ", "café"),
    ],
)
def test_the_normalisation_of_the_vqa_challenge(answer, normalised):
    assert vqa_accuracy.normalise(answer) == normalised


def test_answer_and_references_are_normalised_alike():
    references = ["2 dogs", "two dogs", "Two Dogs.", "the two dogs!"] + ["cats"] * 6
    assert vqa_accuracy.score("two dogs", references) == {"vqa_accuracy": 1}


def test_an_answer_that_all_people_gave_is_normalised_too():
    """TextVQA normalises it; the script of the VQA challenge would compare `Cats.` as it is."""
    assert vqa_accuracy.score("Cats.", ["cats"] * 10) == {"vqa_accuracy": 1}


def test_a_scorer_that_has_changed_has_a_new_key_and_all_others_keep_theirs():
    """Scores that were cached before the change are not used again."""
    keys = {"anls": "anls:2"}
    for name in NAMES:
        assert scorer_key(name) == keys.get(name, name)
        assert scorer_key(f"emloc.metrics.{name}.score") == keys.get(name, name)


def test_the_scorers_import_no_other_part_of_the_package():
    for path in Path(emloc.tasks.metrics.__path__[0]).glob("*.py"):
        assert "import emloc" not in path.read_text(), path
        assert "from emloc" not in path.read_text(), path
