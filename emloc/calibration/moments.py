"""What calibration knows of one block: second moments of what its linear layers take or give.

Shapes: N tokens, a layer of m outputs and n inputs. Input Gram X^T X (n, n), output Gram
(X W^T)^T (X W^T) (m, m), both summed in float64. Layers fed by the same tensor (query, key and
value; gate and up) share one input Gram, their *site*, named after the first of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emloc.runtime.manifest import whole
from emloc.runtime.safetensors_file import write_shard
from emloc.tensors.linalg.gram import gram, product

# Tokens whose outputs are formed at once: in float64, inputs and outputs of a whole batch would be
# several times the size of the block.
PIECE = 4096


@dataclass
class Statistics:
    """Second moments of the linears of one block."""

    sites: dict[str, str] = field(default_factory=dict)  # layer -> whose input it shares
    inputs: dict[str, Tensor] = field(default_factory=dict)  # site -> input Gram
    outputs: dict[str, Tensor] = field(default_factory=dict)  # layer -> output Gram
    tokens: int = 0

    def of(self, layer: str) -> dict[str, Tensor]:
        """`input_gram` or `output_gram` of a layer, as `linalg.factorize` takes them."""
        if layer in self.outputs:
            return {"output_gram": self.outputs[layer]}
        return {"input_gram": self.inputs[self.sites[layer]]}

    def add(self, taken: dict[str, Tensor], weights: dict[str, Tensor], whole: bool) -> None:
        """Count one batch: layer -> the tokens it took (N, n), and layer -> its weight (m, n).

        With `whole`, input Grams only, also where the outputs are the smaller matrices. The totals
        stay on the device of the tokens and are added to in place.
        """
        groups: dict[int, list[str]] = {}
        for layer, rows in taken.items():
            groups.setdefault(id(rows), []).append(layer)
        for layers in groups.values():
            rows = taken[layers[0]]
            size_of_outputs = sum(weights[layer].shape[0] ** 2 for layer in layers)
            if whole or rows.shape[-1] ** 2 <= size_of_outputs:
                self.sites |= dict.fromkeys(layers, layers[0])
                self.inputs[layers[0]] = gram(rows, total=self.inputs.get(layers[0]))
            else:
                for layer in layers:
                    for some in rows.split(PIECE):  # type: ignore[no-untyped-call]
                        given = product(some, weights[layer].T)
                        self.outputs[layer] = gram(given, total=self.outputs.get(layer))
        self.tokens += max((len(rows) for rows in taken.values()), default=0)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {f"input.{site}": total for site, total in self.inputs.items()}
        tensors |= {f"output.{layer}": total for layer, total in self.outputs.items()}
        facts = {"sites": json.dumps(self.sites), "tokens": str(self.tokens)}
        write_shard(path, tensors, facts)

    @staticmethod
    def load(path: Path) -> Statistics:
        """Read what `save` wrote."""
        with safe_open(whole(path), framework="pt") as file:
            facts = file.metadata()
            found = Statistics(json.loads(facts["sites"]), tokens=int(facts["tokens"]))
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                kind, _, layer = name.partition(".")
                home = found.inputs if kind == "input" else found.outputs
                home[layer] = file.get_tensor(name)
        return found


class InputRecorder:
    """Context that keeps what the named linears take, batch by batch, padding left out.

    `rows(mask)` gives it once per batch: layer -> (N, n). Layers that took the same tensor get the
    same rows.
    """

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self._layers = layers
        self._seen: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> InputRecorder:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - torch's hook type
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen[name] = args[0]

        return hook

    def rows(self, mask: Tensor | None) -> dict[str, Tensor]:
        """What each layer took of the batch that has just run; forgotten afterwards."""
        seen, self._seen = self._seen, {}
        flat: dict[int, Tensor] = {}
        for tensor in seen.values():
            if id(tensor) not in flat:
                flat[id(tensor)] = _valid(tensor, mask)
        return {name: flat[id(tensor)] for name, tensor in seen.items()}


def _valid(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, length, n) -> (N, n), without the padding where the mask is this tensor's."""
    if mask is not None and tensor.shape[:-1] == mask.shape:
        return tensor[mask]
    return tensor.reshape(-1, tensor.shape[-1])
