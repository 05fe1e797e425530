"""Task for a data set of questions about images, on the hub or in a local copy."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from emloc.config.values import Checked, OneOf, Range, Text
from emloc.data.examples import Examples
from emloc.errors import ConfigError
from emloc.runtime.keys import neutral
from emloc.tasks.images import ImageSource
from emloc.tasks.metrics import Scorer
from emloc.tasks.questions import Questions, ReadStats, StoredQuestion, split_by_image
from emloc.tasks.rows import Rows
from emloc.tasks.scorers import find_scorer, scorer_key
from emloc.tasks.templates import RowExpression, text_expression, value_expression

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VqaTask(Checked):
    """A data set whose rows have one or more images, a question and its correct answers.

    If `train_split` equals `eval_split` or is a copy of it, the split is divided by image: the
    questions about the first half of the images are training rows, the others are held out.
    """

    section: ClassVar[str] = "task"
    lm_eval: ClassVar[None] = None

    name: str  # short name for run folders and reports; the stem of the YAML file
    id: str | None = None  # data set on the hub; not used if `path` is set
    train_id: str | None = None  # data set on the hub with the training split; null: `id`
    config: str | None = None  # configuration (subset) of `id`; null if it has only one
    revision: str | None = None  # commit, tag or branch of `id`; null: the newest
    path: str | None = None  # local copy: a copied hub folder, or a folder of <split>.csv files
    files: dict[str, str] | None = None  # split -> file, if the data set declares no splits
    train_split: str  # split for calibration and training
    eval_split: str  # split for evaluation
    image: str  # Jinja expression: the image of a row, or a list of images
    image_root: str | None = None  # folder of the files that `image` names; null: <path>/images
    # Jinja template over the columns of a row; the images precede the prompt
    prompt: Annotated[str, Text(may_be_empty=True)]
    target: str  # Jinja template of the answer to learn, over the columns and `references`
    references: str  # Jinja expression: all correct answers, one or a list
    choices: str | None = None  # Jinja expression: options of a multiple-choice question
    group: str | None = None  # Jinja expression: group of the row; each group gets its own scores
    scorer: str  # scorer of one answer, such as exact or anls; your own by its dotted path
    metric: str  # main score: one of the scorer's metrics
    # maximum number of tokens to generate per answer
    answer_tokens: Annotated[int, Range(least=1, usual=32)]
    # maximum number of training rows, the first ones; null: all
    limit: Annotated[int | None, Range(least=1, usual=None)] = None
    # if the image of a row cannot be read: fail | skip
    unreadable: Annotated[str, OneOf("fail", "skip")] = "fail"
    # if a row has no value that a template writes: fail | skip
    missing: Annotated[str, OneOf("fail", "skip")] = neutral("fail")

    conflicts: ClassVar[Any] = (
        (
            {"id": None, "path": None},
            "task.id and task.path are both null; set task.path=/path/to/copy",
        ),
    )

    def __post_init__(self) -> None:
        """Check the settings, as far as possible without reading data."""
        super().__post_init__()
        _ = self._expressions  # raises for syntax errors

    @property
    def key(self) -> dict[str, Any]:
        """Cache key of the evaluation: the held-out rows with their images, and the scorer."""
        rows, scorer = self.held_out(None).key, scorer_key(self.scorer)
        return {"rows": rows, "scorer": scorer, "answer_tokens": self.answer_tokens}

    @cached_property
    def score(self) -> Scorer:
        """The scorer: a function that returns the scores of one answer, by metric.

        Raises:
            ConfigError: the setting `scorer` names no function.
        """
        return find_scorer(self.scorer)

    def train(self) -> Examples:
        """The first `limit` training rows that are not also evaluation rows.

        Two rows are the same if they have the same prompt and images with the same stored bytes.
        """
        questions = self._halves[0] if self._is_divided else self._train_questions
        return Examples(self.name, tuple(question.example for question in questions[: self.limit]))

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` rows of the evaluation split in file order; all if `limit` is None."""
        questions = self._halves[1] if self._is_divided else self._eval_questions
        return Examples(self.name, tuple(question.example for question in questions[:limit]))

    @cached_property
    def _expressions(self) -> dict[str, RowExpression]:
        """Setting -> compiled template or expression."""
        texts = {"prompt": self.prompt, "target": self.target}
        values = {"image": self.image, "references": self.references}
        optional = {"choices": self.choices, "group": self.group}
        values |= {name: source for name, source in optional.items() if source is not None}
        expressions = {name: text_expression(name, source) for name, source in texts.items()}
        return expressions | {
            name: value_expression(name, source) for name, source in values.items()
        }

    @property
    def _has_separate_train_set(self) -> bool:
        """Whether the training split belongs to another data set on the hub."""
        return self.path is None and self.train_id not in (None, self.id)

    @cached_property
    def _is_divided(self) -> bool:
        """Whether one split must be divided into training and evaluation rows.

        This is so if both settings name one split, or if the two splits have the same rows.
        """
        if self._has_separate_train_set:
            return False
        if self.train_split == self.eval_split:
            return True
        rows = self._stored["eval_split"]
        if not rows.has(self.train_split):
            return False
        train, held_out = (
            rows.of(split).data.table for split in (self.train_split, self.eval_split)
        )
        return bool(train.equals(held_out))

    @cached_property
    def _stored(self) -> dict[str, Rows]:
        """Setting (`train_split` and `eval_split`) -> the data set with this split."""
        splits = {name: getattr(self, name) for name in ("train_split", "eval_split")}
        if self._has_separate_train_set:
            train = Rows(
                name=self.name,
                id=self.train_id,
                splits={"train_split": self.train_split},
                setting="train_id",
            )
            del splits["train_split"]
        main = Rows(
            name=self.name,
            id=self.id,
            config=self.config,
            revision=self.revision,
            path=self.path,
            splits=splits,
            files=self.files,
            image_folder=self._image_source.root,
        )
        return {
            "train_split": train if self._has_separate_train_set else main,
            "eval_split": main,
        }

    @cached_property
    def _image_source(self) -> ImageSource:
        """Origin of the images; image files lie in `image_root`, or else in <path>/images.

        Raises:
            ConfigError: `image_root` is no folder.
        """
        if self.image_root is not None:
            root = Path(self.image_root).expanduser().resolve()
            if not root.is_dir():
                raise ConfigError(
                    f"task.image_root: no folder {root}; set task.image_root=/path/to/images"
                )
            return ImageSource(self.name, root)
        folder = Path(self.path).expanduser().resolve() / "images" if self.path else None
        return ImageSource(self.name, folder if folder and folder.is_dir() else None)

    @cached_property
    def _reader(self) -> Questions:
        """Reads questions from rows by the settings of this task."""
        skip = self.unreadable == "skip"
        return Questions(self.name, self._expressions, self._image_source, skip, self.score)

    @cached_property
    def _eval_read(self) -> tuple[tuple[StoredQuestion, ...], ReadStats]:
        """Questions of the evaluation split, with or without their image files, and the counts."""
        stats = ReadStats()
        rows = self._stored["eval_split"]
        return tuple(self._reader.read(rows, self.eval_split, stats)), stats

    @cached_property
    def _eval_questions(self) -> tuple[StoredQuestion, ...]:
        """Questions of the evaluation split, after a check that no image file is missing."""
        questions, stats = self._eval_read
        self._refuse_missing(stats.missing)
        self._report_skipped("eval_split", stats, questions)
        return questions

    @cached_property
    def _train_questions(self) -> tuple[StoredQuestion, ...]:
        """The first `limit` questions of the training split that are no evaluation questions."""
        eval_by_prompt = defaultdict(list)
        for question in self._eval_read[0]:
            eval_by_prompt[question.example.prompt].append(question)
        training_questions, dropped, stats = [], [], ReadStats()
        for question in self._reader.read(self._stored["train_split"], self.train_split, stats):
            same_prompt = eval_by_prompt.get(question.example.prompt, ())
            if any(question.is_same(other) for other in same_prompt):
                dropped.append(question.example.id)
                continue
            training_questions.append(question)
            if len(training_questions) == self.limit:
                break
        # One error lists the missing files of both splits, so that the user can add all at once.
        self._refuse_missing(self._eval_read[1].missing | stats.missing)
        if dropped:
            log.warning(
                "task %s: dropped %d of %d training rows that are also evaluation rows, the first "
                "is %s",
                self.name,
                len(dropped),
                stats.rows,
                dropped[0],
            )
        if dropped and not training_questions:
            raise ConfigError(
                f"task {self.name}: every row of task.train_split={self.train_split} is also in "
                f"task.eval_split={self.eval_split}; set task.train_split to another split, or to "
                f"{self.eval_split} too, which is then divided by image"
            )
        self._report_skipped("train_split", stats, training_questions)
        return tuple(training_questions)

    @cached_property
    def _halves(self) -> tuple[tuple[StoredQuestion, ...], tuple[StoredQuestion, ...]]:
        """Training questions and held-out questions of one split that is divided by image."""
        training, held_out, images = split_by_image(self._eval_questions)
        if images < 2:
            raise ConfigError(
                f"task {self.name}: split {self.eval_split} cannot be divided by image, since all "
                "its rows show one image; set task.train_split to another split"
            )
        log.info(
            "task %s: split %s is divided by image: %d training rows about %d of the %d images, "
            "%d held-out rows",
            self.name,
            self.eval_split,
            len(training),
            images // 2,
            images,
            len(held_out),
        )
        return tuple(training), tuple(held_out)

    def _refuse_missing(self, files: Iterable[str]) -> None:
        """Check that no image file is missing.

        Raises:
            ConfigError: files are missing; the message lists all of them.
        """
        names = sorted(files)
        folder = self._image_source.root or "their folders"
        if names:
            raise ConfigError(
                f"task {self.name}: {len(names)} images are not in {folder}: {', '.join(names)}; "
                "put them there, set task.image_root to their folder, or "
                "task.unreadable=skip to leave their rows out"
            )

    def _report_skipped(
        self, field: str, stats: ReadStats, questions: Sequence[StoredQuestion]
    ) -> None:
        """Log how many rows of the split in the setting `field` were skipped, and why.

        Raises:
            ConfigError: no row of the split is left, or rows lack a value and `missing` is `fail`.
        """
        split, total = getattr(self, field), stats.rows
        stats.incomplete.report(self.name, split, total, self.missing)
        if stats.unanswered:
            log.warning(
                "task %s: left out %d of %d rows of %s that have no usable answer "
                "(task.references), the first is %s",
                self.name, stats.unanswered, total, split, stats.first_unanswered,
            )  # fmt: skip
        if stats.unreadable:
            log.warning("task %s: left out %d of %d rows of %s whose images cannot be read: %s",
                        self.name, len(stats.unreadable), total, split,
                        "; ".join(stats.unreadable))  # fmt: skip
        if not questions:
            lacking = "a usable answer, as in many published test splits"
            lacking = "an image that can be read" if stats.unreadable else lacking
            raise ConfigError(
                f"task {self.name}: none of the {total} rows of {split} has {lacking}; "
                f"set task.{field} to another split"
            )
