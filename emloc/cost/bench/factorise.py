"""How long the factors of all layers take, and how near they are to the best ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from emloc.calibration.moments import Statistics
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, fresh, seconds
from emloc.emulators.size import ranks_at
from emloc.emulators.svd.factors import factorize
from emloc.tensors.linalg.factorize import lost_energy
from emloc.tensors.linalg.gram import gram

LEAST_RATIO, MOST_EXCESS = 20, 0.1  # the targets beside the time: times the chain; per cent

# Activations as transformers have them: a falling spectrum and a few channels that stand out.
TOKENS, STRONG = 8192, 100.0

Shape = tuple[int, int]


def factorise(work: str, model: str, ratio: float, most: float | None) -> Iterator[BenchRow]:
    """Time all layers by `subspace`; by `eigen` and the paper's chain one layer of each shape.

    The other two are that layer's seconds times the number of such layers. The chain and the error
    are left out where a layer is wider than 2:1, which is known by its outputs alone. `most`: what
    all layers may take, in seconds; then the chain has a target too.
    """
    setting = BenchSetup(model)
    device, source = setting.device, setting.source
    layers = setting.run_config.model.compressed(source)
    ranks = ranks_at(ratio, layers, 1)
    counts = Counter(layers.values())
    first = {shape: next(n for n, s in layers.items() if s == shape) for shape in counts}
    known: dict[Shape, Statistics] = {}
    for shape, layer in first.items():
        known[shape] = _moments(source.weight(layer, device), _narrow(shape), device)
    one: dict[str, float] = dict.fromkeys(("eigen", "whiten"), 0.0)
    worst = 0.0
    for shape, layer in first.items():
        weight, rank, count = source.weight(layer, device), ranks[layer], counts[shape]
        _time("subspace", weight, rank, known[shape])  # libraries are loaded and set up once
        one["eigen"] += count * _time("eigen", weight, rank, known[shape])
        if _narrow(shape):  # the paper's chain has no other statistic than the inputs'
            fresh(device)
            one["whiten"] += count * _time("whiten", weight, rank, known[shape])
            worst = max(worst, _excess(weight, rank, known[shape]))
        del weight
        fresh(device)
    ours = sum(
        _time("subspace", source.weight(layer, device), ranks[layer], known[shape])
        for layer, shape in layers.items()
    )
    limit = most if setting.full else None
    least, excess = LEAST_RATIO if limit else None, MOST_EXCESS if setting.full else None
    yield row(work, f"all {len(layers)} linears at ratio {ratio:g}", "s", ours, most=limit)
    peer = "times the paper's chain (one layer of each shape x count, none wider than 2:1)"
    yield row(work, peer, "s", ours, peer=one["whiten"], least_ratio=least)
    exact = "times our exact path (one layer of each shape x count)"
    yield row(work, exact, "s", ours, peer=one["eigen"])
    yield row(work, "relative error above the exact optimum, worst shape", "%", worst, most=excess)


def _time(algorithm: str, weight: Tensor, rank: int, known: Statistics) -> float:
    """Seconds for the factors of one layer."""
    build_inputs = {"layer": weight}, {"layer": rank}
    return seconds(lambda: factorize(*build_inputs, known, algorithm), weight.device)


def _narrow(shape: Shape) -> bool:
    """Whether calibration would sum the inputs of such a layer rather than its outputs."""
    return shape[1] <= 2 * shape[0]


def _moments(weight: Tensor, inputs: bool, device: torch.device) -> Statistics:
    """What calibration would know of a layer, from activations made for the occasion."""
    columns = weight.shape[1]
    draw = torch.Generator(device=device).manual_seed(columns)
    scale = torch.arange(1, columns + 1, device=device).float().rsqrt()
    scale[:4] *= STRONG
    x = torch.randn(min(TOKENS, 4 * columns), columns, device=device, generator=draw) * scale
    if inputs:
        return Statistics({"layer": "layer"}, {"layer": gram(x)}, {}, len(x))
    return Statistics({}, {}, {"layer": gram(x @ weight.float().T)}, len(x))


def _excess(weight: Tensor, rank: int, inputs: Statistics) -> float:
    """Per cent by which the relative error is above that of the exact decomposition."""
    moments = inputs.of("layer")["input_gram"]
    errors = [
        lost_energy(
            weight,
            factorize({"layer": weight}, {"layer": rank}, inputs, by)["layer"].factors,
            moments,
        )
        for by in ("subspace", "eigen")
    ]
    found, best = (error**0.5 for error in errors)
    return 100 * (found / best - 1)
