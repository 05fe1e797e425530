"""Linear layers whose weight is the product of two low-rank factors."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from emloc.precision import Packed, multiply, register_parts, registered_parts


class Factorized(nn.Linear):
    """A frozen factorised layer `y = u (v x) + bias` with u (out, k) and v (k, in).

    It is a subclass of `nn.Linear`, so PEFT adapts it like any linear layer.
    """

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate the full weight
        self.out_features, self.in_features = u.shape[0], v.shape[1]
        self.u = nn.Parameter(u, requires_grad=False)
        self.v = nn.Parameter(v, requires_grad=False)
        _register_bias(self, bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return v, since PEFT reads the device and dtype of a linear layer's weight.

        The product u v is never computed here. If somebody merges an adapter (out, in) into this
        weight, the shapes mismatch and raise an error; a merge into a temporary product would be
        lost silently.
        """
        return self.v

    @property
    def rank(self) -> int:
        """The rank k: number of columns of u and of rows of v."""
        return self.v.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """Map x (..., in) to y (..., out)."""
        return functional.linear(functional.linear(input, self.v), self.u, self.bias)

    def product(self) -> Tensor:
        """The weight u v (out, in) that the factors approximate, in float64."""
        return self.u.double() @ self.v.double()

    def extra_repr(self) -> str:
        """The layer's sizes, as `nn.Linear` prints them, and its rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PackedFactorized(nn.Linear):
    """A frozen layer `y = u (v x) + bias` with packed factors v (k, in) and u^T (k, out).

    u is stored transposed for two reasons. Both factors can then be stacked on the rows of a LoRA.
    And in formats with one scale per group of neighbouring numbers, a group belongs to one
    direction, whose numbers have similar sizes. Each forward and backward pass dequantises a
    factor, multiplies by it and drops it.
    """

    weight: Tensor

    def __init__(self, v: Packed, ut: Packed, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = v.shape[1], ut.shape[1], v.shape[0]
        self.precision = v.precision
        # PEFT reads the weight's device and dtype; the tensor is empty, see `Factorized.weight`.
        like = next(iter(v.parts.values()))
        self.register_buffer("weight", like.new_empty((*v.shape, 0), dtype=v.dtype), False)
        register_parts(self, "v", v)
        register_parts(self, "ut", ut)
        _register_bias(self, bias)

    @property
    def v(self) -> Packed:
        """The packed factor v (k, in)."""
        return self._matrix("v", self.in_features)

    @property
    def ut(self) -> Packed:
        """The packed factor u^T (k, out)."""
        return self._matrix("ut", self.out_features)

    def _matrix(self, name: str, columns: int) -> Packed:
        """The packed factor `name` (k, columns), as a view of the layer's buffers."""
        shape = (self.rank, columns)
        parts = registered_parts(self, name, self.precision.layout(*shape))
        return Packed(self.precision, parts, shape, self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map x (..., in) to y (..., out), in the dtype of the factors."""
        y = multiply(multiply(input, self.v), self.ut, transposed=True)
        return y if self.bias is None else y + self.bias

    def product(self) -> Tensor:
        """The weight u v (out, in) that the factors approximate, in float64."""
        return self.ut.dequantize().double().T @ self.v.dequantize().double()

    def extra_repr(self) -> str:
        """The layer's sizes, as `nn.Linear` prints them, and its rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _register_bias(layer: nn.Module, bias: Tensor | None) -> None:
    """Register the bias: a parameter is shared, a plain tensor becomes a new frozen parameter."""
    if bias is not None and not isinstance(bias, nn.Parameter):
        bias = nn.Parameter(bias, requires_grad=False)
    layer.register_parameter("bias", bias)
