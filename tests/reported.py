"""Build rows of results for tests of the report, without any run."""

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
