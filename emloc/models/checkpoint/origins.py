"""Origins of parameters in the files of a checkpoint: tensors, rows of tensors, or conversions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from emloc.models.checkpoint.files import StoredTensor
from emloc.models.checkpoint.fused_tensors import TensorSlice


@dataclass(frozen=True)
class Direct:
    """A parameter or buffer that is stored as a tensor, or as some rows of one."""

    tensor: StoredTensor
    part: TensorSlice | None = None  # None: all rows

    @property
    def inputs(self) -> tuple[StoredTensor, ...]:
        """The stored tensor."""
        return (self.tensor,)


@dataclass(frozen=True, eq=False)
class Converted:
    """Parameters that transformers computes from stored tensors, such as the experts of a block."""

    converter: WeightConverter  # transformers' operations
    first: str  # name of the first of the parameters
    patterns: tuple[str, ...]  # for each stored tensor: which of the converter's inputs it is
    inputs: tuple[StoredTensor, ...]
    model: PreTrainedModel  # on the meta device; some operations look up sizes and dtypes

    @property
    def targets(self) -> list[str]:
        """Names of the parameters."""
        patterns = self.converter.target_patterns
        return [self.first.replace(patterns[0], pattern) for pattern in patterns]

    @property
    def main_input(self) -> StoredTensor:
        """The stored tensor that is neither a scale nor another companion of a weight."""
        names = self.converter.target_patterns
        inputs = zip(self.patterns, self.inputs, strict=True)
        return next((tensor for pattern, tensor in inputs if pattern in names), self.inputs[0])

    @property
    def dequantised_name(self) -> str:
        """Name that a checkpoint without quantisation gives to this quantised weight.

        Raises:
            ValueError: several quantised tensors are put together to one parameter.
        """
        if len(self.converter.operations) > 1:
            raise ValueError("it is put together from several quantised tensors")
        pattern = self.patterns[self.inputs.index(self.main_input)]
        return self.main_input.name.removesuffix(pattern) + self.converter.target_patterns[0]

    def compute(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """Parameter name -> value, from the values of `inputs` in the same order.

        Raises:
            ValueError: the operations do not fit the tensors.
        """
        converter = copy.deepcopy(self.converter)
        for stored, pattern, tensor in zip(self.inputs, self.patterns, tensors, strict=True):
            converter.add_tensor(self.first, stored.name, pattern, tensor)
        results = self._run(converter)
        for name in self.targets:
            parameter = self.model.get_parameter_or_buffer(name)
            if results[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)} in the model, but "
                    f"{tuple(results[name].shape)} in the checkpoint"
                )
            if results[name].dtype.itemsize == 1:
                raise ValueError(f"{name} is quantised without a scale")
        return results

    def store(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The single stored tensor that holds all these parameters: `compute`, reversed.

        Raises:
            ValueError: the parameters come from several tensors, or the operations cannot be
                reversed.
        """
        if len(self.inputs) > 1:
            raise ValueError("it is stored in several tensors")
        converter = self.converter.reverse_transform()
        for pattern, name in zip(converter.source_patterns, self.targets, strict=True):
            converter.add_tensor(self.first, name, pattern, parameters[name])
        [tensor] = self._run(converter).values()
        return tensor

    def _run(self, converter: WeightConverter) -> dict[str, Tensor]:
        """Results of a converter that has collected its inputs."""
        with torch.no_grad():
            results: Mapping[str, Any] = converter.convert(
                self.first, model=self.model, config=self.model.config
            )
        return {
            name: (value[0] if isinstance(value, list) else value).detach()
            for name, value in results.items()
        }


Origin = Direct | Converted


def is_quantised(origin: Origin) -> TypeGuard[Converted]:
    """Whether a parameter is stored as quantised numbers and their scales."""
    return (
        isinstance(origin, Converted)
        and any(hasattr(operation, "hf_quantizer") for operation in origin.converter.operations)
        and len(set(origin.patterns)) > 1
    )


# Maps the tensors of a checkpoint to parameters and buffers: name -> origin. Names that the model
# does not have are included.
Layout = Callable[[Sequence[StoredTensor]], dict[str, Origin]]


def layout_by_name(
    parts: Callable[[str], Mapping[str, TensorSlice | None]],
) -> Layout:
    """A layout from a function that maps the name of a stored tensor to parameters and rows."""

    def layout(tensors: Sequence[StoredTensor]) -> dict[str, Origin]:
        """Parameter name -> origin."""
        return {
            name: Direct(tensor, rows)
            for tensor in tensors
            for name, rows in parts(tensor.name).items()
        }

    return layout
