"""A linear layer as the product of two thin ones."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Factorized(nn.Linear):
    """`y = u (v x) + bias` with u (out, k) and v (k, in).

    It is an `nn.Linear` to whoever asks, so PEFT adapts it as one.
    """

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate the full weight
        self.out_features, self.in_features = u.shape[0], v.shape[1]
        self.u = nn.Parameter(u, requires_grad=False)
        self.v = nn.Parameter(v, requires_grad=False)
        # A parameter given is shared; a plain tensor becomes one of this layer's own.
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

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
