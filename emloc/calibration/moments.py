"""Second moments of one block: Gram matrices of the inputs or outputs of its linear layers.

Shapes: N tokens, a layer with m outputs and n inputs. Input Gram X^T X (n, n), output Gram
(X W^T)^T (X W^T) (m, m), both summed in float64. Layers with the same input tensor (query, key and
value; gate and up) share one input Gram. Their common input is called a *site* and is named after
the first of these layers.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emloc.calibration.padding import TokenMask
from emloc.runtime.manifest import verified_file
from emloc.runtime.safetensors_file import write_safetensors
from emloc.tensors.linalg.gram import gram, product

# Tokens whose outputs are computed at once. In float64, the inputs and outputs of a whole batch
# would need several times the memory of the block.
PIECE = 4096


@dataclass
class Statistics:
    """Second moments of the linear layers of one block, summed over calibration tokens."""

    sites: dict[str, str] = field(default_factory=dict)  # layer -> site of its input
    inputs: dict[str, Tensor] = field(default_factory=dict)  # site -> input Gram
    outputs: dict[str, Tensor] = field(default_factory=dict)  # layer -> output Gram
    tokens: int = 0  # tokens summed over

    def of(self, layer: str) -> dict[str, Tensor]:
        """The layer's `input_gram` or `output_gram`, named as an argument of `linalg.factorize`."""
        if layer in self.outputs:
            return {"output_gram": self.outputs[layer]}
        return {"input_gram": self.inputs[self.sites[layer]]}

    def add(
        self,
        inputs: dict[str, Tensor],
        weights: dict[str, Tensor],
        inputs_only: bool,
        joint: Collection[str] = (),
    ) -> None:
        """Add the tokens of one batch to the sums, in place on the device of the tokens.

        Args:
            inputs: layer -> its input tokens (N, n); one tensor object for all layers of a site.
            weights: layer -> its weight (m, n).
            inputs_only: sum input Grams for all layers, even where the output Grams are smaller.
            joint: layers that need an input Gram in any case.
        """
        groups: dict[int, list[str]] = {}
        for layer, rows in inputs.items():
            groups.setdefault(id(rows), []).append(layer)
        for layers in groups.values():
            rows = inputs[layers[0]]
            output_elements = sum(weights[layer].shape[0] ** 2 for layer in layers)
            needs_inputs = inputs_only or not set(layers).isdisjoint(joint)
            if needs_inputs or rows.shape[-1] ** 2 <= output_elements:
                self.sites |= dict.fromkeys(layers, layers[0])
                self.inputs[layers[0]] = gram(rows, total=self.inputs.get(layers[0]))
            else:
                for layer in layers:
                    for piece in rows.split(PIECE):  # type: ignore[no-untyped-call]
                        outputs = product(piece, weights[layer].T)
                        self.outputs[layer] = gram(outputs, total=self.outputs.get(layer))
        self.tokens += max((len(rows) for rows in inputs.values()), default=0)

    def overflowing(self) -> list[str]:
        """Layers with NaN or infinite values, which every such value leaves on the diagonal."""
        grams = self.inputs | self.outputs
        return [name for name, total in grams.items() if not total.diagonal().isfinite().all()]

    def save(self, path: Path) -> None:
        """Write the second moments to a safetensors file."""
        tensors = {f"input.{site}": total for site, total in self.inputs.items()}
        tensors |= {f"output.{layer}": total for layer, total in self.outputs.items()}
        metadata = {"sites": json.dumps(self.sites), "tokens": str(self.tokens)}
        write_safetensors(path, tensors, metadata)

    @staticmethod
    def load(path: Path) -> Statistics:
        """Read the second moments from a file that `save` has written."""
        with safe_open(verified_file(path), framework="pt") as file:
            metadata = file.metadata()
            statistics = Statistics(json.loads(metadata["sites"]), tokens=int(metadata["tokens"]))
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                kind, _, layer = name.partition(".")
                grams = statistics.inputs if kind == "input" else statistics.outputs
                grams[layer] = file.get_tensor(name)
        return statistics


class InputRecorder:
    """Context manager whose forward hooks record the inputs of linear layers, batch by batch.

    Call `rows(mask)` once after each batch to read the inputs. A layer that runs several times in a
    batch has the inputs of all its runs.
    """

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self._layers = layers
        self._inputs: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> InputRecorder:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook_for(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook_for(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - torch's type
        """A forward pre-hook that records the input of the layer `name`."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inputs.setdefault(name, []).append(args[0])

        return hook

    def rows(self, mask: TokenMask | None) -> dict[str, Tensor]:
        """Return layer -> its input tokens (N, n) in the last batch, and clear the recorder.

        `mask` tells which tokens are padding; these are left out. Layers with the same input tensor
        get the same tensor object.

        Raises:
            ConfigError: the padding cannot be found in the inputs of a layer.
        """
        inputs, self._inputs = self._inputs, {}
        rows_by_ids: dict[tuple[int, ...], Tensor] = {}
        rows: dict[str, Tensor] = {}
        for name, tensors in inputs.items():
            ids = tuple(id(tensor) for tensor in tensors)
            if ids not in rows_by_ids:
                pieces = [_real_tokens(name, tensor, mask) for tensor in tensors]
                rows_by_ids[ids] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            rows[name] = rows_by_ids[ids]
        return rows


def _real_tokens(layer: str, inputs: Tensor, mask: TokenMask | None) -> Tensor:
    """Return the input tokens (N, n) of a layer, without padding if there is a mask."""
    if mask is None:
        return inputs.reshape(-1, inputs.shape[-1])
    return mask.rows(layer, inputs)
