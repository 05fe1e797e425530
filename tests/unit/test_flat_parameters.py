"""An optimizer of flat parameters takes the same steps, and saves the same state."""

import pytest
import torch
from torch import nn

from emloc.tensors.lean.flat_parameters import FlatParameters


def model_and_optimizer(*, flat: bool):
    """A model with two groups of parameters and two dtypes, its optimizer, and what is flat."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4).double(), nn.Linear(4, 2, bias=False))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        {"params": [], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    if not flat:
        return model, optimizer, None
    parameters = FlatParameters([group["params"] for group in optimizer.param_groups])
    parameters.hand_to(optimizer)
    return model, optimizer, parameters


def step(model, optimizer, flat, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    if flat is None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        return
    with flat.attached(model):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad += gradient
        optimizer.step()
        model.zero_grad()
        assert all(not p.grad.any() for p in model.parameters())


def assert_equal_states(actual, expected) -> None:
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert actual["state"][number].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(actual["state"][number][name], value)


def test_steps_and_states_are_those_of_the_parameters():
    (model, optimizer, _), (flat_model, flat_optimizer, flat) = (
        model_and_optimizer(flat=False),
        model_and_optimizer(flat=True),
    )
    # One tensor for each group and dtype.
    assert [len(group["params"]) for group in flat_optimizer.param_groups] == [2, 2, 0]
    assert_equal_states(flat_optimizer.state_dict(), optimizer.state_dict())
    for seed in range(3):
        step(model, optimizer, None, seed)
        step(flat_model, flat_optimizer, flat, seed)
    for actual, expected in zip(flat_model.parameters(), model.parameters(), strict=True):
        assert actual.grad is None
        torch.testing.assert_close(actual, expected)
    assert_equal_states(flat_optimizer.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("saved_flat", [True, False])
@pytest.mark.parametrize("loaded_flat", [True, False])
def test_a_training_goes_on_from_either_state(saved_flat, loaded_flat, tmp_path):
    model, optimizer, flat = model_and_optimizer(flat=saved_flat)
    for seed in range(2):
        step(model, optimizer, flat, seed)
    torch.save((optimizer.state_dict(), model.state_dict()), tmp_path / "state.pt")
    other, other_optimizer, other_flat = model_and_optimizer(flat=loaded_flat)
    state, parameters = torch.load(tmp_path / "state.pt")
    other_optimizer.load_state_dict(state)
    other.load_state_dict(parameters)
    step(model, optimizer, flat, 2)
    step(other, other_optimizer, other_flat, 2)
    for actual, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_state_of_other_parameters_is_refused():
    _, optimizer, _ = model_and_optimizer(flat=True)
    state = torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict()
    with pytest.raises(ValueError):  # noqa: PT011 - the message is Python's
        optimizer.load_state_dict(state)
