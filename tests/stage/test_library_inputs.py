"""Models and batches that `build_emulator` takes, and those that it names and refuses."""

import copy
import pickle
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import image_batch, tiny_internvl, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

import emloc
from emloc import ConfigError, Factorized
from emloc.library.arguments import target_linears
from emloc.library.identity import stamp_of

# PEFT looks for the emulator's vocabulary; pytest shows what the library has silenced.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")

IDS = torch.randint(5, 200, (6, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
BATCHES = [{"input_ids": IDS[:3], "attention_mask": MASK[:3]}, {"input_ids": IDS[3:]}]


@pytest.fixture(scope="module")
def original():
    return tiny_llama(tiny_tokenizer(chat=False))


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def built(original):
    """An emulator that no test changes."""
    return emloc.build_emulator(original, BATCHES, 0.5)


def refusal(*arguments, **settings) -> str:
    with pytest.raises(ConfigError) as refused:
        emloc.build_emulator(*arguments, **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def digest(emulator) -> str:
    return stamp_of(emulator).digest


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batches",
    [
        (batch for batch in BATCHES),
        tuple(BATCHES),
        [batch | {"labels": batch["input_ids"]} for batch in BATCHES],
        [BatchEncoding(batch) for batch in BATCHES],
        torch.utils.data.DataLoader(BATCHES, batch_size=None),
    ],
    ids=["generator", "tuple", "labels", "encodings", "loader"],
)
def test_batches_of_many_kinds_give_the_same_emulator(original, built, batches):
    assert digest(emloc.build_emulator(original, batches, 0.5)) == digest(built)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (iter([]), "batches is empty"),
        (BATCHES[0], "batches must be a list of batches, got dict; pass [batch] for one"),
        (None, "batches must be a list of batches, got NoneType"),
        ([IDS], "batches[0] must be a dictionary of arguments of model.forward"),
        ([*BATCHES, {}], "batches[2] must be a dictionary of arguments"),
        ([{"input_ids": IDS[:0]}], "batches[0]: input_ids is empty, shape (0, 12)"),
        (
            [BATCHES[0], {"input_ids": IDS, "attention_mask": 0 * MASK}],
            "batches[1] has nothing but padding",
        ),
        (
            [{"input_ids": IDS, "attention_mask": MASK[:, None, None]}],
            "batches[0]: attention_mask must have the shape (rows, tokens), got (6, 1, 1, 12)",
        ),
    ],
)
def test_batches_that_cannot_be_run_are_named(original, batches, message):
    assert message in refusal(original, batches, 0.5)


class Block(nn.Module):
    """A model of one block, most of whose parameters may be in no linear layer."""

    def __init__(self, experts: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4, bias=False)})])
        self.blocks[0].register_parameter("experts", nn.Parameter(torch.zeros(experts, 4)))

    def forward(self, x):
        return self.blocks[0]["up"](x)


def test_an_argument_that_the_forward_does_not_take_is_named():
    message = refusal(Block(), [{"x": torch.ones(2, 4), "text": "no"}], 0.5)
    assert "batches[0] has 'text', which Block.forward does not take" in message


def test_a_layer_that_no_batch_reaches_is_named():
    batches = [{"input_ids": image_batch()["input_ids"] + 20}]
    message = refusal(tiny_internvl(), batches, 0.5)
    assert re.match(r"no batch reaches model\.vision_tower\.\S+; pass batches that do", message)


# Targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("nothing", "targets='nothing' matches no linear layer"),
        ("", "targets='' matches no linear layer"),
        (".*(up_proj|lm_head)", "lm_head lies in no numbered block"),
        ("(", "targets='(' is no regular expression"),
    ],
)
def test_targets_that_cannot_be_compressed_are_named(original, targets, message):
    assert message in refusal(original, BATCHES, 0.5, targets=targets)


def test_a_model_that_is_mostly_no_linear_layer_is_refused():
    """Such as a mixture whose experts share one parameter."""
    message = refusal(Block(experts=12), [{"x": torch.ones(2, 4)}], 0.5)
    assert "linear layers, which have 25% of the parameters of the blocks" in message
    assert message.endswith("pass targets to compress these alone")
    assert target_linears(Block(experts=4), None).keys() == {"blocks.0.up"}
    assert target_linears(Block(experts=12), r"blocks\.0\..*").keys() == {"blocks.0.up"}


def test_blocks_of_conv1d_are_named():
    shape = {"vocab_size": 64, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
    message = refusal(GPT2LMHeadModel(GPT2Config(**shape)), BATCHES, 0.5)
    assert "its blocks consist of Conv1D and have no nn.Linear layer" in message


def test_a_linear_layer_of_another_class_is_left_as_it_is(model):
    """Such as a router, whose forward does more than multiply."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    old = model.model.layers[0].mlp.up_proj
    new = Scaled(old.in_features, old.out_features, bias=False)
    model.model.layers[0].mlp.up_proj = new
    emulator = emloc.build_emulator(model, BATCHES, 0.5)
    assert type(emulator.model.layers[0].mlp.up_proj) is Scaled
    assert isinstance(emulator.model.layers[1].mlp.up_proj, Factorized)


# Models -------------------------------------------------------------------------------------------


def test_a_wrapped_model_is_taken_out_of_its_wrapper(original, built):
    for wrapped in (nn.DataParallel(original), torch.compile(original, backend="eager")):
        emulator = emloc.build_emulator(wrapped, BATCHES, 0.5)
        assert type(emulator) is type(original)
        assert digest(emulator) == digest(built)


def test_a_model_in_ddp_is_taken_out_of_its_wrapper(original, built, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(original))
        assert digest(emloc.build_emulator(wrapped, BATCHES, 0.5)) == digest(built)
    finally:
        torch.distributed.destroy_process_group()


def test_every_module_keeps_its_own_mode(model, built):
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    emulator = emloc.build_emulator(model, BATCHES, 0.5)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: module.training for name, module in emulator.named_modules()} == modes
    assert digest(emulator) == digest(built)  # no dropout in the forward passes


def test_models_that_cannot_be_compressed_are_named(model, built):
    assert "model must be a model (nn.Module), got str" in refusal("gpt2", BATCHES, 0.5)
    assert "model is an emulator" in refusal(built, BATCHES, 0.5)
    compiled = copy.deepcopy(model)
    compiled.model.layers[0].compile()
    assert "model.layers.0 is compiled" in refusal(compiled, BATCHES, 0.5)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for adapted in (tuned, model):
        assert "model has a PEFT adapter; pass the original" in refusal(adapted, BATCHES, 0.5)
    tuned.unload()
    model.model.layers[1].to("meta")
    message = "model.layers.1.self_attn.q_proj.weight is on the meta device"
    assert message in refusal(model, BATCHES, 0.5)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt", "float8", "qweight"])
def test_a_quantised_model_is_refused(model, kind):
    mlp = model.model.layers[0].mlp
    if kind == "float8":
        mlp.up_proj.weight.data = mlp.up_proj.weight.data.to(torch.float8_e4m3fn)
    elif kind == "qweight":
        mlp.up_proj = nn.Module()
        mlp.up_proj.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    elif kind == "Linear4bit":
        from bitsandbytes.nn import Linear4bit

        mlp.up_proj = Linear4bit(32, 64, bias=False).to("cpu")
    else:
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        mlp.up_proj = Linear8bitLt(32, 64, bias=False, has_fp16_weights=False)
        weight = torch.zeros(64, 32, dtype=torch.int8)
        mlp.up_proj.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    message = refusal(model, BATCHES, 0.5)
    assert re.search(r"model\.layers\.0\.mlp\.up_proj\.\w+ is (a )?quantised", message)
    assert "without quantization_config" in message


def test_a_sharded_weight_is_refused(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight[:16])
    assert "up_proj.weight has the shape (16, 32) and not (64, 32)" in refusal(model, BATCHES, 0.5)


# Sharing ------------------------------------------------------------------------------------------


def test_an_emulator_shares_memory_by_default_and_copies_by_choice(model):
    shared = emloc.build_emulator(model, BATCHES, 0.5)
    own = emloc.build_emulator(model, BATCHES, 0.5, share=False)
    assert torch.equal(logits(shared), logits(own))
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert not {parameter.data_ptr() for parameter in own.parameters()} & theirs
    others = [name for name, _ in shared.named_parameters() if not name.endswith((".u", ".v"))]
    assert len(others) == 7
    assert all(shared.get_parameter(name).data_ptr() in theirs for name in others)
    before = logits(model)
    own.load_state_dict({name: 0 * tensor for name, tensor in own.state_dict().items()})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.to("meta")])
def test_to_cast_or_move_the_emulator_does_not_change_the_original(change, tied):
    model = tiny_llama(tiny_tokenizer(chat=False), tie_word_embeddings=tied)
    before = logits(model)
    change(emloc.build_emulator(model, BATCHES, 0.5))
    assert torch.equal(logits(model), before)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_training_the_emulator_does_not_freeze_the_original(model):
    tuned = get_peft_model(emloc.build_emulator(model, BATCHES, 0.5), LoraConfig(r=2))
    tuned.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


# Saving -------------------------------------------------------------------------------------------


def test_a_saved_emulator_is_loaded_with_equal_outputs(original, built, tmp_path):
    emloc.save_emulator(built, tmp_path / "emulator")
    assert {path.name for path in (tmp_path / "emulator").iterdir()} == {
        "emulator.json",
        "factors.safetensors",
    }
    for share in (True, False):
        again = emloc.load_emulator(tmp_path / "emulator", original, share=share)
        assert torch.equal(logits(again), logits(built))
        assert stamp_of(again) == stamp_of(built)
        assert type(again) is type(original)
        embedding, own = again.model.embed_tokens.weight, original.model.embed_tokens.weight
        assert (embedding.data_ptr() == own.data_ptr()) == share
    tuned = get_peft_model(again, LoraConfig(r=2, target_modules="all-linear"))
    assert len(emloc.correct(tuned, original, built).pairs) == 14
    with pytest.raises(ConfigError, match="exists and is not empty; save the emulator to a new"):
        emloc.save_emulator(built, tmp_path / "emulator")


def test_an_emulator_is_saved_without_its_lora(original, built, tmp_path):
    emulator = copy.deepcopy(built).half()
    tuned = get_peft_model(emulator, LoraConfig(r=2, target_modules="all-linear"))
    emloc.save_emulator(tuned, tmp_path / "emulator")
    again = emloc.load_emulator(tmp_path / "emulator", original)
    layer = again.model.layers[0].mlp.up_proj
    assert layer.u.dtype == torch.float16
    assert torch.equal(layer.u, built.model.layers[0].mlp.up_proj.u.half())
    assert digest(again) == digest(built)


def damage_factor(folder):
    tensors = load_file(folder / "factors.safetensors")
    tensors["model.layers.0.mlp.up_proj.u"][0, 0] += 1
    save_file(tensors, folder / "factors.safetensors")


def drop_factor(folder):
    tensors = load_file(folder / "factors.safetensors")
    del tensors["model.layers.0.mlp.up_proj.v"]
    save_file(tensors, folder / "factors.safetensors")


def replace(old, new):
    def change(folder):
        path = folder / "emulator.json"
        path.write_text(path.read_text().replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage_factor, "factors.safetensors is damaged; save the emulator again"),
        (drop_factor, "model.layers.0.mlp.up_proj.v is missing"),
        (lambda folder: (folder / "factors.safetensors").write_bytes(b""), "cannot be read"),
        (lambda folder: (folder / "factors.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "emulator.json").unlink(), "emulator.json is missing; pass a fo"),
        (replace("{", ""), "emulator.json is damaged"),
        (replace('"digest"', '"other"'), "emulator.json is damaged"),
        (replace("up_proj", "down_proj"), "emulator.json is damaged"),
        (replace('"version": 1', '"version": 2'), "has version 2, and this emloc reads version 1"),
    ],
)
def test_a_damaged_folder_is_named(original, built, tmp_path, change, message):
    emloc.save_emulator(built, tmp_path / "emulator")
    change(tmp_path / "emulator")
    with pytest.raises(ConfigError) as refused:
        emloc.load_emulator(tmp_path / "emulator", original)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_saved_emulator_is_not_loaded_over_another_model(original, built, model, tmp_path):
    emloc.save_emulator(built, tmp_path)
    for wrong in (built, get_peft_model(model, LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(ConfigError, match=r"model (is an emulator|has a PEFT adapter)"):
            emloc.load_emulator(tmp_path, wrong)
    other = copy.deepcopy(original)
    other.model.norm.weight.data[0] += 1
    with pytest.raises(ConfigError, match=r"built from: model\.norm\.weight differs; pass that"):
        emloc.load_emulator(tmp_path, other)
    with pytest.raises(ConfigError, match="emulator is no emulator but a LlamaForCausalLM"):
        emloc.save_emulator(original, tmp_path / "two")


def test_save_pretrained_of_an_emulator_is_refused_and_that_of_its_lora_works(built, tmp_path):
    emulator = copy.deepcopy(built)
    for save in (emulator.save_pretrained, emulator.push_to_hub):
        with pytest.raises(ConfigError, match=r"use emloc\.save_emulator\(emulator, folder\)"):
            save(tmp_path / "emulator")
    assert not (tmp_path / "emulator").exists()
    get_peft_model(emulator, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_or_pickled_emulator_is_the_same_emulator(original, built, copied):
    twin = copied(built)
    assert torch.equal(logits(twin), logits(built))
    assert stamp_of(twin) == stamp_of(built)
    with pytest.raises(ConfigError, match="save_emulator"):
        twin.save_pretrained("nowhere")
    tuned = get_peft_model(twin, LoraConfig(r=2, bias="all"))
    with pytest.raises(ConfigError, match="bias='all' cannot be recovered"):
        tuned(input_ids=IDS, labels=IDS)
