"""What needs no torch is refused in two seconds of processor time, before a run folder exists."""

import resource

import pytest


def seconds_of_children() -> float:
    """Processor time of finished child processes, which other programs do not lengthen."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["train.learning_rate=nan"],
            "emloc: train.learning_rate must be above 0 and finite, got nan; "
            "set train.learning_rate=4e-05\n",
        ),
        (
            ["adapter=dora"],
            "emloc: adapter=dora computes the row norms of each layer's weight, and emulator=svd "
            "does not hold that weight; set adapter=lora, or emulator=full recovery=none\n",
        ),
        (
            ["train.lr=1"],
            "emloc: train.lr: there is no such setting; did you mean train.learning_rate?\n",
        ),
    ],
)
def test_a_wrong_setting_is_refused_within_two_seconds_without_a_folder(
    emloc, tmp_path, words, line
):
    before = seconds_of_children()
    ran = emloc.process(*words, EMLOC_RUNS=str(tmp_path / "runs"))
    assert (ran.code, ran.out, ran.err) == (2, "", line)
    assert seconds_of_children() - before < 2
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["recovery.clamp=inf"], "recovery.clamp must be at least 0 and finite or null, got inf; "),
        (["seed=-1"], "seed must be in [0, 4294967296), got -1; set seed=0"),
        (["calibration.seed=4294967296"], "calibration.seed must be in [0, 4294967296), got 429"),
        (["task.target="], "task.target is empty; give it a text"),
        (["model.lora_targets="], "model.lora_targets is empty, which names no layer; set "),
        (["precision=nf4"], "precision=nf4 is a format of 4 bits, and compression.bits=16; set "),
        (["emulator.sequential=true", "emulator.algorithm=whiten"], "emulator.algorithm=whiten "),
        (["emulator=prune", "recovery=scatter", "emulator.seed=1"], "emulator.seed=1 has an eff"),
        (["task.prompt='{{text'"], "task.prompt: "),
        (["compression=auto"], "compression=auto needs budget.gpu_gib; set budget.gpu_gib=24"),
        (["model.dtype=float16"], "model.dtype=float16 is for runs that train nothing, since sm"),
        (["train=quick", "+recovery.typo=1"], "recovery.typo: Key 'typo' not in 'Correction'"),
        (["plan", "train.clip=-1"], "train.clip must be at least 0, got -1; set train.clip=1"),
        (["-m", "method=lora,emloc", "train.warmup=1"], "train.warmup must be in [0, 1), got 1"),
        (["train.warmup=1", "-m", "seed=1,2"], "train.warmup must be in [0, 1), got 1"),
    ],
)
def test_a_wrong_setting_is_one_line_without_a_folder(emloc, tmp_path, words, line):
    ran = emloc(*words, EMLOC_RUNS=str(tmp_path / "runs"))
    assert ran.code == 2, ran.output
    assert ran.output.startswith(f"emloc: {line}")
    assert ran.output.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_the_wrong_jobs_of_a_sweep_are_refused_and_the_others_start(emloc, tmp_path):
    """All are composed; one of them is right, and only its model cannot be found."""
    words = ["-m", "seed=-1,0", "model.source=/nowhere", "tracker=none"]
    ran = emloc(*words, EMLOC_RUNS=str(tmp_path / "runs"))
    assert ran.code == 2, ran.output
    assert "seed must be in [0, 4294967296), got -1; set seed=0" in ran.err + ran.out
    assert "no config.json there; set model.source" in ran.err + ran.out


def test_help_is_a_word_too(emloc):
    assert emloc("help").out.startswith("emloc 0.1.0: fine-tune a large model")
