"""The command `emloc`, run as a user types it."""

import json
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from permitted import new_permissions, permissions
from tiny import save_checkpoint
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]


def seconds_of_children() -> float:
    """Return the processor time of finished child processes.

    Wall time would also count the time of other programs on a busy machine.
    """
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_run_is_repeated_from_its_results_and_then_merged(
    emloc, tiny, one_run, checkpoint, tmp_path
):
    first = emloc(
        *tiny, "method=emloc", "tracker=wandb", "eval.harness=false", WANDB_MODE="offline"
    )
    assert first.code == 0, first.output
    run = one_run()
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert "| emloc " in first.out
    page, merge, load = re.search(
        r"writes (\S+)\n.* (emloc merge .+)\n.* PeftModel.from_pretrained\(model, \"(.+)\"\)\n",
        first.out,
    ).groups()
    assert emloc("report", str(run.parent)).code == 0
    assert (tmp_path / page).exists()
    modes = permissions(run.parent)  # also of the files of W&B and of the report
    assert modes == new_permissions(modes)
    assert merge == f"emloc merge {run.relative_to(tmp_path)}"
    assert tmp_path / load == run / "adapter"
    for name in ("config.yaml", "metrics.json", "metrics.jsonl", "curve.jsonl", "run.log"):
        assert (run / name).stat().st_size > 0, name
    for name in ("adapter", "adapter_trained"):
        assert (run / name / "adapter_model.safetensors").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["seconds"]) == ["calibrate", "emulate", "train", "recover", "evaluate"]
    assert metrics["provenance"]["versions"]["torch"] == torch.__version__
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [line["train/step"] for line in steps if "train/step" in line] == [1, 2, 3, 4, 5]
    offline = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(offline) == 1
    assert offline[0].stat().st_size > 1000

    before = seconds_of_children()
    again = emloc.process(*tiny, "method=emloc", "eval.harness=false")
    assert again.code == 0
    # Libraries have to be imported to compare data and model with those of the finished run.
    assert seconds_of_children() - before < 12
    assert "done before" in again.output

    merged = emloc("merge", str(run))
    assert merged.code == 0, merged.output
    assert merged.out == f"{run / 'merged'}\n"
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()(input_ids=ids).logits
        merged_logits = AutoModelForCausalLM.from_pretrained(run / "merged")(input_ids=ids).logits
    torch.testing.assert_close(merged_logits, adapted, atol=1e-5, rtol=0)
    assert "already there" in emloc("merge", str(run)).err
    long = emloc("merge", str(run), "--to", "long", "--dtype", "float32")
    assert (long.code, long.out) == (0, "long\n")
    assert json.loads((tmp_path / "long/config.json").read_text())["dtype"] == "float32"


def test_a_sweep_continues_after_a_failed_run(emloc, tiny, tmp_path, only_svg):
    grid = ["-m", "method=zero_shot,lora", "lora.rank=4,99", "name=grid"]
    ran = emloc(*grid, *tiny)
    assert ran.code == 2, (
        ran.output
    )  # 2: one run was refused for its settings; 1 would be a run that failed
    paths = (tmp_path / "runs/grid").glob("*/status.json")
    states = sorted(json.loads(path.read_text())["state"] for path in paths)
    assert states == ["done", "done", "done", "failed"]
    assert "failed(config)" in ran.out
    assert "set lora.rank=16 or less" in ran.err
    repeated = emloc(*grid, *tiny)
    assert repeated.output.count("done before") == 3
    report = emloc("report", str(tmp_path / "runs/grid"))
    assert report.code == 0
    assert report.out.count("| zero_shot") == 2
    assert report.out.count("| lora ") == 2


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "recovery.clmp=1",
            "recovery.clmp: there is no such setting; did you mean recovery.clamp?",
        ),
        ("compression=r26", "compression=r26: there is no such choice; did you mean r25?"),
        ("lora.rank=two", "lora.rank: Value 'two' of type 'str' could not be converted to Integer"),
        ("compression.ratio=1.5", "compression.ratio must lie between 0 and 1, got 1.5"),
        ("tracker=null", "tracker takes one of none, wandb"),
        ("model.source=/nowhere", "no config.json there; set model.source"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(emloc, override, line):
    ran = emloc("tracker=none", override)
    assert ran.code == 2, ran.output
    assert line in ran.err + ran.out
    assert "Traceback" not in ran.output
    said = [text for text in ran.output.splitlines() if "started" not in text]
    assert len(said) == 1, ran.output


def test_a_process_that_refuses_its_settings_prints_no_messages_of_libraries(emloc):
    ran = emloc.process("tracker=none", "compression.ratio=1.5")
    assert ran.code == 2, ran.output
    said = [text for text in ran.output.splitlines() if "started" not in text]
    assert len(said) == 1, ran.output
    assert "compression.ratio must lie between 0 and 1, got 1.5" in said[0]


def test_a_plan_prints_only_a_table(emloc):
    """A plan needs no weights of the model, and messages of libraries are suppressed."""
    ran = emloc.process("plan", "model=internvl2_5_2b", "budget.gpu_gib=6", "--gpu", "rtx3090")
    assert ran.code == 0, ran.output
    assert ran.err == ""
    lines = ran.out.splitlines()
    methods = [*("lora", "qlora", "lora", "lora"), *["offload"] * 4]
    methods += ["emloc", "emloc_nf4", "emloc", "emloc"]
    assert [line.split()[1] for line in lines[2:14]] == methods
    assert lines[-4].startswith("internvl2_5_2b: 16 x 2048 tokens a step, 50 steps, LoRA rank 8;")
    assert lines[-2].startswith("compression=auto: ")
    assert lines[-1].startswith("recommended: ")
    assert len(lines) == 19


def test_a_plan_of_a_sweep_has_a_row_for_each_run(emloc):
    words = ("method=lora,qlora", "model=smollm2_135m", "train.learning_rate=1e-4,2e-4")
    ran = emloc("plan", *words, "--gpu", "8GiB")
    assert ran.code == 0, ran.output
    lines = ran.out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == [
        f"method={method} train.learning_rate={rate}"
        for method in ("lora", "qlora")
        for rate in ("0.0001", "0.0002")
    ]
    assert lines[-1].startswith("4 trainings take ")


def test_a_plan_that_cannot_be_made_is_one_line_and_exit_code_2(emloc):
    ran = emloc("plan", "model=llama3_8b", "train.lean=false")
    assert ran.code == 2, ran.output
    refusal = "only the memory-saving training (train.lean) can be planned; set train.lean=true"
    assert ran.output == f"emloc: {refusal}\n"


def test_each_memory_budget_of_compression_auto_is_a_separate_run(
    emloc, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "torch.cuda.is_available", lambda: False
    )  # a real GPU would be capped at this tiny budget
    wide = save_checkpoint(tmp_path / "wide", hidden_size=256, intermediate_size=512)
    ran = emloc(
        *("-m", "method=emloc", "compression=auto", "budget.gpu_gib=0.0696,0.0762", *tiny),
        *(f"model.source={wide}", "train.batch=1", "train.steps=1", "eval.harness=false"),
    )
    assert ran.code == 0, ran.output
    facts_by_solution = {}
    for path in (tmp_path / "runs/adhoc").glob("*/metrics.json"):
        solution = re.search(
            r"compression=auto: ratio (\S+) at (\d+)", (path.parent / "run.log").read_text()
        )
        facts = json.loads(path.read_text())["emulator"]
        facts_by_solution[float(solution[1]), int(solution[2])] = (
            facts["share_of_linears"],
            facts["bits"],
        )
    assert len(facts_by_solution) == 2
    for (ratio, bits), (share, emulator_bits) in facts_by_solution.items():
        assert share == pytest.approx(ratio, abs=0.03)
        assert bits == emulator_bits


@pytest.mark.parametrize("method", ["emloc_nf4", "upop"])
def test_every_long_stage_logs_its_progress(emloc, tiny, one_run, monkeypatch, method):
    """As if 30 seconds had passed behind each unit."""
    monkeypatch.setattr("emloc.runtime.progress.SECONDS_BETWEEN_LINES", 0)
    ran = emloc(*tiny, f"method={method}", "eval.limit=2", "eval.harness=true")
    assert ran.code == 0, ran.output
    units = {"emloc_nf4": {"calibrate: block", "recover: layer"}, "upop": {"emulate: batch"}}
    lines = [line[11:] for line in (one_run() / "run.log").read_text().splitlines()]
    assert [line for line in lines if ": step 5 of 5, loss " in line]
    found = {" ".join(line.split()[:2]) for line in lines if " of " in line and " s a " in line}
    assert found >= {"train: step", "evaluate: row", "evaluate: answer", *units[method]}
    assert {line for line in lines if " s a " in line} <= {
        line[11:] for line in ran.out.splitlines()
    }


def test_help_and_settings_answer_at_once_without_torch(emloc):
    for arguments in (["--help"], ["--cfg", "job"]):
        times = []
        for _ in range(3):
            before = seconds_of_children()
            ran = emloc.process(*arguments)
            times.append(seconds_of_children() - before)
            assert ran.code == 0
        # Most of this time is spent in Hydra and its grammar of overrides.
        assert min(times) < 1.8, times
    assert "compression" in ran.out
    probe = "import sys, emloc.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


def test_the_version_is_that_of_the_package(emloc):
    (declared,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    for flag in ("--version", "-V"):
        assert emloc(flag).output == f"emloc {declared}\n"


@pytest.mark.parametrize("words", [("help",), ("-h",), ("--help",), ("method=lora", "--help")])
def test_help_is_ours_however_it_is_asked_for(emloc, words):
    ran = emloc(*words)
    assert ran.code == 0
    assert ran.out.startswith("emloc ")
    assert "  merge      merge the adapter of a run" in ran.out
    assert ran.err == ""


@pytest.mark.parametrize("verb", ["report", "tables", "merge", "plan", "bench"])
def test_each_verb_says_what_it_does_with_an_example(emloc, verb):
    ran = emloc(verb, "--help")
    assert ran.code == 0
    assert f"usage: emloc {verb} [-h]" in ran.out
    assert f"Example: emloc {verb}" in ran.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("reprot", "x"), "emloc: there is no verb reprot; did you mean report?"),
        (
            ("xyz",),
            "emloc: there is no verb xyz; the verbs are help, report, tables, merge, plan, bench",
        ),
        (("method", "lora"), "emloc: method is a group; choose as in method=dora"),
    ],
)
def test_a_word_that_is_no_verb_is_answered_in_one_line(emloc, words, line):
    ran = emloc(*words)
    assert ran.code == 2
    assert ran.output == f"{line}\n"


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("emloc method=emloc_", ["method=emloc_covariance", "method=emloc_uncorrected"]),
        ("emloc experiments=", ["experiments=demo"]),
        ("emloc recovery.cl", ["recovery.clamp="]),
    ],
)
def test_shell_completion_knows_groups_experiments_and_keys(emloc, line, completions):
    command = Path(sys.executable).with_name("emloc")
    request = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    ran = emloc.process("-sc", "query=bash", program=(str(command),), **request)
    assert set(completions) <= set(ran.out.split()), ran.output


def test_the_wheel_runs_from_another_folder(tmp_path, emloc):
    """The wheel contains the configuration and needs no file of the source tree."""
    build = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "-o",
            str(tmp_path),
            str(ROOT),
        ],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "emloc/py.typed" in names
    assert "emloc/_data/conf/config.yaml" in names
    assert "emloc/_data/experiments/demo.yaml" in names
    assert not [name for name in names if name.startswith("tests")]
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    probe = "import emloc; print(emloc.__file__)"
    env = {"PYTHONPATH": str(unpacked)}
    assert str(unpacked) in emloc.process("-c", probe, program=(sys.executable,), **env).out
    settings = emloc.process("--cfg", "job", "experiments=demo", **env)
    assert settings.code == 0, settings.output
    assert "name: demo" in settings.out


def test_without_a_tracker_wandb_need_not_be_installed(emloc, tiny):
    hide = "import sys; sys.modules['wandb'] = None; sys.argv[0] = 'emloc'; "
    program = (sys.executable, "-c", hide + "from emloc.cli import main; main()")
    ran = emloc.process(*tiny, "method=zero_shot", program=program)
    assert ran.code == 0, ran.output
