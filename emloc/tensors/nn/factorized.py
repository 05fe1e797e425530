"""Linear layers whose weight is the product of two low-rank factors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from emloc.errors import ConfigError
from emloc.precision import Packed, multiply, register_parts, registered_parts


class Factorized(nn.Linear):
    """A frozen factorised layer `y = u (v x) + bias` with u (out, k) and v (k, in).

    It is a subclass of `nn.Linear`, so PEFT adapts it like any linear layer. Several layers that
    read the same input may have one v, a parameter of all of them.
    """

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate the full weight
        self.out_features, self.in_features = u.shape[0], v.shape[1]
        self.u = nn.Parameter(u, requires_grad=False)
        self.v = v if isinstance(v, nn.Parameter) else nn.Parameter(v, requires_grad=False)
        _register_bias(self, bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return a stand-in with v's device and dtype, which PEFT reads from a linear layer.

        The product u v is never computed here, and the stand-in refuses to be computed with: what
        is merged into a temporary product, or started from its singular vectors, would be lost.
        """
        return _FactorizedWeight(self.v, requires_grad=False)

    @property
    def v_id(self) -> Hashable:
        """What layers have in common if they have one v: the parameter."""
        return id(self.v)

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
    def v_id(self) -> Hashable:
        """What layers have in common if they have one v: the place of its numbers."""
        part = next(iter(self.precision.layout(self.rank, self.in_features)))
        buffer = self.get_buffer(f"v_{part}")
        return buffer.untyped_storage()._cdata, buffer.storage_offset()

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


# Attributes and methods that describe a weight without reading its numbers.
_DESCRIPTIONS = frozenset(
    {
        *("device", "dtype", "shape", "layout", "ndim", "requires_grad", "is_leaf", "is_meta"),
        *("is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_mkldnn", "grad_fn", "names"),
        *("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "get_device"),
    }
)


class _FactorizedWeight(nn.Parameter):
    """Stand-in for the weight of a factorised layer: it has a device and a dtype, no numbers."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what describes the weight, and refuse everything that computes with it.

        Raises:
            ConfigError: the numbers of the weight are read or written.
        """
        # The getter of an attribute is a method `__get__` of the attribute's descriptor.
        attribute = getattr(getattr(func, "__self__", None), "__name__", None)
        if (attribute if func.__name__ == "__get__" else func.__name__) in _DESCRIPTIONS:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise ConfigError(
            "a layer of the emulator is factorised and has no weight to compute with: train a "
            "plain LoRA (no use_dora; init_lora_weights=True), and merge it into the original model"
        )
