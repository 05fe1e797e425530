"""Generate answers through lm-eval's multimodal model and score them with our own scorers.

A prompt has the same tokens and pixels as in training, with or without images. lm-eval goes through
the rows, generates an answer to each and averages the scores of our scorer.
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
from emloc.data.reader import TokenReader, stop_ids
from emloc.stages.evaluation.harness.answer_progress import LoggedAnswers
from emloc.stages.evaluation.harness.lm_eval_tasks import quiet
from emloc.tasks import GenerativeTask
from emloc.tasks.scorers import score_names

ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class PromptAsImage:
    """An encoded prompt, handed to lm-eval where an image is expected."""

    prompt: EncodedExample
    size: tuple[int, int] = (0, 0)  # lm-eval reads `image.size` even if it resizes no image


class HarnessModel(LoggedAnswers, HFMultimodalLM):
    """A model for lm-eval whose prompts are encoded as in training."""

    def __init__(self, model: PreTrainedModel, reader: TokenReader, batch_size: int) -> None:
        self._reader = reader
        super().__init__(model, batch_size=batch_size, image_string="<image>")

    def _create_tokenizer(self, *_: Any, **__: Any) -> None:
        """Use the reader's tokenizer; lm-eval would load the checkpoint's processor."""
        self.tokenizer = self.processor = self._reader.tokenizer

    def tok_batch_multimodal_encode(
        self, strings: list[str], images: list[list[PromptAsImage]], **_: Any
    ) -> dict[str, Tensor]:
        """Collate a batch of prompts: name of a model input -> tensor on the model's device."""
        prompts = [image.prompt for [image] in images]
        batch = self._reader.collate(prompts, answers_only=False)
        batch.pop("position_ids", None)  # `generate` computes positions itself
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
    """Return the mean scores of greedily decoded answers, over all rows and over each group.

    The scores of a group of rows are called `<metric>/<group>`. `folder` receives a file with every
    answer.
    """
    answer_lines: list[dict[str, Any]] = []

    def score_answer(doc: dict[str, int], answers: list[str]) -> dict[str, float]:
        example, _ = rows[doc["row"]]
        answer = answers[0].strip()
        scores = task.score(answer, example.references, example.choices)
        line = {"id": example.id, "group": example.group, "answer": answer}
        answer_lines.append(line | {"references": example.references} | scores)
        group_scores = {f"{name}/{example.group}": value for name, value in scores.items()}
        return scores | (group_scores if example.group else {})

    with quiet():
        stops = stop_ids(model.generation_config, reader)
        lm_eval_task = _lm_eval_task(task, rows, score_answer, stops)
        results = evaluate(
            lm=HarnessModel(model, reader, batch_size),
            task_dict={task.name: lm_eval_task},
            log_samples=False,
        )
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in answer_lines)
    (folder / ANSWERS_FILE).write_text("".join(lines), encoding="utf-8")
    return {
        key.removesuffix(",none"): float(value)
        for key, value in results["results"][task.name].items()
        if key.endswith(",none") and "_stderr," not in key
    }


def _lm_eval_task(
    task: GenerativeTask,
    rows: Sequence[tuple[Example, EncodedExample]],
    score_answer: Callable[[dict[str, int], list[str]], dict[str, float]],
    stops: list[int],
) -> ConfigurableTask:
    """Define the task for lm-eval: its documents are row numbers, its answers decoded greedily."""

    def prompt_images(doc: dict[str, int]) -> list[PromptAsImage]:
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
            "doc_to_image": prompt_images,
            "process_results": score_answer,
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in score_names(task, [example for example, _ in rows])
            ],
            "generation_kwargs": {
                "until": [],
                "do_sample": False,
                "temperature": 0.0,
                "max_gen_toks": task.answer_tokens,
                "eos_token_id": stops,
                "repetition_penalty": 1.0,  # overrides a penalty in the checkpoint
            },
            "num_fewshot": 0,
        }
    )
