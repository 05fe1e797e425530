"""The adapter in a run's folder names the model that this run has read, so that others load it."""

import json
import shutil

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM


def test_the_adapter_loads_with_the_model_that_the_run_has_read(
    emloc, tiny, tmp_path, checkpoint, one_run
):
    """Two folders with one content share the stages, but each run names its own folder."""
    link = tmp_path / "link"
    shutil.copytree(checkpoint, tmp_path / "copy")  # with the times of the files
    link.symlink_to(tmp_path / "copy")
    folders = {"first": str(checkpoint), "second": str(link)}
    stages = []
    for name, source in folders.items():
        ran = emloc(*tiny, "method=lora", f"name={name}", f"model.source={source}")
        assert ran.code == 0, ran.output
        run = one_run(name)
        stages.append(json.loads((run / "metrics.json").read_text())["stages"])
        for adapter in ("adapter", "adapter_trained"):
            config = json.loads((run / adapter / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == source
            assert config["revision"] is None
            card = run / adapter / "README.md"
            assert not card.exists() or source in card.read_text()
    assert stages[0] == stages[1]
    assert emloc("merge", str(run)).code == 0
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        automatic = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
        merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
        original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        outputs = [model(input_ids=ids).logits for model in (automatic, merged, original)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)
