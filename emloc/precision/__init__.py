"""Packed formats for weights, such as nf4, and linear layers with a packed weight.

A format defines how a matrix is packed into a few tensors and unpacked again (`Precision`). Its
size, its safetensors entries, moves between devices and matrix products follow from that. Each
format is one file.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from emloc.config.part import Part
from emloc.config.settings import MODEL_BITS
from emloc.config.values import Range
from emloc.runtime.keys import without_neutral

# Name of a part -> shape (at least one dimension) and dtype of the tensor.
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix (rows, columns) in a packed format; its tensors are read-only."""

    precision: Precision
    parts: Mapping[str, Tensor]  # the tensors that `Precision.layout` lists
    shape: tuple[int, int]
    dtype: torch.dtype  # of the matrix before it was quantised and after it is dequantised

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """Return the dequantised matrix (rows, columns), written to `out` if given.

        Raises:
            ValueError: `out` has another shape or dtype, or is not contiguous.
        """
        if out is not None and not (
            out.shape == self.shape and out.dtype == self.dtype and out.is_contiguous()
        ):
            raise ValueError(
                f"out must be {self.shape}, {self.dtype} and contiguous, "
                f"got {tuple(out.shape)}, {out.dtype}"
            )
        matrix = self.precision.unpack(self, out)
        return matrix if out is None or matrix is out else out.copy_(matrix)

    @cached_property
    def prepared(self) -> Any:
        """The result of `Precision.prepare`, computed once and reused by every `dequantize`."""
        return self.precision.prepare(self)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors to save, as name -> tensor; an empty one stores the shape and dtype."""
        like = torch.empty((*self.shape, 0), dtype=self.dtype)
        return {f"{prefix}.{name}": tensor for name, tensor in {**self.parts, "like": like}.items()}

    def to(self, device: torch.device) -> Packed:
        """Return the packed matrix on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.parts.items()}
        return dataclasses.replace(self, parts=moved)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(tensor.nbytes for tensor in self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Precision(Part):
    """One packed format. A new format defines `layout`, `pack` and `unpack`.

    Further fields of a subclass are settings of the format, and keys of its YAML file.
    """

    section: ClassVar[str] = "precision"

    name: str  # of the choice in the config group, which is also the name of its YAML file
    # per number, without scales that a group of numbers shares
    bits: Annotated[int, Range(least=1, below=16, usual=4)]

    # Whether `pack_for` chooses better codes if it knows what the matrix is multiplied by.
    feedback: ClassVar[bool] = False
    # Operations per number to dequantise a matrix; the estimate of a step's time uses it.
    dequantize_operations: ClassVar[int] = 10
    # Attributes that other libraries expect of a model with layers in this format.
    attributes: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def layout(self, rows: int, columns: int) -> Layout:
        """Shapes and dtypes of the parts of a packed matrix (rows, columns), whatever its dtype."""

    @abstractmethod
    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Quantise a matrix in float32 or 16 bits; return its parts, on the matrix's device."""

    def pack_for(
        self, matrix: Tensor, columns: Tensor | None, rows: Tensor | None
    ) -> dict[str, Tensor]:
        """Quantise a matrix for what it is multiplied by; see `quantize` and `pack`."""
        return self.pack(matrix)

    @abstractmethod
    def unpack(self, packed: Packed, out: Tensor | None) -> Tensor:
        """Dequantise a matrix; return it with `packed.shape` and `packed.dtype`.

        `out` is a tensor of this shape and dtype that may be filled and returned, or ignored.
        """

    def prepare(self, packed: Packed) -> Any:
        """Compute what `unpack` needs every time; it is cached as `packed.prepared`."""
        return None

    def linear(self, matrix: Packed, bias: Tensor | None = None) -> nn.Module:
        """A frozen `PackedLayer` with `matrix` as its weight (out, in)."""
        return PackedLinear(matrix, bias)

    def unreadable_reason(self, rows: int, columns: int, device: torch.device) -> str | None:
        """Reason why PEFT cannot read a packed weight (rows, columns) on `device`; None if it can.

        By default it cannot, since PEFT only knows formats of certain libraries.
        """
        return f"no library reads a weight in {self.name}"

    def mark_model(self, model: nn.Module) -> None:
        """Set the attributes by which other libraries recognise a model with this format."""
        for name, value in self.attributes.items():
            setattr(model, name, value)

    def quantize(
        self, matrix: Tensor, *, columns: Tensor | None = None, rows: Tensor | None = None
    ) -> Packed:
        """Quantise a matrix M (m, n) in float32 or 16 bits to this format, on its device.

        Only a format with `feedback` uses the Grams.

        Args:
            matrix: M.
            columns: Gram X^T X (n, n) of what the columns are multiplied by, in X M^T.
            rows: Gram Z^T Z (m, m) of what the rows are multiplied by, in Z M.

        Raises:
            ValueError: the tensor is no matrix, or `pack` contradicts `layout`.
        """
        if matrix.dim() != 2:
            raise ValueError(f"need a matrix, got a tensor of shape {tuple(matrix.shape)}")
        m, n = matrix.shape
        return self._checked(self.pack_for(matrix.detach(), columns, rows), (m, n), matrix.dtype)

    def from_tensors(self, prefix: str, mapping: Mapping[str, Tensor]) -> Packed:
        """Rebuild the matrix that `Packed.tensors` split into named tensors with this prefix.

        Raises:
            KeyError: a part is missing.
            ValueError: a part has another shape or dtype than `layout` says.
        """
        like = mapping[f"{prefix}.like"]
        rows, columns = like.shape[:2]
        parts = {name: mapping[f"{prefix}.{name}"] for name in self.layout(rows, columns)}
        return self._checked(parts, (rows, columns), like.dtype)

    def meta_matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Packed:
        """A packed matrix (rows, columns) on the meta device: shapes and dtypes without data."""
        parts = {
            name: torch.empty(shape, dtype=kind, device="meta")
            for name, (shape, kind) in self.layout(rows, columns).items()
        }
        return Packed(self, parts, (rows, columns), dtype)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a packed matrix (rows, columns)."""
        layout = self.layout(rows, columns).values()
        return sum(prod(shape) * kind.itemsize for shape, kind in layout)

    @property
    def key(self) -> dict[str, Any]:
        """Cache key of the format: its name, bits and settings."""
        return without_neutral(dataclasses.asdict(self), type(self))

    def _checked(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Packed:
        """The packed matrix of these parts; ValueError if they differ from the layout."""
        expected = dict(self.layout(*shape))
        actual = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parts.items()}
        if actual != expected:
            raise ValueError(
                f"precision={self.name}: a matrix {shape} is packed as {actual}, but the layout of "
                f"the format says {expected}"
            )
        return Packed(self, parts, shape, dtype)


def bits_of(precision: Precision | None) -> int:
    """Bits per number of a packed format; `MODEL_BITS` if it is None, for the model's own dtype."""
    return MODEL_BITS if precision is None else precision.bits


def has_feedback(precision: Precision | None) -> bool:
    """Whether weights are packed in a format that chooses codes by error feedback."""
    return precision is not None and precision.feedback


def require_format(precision: Precision | None) -> Precision:
    """Return the packed format of an emulator that has packed weights.

    Raises:
        ValueError: `precision` is None; the model's dtype would give another emulator.
    """
    if precision is None:
        raise ValueError("the emulator was built in a packed format, but precision is None")
    return precision


class _Multiply(torch.autograd.Function):
    """Multiplies x (..., n) by a frozen packed matrix M, dequantised once in each direction.

    The product is linear in x, so nothing is saved for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Packed, transposed: bool) -> Tensor:
        """Return `x M^T`, as a linear layer computes it, or `x M` if `transposed`."""
        ctx.matrix, ctx.transposed = matrix, transposed
        return _product(x, matrix, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of x; None for the frozen matrix and the flag."""
        return _product(grads[0], ctx.matrix, not ctx.transposed), None, None


def _product(x: Tensor, matrix: Packed, transposed: bool) -> Tensor:
    """`x M^T`, or `x M` if `transposed`, without a gradient."""
    full = matrix.dequantize()
    return x @ full if transposed else functional.linear(x, full)


def multiply(x: Tensor, matrix: Packed, *, transposed: bool = False) -> Tensor:
    """Multiply x by a packed matrix M in M's dtype: `x M^T`, or `x M` if `transposed`.

    The product is differentiable in x; M is frozen.
    """
    result: Tensor = _Multiply.apply(x.to(matrix.dtype), matrix, transposed)  # type: ignore[no-untyped-call]
    return result


def register_parts(module: nn.Module, name: str, matrix: Packed) -> None:
    """Register the parts of a packed matrix as buffers `<name>_<part>` of `module`.

    The buffers move with the module and are not saved. Floating-point parts are registered as
    bytes, since casting the model to another dtype would otherwise round the scales.
    """
    for part, tensor in matrix.parts.items():
        buffer = tensor.view(torch.uint8) if tensor.is_floating_point() else tensor
        module.register_buffer(f"{name}_{part}", buffer, persistent=False)


def registered_parts(module: nn.Module, name: str, layout: Layout) -> dict[str, Tensor]:
    """Part -> tensor of a matrix that `register_parts` registered under `name`."""
    return {
        part: module.get_buffer(f"{name}_{part}").view(kind)
        if kind.is_floating_point
        else module.get_buffer(f"{name}_{part}")
        for part, (_, kind) in layout.items()
    }


class PackedLayer(ABC):
    """A frozen linear layer `y = x M^T + bias` with a packed M; a base class beside `nn.Module`."""

    bias: Any  # a tensor (out,), or None

    @property
    @abstractmethod
    def matrix(self) -> Packed:
        """The packed weight (out, in), as a view of the layer's tensors."""


class PackedLinear(PackedLayer, nn.Linear):
    """A frozen linear layer with a packed weight (out, in), also an instance of `nn.Linear`.

    Each forward and backward pass dequantises the weight, multiplies by it and drops it.
    """

    weight: Tensor

    def __init__(self, matrix: Packed, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate the full weight
        self.out_features, self.in_features = matrix.shape
        self.precision = matrix.precision
        register_parts(self, "weight", matrix)
        # PEFT reads the weight's device and dtype, so the layer has an empty tensor of both. If
        # somebody merges an adapter (out, in) into it, the shapes mismatch and raise an error; a
        # merge into a temporary dequantised weight would be lost silently.
        like = next(iter(matrix.parts.values()))
        empty = like.new_empty((*matrix.shape, 0), dtype=matrix.dtype)
        self.register_buffer("weight", empty, persistent=False)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def matrix(self) -> Packed:
        """The packed weight (out, in), as a view of the layer's buffers."""
        shape = (self.out_features, self.in_features)
        parts = registered_parts(self, "weight", self.precision.layout(*shape))
        return Packed(self.precision, parts, shape, self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map x (..., in) to y (..., out), in the dtype that the weight was quantised from."""
        y = multiply(input, self.matrix)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """The layer's sizes, as `nn.Linear` prints them, and its packed format."""
        shapes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shapes}, precision={self.precision.name}"
