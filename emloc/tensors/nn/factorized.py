"""A linear layer as the product of two thin ones."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from emloc.precision import Packed, multiply, parts_in, put_parts


class Factorized(nn.Linear):
    """`y = u (v x) + bias` with u (out, k) and v (k, in).

    It is an `nn.Linear` to whoever asks, so PEFT adapts it as one.
    """

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate the full weight
        self.out_features, self.in_features = u.shape[0], v.shape[1]
        self.u = nn.Parameter(u, requires_grad=False)
        self.v = nn.Parameter(v, requires_grad=False)
        _keep_bias(self, bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """v, for those who ask a linear layer's weight for its device and dtype, as PEFT does.

        The product is never formed. Folding an adapter (out, in) into this fails on the shape,
        where adding it to a product made for the occasion would be lost without a word.
        """
        return self.v

    @property
    def rank(self) -> int:
        """Number of columns of u and rows of v."""
        return self.v.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return functional.linear(functional.linear(input, self.v), self.u, self.bias)

    def product(self) -> Tensor:
        """The weight (out, in) this layer stands for, in float64."""
        return self.u.double() @ self.v.double()

    def extra_repr(self) -> str:
        """Shapes, as `nn.Linear` prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PackedFactorized(nn.Linear):
    """`y = u (v x) + bias` with v (k, in) and u^T (k, out) in one packed format.

    u lies turned, so that both factors are rows to be formed on top of a LoRA's; and so that where
    a format's groups are of numbers in a row, each belongs to one direction, whose scale it shares
    with few others. Either factor is formed when it is multiplied and dropped again, in the
    backward pass too.
    """

    weight: Tensor

    def __init__(self, v: Packed, ut: Packed, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = v.shape[1], ut.shape[1], v.shape[0]
        self.precision = v.precision
        # Asked for device and dtype, as PEFT does, and holds nothing: see `Factorized.weight`.
        like = next(iter(v.parts.values()))
        self.register_buffer("weight", like.new_empty((*v.shape, 0), dtype=v.dtype), False)
        put_parts(self, "v", v)
        put_parts(self, "ut", ut)
        _keep_bias(self, bias)

    @property
    def v(self) -> Packed:
        """v (k, in)."""
        return self._matrix("v", self.in_features)

    @property
    def ut(self) -> Packed:
        """u^T (k, out)."""
        return self._matrix("ut", self.out_features)

    def _matrix(self, name: str, columns: int) -> Packed:
        shape = (self.rank, columns)
        parts = parts_in(self, name, self.precision.layout(*shape))
        return Packed(self.precision, parts, shape, self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype of the factors."""
        y = multiply(multiply(input, self.v), self.ut, turned=True)
        return y if self.bias is None else y + self.bias

    def product(self) -> Tensor:
        """The weight (out, in) this layer stands for, in float64."""
        return self.ut.dequantize().double().T @ self.v.dequantize().double()

    def extra_repr(self) -> str:
        """Shapes, as `nn.Linear` prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _keep_bias(layer: nn.Module, bias: Tensor | None) -> None:
    """A parameter given is shared; a plain tensor becomes one of this layer's own."""
    if bias is not None and not isinstance(bias, nn.Parameter):
        bias = nn.Parameter(bias, requires_grad=False)
    layer.register_parameter("bias", bias)
