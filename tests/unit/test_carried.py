"""Each recovery keeps the modules that were fully trained."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import linears, save_checkpoint
from torch import nn

from emloc.adapters.lora import Lora
from emloc.adapters.saved import read_lora
from emloc.config.settings import Compression, LoraSettings
from emloc.emulators import BuildInputs, BuiltEmulator
from emloc.emulators.full import Full
from emloc.emulators.prune import Prune
from emloc.emulators.svd import Svd
from emloc.models.checkpoint.source import Source
from emloc.recovery import RecoveryInputs
from emloc.recovery.correction import Correction
from emloc.recovery.none import NoRecovery
from emloc.recovery.scatter import Scatter
from emloc.runtime.stage_cache import Artifact

CPU = torch.device("cpu")
TARGETS = r"model\.layers\.\d+\..*_proj"
WAYS = {
    "none": (Full(), NoRecovery()),
    "correction": (
        Svd(algorithm="subspace", aware=False, multiple=1),
        Correction(metric="identity", clamp=None, strength=1.0),
    ),
    "scatter": (Prune(importance="random", spread="layer", first=0, last=0, seed=0), Scatter()),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_trained_head_is_kept_unchanged(tmp_path, way):
    emulator, recovery = WAYS[way]
    source = Source(save_checkpoint(tmp_path / "model"), "tiny", "0", torch.float32)
    layers = {n: shape for n, shape in source.linears.items() if n.endswith("_proj")}
    (tmp_path / "emulated").mkdir()
    plan = emulator.plan(source, layers, Compression(0.5, "linears", 16))
    emulator.build(tmp_path / "emulated", source, BuildInputs(plan, None, None, None), device=CPU)
    built_emulator = BuiltEmulator(
        emulator, Artifact("emulate", "0", tmp_path / "emulated"), source
    )
    model = built_emulator.open(CPU)
    size = LoraSettings(2, 2.0, 0.0)
    tuned = Lora().attach(model, size, linears(model, TARGETS), modules_to_save=["lm_head"])
    torch.manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    Lora().save(tuned, tmp_path / "trained" / "adapter", source.name)
    trained = Artifact("train", "0", tmp_path / "trained")
    (tmp_path / "carried").mkdir()
    inputs = RecoveryInputs(
        trained=trained,
        built_emulator=built_emulator,
        samples=None,
        training_inputs=None,
        device=CPU,
    )
    recovery.recover(tmp_path / "carried", inputs)
    before, after = (read_lora(tmp_path / one / "adapter") for one in ("trained", "carried"))
    assert after.extras.keys() == before.extras.keys() == {"lm_head.weight"}
    assert torch.equal(after.extras["lm_head.weight"], before.extras["lm_head.weight"])
    whole = Lora().load(source.load(CPU), tmp_path / "carried" / "adapter")
    head = whole.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(head, before.extras["lm_head.weight"])
    own = load_file(source.folder / "model.safetensors")["lm_head.weight"]
    assert not torch.equal(head, own)
    with torch.no_grad():
        ids = torch.arange(5, 17)[None]
        assert whole(input_ids=ids).logits.isfinite().all()
