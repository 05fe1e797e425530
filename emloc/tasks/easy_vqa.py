"""easy-VQA: questions about one coloured shape each, as drawn, or recoloured and noised.

The images are small and the answers few, so that a vision-language model of two million parameters
learns them. The Python package carries all of it; nothing of it is imported or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from emloc.data.examples import Example, Examples
from emloc.data.image import LazyImage
from emloc.errors import ConfigError
from emloc.runtime.digest import digest
from emloc.tasks.checks import refuse_answer_tokens, refuse_limit
from emloc.tasks.metrics import Scorer
from emloc.tasks.scorers import called, named_scorer
from emloc.tasks.templates import compile_template, render_template

PARTS = ("plain", "recoloured")
SPLITS = ("train", "test")
SHAPES = ("circle", "rectangle", "triangle")
NOISE = 20.0  # standard deviation, of 255 grey levels


@dataclass(frozen=True, kw_only=True)
class EasyVqa:
    """A question about the one shape in an image of 64 x 64; columns `question`, `answer`.

    `part` says what the images look like: `plain`, as the package has them, or `recoloured`, with
    every colour turned into its opposite and noise over it. Answers are those of the plain image.
    """

    lm_eval: ClassVar[None] = None

    name: str  # word for run folders and reports; the stem of the YAML file
    part: str  # plain | recoloured
    seed: int = 0  # the order of the questions, and the noise
    limit: int | None = None  # at most this many training rows; null is all
    prompt: str  # Jinja template over `question`
    target: str = "{{answer}}"  # Jinja template of the answer to learn
    scorer: str  # what scores one answer: exact, anls ...; one of your own by its dotted path
    metric: str  # headline score, one of those that the scorer returns
    answer_tokens: int  # most tokens to generate

    def __post_init__(self) -> None:
        """Refuse what can be seen to be wrong without reading the data."""
        if self.part not in PARTS:
            raise ConfigError(
                f"task.part={self.part}: one of {', '.join(PARTS)}; set task.part=recoloured"
            )
        refuse_limit(self.limit)
        refuse_answer_tokens(self.answer_tokens, usual=4)
        compile_template("prompt", self.prompt)
        compile_template("target", self.target)

    @property
    def key(self) -> dict[str, Any]:
        """The package's files, what is done to its images, and what is made of its questions."""
        names = ("part", "seed", "prompt", "target", "answer_tokens")
        made = {name: getattr(self, name) for name in names} | {"scorer": called(self.scorer)}
        return {"files": _fingerprint(_data()), "noise": NOISE} | made

    @cached_property
    def score(self) -> Scorer:
        """The numbers of one answer, by metric.

        Raises:
            ConfigError: there is no such function.
        """
        return named_scorer(self.scorer)

    def train(self) -> Examples:
        """The first `limit` questions about the 4,000 training images, in an order of `seed`."""
        return Examples(self.name, self._train_rows[: self.limit])

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` about the 1,000 test images: a random sample, whatever the limit."""
        _ = self.score  # refused here, if it is wrong, and not behind the training
        return Examples(self.name, self._test_rows[:limit])

    @cached_property
    def _train_rows(self) -> tuple[Example, ...]:
        return tuple(self._read("train"))

    @cached_property
    def _test_rows(self) -> tuple[Example, ...]:
        return tuple(self._read("test"))

    def _read(self, split: str) -> Iterable[Example]:
        folder = _data()
        rows = json.loads((folder / split / "questions.json").read_text())
        prompt = compile_template("prompt", self.prompt)
        target = compile_template("target", self.target)
        pictures = {image: self._picture(folder, split, image) for *_, image in rows}
        # By text too: rows of the same place in another release are others.
        order = sorted(range(len(rows)), key=lambda place: digest([self.seed, place, rows[place]]))
        for place in order:
            question, answer, image = rows[place]
            yield Example(
                id=f"{split}/{place}",
                prompt=render_template("prompt", prompt, {"question": question}),
                target=render_template("target", target, {"question": question, "answer": answer}),
                images=(pictures[image],),
                references=(answer,),
                group=kind(answer),
            )

    def _picture(self, folder: Path, split: str, image: int) -> LazyImage:
        file = folder / split / "images" / f"{image}.png"
        where = f"task {self.name}: {split} image {image}"
        seed = [self.seed, SPLITS.index(split), image]
        identity = digest([_fingerprint(folder), self.part, NOISE, seed])
        if self.part == "plain":
            return LazyImage(where, identity, file.read_bytes)
        return LazyImage(where, identity, partial(recoloured, file, seed))


def recoloured(file: Path, seed: list[int]) -> bytes:
    """The image with opposite colours (255 - x) and Gaussian noise, as PNG; `seed` decides it."""
    with Image.open(file) as image:
        plain = np.asarray(image.convert("RGB"), dtype=np.float32)
    noise = np.random.default_rng(seed).normal(scale=NOISE, size=plain.shape)
    pixels = np.rint(255 - plain + noise).clip(0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    # Noise does not compress: the least effort is nearly as small.
    Image.fromarray(pixels).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def kind(answer: str) -> str:
    """What a question with this answer asks for: `yes/no`, `shape` or `color`."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color"


def question_only(examples: Iterable[Example]) -> dict[str, float]:
    """Accuracy of the best answers that depend on the text of the question alone.

    What any model has to beat to have seen anything: for each prompt the answer that most of
    `examples` give to it, hence the best on these very rows. `all`, and by group.
    """
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in examples:
        answers[row.group, row.prompt][row.references[0]] += 1
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (group, _), given in answers.items():
        for name in ("all", group):
            right[name] += max(given.values())
            total[name] += given.total()
    return {name: right[name] / total[name] for name in total}


@cache
def _data() -> Path:
    """The package's data folder, found without importing it.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "data"
        if all((folder / split / "questions.json").is_file() for split in SPLITS):
            return folder
    raise ConfigError(
        "task easy_vqa: its images are in a Python package that is not installed; "
        "pip install --no-deps easy-vqa"
    )


@cache
def _fingerprint(folder: Path) -> str:
    content = hashlib.sha256()
    for split in SPLITS:
        files = sorted((folder / split / "images").glob("*.png"), key=lambda file: int(file.stem))
        for file in (folder / split / "questions.json", *files):
            content.update(f"{file.name} {file.stat().st_size} ".encode())
            content.update(file.read_bytes())
    return content.hexdigest()[:16]
