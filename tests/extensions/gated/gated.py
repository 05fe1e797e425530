"""A plug-in: a mixture of LoRA experts that a router weighs for each token.

An auxiliary loss makes the router use all experts equally. The plug-in is one module and one YAML
file outside the package, as a user would write them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.adapters import Adapter
from emloc.adapters.auxiliary import AuxiliaryLosses
from emloc.config.settings import LoraSettings
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Experts(nn.Module):
    """A linear layer with LoRA experts: `W x + scale sum_e p_e(x) B_e A_e x`.

    The weights of the experts are p = softmax(router x). The matrices of the experts are stacked:
    a (e r, n), b (m, e r).
    """

    def __init__(
        self, base: nn.Module, experts: int, rank: int, scale: float, losses: AuxiliaryLosses
    ) -> None:
        super().__init__()
        rows, columns = base.out_features, base.in_features
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.base, self.experts, self.rank, self.scale = base, experts, rank, scale
        self.losses = losses
        self.router = nn.Parameter(torch.empty(experts, columns, device=device))
        self.a = nn.Parameter(torch.empty(experts * rank, columns, device=device))
        self.b = nn.Parameter(torch.zeros(rows, experts * rank, device=device))
        nn.init.normal_(self.router, std=0.02)
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (..., n) to outputs (..., m) and add the auxiliary loss."""
        inputs = x.to(self.a.dtype)
        shares = (inputs @ self.router.T).softmax(-1)
        mean = shares.flatten(0, -2).mean(0)
        self.losses.add(self.experts * mean.square().sum())  # 1 if all experts are used equally
        hidden = (inputs @ self.a.T).unflatten(-1, (self.experts, self.rank)) * shares[..., None]
        return self.base(x) + (self.scale * hidden.flatten(-2) @ self.b.T).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Gated(Adapter):
    """An adapter with a fixed number of experts on each adapted linear layer."""

    nonlinear = "weighs its experts by the input"

    experts: int
    balance: float  # weight of the loss that grows if the router prefers some experts

    def __post_init__(self) -> None:
        if self.balance < 0:
            raise ConfigError(
                f"adapter.balance must be at least 0, got {self.balance:g}; set adapter.balance=0.1"
            )

    def attach(
        self,
        model: PreTrainedModel,
        lora: LoraSettings,
        layers: Sequence[str],
        modules_to_save: Sequence[str] = (),
    ) -> PreTrainedModel:
        """Wrap the layers of the model in place and return the model."""
        if modules_to_save:
            raise ConfigError(f"adapter=gated trains no {modules_to_save[0]}; set adapter=lora")
        model.requires_grad_(False)
        # A plain object, no module, so that the state of the model does not contain the losses.
        model.auxiliary_losses = AuxiliaryLosses(model)
        model.gated = {"rank": lora.rank, "scale": lora.alpha / lora.rank, "layers": list(layers)}
        size = self.experts, lora.rank, lora.alpha / lora.rank
        for layer in layers:
            base = model.get_submodule(layer)
            model.set_submodule(layer, Experts(base, *size, model.auxiliary_losses))
        return model

    def load(
        self, model: PreTrainedModel, folder: Path, *, trainable: bool = False
    ) -> PreTrainedModel:
        """Wrap the layers that the folder names and load their trained tensors."""
        config = json.loads((folder / CONFIG).read_text())
        size = LoraSettings(config["rank"], config["scale"] * config["rank"], 0.0)
        self.attach(model, size, config["layers"])
        self.restore(model, load_file(folder / WEIGHTS))
        return model if trainable else model.requires_grad_(False)

    def save(self, model: PreTrainedModel, folder: Path, base: str) -> None:
        """Write the trained tensors and the names of their layers."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: one.cpu().contiguous() for name, one in self.state(model).items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"base": base, **model.gated}, indent=1))

    def merge(
        self, source: Source, folder: Path, target: Path, dtype: torch.dtype | None = None
    ) -> Path:
        """Refuse to merge: the merged weights would depend on the input.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"adapter=gated {self.nonlinear} and cannot be merged; load the adapter in {folder}"
        )

    def auxiliary_loss(self, model: Any) -> Tensor | None:
        """The weighted imbalance of the experts, averaged over layers; None before any forward."""
        loss = model.auxiliary_losses.take()
        return None if loss is None else self.balance * loss
