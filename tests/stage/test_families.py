"""Model families from outside the package: what they learn, with heads of their own, end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny import tiny_tokenizer
from transformers import RobertaConfig, RobertaForMaskedLM, ViTConfig, ViTModel

from emloc.compose import compose
from emloc.config import build
from emloc.pipeline import run

EXTENSIONS = Path(__file__).parents[1] / "extensions"
CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A language model, of which a classifier takes all but the head."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = tiny_tokenizer(chat=False)
    config = RobertaConfig(
        vocab_size=len(tokenizer), pad_token_id=0, num_hidden_layers=4, type_vocab_size=1, **SMALL
    )
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """An encoder saved by itself: the names of its tensors begin below the classifier's."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(image_size=28, patch_size=7, num_hidden_layers=4, **SMALL)
    torch.manual_seed(0)
    ViTModel(config).save_pretrained(folder)
    return folder


def written(folder: Path, rows: list[dict[str, str]]) -> Path:
    for split, part in (("train", rows[:32]), ("test", rows[32:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Rows whose first letter tells the class and the vector; lengths differ."""
    rows = [
        {"text": "zx"[i % 2] * 6 + "b" * (i % 5) + str(i), "label": ("even", "odd")[i % 2]}
        | {"vector": ("2 -1", "-1 2")[i % 2]}
        for i in range(44)
    ]
    return written(tmp_path_factory.mktemp("texts"), rows)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Dark images and light ones."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    rows = []
    for i in range(44):
        noise = draw.integers(0, 60, (20, 20, 3)) + (0, 180)[i % 2]
        Image.fromarray(noise.astype(np.uint8)).save(folder / "images" / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": ("dark", "light")[i % 2]})
    return written(folder, rows)


@pytest.fixture
def go(store, monkeypatch, roberta, vit, texts, images):
    """The cell of a plug-in's model, and its run."""
    for plugin in ("classifier", "regression"):
        monkeypatch.syspath_prepend(EXTENSIONS / plugin)

    def load(group: str, name: str):
        [file] = EXTENSIONS.glob(f"*/conf/{group}/{name}.yaml")
        return OmegaConf.load(file)

    def cell(model: str, *overrides: str, **changed):
        tiny = [
            *("calibration.samples=8", "lora=r4", "train.batch=8", "train.log_every=1"),
            *("train.steps=30", "train.learning_rate=0.01", "train.schedule=constant"),
            *("compression=r50", "eval=quick", "tracker=none"),
        ]
        cfg = compose([*tiny, *overrides])
        sees = model == "tiny_vit"
        own = {"source": str(vit if sees else roberta), "dtype": "float32"}
        cfg.model = OmegaConf.merge(load("model", model), own | changed)
        task = {"path": str(images if sees else texts)}
        if model == "tiny_flow":
            task |= {"target": "{{vector}}", "metric": "error"}
        name = "labelled_images" if sees else "labelled_texts"
        cfg.task = OmegaConf.merge(load("task", name), task)
        return build(cfg)

    def go_with(model: str, *overrides: str, **changed):
        return run(cell(model, *overrides, **changed), store, lambda step, values: None)

    go_with.cell = cell
    return go_with


def answers_of(result) -> list[dict]:
    lines = (result.evaluated.folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", ["emloc", "emloc_covariance", "lora", "offsite"])
@pytest.mark.parametrize("model", ["tiny_roberta", "tiny_vit"])
def test_a_classifier_learns_its_classes(go, model, method):
    """A fresh head and an adapter, through every kind of emulator but one of units."""
    ends = ["emulator.first=1", "emulator.last=1", "compression=r75"] if method == "offsite" else []
    before = go(model, "method=zero_shot").evaluated.facts["scores"]
    result = go(model, f"method={method}", *ends)
    scores = result.evaluated.facts["scores"]
    assert result.metric == "accuracy"
    assert scores["accuracy"] > 0.9 > before["accuracy"]
    assert scores["loss"] < 0.5 * before["loss"]
    answers = answers_of(result)
    assert [one["id"].rpartition("/")[2] for one in answers] == [str(i) for i in range(12)]
    assert sum(one["right"] for one in answers) / 12 == scores["accuracy"]


@pytest.mark.parametrize("method", ["emloc", "lora"])
def test_a_family_of_continuous_targets_comes_nearer_to_them(go, method):
    before = go("tiny_flow", "method=zero_shot").evaluated.facts["scores"]
    result = go("tiny_flow", f"method={method}")
    assert result.metric == "error"
    assert result.evaluated.facts["scores"]["error"] < 0.5 * before["error"]
