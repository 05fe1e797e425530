"""In which format numbers are held: a file for each packed format, and layers that hold one.

A format says how a matrix becomes a few tensors and back (`Precision`). All else, such as its size,
its file, its place on a device and the products with it, follows from that.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from emloc.config.part import Part
from emloc.config.settings import MODEL_BITS
from emloc.errors import ConfigError
from emloc.runtime.keys import without_neutral

# Part -> shape and dtype of a tensor, which has at least one dimension.
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix (rows, columns) in a packed format. The tensors are never written to."""

    precision: Precision
    parts: Mapping[str, Tensor]  # as the layout of the format says
    shape: tuple[int, int]
    dtype: torch.dtype  # of the matrix: what it was quantised from, and is multiplied in

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """The matrix (rows, columns), in `out` if given: contiguous, of this shape and dtype.

        Raises:
            ValueError: `out` is none of these.
        """
        if out is not None and not (
            out.shape == self.shape and out.dtype == self.dtype and out.is_contiguous()
        ):
            raise ValueError(
                f"need {self.shape} {self.dtype} contiguous, got {tuple(out.shape)} {out.dtype}"
            )
        matrix = self.precision.unpack(self, out)
        return matrix if out is None or matrix is out else out.copy_(matrix)

    @cached_property
    def prepared(self) -> Any:
        """What `Precision.prepare` made of it, once for all the times the matrix is formed."""
        return self.precision.prepare(self)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What a safetensors file has to hold, by name; shape and dtype as a tensor of no bytes."""
        like = torch.empty((*self.shape, 0), dtype=self.dtype)
        return {f"{prefix}.{name}": tensor for name, tensor in {**self.parts, "like": like}.items()}

    def to(self, device: torch.device) -> Packed:
        """The same on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.parts.items()}
        return dataclasses.replace(self, parts=moved)

    @property
    def nbytes(self) -> int:
        """Bytes of all it holds."""
        return sum(tensor.nbytes for tensor in self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Precision(Part):
    """One packed format. A new one says `layout`, `pack` and `unpack`.

    Its other fields are settings of the format, and keys of its YAML.
    """

    name: str  # of the choice, as its YAML file is called
    bits: int  # of one number, without what a group of numbers shares

    # Operations it takes to form a matrix, which an estimate of a step's time counts.
    forming: ClassVar[int] = 10
    # What other libraries ask a model for that has such layers.
    attributes: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __post_init__(self) -> None:
        if not 0 < self.bits < MODEL_BITS:
            raise ConfigError(
                f"precision.bits must be at least 1 and below {MODEL_BITS}, got {self.bits}; "
                f"set precision=null compression.bits={MODEL_BITS}"
            )

    @abstractmethod
    def layout(self, rows: int, columns: int) -> Layout:
        """The tensors that hold a matrix (rows, columns), whatever its dtype."""

    @abstractmethod
    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors of a matrix in float32 or 16 bits, on its device."""

    @abstractmethod
    def unpack(self, packed: Packed, out: Tensor | None) -> Tensor:
        """The matrix, of `packed.shape` and `packed.dtype`.

        `out` is room for it, which may be filled and returned, or ignored.
        """

    def prepare(self, packed: Packed) -> Any:
        """What `unpack` finds as `packed.prepared`, if that takes long to make."""
        return None

    def linear(self, matrix: Packed, bias: Tensor | None = None) -> nn.Module:
        """A frozen `PackedLayer` with `matrix` as its weight (out, in)."""
        return PackedLinear(matrix, bias)

    def unreadable(self, rows: int, columns: int, device: torch.device) -> str | None:
        """Why an adapter that reads a layer's weight (rows, columns) cannot read it on `device`.

        None where it can. By itself no library reads a format that is not its own.
        """
        return f"no library reads a weight in {self.name}"

    def announce(self, model: nn.Module) -> None:
        """Tell other libraries that `model` has layers of this format."""
        for name, value in self.attributes.items():
            setattr(model, name, value)

    def quantize(self, matrix: Tensor) -> Packed:
        """A matrix in float32 or 16 bits in this format, on its device.

        Raises:
            ValueError: it is no matrix, or the format contradicts its own layout.
        """
        if matrix.dim() != 2:
            raise ValueError(f"need a matrix, got a tensor of shape {tuple(matrix.shape)}")
        rows, columns = matrix.shape
        return self._checked(self.pack(matrix.detach()), (rows, columns), matrix.dtype)

    def from_tensors(self, prefix: str, mapping: Mapping[str, Tensor]) -> Packed:
        """What `Packed.tensors` took apart.

        Raises:
            KeyError: a part is missing.
            ValueError: a part is not as this format's are.
        """
        like = mapping[f"{prefix}.like"]
        rows, columns = like.shape[:2]
        parts = {name: mapping[f"{prefix}.{name}"] for name in self.layout(rows, columns)}
        return self._checked(parts, (rows, columns), like.dtype)

    def nowhere(self, rows: int, columns: int, dtype: torch.dtype) -> Packed:
        """A matrix of that shape on the meta device, without numbers."""
        parts = {
            name: torch.empty(shape, dtype=kind, device="meta")
            for name, (shape, kind) in self.layout(rows, columns).items()
        }
        return Packed(self, parts, (rows, columns), dtype)

    def nbytes(self, rows: int, columns: int) -> int:
        """`Packed.nbytes` of a matrix, without having one."""
        layout = self.layout(rows, columns).values()
        return sum(prod(shape) * kind.itemsize for shape, kind in layout)

    @property
    def key(self) -> dict[str, Any]:
        """Name, bits and settings: what a stage that packs matrices depends on."""
        return without_neutral(dataclasses.asdict(self), type(self))

    def _checked(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Packed:
        expected = dict(self.layout(*shape))
        got = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parts.items()}
        if got != expected:
            raise ValueError(
                f"precision={self.name}: a matrix {shape} is held as {got}, and its layout says "
                f"{expected}"
            )
        return Packed(self, parts, shape, dtype)


def bits_of(precision: Precision | None) -> int:
    """Bits of a number; `MODEL_BITS` for the model's own dtype, which is no packed format."""
    return MODEL_BITS if precision is None else precision.bits


def require_format(precision: Precision | None) -> Precision:
    """The format of what is known to be packed.

    Raises:
        ValueError: there is none, and the model's dtype would not be what was trained through.
    """
    if precision is None:
        raise ValueError("the emulator was built in a packed format, and is opened without one")
    return precision


class _Multiply(torch.autograd.Function):
    """x (..., n) by a frozen matrix that is formed for the moment, forwards and backwards.

    The map is linear, so that nothing at all is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Packed, turned: bool) -> Tensor:
        """`x M^T`, as a linear layer multiplies; `turned`, with M held as its transpose: `x M`."""
        ctx.matrix, ctx.turned = matrix, turned
        return _product(x, matrix, turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        return _product(grads[0], ctx.matrix, not ctx.turned), None, None


def _product(x: Tensor, matrix: Packed, turned: bool) -> Tensor:
    full = matrix.dequantize()
    return x @ full if turned else functional.linear(x, full)


def multiply(x: Tensor, matrix: Packed, *, turned: bool = False) -> Tensor:
    """`x M^T` (`turned`: `x M`) in the dtype of the matrix, differentiable in x."""
    result: Tensor = _Multiply.apply(x.to(matrix.dtype), matrix, turned)  # type: ignore[no-untyped-call]
    return result


def put_parts(module: nn.Module, name: str, matrix: Packed) -> None:
    """Make the parts of `matrix` buffers of `module`, which move with it and are not saved.

    Floating point as bytes: a model cast to another dtype would round the scales.
    """
    for part, tensor in matrix.parts.items():
        held = tensor.view(torch.uint8) if tensor.is_floating_point() else tensor
        module.register_buffer(f"{name}_{part}", held, persistent=False)


def parts_in(module: nn.Module, name: str, layout: Layout) -> dict[str, Tensor]:
    """What `put_parts` put there: part -> tensor."""
    return {
        part: module.get_buffer(f"{name}_{part}").view(kind)
        if kind.is_floating_point
        else module.get_buffer(f"{name}_{part}")
        for part, (_, kind) in layout.items()
    }


class PackedLayer(ABC):
    """Beside a module: a frozen linear layer `y = x M^T + bias` with M in a packed format."""

    bias: Any  # a tensor (out,), or None

    @property
    @abstractmethod
    def matrix(self) -> Packed:
        """The weight (out, in), in the tensors that the layer holds."""


class PackedLinear(PackedLayer, nn.Linear):
    """A linear layer whose weight (out, in) is packed; an `nn.Linear` to whoever asks.

    The weight is formed when it is multiplied and dropped again, in the backward pass too.
    """

    weight: Tensor

    def __init__(self, matrix: Packed, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate the full weight
        self.out_features, self.in_features = matrix.shape
        self.precision = matrix.precision
        put_parts(self, "weight", matrix)
        # Asked for device and dtype, as PEFT does, and holds nothing: an adapter (out, in) folded
        # into it fails on the shape, where adding it to a weight formed for the occasion would be
        # lost without a word.
        like = next(iter(matrix.parts.values()))
        nothing = like.new_empty((*matrix.shape, 0), dtype=matrix.dtype)
        self.register_buffer("weight", nothing, persistent=False)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def matrix(self) -> Packed:
        """The weight (out, in), in the tensors that the layer holds."""
        shape = (self.out_features, self.in_features)
        parts = parts_in(self, "weight", self.precision.layout(*shape))
        return Packed(self.precision, parts, shape, self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype the weight was quantised from."""
        y = multiply(input, self.matrix)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shapes, as `nn.Linear` prints them, and the format."""
        shapes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shapes}, precision={self.precision.name}"
