"""Results as reports are made of them, without the runs."""

from emloc.report.rows import Row


def row(method: str = "emloc", score: float | None = 0.5, **changed) -> Row:
    """A run of an 8B on pmc_vqa; without a score it ran out of memory."""
    known = {
        "experiment": "mine",
        "cell": "",
        "model": "internvl2_5_8b",
        "task": "pmc_vqa",
        "seed": 0,
        "state": "done" if score is not None else "OOM",
    } | {key: changed.pop(key) for key in list(changed) if key in Row.__annotations__}
    settings = {key: known[key] for key in ("model", "task")} | {"method": method}
    settings |= {"lora.rank": "8"} | known.pop("settings", {})
    numbers = {} if score is None else {"score": score, "scores/loss": 1.0, **changed}
    done = score is not None
    return Row(
        **known,
        run=f"{method}-{known['cell']}-{known['model']}-{known['task']}-s{known['seed']}",
        method=method,
        metric="accuracy" if done else "",
        data="abc" if done else "",
        settings=settings,
        numbers=numbers,
    )
