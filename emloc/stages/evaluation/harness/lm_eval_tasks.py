"""Score a model on a task that lm-eval defines, with our rows and our prompt."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from emloc.data.chat_template import Message, has_template, render_messages
from emloc.data.prompts import encode_pair, encode_prompt, frame_of
from emloc.data.reader import TextReader, stop_ids
from emloc.errors import ConfigError
from emloc.stages.evaluation.harness.answer_progress import LoggedAnswers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emloc.tasks.text import TextTask

log = logging.getLogger(__name__)

SEED = 1234  # lm-eval's default; it selects the examples of a few-shot prompt
TASK_FILE = "lm_eval_task.yaml"
SAMPLES_FILE = "lm_eval_samples.jsonl"


class LoggedModel(LoggedAnswers, HFLM):
    """A model in lm-eval's hands that encodes texts as in training and logs its progress."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat as in training: with a fixed date, and with the text of every turn.

        As in lm-eval, a template that takes no system message gets the other turns alone.
        """
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return render_messages(self.tokenizer, messages, **options)
        except ConfigError:
            others = [message for message in messages if message.role != "system"]
            if len(others) == len(messages):
                raise
            return render_messages(self.tokenizer, others, **options)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts for generation with the tokens that precede an answer in training."""
        rows = [
            encode_prompt(self.tokenizer, text, special_tokens=self._adds_special_tokens(text))
            for text in strings
        ]
        batch = self.tokenizer.pad(
            {"input_ids": rows}, padding_side=padding_side, return_tensors="pt"
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if left_truncate_len and ids.shape[1] > left_truncate_len:
            log.warning(
                "evaluate: a prompt of lm-eval has %d tokens, and the model reads its last %d",
                ids.shape[1],
                left_truncate_len,
            )
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a prompt and a possible answer as in training, as one text."""
        lead = frame_of(self.tokenizer).lead
        answer = continuation if continuation[:1].isspace() else lead + continuation
        special = self._adds_special_tokens(context)
        pair = encode_pair(self.tokenizer, context, answer, special_tokens=special)
        return pair.prompt_ids, pair.answer_ids

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer adds special tokens to a text: to those that have none yet."""
        begin = self.tokenizer.bos_token
        return self.add_bos_token is not False and not (begin and text.startswith(begin))


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TextTask,
    *,
    limit: int | None,
    batch_size: int,
    folder: Path,
) -> dict[str, float]:
    """Return lm-eval's scores of `model` as `{"metric,filter": value}`.

    `model` is in eval mode and on its device. The first `limit` rows are answered by greedy
    decoding; None means all rows. Prompts go through the chat template if `tokenizer` has one.
    `folder` receives the definition of the task and a file with every answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chat = has_template(tokenizer)
    with quiet():
        loaded = lm_eval.tasks.TaskManager(include_defaults=False).load(
            [str(write_task(task, folder))]
        )
        (lm_eval_task,) = loaded["tasks"].values()
        lm_eval_task.set_fewshot_seed(SEED)
        if lm_eval_task.get_config("output_type") == "generate_until":
            stops = stop_ids(model.generation_config, TextReader(tokenizer))
            greedy = {"do_sample": False, "temperature": 0.0, "eos_token_id": stops}
            lm_eval_task.set_config("generation_kwargs", greedy, update=True)
        wrapped = LoggedModel(
            pretrained=model,
            # A copy, since lm-eval adds a padding token to a tokenizer without one.
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            # A chat template adds the special tokens itself; see emloc.data.prompts.encode.
            add_bos_token=False if chat else None,
            # In bfloat16, rounding often makes the likelihoods of two choices equal.
            softmax_dtype=torch.float32,
        )
        # lm-eval's `simple_evaluate` would also run pip and nvidia-smi to describe the machine.
        results = evaluate(
            lm=wrapped,
            task_dict=loaded,
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    name = lm_eval_task.config.task
    _write_samples(results["samples"][name], folder / SAMPLES_FILE)
    return {
        metric: float(value)
        for metric, value in results["results"][name].items()
        if "," in metric and isinstance(value, int | float)
    }


def write_task(task: TextTask, folder: Path) -> Path:
    """Write a YAML file that extends lm-eval's task by our data source, splits and prompt.

    Returns:
        The path of the file, in `folder`.
    """
    source = {key: value for key, value in task.source().items() if value is not None}
    values = {
        "include": str(own_yaml(str(task.lm_eval))),
        "dataset_path": source.pop("path"),
        "dataset_name": source.pop("name", None),
        "dataset_kwargs": source,
        "training_split": task.train_split,
        "fewshot_split": task.train_split,
        "validation_split": None,
        "test_split": task.eval_split,
        "num_fewshot": task.shots,
        **task.lm_eval_templates(),
    }
    file = folder / TASK_FILE
    file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


def own_yaml(name: str) -> Path:
    """Return the YAML file of the task `name` in the installed lm-eval.

    Raises:
        ConfigError: lm-eval has no such file.
    """
    root = Path(lm_eval.tasks.__file__).parent
    files = sorted(root.rglob(f"{name}.yaml"))
    if not files:
        raise ConfigError(
            f"task.lm_eval: the installed lm-eval has no file {name}.yaml; "
            "set task.lm_eval=null to score without lm-eval"
        )
    return files[0]


def _write_samples(samples: list[dict[str, Any]], file: Path) -> None:
    """Write a JSON line for each question and each answer filter of lm-eval."""
    with file.open("w", encoding="utf-8") as stream:
        for sample in samples:
            line = {
                "doc_id": sample["doc_id"],
                "filter": sample["filter"],
                "target": sample["target"],
                "response": [answer for answers in sample["resps"] for answer in answers],
                "filtered": sample["filtered_resps"],
                **{metric: sample[metric] for metric in sample["metrics"]},
            }
            # Scores may be numpy numbers, which `json` cannot write.
            stream.write(json.dumps(line, ensure_ascii=False, default=float) + "\n")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide lm-eval's log lines below errors within the block.

    `emloc.runtime.quiet_libraries` hides its progress bars.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
