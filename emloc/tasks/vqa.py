"""Any data set of questions about images, on the hub or a local copy, as prompts and answers."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from emloc.data.examples import Examples
from emloc.errors import ConfigError
from emloc.tasks.checks import refuse_answer_tokens, refuse_limit
from emloc.tasks.images import ImageSource
from emloc.tasks.metrics import Scorer
from emloc.tasks.questions import Questions, ReadStats, StoredQuestion, by_image
from emloc.tasks.rows import Rows
from emloc.tasks.scorers import called, named_scorer
from emloc.tasks.templates import RowExpression, expression, template

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VqaTask:
    """A data set with one or more images, a question and its right answers in every row.

    Where `train_split` is `eval_split`, or a copy of it, the split is divided by image: the first
    half of the images is trained on, the others are held out.
    """

    lm_eval: ClassVar[None] = None

    name: str  # word for run folders and reports; the stem of the YAML file
    id: str | None = None  # data set on the hub; read unless `path` is set
    train_id: str | None = None  # the one that holds the training split; null: the same
    config: str | None = None  # configuration (subset) of `id`, where it has several
    revision: str | None = None  # commit, tag or branch of `id`; null is the newest
    path: str | None = None  # local copy: a copied hub folder, or a folder of <split>.csv files
    files: dict[str, str] | None = None  # split -> file, of a data set that declares no splits
    train_split: str  # split to calibrate and train on
    eval_split: str  # split to evaluate on
    image: str  # Jinja expression: the image of a row, or a list of them
    image_root: str | None = None  # folder of images that rows only name; null: <path>/images
    prompt: str  # Jinja template over the columns of a row; images come before it
    target: str  # Jinja template of the answer to learn, over columns and `references`
    references: str  # Jinja expression: all right answers, one or a list
    choices: str | None = None  # Jinja expression: what the prompt offers to choose from
    group: str | None = None  # Jinja expression: kind of row, for scores of its own
    scorer: str  # what scores one answer: exact, anls ...; one of your own by its dotted path
    metric: str  # headline score: one of those the scorer gives
    answer_tokens: int  # most tokens to generate
    limit: int | None = None  # at most this many training rows, the first ones; null is all
    unreadable: str = "fail"  # a row whose image cannot be read: fail | skip

    def __post_init__(self) -> None:
        """Refuse what can be seen to be wrong without reading data."""
        if self.id is None and self.path is None:
            raise ConfigError("task.id and task.path are both null; set task.path=/path/to/copy")
        if self.unreadable not in ("fail", "skip"):
            raise ConfigError(
                f"task.unreadable={self.unreadable}: set task.unreadable=fail or skip"
            )
        refuse_limit(self.limit)
        refuse_answer_tokens(self.answer_tokens, usual=32)
        _ = self._formulas

    @property
    def key(self) -> dict[str, Any]:
        """The very rows held out, images by content or by the file they are in, and the scorer."""
        rows, scorer = self.held_out(None).key, called(self.scorer)
        return {"rows": rows, "scorer": scorer, "answer_tokens": self.answer_tokens}

    @cached_property
    def score(self) -> Scorer:
        """The numbers of one answer, by metric.

        Raises:
            ConfigError: there is no such function.
        """
        return named_scorer(self.scorer)

    def train(self) -> Examples:
        """The first `limit` training rows that are not also held out.

        A row is, if its prompt and the stored bytes of its images are those of a held-out row.
        """
        trained = self._halves[0] if self._divided else self._trained
        return Examples(self.name, tuple(one.example for one in trained[: self.limit]))

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` rows of the evaluation split in file order, or all of them."""
        held_out = self._halves[1] if self._divided else self._evaluated
        return Examples(self.name, tuple(one.example for one in held_out[:limit]))

    @cached_property
    def _formulas(self) -> dict[str, RowExpression]:
        texts = {"prompt": self.prompt, "target": self.target}
        values = {"image": self.image, "references": self.references}
        further = {"choices": self.choices, "group": self.group}
        values |= {name: source for name, source in further.items() if source is not None}
        formulas = {name: template(name, source) for name, source in texts.items()}
        return formulas | {name: expression(name, source) for name, source in values.items()}

    @property
    def _elsewhere(self) -> bool:
        """Whether the training split is of another data set."""
        return self.path is None and self.train_id not in (None, self.id)

    @cached_property
    def _divided(self) -> bool:
        """Whether one split serves for both: it is named twice, or, in an excerpt, there twice."""
        if self._elsewhere:
            return False
        if self.train_split == self.eval_split:
            return True
        rows = self._stored["eval_split"]
        if not rows.has(self.train_split):
            return False
        train, held_out = (rows.of(one).data.table for one in (self.train_split, self.eval_split))
        return bool(train.equals(held_out))

    @cached_property
    def _stored(self) -> dict[str, Rows]:
        """Where each of the two splits is."""
        splits = {name: getattr(self, name) for name in ("train_split", "eval_split")}
        if self._elsewhere:
            train = Rows(
                name=self.name,
                id=self.train_id,
                splits={"train_split": self.train_split},
                setting="train_id",
            )
            del splits["train_split"]
        own = Rows(
            name=self.name,
            id=self.id,
            config=self.config,
            revision=self.revision,
            path=self.path,
            splits=splits,
            files=self.files,
            aside=self._album.root,
        )
        return {"train_split": train if self._elsewhere else own, "eval_split": own}

    @cached_property
    def _album(self) -> ImageSource:
        if self.image_root is not None:
            root = Path(self.image_root).expanduser().resolve()
            if not root.is_dir():
                raise ConfigError(
                    f"task.image_root: no folder {root}; set task.image_root=/path/to/images"
                )
            return ImageSource(self.name, root)
        beside = Path(self.path).expanduser().resolve() / "images" if self.path else None
        return ImageSource(self.name, beside if beside and beside.is_dir() else None)

    @cached_property
    def _questions(self) -> Questions:
        skip = self.unreadable == "skip"
        return Questions(self.name, self._formulas, self._album, skip, self.score)

    @cached_property
    def _asked(self) -> tuple[tuple[StoredQuestion, ...], ReadStats]:
        account = ReadStats()
        rows = self._stored["eval_split"]
        return tuple(self._questions.read(rows, self.eval_split, account)), account

    @cached_property
    def _evaluated(self) -> tuple[StoredQuestion, ...]:
        found, account = self._asked
        self._refuse_missing(account.missing)
        self._settle("eval_split", account, found)
        return found

    @cached_property
    def _trained(self) -> tuple[StoredQuestion, ...]:
        asked = defaultdict(list)
        for one in self._asked[0]:
            asked[one.example.prompt].append(one)
        found, dropped, account = [], 0, ReadStats()
        for one in self._questions.read(self._stored["train_split"], self.train_split, account):
            if any(one.same(other) for other in asked.get(one.example.prompt, ())):
                dropped += 1
                continue
            found.append(one)
            if len(found) == self.limit:
                break
        # Of both splits: what one error lists can be fetched in one go.
        self._refuse_missing(self._asked[1].missing | account.missing)
        if dropped:
            log.warning(
                "task %s: dropped %d of %d training rows that are also evaluation rows",
                self.name,
                dropped,
                account.seen,
            )
        if dropped and not found:
            raise ConfigError(
                f"task {self.name}: every row of task.train_split={self.train_split} is also in "
                f"task.eval_split={self.eval_split}; set task.train_split to another split, or to "
                f"{self.eval_split} too, which is then divided by image"
            )
        self._settle("train_split", account, found)
        return tuple(found)

    @cached_property
    def _halves(self) -> tuple[tuple[StoredQuestion, ...], tuple[StoredQuestion, ...]]:
        """What is trained on and what is held out of one split."""
        first, rest, images = by_image(self._evaluated)
        if images < 2:
            raise ConfigError(
                f"task {self.name}: split {self.eval_split} is to be divided by image and shows "
                "one alone; set task.train_split to another split"
            )
        log.info(
            "task %s: %s is divided: %d rows on %d of its %d images to train on, %d held out",
            self.name,
            self.eval_split,
            len(first),
            images // 2,
            images,
            len(rest),
        )
        return tuple(first), tuple(rest)

    def _refuse_missing(self, files: Iterable[str]) -> None:
        """Refuse images that are not there.

        Raises:
            ConfigError: there are such; it lists them all.
        """
        names = sorted(files)
        where = self._album.root or "their folders"
        if names:
            raise ConfigError(
                f"task {self.name}: {len(names)} images are not in {where}: {', '.join(names)}; "
                "put them there, set task.image_root to where they are, or "
                "task.unreadable=skip to leave their rows out"
            )

    def _settle(self, field: str, account: ReadStats, found: Sequence[StoredQuestion]) -> None:
        """Say what of a split is not used.

        Raises:
            ConfigError: nothing is left of it.
        """
        split, seen = getattr(self, field), account.seen
        if account.unanswered:
            log.warning("task %s: left out %d of %d rows of %s that have no usable answer",
                        self.name, account.unanswered, seen, split)  # fmt: skip
        if account.unreadable:
            log.warning("task %s: left out %d of %d rows of %s whose images cannot be read: %s",
                        self.name, len(account.unreadable), seen, split,
                        "; ".join(account.unreadable))  # fmt: skip
        if not found:
            what = "a usable answer, as in many published test splits"
            what = "an image that can be read" if account.unreadable else what
            raise ConfigError(
                f"task {self.name}: none of the {seen} rows of {split} has {what}; "
                f"set task.{field} to another split"
            )
