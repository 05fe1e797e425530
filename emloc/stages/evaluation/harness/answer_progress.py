"""Progress of lm-eval's requests, which lm-eval itself shows as bars and never logs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from emloc.runtime.progress import StageProgress


class AnswerCounter:
    """Takes the place of lm-eval's cache of answers, which is called once for each answer."""

    def __init__(self, progress: StageProgress) -> None:
        self._progress = progress

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Count one answer."""
        self._progress.update()


class LoggedAnswers:
    """Mixin in front of a model class of lm-eval: log the progress of its requests."""

    cache_hook: Any

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Written answers to the requests."""
        with self._counted(requests):
            return super().generate_until(requests, disable_tqdm=True)  # type: ignore[misc]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of the requests' continuations."""
        with self._counted(requests):
            return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    @contextmanager
    def _counted(self, requests: Sequence[Any]) -> Iterator[None]:
        before = self.cache_hook
        with StageProgress("evaluate", len(requests), "answer") as progress:
            self.cache_hook = AnswerCounter(progress)
            try:
                yield
            finally:
                self.cache_hook = before
