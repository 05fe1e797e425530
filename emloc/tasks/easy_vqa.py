"""easy-VQA: questions about images of one coloured shape, original or recoloured with noise.

The images are small and the answers are few, so that a vision-language model with two million
parameters can learn the task. The data comes from the Python package `easy-vqa`, whose code is
never imported or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from PIL import Image

from emloc.config.values import SEED, Checked, OneOf, Range
from emloc.data.examples import Example, Examples
from emloc.data.image import LazyImage
from emloc.errors import ConfigError
from emloc.runtime.digest import digest
from emloc.tasks.metrics import Scorer
from emloc.tasks.scorers import find_scorer, scorer_key
from emloc.tasks.templates import compile_template, render_template

SPLITS = ("train", "test")
SHAPES = ("circle", "rectangle", "triangle")
Question = tuple[str, str, int]  # question, answer and number of the image
NOISE = 20.0  # standard deviation of the noise in grey levels, of 255


@dataclass(frozen=True, kw_only=True)
class EasyVqa(Checked):
    """Questions about the shape in an image of 64 x 64 pixels, and its colour.

    The columns of a row are `question` and `answer`. `part` selects the images: `plain` are the
    package's images, `recoloured` are their negatives with noise. The answers are always those of
    the plain images.
    """

    section: ClassVar[str] = "task"
    lm_eval: ClassVar[None] = None

    name: str  # short name for run folders and reports; the stem of the YAML file
    # plain | recoloured
    part: Annotated[str, OneOf("recoloured", "plain")]
    # decides the order of the questions, and the noise
    seed: Annotated[int, SEED] = 0
    # maximum number of training rows; null: all
    limit: Annotated[int | None, Range(least=1, usual=None)] = None
    prompt: str  # Jinja template over `question`
    target: str = "{{answer}}"  # Jinja template of the answer to learn
    scorer: str  # scorer of one answer, such as exact or anls; your own by its dotted path
    metric: str  # main score: one of the scorer's metrics
    # maximum number of tokens to generate per answer
    answer_tokens: Annotated[int, Range(least=1, usual=4)]

    def __post_init__(self) -> None:
        """Check the settings, as far as possible without reading the data."""
        super().__post_init__()
        compile_template("prompt", self.prompt)
        compile_template("target", self.target)

    @property
    def key(self) -> dict[str, Any]:
        """Cache key of the task: the package's data, the change of its images, and the settings."""
        names = ("part", "seed", "prompt", "target", "answer_tokens")
        settings = {name: getattr(self, name) for name in names}
        settings |= {"scorer": scorer_key(self.scorer)}
        return {"files": _fingerprint(_data_folder()), "noise": NOISE} | settings

    @cached_property
    def score(self) -> Scorer:
        """The scorer: a function that returns the scores of one answer, by metric.

        Raises:
            ConfigError: the setting `scorer` names no function.
        """
        return find_scorer(self.scorer)

    def train(self) -> Examples:
        """The first `limit` questions about the 4,000 training images, in random order."""
        return Examples(self.name, self._rows("train", self.limit))

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` questions about the 1,000 test images, in random order; None: all."""
        _ = self.score  # a wrong `scorer` fails here, before the training
        return Examples(self.name, self._rows("test", limit))

    def _rows(self, split: str, limit: int | None) -> tuple[Example, ...]:
        """The first `limit` questions of a split, read once."""
        if (split, limit) not in self._rows_read:
            self._rows_read[split, limit] = tuple(self._read(split, limit))
        return self._rows_read[split, limit]

    @cached_property
    def _rows_read(self) -> dict[tuple[str, int | None], tuple[Example, ...]]:
        """Split and limit -> the questions that `_rows` has read."""
        return {}

    def _read(self, split: str, limit: int | None) -> Iterable[Example]:
        """Yield the first `limit` questions of a split in a random order given by `seed`."""
        folder = _data_folder()
        prompt = compile_template("prompt", self.prompt)
        target = compile_template("target", self.target)
        image_of = cache(partial(self._image, folder, split))
        rows = _shuffled_questions(folder, _fingerprint(folder), split, self.seed)
        for index, (question, answer, image_number) in rows[:limit]:
            yield Example(
                id=f"{split}/{index}",
                prompt=render_template("prompt", prompt, {"question": question}),
                target=render_template("target", target, {"question": question, "answer": answer}),
                images=(image_of(image_number),),
                references=(answer,),
                group=question_type(answer),
            )

    def _image(self, folder: Path, split: str, number: int) -> LazyImage:
        """The image with this number, plain or recoloured as `part` says."""
        file = folder / split / "images" / f"{number}.png"
        name = f"task {self.name}: {split} image {number}"
        seed = [self.seed, SPLITS.index(split), number]
        key = digest([_fingerprint(folder), self.part, NOISE, seed])
        if self.part == "plain":
            return LazyImage(name, key, file.read_bytes)
        return LazyImage(name, key, partial(recolour, file, seed))


def recolour(file: Path, seed: list[int]) -> bytes:
    """The negative of an image (255 - x) with Gaussian noise from `seed`, as a PNG file."""
    with Image.open(file) as image:
        plain = np.asarray(image.convert("RGB"), dtype=np.float32)
    noise = np.random.default_rng(seed).normal(scale=NOISE, size=plain.shape)
    pixels = np.rint(255 - plain + noise).clip(0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    # Noise hardly compresses, so a higher compression level would only cost time.
    Image.fromarray(pixels).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def question_type(answer: str) -> str:
    """Type of a question with this answer: `yes/no`, `shape` or `color`."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color"


def question_only(examples: Iterable[Example]) -> dict[str, float]:
    """Best accuracy that is possible without the images, over all examples and by group.

    The answer to each prompt is the most frequent one among `examples`, which is optimal on these
    rows. Only a model with a higher accuracy uses the images.

    Returns:
        `all` and each group -> accuracy.
    """
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in examples:
        answers[row.group, row.prompt][row.references[0]] += 1
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (group, _), counts in answers.items():
        for name in ("all", group):
            right[name] += max(counts.values())
            total[name] += counts.total()
    return {name: right[name] / total[name] for name in total}


@cache
def _data_folder() -> Path:
    """Data folder of the installed package `easy_vqa`, found without an import of the package.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "data"
        if all((folder / split / "questions.json").is_file() for split in SPLITS):
            return folder
    raise ConfigError(
        "task easy_vqa: the Python package with the images is not installed; "
        "pip install --no-deps easy-vqa"
    )


@lru_cache(maxsize=4)
def _shuffled_questions(
    folder: Path, fingerprint: str, split: str, seed: int
) -> list[tuple[int, Question]]:
    """Index and content of all questions of a split, in a random order given by `seed`.

    Args:
        folder: the data folder.
        fingerprint: hash of its content, as the result is kept for the next call.
        split: train | test.
        seed: decides the order.
    """
    rows: list[Question] = json.loads((folder / split / "questions.json").read_text())
    # The sort key contains the row, as another release has other rows at the same index.
    return sorted(enumerate(rows), key=lambda pair: digest([seed, *pair]))


@cache
def _fingerprint(folder: Path) -> str:
    """Hash of all questions and images in the data folder."""
    content = hashlib.sha256()
    for split in SPLITS:
        files = sorted((folder / split / "images").glob("*.png"), key=lambda file: int(file.stem))
        for file in (folder / split / "questions.json", *files):
            content.update(f"{file.name} {file.stat().st_size} ".encode())
            content.update(file.read_bytes())
    return content.hexdigest()[:16]
