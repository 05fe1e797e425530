"""Answers written freely, about images or none, by lm-eval's multimodal path to our own scorers.

The tokens and pixels of a prompt are those of training: lm-eval sees the rows, asks for an answer
to each and averages what the scorer makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.hf_vlms import HFMultimodalLM
from torch import Tensor
from transformers import PreTrainedModel

from emloc.data.examples import Example
from emloc.data.prompts import EncodedExample
from emloc.data.reader import TokenReader
from emloc.stages.evaluation.harness.answer_progress import LoggedAnswers
from emloc.stages.evaluation.harness.lm_eval_tasks import quiet
from emloc.tasks import GenerativeTask
from emloc.tasks.scorers import score_names

ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class PromptAsImage:
    """A prompt in the place of its images."""

    prompt: EncodedExample
    size: tuple[int, int] = (0, 0)  # lm-eval looks before it resizes, which it is not told to


class HarnessModel(LoggedAnswers, HFMultimodalLM):
    """A model in lm-eval's hands that reads prompts as it did in training."""

    def __init__(self, model: PreTrainedModel, reader: TokenReader, batch_size: int) -> None:
        self._reader = reader
        super().__init__(model, batch_size=batch_size, image_string="<image>")

    def _create_tokenizer(self, *_: Any, **__: Any) -> None:
        self.tokenizer = self.processor = self._reader.tokenizer

    def tok_batch_multimodal_encode(
        self, strings: list[str], images: list[list[PromptAsImage]], **_: Any
    ) -> dict[str, Tensor]:
        """Tokens and pixels of a batch of prompts."""
        prompts = [one.prompt for [one] in images]
        batch = self._reader.collate(prompts, answers_only=False)
        batch.pop("position_ids", None)  # generation counts them itself
        return {name: value.to(self.device) for name, value in batch.items()}


def score(
    model: PreTrainedModel,
    reader: TokenReader,
    task: GenerativeTask,
    rows: Sequence[tuple[Example, EncodedExample]],
    *,
    batch_size: int,
    folder: Path,
) -> dict[str, float]:
    """The task's scores of greedy answers, over all rows and over each group of them.

    `folder` receives every answer. A group's scores are called `<metric>/<group>`.
    """
    written: list[dict[str, Any]] = []

    def judge(doc: dict[str, int], answers: list[str]) -> dict[str, float]:
        example, _ = rows[doc["row"]]
        answer = answers[0].strip()
        found = task.score(answer, example.references, example.choices)
        line = {"id": example.id, "group": example.group, "answer": answer}
        written.append(line | {"references": example.references} | found)
        named = {f"{name}/{example.group}": value for name, value in found.items()}
        return found | (named if example.group else {})

    with quiet():
        asked = _task(task, rows, judge, reader.tokenizer.eos_token_id)
        results = evaluate(
            lm=HarnessModel(model, reader, batch_size),
            task_dict={task.name: asked},
            log_samples=False,
        )
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in written)
    (folder / ANSWERS_FILE).write_text("".join(lines), encoding="utf-8")
    return {
        key.removesuffix(",none"): float(value)
        for key, value in results["results"][task.name].items()
        if key.endswith(",none") and "_stderr," not in key
    }


def _task(
    task: GenerativeTask,
    rows: Sequence[tuple[Example, EncodedExample]],
    judge: Callable[[dict[str, int], list[str]], dict[str, float]],
    end: int,
) -> ConfigurableTask:
    """lm-eval's definition of the task: every row by its number, answered greedily."""

    def shown(doc: dict[str, int]) -> list[PromptAsImage]:
        _, encoded = rows[doc["row"]]
        prompt = encoded.input_ids[: encoded.answer_start]
        return [PromptAsImage(replace(encoded, input_ids=prompt))]

    return ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda: {
                "test": datasets.Dataset.from_dict({"row": list(range(len(rows)))})
            },
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": lambda doc: rows[doc["row"]][0].prompt,
            "doc_to_target": lambda doc: rows[doc["row"]][0].target,
            "doc_to_image": shown,
            "process_results": judge,
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in score_names(task, [example for example, _ in rows])
            ],
            "generation_kwargs": {
                "until": [],
                "do_sample": False,
                "temperature": 0.0,
                "max_gen_toks": task.answer_tokens,
                "eos_token_id": end,
                "repetition_penalty": 1.0,  # whatever the checkpoint has: answers are greedy
            },
            "num_fewshot": 0,
        }
    )
