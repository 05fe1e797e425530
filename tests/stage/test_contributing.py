"""The worked examples of CONTRIBUTING, as one plug-in: each of them does what its text says."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from documents import PLUGIN, ROOT, plugin_files, write_plugin
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from emloc.config.compose import compose
from emloc.errors import ConfigError
from emloc.stages.run_config import build

ON_IMAGES = ("model=tiny_internvl", "task=easy_vqa", "tracker=none")


@pytest.fixture(autouse=True)
def plugin(made_once, monkeypatch):
    folder = made_once(PLUGIN, write_plugin)
    monkeypatch.setenv("EMLOC_PLUGINS", str(folder))
    return folder


@pytest.fixture
def small(tiny):
    """The tiny run without its data."""
    return [word for word in tiny if not word.startswith("task")]


@pytest.fixture
def neox(made_once, checkpoint):
    """A checkpoint of Pythia's family, with the tokenizer of the tiny Llama."""

    def save(folder):
        for path in checkpoint.glob("tokenizer*"):
            shutil.copy(path, folder)
        sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
        config = GPTNeoXConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
        GPTNeoXForCausalLM(config).save_pretrained(folder)

    return made_once("neox", save)


def adapter_of(artifact):
    return load_file(artifact.folder / "adapter" / "adapter_model.safetensors")


def refused(*words):
    with pytest.raises(ConfigError) as caught:
        build(compose(words))
    return str(caught.value)


def test_every_choice_of_the_examples_is_run_here(plugin):
    """A new example needs a test below, and its name in this list."""
    choices = {path.parent.name + "/" + path.stem for path in plugin.glob("conf/*/*.yaml")}
    assert choices == {
        *("adapter/gaussian", "emulator/sketch", "experiments/first_look"),
        *("method/qlora_corrected", "model/pythia_160m", "model/smollm2_prompted"),
        *("precision/int8", "recovery/shrunk", "stage/distance"),
        *("task/additions", "task/capitals", "tracker/csv"),
    }
    modules = {name.removesuffix(".py") for name in plugin_files() if name.endswith(".py")}
    targets = " ".join(path.read_text() for path in plugin.glob("conf/*/*.yaml"))
    assert {name for name in modules if f"_target_: {name}." not in targets} == {"contains"}


def test_the_examples_keep_the_rules_of_the_package(plugin):
    """Those that ruff checks, docstrings and types among them."""
    for command in (["check"], ["format", "--check"]):
        ruff = ["ruff", *command, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        ran = subprocess.run(
            [sys.executable, "-m", *ruff, str(plugin)], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_method(run_cached):
    result = run_cached("method=qlora_corrected")
    assert result.emulated.facts["precision"] == "nf4"
    assert result.recovered.facts["corrected_layers"] == 14


def test_a_data_set_with_templates(emloc, one_run, small, tmp_path):
    rows = [{"country": f"Land {i}", "capital": f"Town {i}"} for i in range(12)]
    for split, part in (("train", rows[:8]), ("test", rows[8:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    words = ("task=capitals", f"task.path={tmp_path}")
    [first] = build(compose(words)).task.held_out(1).rows
    assert first.prompt == "What is the capital of Land 8?"
    assert first.target == "Town 8"
    ran = emloc(*words, *small)
    assert ran.code == 0, ran.output
    assert len((one_run() / "predictions.jsonl").read_text().splitlines()) == 4


def test_a_data_set_with_a_class(emloc, one_run, small):
    words = ("task=additions", "task.digits=1", "task.held_out_rows=20")
    task = build(compose(words)).task
    assert len(task.train()) == 80
    assert not {row.prompt for row in task.train()} & {row.prompt for row in task.held_out(None)}
    assert all(eval(row.prompt.rstrip("=")) == int(row.target) for row in task.train())
    assert "set task.digits=2" in refused("task=additions", "task.digits=4")
    ran = emloc(*words, *small)
    assert ran.code == 0, ran.output
    assert len((one_run() / "predictions.jsonl").read_text().splitlines()) == 20


def test_a_scorer(emloc, one_run):
    words = ("task.scorer=contains.score", "task.metric=contains", "method=zero_shot")
    ran = emloc(*ON_IMAGES, *words, "task.limit=16", "eval.limit=8")
    assert ran.code == 0, ran.output
    metrics = json.loads((one_run() / "metrics.json").read_text())
    assert metrics["metric"] == "contains"
    answers = [json.loads(one) for one in (one_run() / "answers.jsonl").read_text().splitlines()]
    assert metrics["score"] == pytest.approx(sum(one["contains"] for one in answers) / 8)


def test_a_checkpoint_of_another_family(run_cached, neox):
    model = build(compose(["model=pythia_160m"])).model
    layers = model.adapted_layers(model.shape_source())
    assert len(layers) == 4 * 12
    assert set(layers.values()) == {(2304, 768), (768, 768), (3072, 768), (768, 3072)}
    result = run_cached("model=pythia_160m", f"model.source={neox}", "method=emloc")
    assert result.recovered.facts["corrected_layers"] == 8


def test_a_family_with_other_prompts(run_cached, checkpoint):
    words = ("model=smollm2_prompted", f"model.source={checkpoint}", "model.dtype=float32")
    source = build(compose(words)).model.open()
    reader = source.reader()
    [example] = build(compose(["task=additions"])).task.held_out(1).rows
    text = reader.tokenizer.decode(reader.encode(example).input_ids)
    assert text.startswith(f"Question: {example.prompt}\nAnswer: {example.target}")
    result, plain = run_cached(words[0], "method=zero_shot"), run_cached("method=zero_shot")
    assert result.evaluated.facts["scores"]["loss"] != plain.evaluated.facts["scores"]["loss"]


def test_an_emulator(run_cached):
    result = run_cached("emulator=sketch")
    facts = result.emulated.facts
    assert 0.4 < facts["share_of_linears"] <= 0.5
    assert result.recovered.facts["corrected_layers"] == 14
    with pytest.raises(ConfigError, match=r"set compression\.bits=16"):
        run_cached("emulator=sketch", "compression.bits=4")


def test_an_adapter(run_cached):
    result = run_cached("method=lora", "adapter=gaussian")
    config = json.loads((result.trained.folder / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "gaussian"


def test_a_recovery(run_cached):
    result = run_cached("recovery=shrunk", "recovery.factor=0.25")
    trained, shrunk = adapter_of(result.trained), adapter_of(result.recovered)
    for name, tensor in trained.items():
        assert torch.equal(shrunk[name], tensor * (0.25 if "lora_B" in name else 1)), name
    assert "set recovery.factor=0.5" in refused("recovery=shrunk", "recovery.factor=2")


def test_a_packed_format(run_cached):
    result = run_cached("method=emloc", "compression.bits=8")
    assert result.emulated.facts["precision"] == "int8"
    matrix = torch.randn(6, 5)
    packed = build(compose(["compression.bits=8"])).precision.quantize(matrix)
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((packed.dequantize() - matrix).abs() <= 0.501 * step).all()


def test_a_stage(run_cached):
    result = run_cached("stage=[standard,distance]")
    assert list(result.stages)[1:3] == ["emulate", "distance"]
    errors = json.loads((result.stages["distance"].folder / "distance.json").read_text())
    assert len(errors) == 14
    assert all(0 < error < 1 for error in errors.values())
    whole = run_cached("stage=[standard,distance]", "method=lora")
    assert whole.stages["distance"].facts["largest_error"] == 0


def test_an_experiment_and_a_tracker(emloc, tiny, tmp_path):
    words = [word for word in tiny if word != "tracker=none"]
    ran = emloc("experiments=first_look", "method=zero_shot,lora", "tracker=csv", *words)
    assert ran.code == 0, ran.output
    runs = sorted((tmp_path / "runs" / "first_look").glob("*/numbers.csv"))
    assert [path.parent.name.split("-")[0] for path in runs] == ["lora", "zero_shot"]
    lines = runs[0].read_text().splitlines()
    assert lines[0] == "name,value"
    assert lines[-1] == "state,done"
    assert sum(line.startswith("train/loss,") for line in lines) == 5
