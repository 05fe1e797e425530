"""Build rows of results for tests of the report, without any run."""

import json
from pathlib import Path

from omegaconf import OmegaConf

from emloc.config.run_folder import Run
from emloc.report.rows import Row


def row(method: str = "emloc", score: float | None = 0.5, **changed) -> Row:
    """Return the result of a run of an 8B model on pmc_vqa; score=None means out of memory.

    `changed` overrides fields of `Row`; all other names become numbers of the run.
    """
    fields = {
        "experiment": "mine",
        "cell": "",
        "model": "internvl2_5_8b",
        "task": "pmc_vqa",
        "seed": 0,
        "state": "done" if score is not None else "OOM",
    } | {key: changed.pop(key) for key in list(changed) if key in Row.__annotations__}
    settings = {key: fields[key] for key in ("model", "task")} | {"method": method}
    settings |= {"lora.rank": "8"} | fields.pop("settings", {})
    numbers = {} if score is None else {"score": score, "scores/loss": 1.0, **changed}
    is_done = score is not None
    return Row(
        **fields,
        run=f"{method}-{fields['cell']}-{fields['model']}-{fields['task']}-s{fields['seed']}",
        method=method,
        metric="accuracy" if is_done else "",
        data="abc" if is_done else "",
        settings=settings,
        numbers=numbers,
    )


def write_run(
    folder: Path, cell: str, score: float, seed: int = 0, task: str = "gsm8k", method: str = ""
) -> None:
    """Write the folder of a run that is done, with curve, layers, correction and predictions."""
    model = "llama3_8b"
    choices = {"cell": f"table3_nlp/{cell}", "model": model, "task": task, "lora": "r8"}
    config = {
        "method": method or cell,
        "seed": seed,
        "model": {"name": model},
        "task": {"name": task},
    }
    run = Run(folder / f"{cell}-{model}-{task}-s{seed}")
    run.begin(OmegaConf.create(config), choices)
    layers = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(4) for name in "qkvo"]
    tables = {
        "layers.json": {
            name: {"rank": 8, "kept": 0.9 + at / 200} for at, name in enumerate(layers)
        },
        "correction.json": {
            name: {
                **{"directions": 8, "ratio": 9 * score + at, "clamped": at / 16, "removed": 1.0},
                **{"mismatch_before": 4.0 + at, "mismatch_after": 4.0 + at - 9 * score},
            }
            for at, name in enumerate(layers)
        },
    }
    for name, table in tables.items():
        if cell not in ("zero_shot", "lora"):
            (run.folder / name).write_text(json.dumps(table))
    curve = [{"step": step, "loss": 3 / step + score + seed / 10} for step in range(1, 9)]
    lines_of = {"predictions.jsonl": [{"id": 1}, {"id": 2}]}
    lines_of |= {} if cell == "zero_shot" else {"curve.jsonl": curve}
    for name, lines in lines_of.items():
        (run.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds = {"calibrate": 20.0, "emulate": 60.0, "train": 600.0, "recover": 5.0}
    versions = {"torch": "2.13", "transformers": "5.23"}
    run.finish(
        {
            "metric": "exact_match",
            "score": score,
            "scores": {"loss": 1 - score, "exact_match": score},
            "scores_as_trained": {"loss": 1.1 - score},
            "data": {"name": task},
            "emulator": {"bytes": 8e9 + 1e9 * score},
            "seconds": {"emulate": 60.0} if cell == "zero_shot" else seconds,
            "peak_gib": {"emulate": 3.0, "train": 10.0 + score},
            "step_seconds": 1.25,
            "provenance": {"commit": "abcdef0123456789", "versions": versions, "dirty": False},
        }
    )
