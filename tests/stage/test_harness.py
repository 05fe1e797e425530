"""Tasks of lm-eval on tiny models: requests, scores and written files."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import datasets
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from pieces import piece_tokenizer
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

from emloc.data.examples import Example, Examples
from emloc.data.prompts import encode, render
from emloc.data.reader import TextReader
from emloc.errors import ConfigError
from emloc.stages.evaluation.harness import generated_answers
from emloc.stages.evaluation.harness.lm_eval_tasks import (
    SAMPLES_FILE,
    TASK_FILE,
    LoggedModel,
    score,
)
from emloc.tasks.mathqa import MathQA, options
from emloc.tasks.scorers import find_scorer
from emloc.tasks.text import TextTask

TRAIN = [{"question": f"Say {n}.", "answer": f"So it is {n}.\n#### {n}"} for n in range(10, 14)]
TEST = [{"question": f"Say {n} now.", "answer": f"So it is {n}.\n#### {n}"} for n in range(20, 24)]
CHOICES = "a ) 24 , b ) 120 , c ) 625 , d ) 720 , e ) 1024"
PROBLEMS = [
    {"Problem": f"{word} ?", "options": CHOICES, "correct": letter}
    for word, letter in zip(("one", "two", "three", "four"), "abce", strict=True)
]
# Like the tiny template, but the tokenizer writes <s> instead of the template.
BARE_TEMPLATE = CHAT_TEMPLATE.replace("{{ bos_token }}", "")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def gsm8k(tmp_path) -> TextTask:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split, rows in (("train", TRAIN), ("test", TEST)):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return TextTask(
        name="gsm8k",
        path=str(folder),
        train_split="train",
        eval_split="test",
        prompt="Question: {{question}}\nAnswer:",
        target="{{answer}}",
        metric="exact_match,flexible-extract",
        lm_eval="gsm8k",
    )


@pytest.fixture
def mathqa(tmp_path) -> MathQA:
    folder = tmp_path / "mathqa"
    folder.mkdir()
    for split, rows in (("dev", PROBLEMS[:2]), ("test", PROBLEMS)):
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return MathQA(
        name="mathqa",
        path=str(folder),
        train_split="dev",
        eval_split="test",
        prompt="Question: {{Problem}}\nAnswer:",
        target="{{answer}}",
        metric="acc,none",
        lm_eval="mathqa",
    )


@pytest.fixture(params=["plain", "chat", "chat without <s>"])
def tokenizer(request):
    tokenizer = tiny_tokenizer(chat=request.param != "plain")
    if request.param == "chat without <s>":
        tokenizer.chat_template = BARE_TEMPLATE
    return tokenizer


@pytest.fixture
def generation_requests(monkeypatch) -> list[tuple[str, list[int]]]:
    """Text and token ids of each generation request; answers are limited to one token."""
    requests = []
    original = LoggedModel.tok_batch_encode

    def spy(self, strings, **kwargs):
        ids, attention = original(self, strings, **kwargs)
        for text, row, mask in zip(strings, ids, attention, strict=True):
            requests.append((text, row[mask.bool()].tolist()))
        return ids, attention

    monkeypatch.setattr(LoggedModel, "tok_batch_encode", spy)
    monkeypatch.setattr(HFLM, "max_gen_toks", 1)
    return requests


def samples(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / SAMPLES_FILE).read_text().splitlines()]


def ask(task, tokenizer, folder, model=None, **kwargs) -> dict[str, float]:
    options = {"limit": None, "batch_size": 2} | kwargs
    return score(model or tiny_llama(tokenizer), tokenizer, task, folder=folder, **options)


def test_generation_requests_are_our_prompts(gsm8k, tokenizer, tmp_path, generation_requests):
    ask(gsm8k, tokenizer, tmp_path / "run")
    rows = gsm8k.held_out(None)
    encoded = [encode(tokenizer, row) for row in rows]
    assert sorted(generation_requests) == sorted(
        (render(tokenizer, row.prompt), one.input_ids[: one.answer_start])
        for row, one in zip(rows, encoded, strict=True)
    )
    starts = {ids[0] == tokenizer.bos_token_id for _, ids in generation_requests}
    assert starts == {tokenizer.chat_template != BARE_TEMPLATE}


def test_choice_requests_are_our_examples(mathqa, tokenizer, tmp_path, monkeypatch):
    requests = []
    original = LoggedModel._encode_pair

    def spy(self, context, continuation):
        before, after = original(self, context, continuation)
        requests.append(before + after)
        return before, after

    monkeypatch.setattr(LoggedModel, "_encode_pair", spy)
    ask(mathqa, tokenizer, tmp_path / "run")
    rows = [encode(tokenizer, row) for row in mathqa.held_out(None)]
    assert len(requests) == 5 * len(rows)
    # All tokens except the end token, which lm-eval does not score.
    right = [requests[5 * index + "abcde".index(PROBLEMS[index]["correct"])] for index in range(4)]
    assert right == [row.input_ids[:-1] for row in rows]


@torch.no_grad()
def log_likelihood(model, tokenizer, example) -> float:
    encoded = encode(tokenizer, example)
    ids = torch.tensor([encoded.input_ids[:-1]])
    logs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    scores = logs.gather(1, ids[0, 1:, None])[:, 0]
    return scores[encoded.answer_start - 1 :].sum().item()


def test_choices_are_scored_by_their_likelihood(mathqa, tmp_path):
    tokenizer = tiny_tokenizer(chat=False)
    model = tiny_llama(tokenizer)
    result = ask(mathqa, tokenizer, tmp_path / "run", model)
    hits = []
    for row, example, sample in zip(
        PROBLEMS, mathqa.held_out(None), samples(tmp_path / "run"), strict=True
    ):
        own = [
            log_likelihood(model, tokenizer, replace(example, target=option))
            for option in options(row["options"])
        ]
        assert [value for value, _ in sample["response"]] == pytest.approx(own, abs=1e-3)
        assert sample["target"] == "abcde".index(row["correct"])
        hits.append(float(own.index(max(own)) == sample["target"]))
        assert sample["acc"] == hits[-1]
    assert result["acc,none"] == sum(hits) / 4
    assert set(result) == {"acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"}
    assert all(type(value) is float for value in result.values())


def test_exact_match_of_generated_answers(gsm8k, tmp_path, monkeypatch):
    answers = ["So it is 20.\n#### 20", "It must be 21.", "#### 99", "nothing"]
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, disable_tqdm: answers)
    result = ask(gsm8k, tiny_tokenizer(chat=True), tmp_path / "run")
    assert result["exact_match,strict-match"] == 0.25
    assert result["exact_match,flexible-extract"] == 0.5
    assert result["exact_match_stderr,flexible-extract"] == pytest.approx(0.28868, abs=1e-5)
    assert set(result) >= {gsm8k.metric}
    lines = samples(tmp_path / "run")
    assert lines[1] == {
        "doc_id": 1,
        "filter": "strict-match",
        "target": TEST[1]["answer"],
        "response": ["It must be 21."],
        "filtered": ["[invalid]"],
        "exact_match": 0.0,
    }
    assert [line["exact_match"] for line in lines] == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def test_limit_keeps_the_first_rows(gsm8k, tmp_path, generation_requests):
    tokenizer = tiny_tokenizer(chat=False)
    result = ask(gsm8k, tokenizer, tmp_path / "run", limit=1)
    assert [text for text, _ in generation_requests] == ["Question: Say 20 now.\nAnswer:"]
    # A single row has no standard error.
    assert set(result) == {"exact_match,strict-match", "exact_match,flexible-extract"}


def test_prompt_of_the_task_is_the_prompt_of_lm_eval(gsm8k, tmp_path, generation_requests):
    task = replace(gsm8k, prompt="{{question}} Go!")
    ask(task, tiny_tokenizer(chat=False), tmp_path / "run", limit=1)
    assert [text for text, _ in generation_requests] == ["Say 20 now. Go!"]


def test_shots_are_solved_training_rows(gsm8k, tmp_path, generation_requests):
    tokenizer = tiny_tokenizer(chat=False)
    ask(replace(gsm8k, shots=2), tokenizer, tmp_path / "run", limit=1)
    (text, _), *_ = generation_requests
    *solved, question = text.split("\n\n")
    assert question == "Question: Say 20 now.\nAnswer:"
    solved_rows = {f"Question: {row['question']}\nAnswer: {row['answer']}" for row in TRAIN}
    assert len(solved) == len(set(solved)) == 2
    assert set(solved) <= solved_rows
    ask(replace(gsm8k, shots=2), tokenizer, tmp_path / "again", limit=1)
    assert generation_requests[-1][0] == text


def test_shots_of_a_chat_model_are_turns(gsm8k, tmp_path, generation_requests):
    ask(replace(gsm8k, shots=1), tiny_tokenizer(chat=True), tmp_path / "run", limit=1)
    ((text, _),) = generation_requests
    assert text.count("<|im_start|>user") == 2
    assert text.count("<|im_start|>assistant") == 2


def test_generation_is_greedy_and_ends_at_the_default_length(gsm8k, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer(chat=False)
    model = tiny_llama(tokenizer)
    model.generation_config.do_sample = True
    calls = []
    original = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kwargs: calls.append(kwargs) or original(**kwargs)
    )
    first = ask(gsm8k, tokenizer, tmp_path / "a", model, limit=2)
    second = ask(gsm8k, tokenizer, tmp_path / "b", model, limit=2)
    assert first == second
    assert samples(tmp_path / "a") == samples(tmp_path / "b")
    assert {call["do_sample"] for call in calls} == {False}
    lengths = {call["max_length"] - call["input_ids"].shape[1] for call in calls}
    assert lengths == {256}


def test_answers_do_not_depend_on_the_batch_size(mathqa, tmp_path):
    tokenizer = tiny_tokenizer(chat=True)
    for size in (1, 3):
        ask(mathqa, tokenizer, tmp_path / str(size), batch_size=size)
    for one, three in zip(samples(tmp_path / "1"), samples(tmp_path / "3"), strict=True):
        assert one["doc_id"] == three["doc_id"]
        for (a, _), (b, _) in zip(one["response"], three["response"], strict=True):
            assert a == pytest.approx(b, abs=1e-3)


def test_an_untrained_adapter_is_scored_like_its_model(mathqa, tmp_path):
    tokenizer = tiny_tokenizer(chat=True)
    base = ask(mathqa, tokenizer, tmp_path / "base")
    wrapped = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=2, target_modules=["q_proj"]))
    assert ask(mathqa, tokenizer, tmp_path / "new", wrapped.eval()) == base
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.fill_(4.0)
    ask(mathqa, tokenizer, tmp_path / "moved", wrapped)
    before, after = (samples(tmp_path / run)[0]["response"] for run in ("new", "moved"))
    assert before == samples(tmp_path / "base")[0]["response"]
    assert abs(before[0][0] - after[0][0]) > 1e-3


def test_the_tokenizer_is_unchanged(gsm8k, tmp_path, generation_requests):
    tokenizer = tiny_tokenizer(chat=False)
    model = tiny_llama(tokenizer)
    tokenizer.pad_token = None
    ask(gsm8k, tokenizer, tmp_path / "run", model)
    assert tokenizer.pad_token is None
    assert len(generation_requests) == 4


def test_the_task_file_includes_that_of_lm_eval(gsm8k, mathqa, tmp_path, generation_requests):
    tokenizer = tiny_tokenizer(chat=False)
    ask(gsm8k, tokenizer, tmp_path / "run", limit=1)
    values = yaml.safe_load((tmp_path / "run" / TASK_FILE).read_text())
    assert values.pop("include").endswith("lm_eval/tasks/gsm8k/gsm8k.yaml")
    cache = values["dataset_kwargs"].pop("cache_dir")
    assert cache.startswith(str(tmp_path / "cache" / "emloc"))
    folder = tmp_path / "gsm8k"
    assert values == {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
        },
        "training_split": "train",
        "fewshot_split": "train",
        "validation_split": None,
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": gsm8k.prompt,
        "doc_to_target": gsm8k.target,
    }


def test_a_copy_of_a_hub_folder(gsm8k, tmp_path, generation_requests):
    folder = tmp_path / "hub"
    (folder / "main").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.parquet").rename(folder / "main" / f"{split}.parquet")
    files = [{"split": split, "path": f"main/{split}.parquet"} for split in ("train", "test")]
    card = yaml.safe_dump({"configs": [{"config_name": "main", "data_files": files}]})
    (folder / "README.md").write_text(f"---\nlicense: mit\n{card}---\n")
    task = replace(gsm8k, path=str(folder), config="main")
    ask(task, tiny_tokenizer(chat=False), tmp_path / "run", limit=1)
    assert [text for text, _ in generation_requests] == ["Question: Say 20 now.\nAnswer:"]


def test_an_unknown_task_of_lm_eval_is_refused(gsm8k, tmp_path):
    with pytest.raises(ConfigError) as caught:
        ask(replace(gsm8k, lm_eval="gsm9k"), tiny_tokenizer(chat=False), tmp_path / "run")
    assert str(caught.value) == (
        "task.lm_eval: the installed lm-eval has no file gsm9k.yaml; "
        "set task.lm_eval=null to score without lm-eval"
    )


# Tokenizers with pieces, and chat templates of other families ------------------------------------

PARTS = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
# The space after the prompt belongs to the first token of the answer.
OPEN = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

END_OF_TURN = {None: ["</s>"], PARTS: ["<|end|>"], SPACED: ["▁", "</s>"], OPEN: ["</s>"]}


@pytest.fixture(params=[None, PARTS, SPACED, OPEN], ids=["plain", "parts", "spaced", "open"])
def pieces(request):
    return piece_tokenizer(request.param, ("<|turn|>", "<|end|>"))


def test_generation_requests_have_the_tokens_of_training(
    gsm8k, pieces, tmp_path, generation_requests
):
    ask(gsm8k, pieces, tmp_path / "run")
    rows = [encode(pieces, row) for row in gsm8k.held_out(None)]
    assert sorted(ids for _, ids in generation_requests) == sorted(
        row.input_ids[: row.answer_start] for row in rows
    )


def test_choices_have_the_tokens_of_training(mathqa, pieces, tmp_path, monkeypatch):
    requests = []
    original = LoggedModel._encode_pair

    def spy(self, context, continuation):
        requests.append(original(self, context, continuation))
        return requests[-1]

    monkeypatch.setattr(LoggedModel, "_encode_pair", spy)
    ask(mathqa, pieces, tmp_path / "run")
    rows = [encode(pieces, row) for row in mathqa.held_out(None)]
    right = [requests[5 * index + "abcde".index(PROBLEMS[index]["correct"])] for index in range(4)]
    for (before, after), row in zip(right, rows, strict=True):
        assert before == row.input_ids[: row.answer_start]
        # Training also learns the end of the turn, which lm-eval does not score.
        assert after == row.input_ids[row.answer_start :][: len(after)]
        rest = row.input_ids[row.answer_start + len(after) :]
        assert pieces.convert_ids_to_tokens(rest) == END_OF_TURN[pieces.chat_template]


def test_a_template_without_system_messages_gets_the_other_turns(gsm8k, tmp_path, monkeypatch):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = refusing + CHAT_TEMPLATE
    model = LoggedModel(pretrained=tiny_llama(tokenizer), tokenizer=tokenizer)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    assert model.apply_chat_template(chat) == render(tokenizer, "Which?")
    with pytest.raises(ConfigError, match="no"):
        model.apply_chat_template([chat[0]])


def stops_of(monkeypatch) -> list[list[int]]:
    """Return a list that receives the end tokens of each call of `generate`."""
    stops: list[list[int]] = []
    original = LlamaForCausalLM.generate

    def spy(self, *arguments, **options):
        stops.append(options["eos_token_id"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", spy)
    return stops


@pytest.fixture
def several_ends():
    """A model with its own end token, and a tokenizer whose turns end with a third one."""
    tokenizer = piece_tokenizer(PARTS, ("<|turn|>", "<|end|>"))
    model = tiny_llama(tokenizer)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("Z")]
    return model, tokenizer


ENDS = ["Z", "</s>", "<|end|>"]


def test_tasks_of_lm_eval_stop_at_every_end_token(
    gsm8k, several_ends, tmp_path, monkeypatch, generation_requests
):
    model, tokenizer = several_ends
    stops = stops_of(monkeypatch)
    ask(gsm8k, tokenizer, tmp_path / "run", model)
    assert {tuple(ids) for ids in stops} == {tuple(sorted(tokenizer.convert_tokens_to_ids(ENDS)))}


def test_generated_answers_stop_at_every_end_token(several_ends, tmp_path, monkeypatch):
    model, tokenizer = several_ends
    reader, stops = TextReader(tokenizer), stops_of(monkeypatch)
    rows = [Example("0", "Which town?", "Paris", references=("Paris",))]
    encoded = [(row, reader.encode(row)) for row in rows]
    generated_answers.score(
        model, reader, Towns(Examples("towns", tuple(rows))), encoded, batch_size=1, folder=tmp_path
    )
    assert stops == [sorted(tokenizer.convert_tokens_to_ids(ENDS))]


@dataclass(frozen=True)
class Towns:
    """A task whose answers are generated."""

    rows: Examples
    name: str = "towns"
    metric: str = "accuracy"
    answer_tokens: int = 2

    @property
    def score(self) -> Callable:
        return find_scorer("exact")

    def held_out(self, limit: int | None) -> Examples:
        return self.rows
