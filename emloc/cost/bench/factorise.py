"""Benchmark of the low-rank factors of all layers: time, and distance from the optimum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from emloc.calibration.moments import Statistics
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, reset_memory, time_call
from emloc.emulators.size import ranks_at
from emloc.emulators.svd.factors import factorize
from emloc.tensors.linalg.factorize import lost_energy
from emloc.tensors.linalg.gram import gram

# Targets besides the time: speed-up over the paper's chain, and excess error in per cent.
LEAST_RATIO, MOST_EXCESS = 20, 0.1

# Random activations resemble those of transformers: a falling spectrum and a few strong channels.
TOKENS, STRONG = 8192, 100.0

Shape = tuple[int, int]


def factorise(benchmark: str, model: str, ratio: float, most: float | None) -> Iterator[BenchRow]:
    """Time the factors of all layers by `subspace`, and compare with `eigen` and the paper's chain.

    The other two algorithms are timed on one layer of each shape, times the number of such layers.
    Layers wider than 2:1 have moments of their outputs only, so the paper's chain and the error
    leave them out. `most` is the target for all layers in seconds; with it the speed-up over the
    chain has a target, too.
    """
    setup = BenchSetup(model)
    device, source = setup.device, setup.source
    layers = setup.run_config.model.compressible_layers(source)
    ranks = ranks_at(ratio, layers, 1)
    counts = Counter(layers.values())
    examples = {shape: next(n for n, s in layers.items() if s == shape) for shape in counts}
    statistics: dict[Shape, Statistics] = {}
    for shape, layer in examples.items():
        statistics[shape] = _random_statistics(
            source.weight(layer, device), _uses_input_moments(shape), device
        )
    seconds: dict[str, float] = dict.fromkeys(("eigen", "whiten"), 0.0)
    worst = 0.0
    for shape, layer in examples.items():
        weight, rank, count = source.weight(layer, device), ranks[layer], counts[shape]
        _time(
            "subspace", weight, rank, statistics[shape]
        )  # the first call loads and initialises libraries
        seconds["eigen"] += count * _time("eigen", weight, rank, statistics[shape])
        if _uses_input_moments(shape):  # the paper's chain needs moments of the inputs
            reset_memory(device)
            seconds["whiten"] += count * _time("whiten", weight, rank, statistics[shape])
            worst = max(worst, _excess(weight, rank, statistics[shape]))
        del weight
        reset_memory(device)
    ours = sum(
        _time("subspace", source.weight(layer, device), ranks[layer], statistics[shape])
        for layer, shape in layers.items()
    )
    limit = most if setup.is_full_size else None
    least, excess = LEAST_RATIO if limit else None, MOST_EXCESS if setup.is_full_size else None
    yield row(benchmark, f"all {len(layers)} linears at ratio {ratio:g}", "s", ours, most=limit)
    peer = "times the paper's chain (one layer of each shape x count, none wider than 2:1)"
    yield row(benchmark, peer, "s", ours, peer=seconds["whiten"], least_ratio=least)
    exact = "times our exact path (one layer of each shape x count)"
    yield row(benchmark, exact, "s", ours, peer=seconds["eigen"])
    yield row(
        benchmark, "relative error above the exact optimum, worst shape", "%", worst, most=excess
    )


def _time(algorithm: str, weight: Tensor, rank: int, statistics: Statistics) -> float:
    """Return the seconds that an algorithm needs for the factors of one layer."""
    weights, ranks = {"layer": weight}, {"layer": rank}
    return time_call(lambda: factorize(weights, ranks, statistics, algorithm), weight.device)


def _uses_input_moments(shape: Shape) -> bool:
    """Return whether calibration would accumulate a layer's inputs rather than its outputs."""
    return shape[1] <= 2 * shape[0]


def _random_statistics(weight: Tensor, uses_inputs: bool, device: torch.device) -> Statistics:
    """Return the statistics of a layer for random activations."""
    columns = weight.shape[1]
    generator = torch.Generator(device=device).manual_seed(columns)
    scale = torch.arange(1, columns + 1, device=device).float().rsqrt()
    scale[:4] *= STRONG
    x = torch.randn(min(TOKENS, 4 * columns), columns, device=device, generator=generator) * scale
    if uses_inputs:
        return Statistics({"layer": "layer"}, {"layer": gram(x)}, {}, len(x))
    return Statistics({}, {}, {"layer": gram(x @ weight.float().T)}, len(x))


def _excess(weight: Tensor, rank: int, inputs: Statistics) -> float:
    """Return by how many per cent the relative error exceeds that of the exact decomposition."""
    moments = inputs.of("layer")["input_gram"]
    errors = [
        lost_energy(
            weight,
            factorize({"layer": weight}, {"layer": rank}, inputs, by)["layer"].factors,
            moments,
        )
        for by in ("subspace", "eigen")
    ]
    subspace_error, least_error = (error**0.5 for error in errors)
    return 100 * (subspace_error / least_error - 1)
