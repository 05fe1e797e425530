"""The task easy_vqa: rows, recoloured images, and scores from questions alone."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emloc.config.compose import compose
from emloc.data.examples import Example
from emloc.errors import ConfigError
from emloc.stages.run_config import build
from emloc.tasks import easy_vqa
from emloc.tasks.easy_vqa import NOISE, EasyVqa, question_only, question_type

ROWS = {
    "train": [
        ["what is the red shape?", "triangle", 0],
        ["what is the color of the triangle?", "red", 0],
        ["is there a circle?", "no", 0],
        ["what shape is present?", "circle", 1],
        ["is there not a circle?", "no", 1],
    ],
    "test": [["what shape is present?", "rectangle", 0], ["is there a red shape?", "yes", 0]],
}
COLOURS = {("train", 0): (255, 0, 0), ("train", 1): (0, 128, 128), ("test", 0): (165, 42, 42)}


def task(**overrides) -> EasyVqa:
    fixed = {
        "name": "easy_vqa",
        "part": "recoloured",
        "prompt": "{{question}}",
        "scorer": "exact",
        "metric": "accuracy",
        "answer_tokens": 4,
    }
    return EasyVqa(**(fixed | overrides))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A fake package easy-vqa with three images; it can be located but not imported."""
    folder = tmp_path / "easy_vqa"
    for split, rows in ROWS.items():
        (folder / "data" / split / "images").mkdir(parents=True)
        (folder / "data" / split / "questions.json").write_text(json.dumps(rows))
    for (split, image), colour in COLOURS.items():
        file = folder / "data" / split / "images" / f"{image}.png"
        Image.new("RGB", (64, 64), colour).save(file)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield folder
    forget()


def forget() -> None:
    easy_vqa._data_folder.cache_clear()
    easy_vqa._fingerprint.cache_clear()


def pixels(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(float)


def test_the_real_package_has_its_published_counts():
    rows, held_out = task().train(), task().held_out(None)
    assert (len(rows), len(held_out)) == (38_575, 9_673)
    assert Counter(row.group == "yes/no" for row in rows)[True] == 28_407
    assert Counter(row.group == "yes/no" for row in held_out)[True] == 7_136
    assert len({row.images[0].key for row in rows}) == 4_000
    assert len({row.images[0].key for row in held_out}) == 1_000
    assert len({row.target for row in rows}) == 13


def test_questions_alone_answer_two_thirds_of_the_real_test_rows():
    actual = question_only(task().held_out(None))
    expected = {"all": 0.678, "yes/no": 0.825, "shape": 0.374, "color": 0.155}
    assert actual == pytest.approx(expected, abs=5e-4)


def test_the_first_rows_of_the_real_test_rows_are_a_random_sample():
    whole, some = task().held_out(None), task().held_out(300)
    assert some.rows == whole.rows[:300]
    for group, share in {"yes/no": 0.738, "shape": 0.130, "color": 0.132}.items():
        assert abs(sum(row.group == group for row in some) / 300 - share) < 0.08


def test_a_row_holds_image_references_and_kind(package):
    rows = {row.prompt: row for row in task().train()}
    row = rows["what is the color of the triangle?"]
    assert (row.id, row.target, row.references, row.group) == ("train/1", "red", ("red",), "color")
    assert [one.name for one in row.images] == ["task easy_vqa: train image 0"]
    assert len(rows) == 5
    assert {row.group for row in rows.values()} == {"yes/no", "shape", "color"}


def test_plain_images_are_the_original_files(package):
    for row in task(part="plain").train():
        [picture] = row.images
        image = int(picture.name.rsplit(" ", 1)[1])
        assert picture.read() == (package / f"data/train/images/{image}.png").read_bytes()
        assert picture.size == (64, 64)


def test_recoloured_images_have_opposite_colours_and_noise_of_the_stated_size(package):
    [row, *_] = (row for row in task().train() if row.prompt == "what shape is present?")
    actual = pixels(row.images[0].read())
    opposite = np.array([255, 127, 127])  # the opposite colour of teal
    noise = (actual - opposite)[:, :, 1:]  # the noise in these two channels is not clipped
    assert abs(noise.mean()) < 1
    assert noise.std() == pytest.approx(NOISE, rel=0.03)
    assert (actual[:, :, 0] == 255).mean() == pytest.approx(0.5, abs=0.05)


def test_recoloured_images_depend_only_on_seed_and_image(package):
    first, again, other = (
        {row.images[0].name: row.images[0] for row in task(seed=seed).train()} for seed in (3, 3, 4)
    )
    for name in first:
        assert first[name].read() == again[name].read() != other[name].read()
        assert first[name].key == again[name].key != other[name].key
    noise = [pixels(one.read()) - pixels(one.read()).mean((0, 1)) for one in first.values()]
    assert np.abs(noise[0] - noise[1]).max() > NOISE


def test_the_seed_decides_the_order_and_the_limit_keeps_the_first_rows(package):
    orders = {tuple(row.id for row in task(seed=seed).train()) for seed in range(20)}
    assert len(orders) > 10
    assert task(limit=2).train().rows == task().train().rows[:2]
    assert len(task(limit=2).held_out(None)) == 2
    assert task().held_out(1).rows == task().held_out(None).rows[:1]


def test_the_key_changes_with_everything_that_changes_rows(package):
    keys = [
        task(**overrides).key
        for overrides in ({}, {"part": "plain"}, {"seed": 1}, {"prompt": "{{question}}?"})
    ]
    assert all(one != other for index, one in enumerate(keys) for other in keys[:index])
    Image.new("RGB", (64, 64)).save(package / "data/test/images/0.png")
    forget()
    assert task().key != keys[0]


def test_a_prompt_wraps_the_question(package):
    rows = task(prompt="Q: {{question}}", target="{{answer}}!").held_out(None)
    assert {row.prompt: row.target for row in rows} == {
        "Q: what shape is present?": "rectangle!",
        "Q: is there a red shape?": "yes!",
    }


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("yes", "yes/no"), ("no", "yes/no"), ("triangle", "shape"), ("teal", "color")],
)
def test_the_group_of_a_question_follows_from_its_answer(answer, expected):
    assert question_type(answer) == expected


def test_question_only_uses_the_most_frequent_answer_of_each_question():
    def rows(prompt: str, answers: str, group: str) -> list[Example]:
        return [Example("", prompt, one, references=(one,), group=group) for one in answers.split()]

    actual = question_only(
        rows("is it?", "yes yes yes no", "yes/no")
        + rows("is it not?", "yes", "yes/no")
        + rows("what is it?", "circle triangle circle", "shape")
        + rows("what is it?", "red", "color")
    )
    assert actual == {"all": 7 / 9, "yes/no": 4 / 5, "shape": 2 / 3, "color": 1.0}


def test_a_missing_package_is_reported_with_the_command_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    forget()
    with pytest.raises(ConfigError, match="pip install --no-deps easy-vqa") as caught:
        task().held_out(None)
    forget()
    assert "\n" not in str(caught.value)


def test_a_folder_of_that_name_without_data_counts_as_not_installed(package):
    (package / "data/test/questions.json").unlink()
    forget()
    with pytest.raises(ConfigError, match="not installed"):
        task().train()


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ({"part": "inverted"}, "set task.part=recoloured"),
        ({"limit": 0}, "set task.limit=null"),
        ({"answer_tokens": 0}, "set task.answer_tokens=4"),
        ({"prompt": "{{question"}, "correct task.prompt"),
        ({"target": "{% if %}"}, "correct task.target"),
    ],
)
def test_invalid_settings_are_refused(overrides, advice):
    with pytest.raises(ConfigError, match=advice):
        task(**overrides)


def test_an_unknown_column_is_refused(package):
    with pytest.raises(ConfigError, match=r"task\.prompt.*the columns are question"):
        task(prompt="{{query}}").train()


def test_a_missing_scorer_is_refused_before_rows_are_read():
    with pytest.raises(ConfigError, match=r"task\.scorer=emloc\.tasks\.metrics\.exact\.points"):
        task(scorer="emloc.tasks.metrics.exact.points").held_out(1)


def test_the_scorer_of_the_task_scores_its_rows(package):
    [row] = task().held_out(1)
    assert task().score(f" {row.target.upper()}\n", row.references) == {"accuracy": 1.0}
    assert task().score("purple", row.references) == {"accuracy": 0.0}


def test_the_yaml_builds_this_task():
    actual = build(compose(["task=easy_vqa"])).task
    assert isinstance(actual, EasyVqa)
    assert actual.part == "recoloured"


def test_the_data_is_read_from_the_folder_of_the_package(package):
    assert easy_vqa._data_folder() == Path(package) / "data"
