"""`correct` takes an adapter, a model and an emulator that belong together, or refuses them."""

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer, TrainingArguments

import emloc
from emloc import ConfigError, Factorized
from emloc.library.correct import residual_of
from emloc.library.identity import stamp_of, tensor_digest

# PEFT looks for the emulator's vocabulary; pytest shows what the library has silenced.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")

IDS = torch.randint(5, 200, (6, 12), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


def make_model(seed: int = 0, **overrides):
    """A random Llama; every seed has other weights."""
    model = tiny_llama(tiny_tokenizer(chat=False), **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + seed / 8)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def built(model):
    """Ratio -> an emulator that no test changes."""
    return {ratio: emloc.build_emulator(model, BATCHES, ratio) for ratio in (0.5, 0.25)}


@pytest.fixture
def emulator(built):
    return copy.deepcopy(built[0.5])


def lora(**settings):
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    return LoraConfig(**(values | settings))


def attach(emulator, name: str = "default", std: float = 0.3, **settings):
    """A PEFT model whose LoRA has random matrices, as after a training."""
    tuned = get_peft_model(emulator, lora(**settings), adapter_name=name)
    fill(tuned, name, std)
    return tuned


def fill(tuned, name: str, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter, tensor in tuned.named_parameters():
        if f".{name}." in parameter and ".lora_" in parameter:
            nn.init.normal_(tensor, std=std, generator=generator)


def refusal(*arguments, **settings) -> str:
    with pytest.raises(ConfigError) as refused:
        emloc.correct(*arguments, **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# A whole journey ----------------------------------------------------------------------------------


def test_a_journey_with_another_adapter_name_and_the_trainer(model, emulator, tmp_path):
    """Train with transformers' Trainer, correct, merge with plain PEFT: the logits are exact."""
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    tuned = get_peft_model(emulator, lora(task_type="CAUSAL_LM"), adapter_name="task")
    tuned.add_adapter("unused", lora(r=2))
    tuned.set_adapter("task")
    arguments = TrainingArguments(
        str(tmp_path / "runs"), max_steps=4, save_steps=2, learning_rate=0.03, report_to=[],
        per_device_train_batch_size=3, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(tuned, arguments, train_dataset=rows).train()
    corrected = emloc.correct(tuned, model, emulator, clamp=None)
    corrected.save(tmp_path / "adapter")
    expected = copy.deepcopy(model)
    assert len(corrected.pairs) == 14
    with torch.no_grad():
        for name in corrected.pairs:
            layer, weight = emulator.get_submodule(name), expected.get_submodule(name).weight
            a, b = (m["task"].weight.double() for m in (layer.lora_A, layer.lora_B))
            error = weight.double() - layer.get_base_layer().product()
            # What the LoRA learnt is kept, less the error of the emulator on the rows of A.
            weight += 2 * b @ a - error @ torch.linalg.pinv(a) @ a
        true = expected(input_ids=IDS).logits
        folder, original = tmp_path / "adapter", copy.deepcopy(model)
        merged = PeftModel.from_pretrained(original, folder).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, true, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(true, model(input_ids=IDS).logits, atol=1e-2)
    checkpoint = tmp_path / "runs" / "checkpoint-4"
    again = emloc.correct(checkpoint / "task", model, emulator, clamp=None)
    assert all(torch.equal(again.pairs[n].b, pair.b) for n, pair in corrected.pairs.items())
    assert f"pass {checkpoint / 'task'}" in refusal(checkpoint, model, emulator)


# The adapter --------------------------------------------------------------------------------------


def test_the_active_adapter_is_taken(model, emulator):
    tuned = attach(emulator, "first")
    tuned.add_adapter("second", lora(r=2))
    fill(tuned, "second", 0.2)
    for name, rank in (("second", 2), ("first", 4)):
        tuned.set_adapter(name)
        pairs = emloc.correct(tuned, model, emulator, clamp=0).pairs
        assert {pair.a.shape[0] for pair in pairs.values()} == {rank}
        for layer, pair in pairs.items():
            delta = emulator.get_submodule(layer).get_delta_weight(name)
            torch.testing.assert_close(pair.delta, delta)
    tuned.base_model.set_adapter(["first", "second"])
    assert "several adapters are active: first, second" in refusal(tuned, model, emulator)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_bias": True, "target_modules": ["lm_head"]}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": ["embed_tokens"]}, r"the LoRA \(Embedding\) of model.embed_tokens"),
        ({"modules_to_save": ["down_proj"]}, r"modules_to_save\) of model.layers.0.mlp.down_proj"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
        ({"target_modules": ["lm_head"], "use_dora": True}, "use_dora=True"),
        ({"target_modules": ["lm_head"], "init_lora_weights": "pissa"}, "'pissa'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_what_cannot_be_recovered_is_refused_at_the_first_step(model, emulator, settings, message):
    tuned = get_peft_model(emulator, lora(**settings))
    with pytest.raises(ConfigError, match=message) as refused:
        tuned(input_ids=IDS, labels=IDS)
    assert "LoraConfig and attach it again" in str(refused.value)
    assert re.search(message, refusal(tuned, model, emulator))
    with torch.no_grad():
        tuned(input_ids=IDS)  # no training step


def test_other_kinds_of_adapters_are_refused_at_the_first_step(emulator):
    from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig

    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for config in (prompt, prefix):
        tuned = get_peft_model(emulator, config).train()
        with pytest.raises(ConfigError, match=r"trained by its inputs \(prompt or prefix tuning"):
            tuned(input_ids=IDS, labels=IDS)
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(ConfigError, match="peft_type='IA3' cannot be recovered"):
        get_peft_model(emulator, ia3)(input_ids=IDS, labels=IDS)


def test_an_adapter_of_transformers_is_refused_at_the_first_step(emulator):
    emulator.add_adapter(lora())
    with pytest.raises(ConfigError, match=r"attached by add_adapter; use peft\.get_peft_model"):
        emulator(input_ids=IDS, labels=IDS)


def test_several_active_adapters_are_refused_at_the_first_step(emulator):
    tuned = attach(emulator, "first")
    tuned.add_adapter("second", lora(r=2))
    tuned.base_model.set_adapter(["first", "second"])
    with pytest.raises(ConfigError, match="several adapters are active: first, second; choose"):
        tuned(input_ids=IDS, labels=IDS)


def test_an_adapter_that_is_chosen_later_is_checked_too(emulator):
    tuned = attach(emulator)
    tuned(input_ids=IDS, labels=IDS)
    tuned.add_adapter("other", lora(lora_bias=True, target_modules=["lm_head"]))
    tuned(input_ids=IDS, labels=IDS)
    tuned.set_adapter("other")
    with pytest.raises(ConfigError, match="'other': a LoRA with lora_bias=True cannot be"):
        tuned(input_ids=IDS, labels=IDS)
    tuned.unload()
    again = get_peft_model(emulator, lora(bias="all"))
    with pytest.raises(ConfigError, match="'default': a LoRA with bias='all' cannot be"):
        again(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("allowed", [{}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
def test_a_plain_lora_is_trained_and_other_layers_in_full(emulator, allowed):
    tuned = get_peft_model(emulator, lora(**allowed))
    tuned(input_ids=IDS, labels=IDS).loss.backward()


class Blocks(nn.Module):
    """The smallest model with numbered blocks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.layers = nn.ModuleList(nn.Sequential(layer) for layer in self.layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_the_check_also_runs_when_the_model_is_compiled():
    emulator = emloc.build_emulator(Blocks(), [{"x": torch.randn(4, 16, 8)}], 0.5)
    tuned = get_peft_model(emulator, lora(bias="all", target_modules=r"layers\.0\.0"))
    with pytest.raises(ConfigError, match="bias='all' cannot be recovered"):
        torch.compile(tuned, backend="eager")(x=torch.randn(2, 8))
    torch._dynamo.reset()


def test_an_adapter_that_was_corrected_is_refused_however_it_comes(model, emulator, tmp_path):
    tuned = attach(emulator)
    tuned.save_pretrained(tmp_path / "trained")
    corrected = emloc.correct(tmp_path / "trained", model, emulator)
    corrected.save(tmp_path / "once")
    config = json.loads((tmp_path / "once" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ""
    stamp = json.loads((tmp_path / "once" / "carried.json").read_text())
    assert stamp["emulator"] == stamp_of(emulator).digest
    assert "already recovered" in refusal(tmp_path / "once", model, emulator)
    assert "got SavedLora" in refusal(corrected, model, emulator)

    over_original = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "once")
    assert "attached to a model that is no emulator" in refusal(over_original, model, emulator)
    over_original.save_pretrained(tmp_path / "again")
    assert "was corrected before" in refusal(tmp_path / "again", model, emulator)

    tuned.unload()
    over_emulator = PeftModel.from_pretrained(emulator, tmp_path / "once", is_trainable=True)
    assert "was corrected before" in refusal(over_emulator, model, emulator)
    with pytest.raises(ConfigError, match="was corrected before"):
        over_emulator(input_ids=IDS, labels=IDS)
    over_emulator.save_pretrained(tmp_path / "third")
    assert "was corrected before" in refusal(tmp_path / "third", model, emulator)


def test_an_adapter_may_be_trained_further(model, emulator, built, tmp_path):
    attach(emulator).save_pretrained(tmp_path)
    tuned = PeftModel.from_pretrained(copy.deepcopy(built[0.5]), tmp_path, is_trainable=True)
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    assert len(emloc.correct(tuned, model, emulator).pairs) == 14


def test_an_adapter_for_the_original_is_refused(model, emulator, tmp_path):
    attach(copy.deepcopy(model)).save_pretrained(tmp_path)
    assert "was not trained on this emulator" in refusal(tmp_path, model, emulator)


def test_an_adapter_that_diverged_is_refused(model, emulator):
    tuned = attach(emulator)
    emulator.model.layers[1].mlp.up_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    assert "model.layers.1.mlp.up_proj is not finite" in refusal(tuned, model, emulator)


def test_the_corrected_adapter_names_the_original(tmp_path):
    model = make_model()
    model.name_or_path = "someone/model"
    emulator = emloc.build_emulator(model, BATCHES, 0.5)
    assert emulator.name_or_path == f"someone/model (emulator {stamp_of(emulator).digest})"
    assert model.name_or_path == "someone/model"
    corrected = emloc.correct(attach(emulator), model, emulator)
    assert corrected.config["base_model_name_or_path"] == "someone/model"


# The emulator -------------------------------------------------------------------------------------


def test_an_emulator_of_another_ratio_is_refused(model, emulator, built, tmp_path):
    tuned = attach(emulator)
    tuned.save_pretrained(tmp_path)
    own, other = stamp_of(built[0.5]).digest, stamp_of(built[0.25]).digest
    expected = f"the emulator {own} (ratio 0.5), and emulator is {other} (ratio 0.25)"
    assert expected in refusal(tuned, model, built[0.25])
    assert f"trained on the emulator {own}, and this is {other} (ratio 0.25)" in refusal(
        tmp_path, model, built[0.25]
    )


def test_an_emulator_of_other_samples_is_refused(model, emulator, tmp_path):
    attach(emulator).save_pretrained(tmp_path)
    other = emloc.build_emulator(model, [{"input_ids": IDS + 20}], 0.5)
    assert "pass the emulator that it was trained on" in refusal(tmp_path, model, other)


def test_the_same_call_builds_the_same_emulator(model, built):
    assert stamp_of(emloc.build_emulator(model, BATCHES, 0.5)) == stamp_of(built[0.5])


def test_the_original_in_place_of_the_emulator_and_swapped_arguments_are_refused(model, emulator):
    tuned = attach(emulator)
    for arguments in ((tuned, model, model), (tuned, emulator, model), (emulator, tuned, model)):
        message = refusal(*arguments)
        assert "emulator is no emulator but a LlamaForCausalLM" in message
        assert "correct(adapter, model, emulator)" in message
    for wrong in (emulator, tuned):
        assert "model is an emulator; pass the original" in refusal(tuned, wrong, emulator)
    assert "adapter must be a PEFT model with a LoRA" in refusal(model, model, emulator)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")]
)
def test_wrapped_models_are_taken_out_of_their_wrappers(model, emulator, wrap):
    tuned = attach(emulator)
    one = emloc.correct(wrap(tuned), wrap(model), wrap(tuned))
    two = emloc.correct(tuned, model, emulator)
    assert all(torch.equal(one.pairs[name].b, pair.b) for name, pair in two.pairs.items())


# The original -------------------------------------------------------------------------------------


def test_another_original_is_refused(model, emulator):
    tuned = attach(emulator)
    assert re.search(r"layers\.0\.\S+_proj.weight differs", refusal(tuned, make_model(1), emulator))
    assert "does not have" in refusal(tuned, make_model(intermediate_size=80), emulator)
    changed = copy.deepcopy(model)
    changed.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
    assert "model.layers.1.mlp.up_proj.weight differs" in refusal(tuned, changed, emulator)


def test_an_uncompressed_layer_with_a_lora_has_to_be_equal_too(model):
    emulator = emloc.build_emulator(model, BATCHES, 0.5, targets=r".*layers\.0\..*")
    tuned = attach(emulator, target_modules=["v_proj"])
    changed = copy.deepcopy(model)
    changed.model.layers[1].self_attn.v_proj.weight.data[0, 0] += 1
    assert "layers.1.self_attn.v_proj.weight differs" in refusal(tuned, changed, emulator)
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data.zero_()  # is no part of the correction
    assert len(emloc.correct(tuned, changed, emulator).pairs) == 2


def test_the_original_in_a_wider_dtype_is_the_same_model(emulator, built):
    narrow = make_model().bfloat16()
    emulator = emloc.build_emulator(narrow, BATCHES, 0.5)
    tuned = attach(emulator)
    wide = copy.deepcopy(narrow).float()
    one, two = emloc.correct(tuned, narrow, emulator), emloc.correct(tuned, wide, emulator)
    assert all(torch.equal(one.pairs[name].b, pair.b) for name, pair in two.pairs.items())


def test_a_digest_depends_on_every_number_and_its_place():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(6, 5, generator=generator).bfloat16()
    swapped = one[:, [1, 0, 2, 3, 4]]
    others = [one.T, one.flip(0), swapped, one.reshape(5, 6), one * 2, -one, one.reshape(-1)]
    digests = {tensor_digest(tensor) for tensor in (one, *others)}
    assert len(digests) == len(others) + 1
    assert tensor_digest(one.float()) == tensor_digest(one) == tensor_digest(one.clone())
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor(2.0))


@pytest.mark.parametrize("places", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda:0", "cuda:1")])
def test_weight_and_factors_may_be_on_two_devices(places):
    """On tensors without numbers, since most machines have one device."""
    with FakeTensorMode():
        weight = torch.empty(6, 5, device=places[0], dtype=torch.bfloat16)
        layer = Factorized(torch.empty(6, 2, device=places[1]), torch.empty(2, 5, device=places[1]))
        residual = residual_of(weight, layer)
        assert residual.shape == (6, 5)
        assert residual.dtype == torch.float64
        assert residual.device.type == "cuda"


def test_casting_the_emulator_does_not_change_the_original(model, emulator):
    """Half of a model is what many trainers do to it."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = attach(emulator.half())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert len(emloc.correct(tuned, model, emulator).pairs) == 14


def test_damage_in_an_adapter_folder_is_named(model, emulator, tmp_path):
    attach(emulator).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "up_proj.lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, path)
    message = refusal(tmp_path, model, emulator)
    assert "model.layers.0.mlp.up_proj fits a linear layer of shape (64, 31)" in message
