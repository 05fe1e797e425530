"""The metric multiple_choice: which choice a written answer names, by label or by text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc.tasks.metrics.multiple_choice import score

ORGANS = ("A:Skin", "B:Liver cyst", "C:Retina", "D:Liver")
COUNTRIES = ("1. Sweden", "2. Austria", "3. China", "4. Eritrea", "5. United States")


def named(answer: str, choices: tuple[str, ...], labels: str) -> str:
    """Return the only label for which the answer counts as correct, or "" if there is none."""
    right = [label for label in labels if score(answer, [label], choices) == {"accuracy": 1}]
    assert len(right) <= 1
    return "".join(right)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        # The answer is only a label.
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("[b]", "B"),
        ("**B**", "B"),
        (" B\n", "B"),
        ("\uff22", "B"),
        ("A", "A"),
        ("a", "A"),
        # A label, followed by a reason or a text.
        ("B) Skin", "B"),
        ("b) Skin", "B"),
        ("(B) Skin", "B"),
        ("B. Skin", "B"),
        ("B: Liver cyst", "B"),
        ("B - Skin", "B"),
        ("B\nThe skin is not shown.", "B"),
        ("B, not the skin.", "B"),
        ("(B) or (C)", "B"),
        ("A: Skin", "A"),
        # A label after an introduction.
        ("The answer is B", "B"),
        ("The answer is b.", "B"),
        ("Answer: (B)", "B"),
        ("The correct answer is option B.", "B"),
        ("the answer should be **B**, as skin looks otherwise", "B"),
        ("The answer is A because nothing else fits", "A"),
        ("Option A shows skin, so the answer is D.", "D"),
        ("I would choose option D.", "D"),
        ("My choice: C", "C"),
        ("It looks like skin (B)", "B"),
        ("lymph node(d) in the skin", "A"),
        ("答案是B。", "B"),
        # A single capital letter in a sentence.
        ("It must be B", "B"),
        ("B is correct", "B"),
        ("A is correct", "A"),
        ("I see B here", "B"),
        # The text of a choice.
        ("Skin", "A"),
        ("skin.", "A"),
        ("liver", "D"),
        ("Liver cyst", "B"),
        ("liver  cyst", "B"),
        ("This is a liver cyst.", "B"),
        ("This is the liver.", "D"),
        ("The image shows the RETINA of an eye", "C"),
        # The article "a" is not a label.
        ("A retina", "C"),
        ("a retina", "C"),
        ("The answer is a retina", "C"),
        ("The answer is A retina", "C"),
        ("Option: a liver", "D"),
        # No choice, or more than one.
        ("", ""),
        ("?", ""),
        ("E", ""),
        ("The answer is E", ""),
        ("A picture of the eye", ""),
        ("The answer is a picture of the eye", ""),
        ("Both A and B are right", ""),
        ("the skin or the retina", ""),
        ("either (A) or (B)", ""),
        ("skinny", ""),
        ("deliver", ""),
        ("Vitamin B-12", ""),
        ("2", ""),
    ],
)
def test_an_answer_names_a_choice_with_a_letter(answer, label):
    assert named(answer, ORGANS, "ABCD") == label


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("2", "2"),
        ("2.", "2"),
        ("(2)", "2"),
        ("02", "2"),
        ("\uff12", "2"),
        ("٢", "2"),
        ("2. Austria", "2"),
        ("2. Sweden", "2"),
        ("The answer is 3", "3"),
        ("答えは3です", "3"),
        ("Austria", "2"),
        ("austria.", "2"),
        ("It comes from the United  States!", "5"),
        ("2 or 3", "2"),
        # The first number counts, even if it is no label.
        ("7", ""),
        ("7. Austria", ""),
        ("In 1990, China", ""),
        ("1" * 5000, ""),
        ("Austria or China", ""),
        ("Indochina", ""),
        ("", ""),
        ("B", ""),
    ],
)
def test_an_answer_names_a_choice_with_a_number(answer, label):
    assert named(answer, COUNTRIES, "12345") == label


@pytest.mark.parametrize(
    ("answer", "choices", "labels", "label"),
    [
        # Choices without labels are labelled by their position.
        ("Dog", ("Cat", "Dog"), "AB", "B"),
        ("B", ("Cat", "Dog"), "AB", "B"),
        ("Dog", ("Cat", "Dog"), "12", "2"),
        ("2", ("Cat", "Dog"), "12", "2"),
        ("(b) dog", ("(a) Cat", "(b) Dog"), "AB", "B"),
        ("dog", (" A. Cat", " B. Dog"), "AB", "B"),
        # Numbers in choices must match as whole numbers.
        ("2.5 mm", ("1.5 mm", "2.5 mm", "3.5 mm"), "ABC", "B"),
        ("2.5", ("1.5", "2.5"), "12", "2"),
        ("it is 5", ("5", "2.5"), "AB", "A"),
        ("it is 2.5", ("5", "2.5"), "AB", "B"),
        ("it is 2.5", ("5", "7"), "AB", ""),
        ("it is 5.2", ("5", "7"), "AB", ""),
        ("7 mm", ("1.5 mm", "2.7 mm"), "12", ""),
        ("about 5.", ("A:5", "B:50"), "AB", "A"),
        ("<5", ("A:>5", "B:<5"), "AB", "B"),
        ("7 up", ("1. Fanta", "2. 7 Up"), "12", "2"),
        # The longest matching text counts, at any position.
        ("an x-ray (chest)", ("A:X-ray", "B:X-ray (chest)"), "AB", "B"),
        ("an x-ray of the chest", ("A:X-ray", "B:X-ray (chest)"), "AB", "A"),
        # A label counts before a text that looks like a label.
        ("2", ("2", "1"), "12", "2"),
        ("B", ("B", "A"), "AB", "B"),
        # A letter that is part of the text of a choice.
        ("Hepatitis B", ("Hepatitis A", "Cancer", "Hepatitis B"), "ABC", "C"),
        ("It is hepatitis B", ("Hepatitis A", "Cancer", "Hepatitis B"), "ABC", "C"),
        ("B. subtilis", ("E. coli", "S. aureus", "B. subtilis"), "ABC", "C"),
        ("B. subtilis is seen", ("E. coli", "S. aureus", "B. subtilis"), "ABC", "C"),
        # Texts without spaces, and one word within another.
        ("これは寿司です", ("刺身", "寿司", "天ぷら"), "123", "2"),
        ("这是Pizza吗", ("饺子", "Pizza"), "12", "2"),
        ("Crème brulée", ("Cre\u0300me brule\u0301e", "Flan"), "12", "1"),
        ("C++", ("A:C", "B:C++"), "AB", "B"),
        ("+", ("A:+", "B:-"), "AB", "A"),
        ("an x-ray", ("A:+", "B:-"), "AB", ""),
        # Two choices with the same text cannot be distinguished by it.
        ("none", ("A:None", "B:None"), "AB", ""),
        ("in none", ("A:None", "B:None"), "AB", ""),
        ("", ("A:", "B:x"), "AB", ""),
        # Without choices only labels count.
        ("The answer is B", (), "ABC", "B"),
        ("B", (), "ABC", "B"),
        ("2", (), "123", "2"),
        ("2. Austria", (), "123", "2"),
        ("liver", (), "ABC", ""),
    ],
)
def test_choices_of_many_kinds(answer, choices, labels, label):
    assert named(answer, choices, labels) == label


def test_any_of_several_correct_labels_counts():
    assert score("b", ["A", " b "], ORGANS) == {"accuracy": 1}


@pytest.mark.parametrize(
    ("references", "choices", "message"),
    [
        (["E"], ORGANS, "reference E is none of A, B, C, D"),
        (["0"], COUNTRIES, "reference 0 is none of 1, 2, 3, 4, 5"),
        (["2"], (), None),
        (["Skin"], ORGANS, "reference 'Skin' is no label"),
        ([""], ORGANS, "reference '' is no label"),
        (["é"], (), "reference 'é' is no label"),
    ],
)
def test_a_reference_must_be_a_label_of_the_choices(references, choices, message):
    if message is None:
        assert score("2", references, choices) == {"accuracy": 1}
        return
    with pytest.raises(ValueError, match=message):
        score("B", references, choices)


WORDS = ["liver", "liver cyst", "skin", "Hepatitis B", "a bone", "X-ray (chest)", "7 up", "寿司"]


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, unique=True),
    st.sampled_from(["{}: {}", "{}. {}", "({}) {}", "{}) {}"]),
    st.booleans(),
    st.data(),
)
def test_a_choice_is_named_by_its_label_by_its_text_and_by_both(texts, form, numbered, data):
    labels = [str(i + 1) if numbered else chr(ord("A") + i) for i in range(len(texts))]
    choices = [form.format(*pair) for pair in zip(labels, texts, strict=True)]
    index = data.draw(st.integers(0, len(texts) - 1))
    for answer in (labels[index], texts[index], choices[index], texts[index].upper()):
        assert score(answer, [labels[index]], choices) == {"accuracy": 1}, answer
        assert score(answer, [labels[index]], texts) == {"accuracy": 1}, answer


@given(st.text(max_size=30), st.sampled_from([ORGANS, COUNTRIES, ()]))
def test_no_answer_names_two_choices(answer, choices):
    """The helper `named` asserts this."""
    named(answer, choices, "12345" if choices == COUNTRIES else "ABCD")


@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5), st.data())
def test_a_label_alone_names_its_choice_for_all_texts(texts, data):
    index = data.draw(st.integers(0, len(texts) - 1))
    for label in (chr(ord("A") + index), str(index + 1)):
        assert score(label, [label], texts) == {"accuracy": 1}
