"""Graphs of a step, with a recorder that repeats a step by calling it."""

import pytest
import torch
from torch import nn

from emloc.data.fixed_shapes import FixedShapes
from emloc.stages.training.capture import Capture
from emloc.stages.training.finite import FiniteLosses
from emloc.stages.training.graph_inputs import Trained
from emloc.stages.training.graphed_passes import GraphedPasses
from emloc.tensors.lean.flat_parameters import FlatParameters
from emloc.tensors.lean.step_graphs import StepGraphs


class Recorder:
    """Repeats steps, and counts how often each is repeated."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, step):
        step()
        index = len(self.replays)
        self.replays.append(0)

        def replay() -> None:
            self.replays[index] += 1
            step()

        return replay


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3, dtype=torch.float64)


def passes_of(model, recorder):
    def loss(batch, count):
        return model(batch["x"]).square().sum() / count

    trained = Trained(model, model, torch.device("cpu"), None, loss)
    capture = Capture(FixedShapes((), (), 0.0, masked=True), None, False, None, recorder)
    return GraphedPasses(trained, capture, FlatParameters([model.parameters()]))


def run(passes, batch: dict):
    return passes.run({"x": batch["x"]}, batch["count"])


def inputs(rows: int) -> dict:
    return {"x": torch.randn(rows, 4, dtype=torch.float64), "count": torch.tensor(rows)}


def test_losses_and_gradients_are_those_of_the_step(model):
    recorder = Recorder()
    passes = passes_of(model, recorder)
    with passes.flat.attached(model):
        passes.prepare(lambda: [{"x": inputs(5)["x"]}, {"x": inputs(2)["x"]}])
        assert all(not gradient.any() for gradient in passes.flat.gradients)
        expected, batches = [], [inputs(2), inputs(5), inputs(3), inputs(2)]
        losses = [run(passes, batch) for batch in batches]
        actual = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        assert all(not parameter.grad.any() for parameter in model.parameters())
    for batch in batches:
        loss = model(batch["x"]).square().sum() / batch["count"]
        loss.backward()
        expected.append(loss)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    for parameter, gradient in zip(model.parameters(), actual, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    assert recorder.replays == [1, 2]  # no graph was prepared for a batch of three rows


def test_shapes_beyond_the_most_have_no_graph():
    recorder = Recorder()
    graphs = StepGraphs(lambda given: given["x"].sum(), recorder, 2)
    for size in (3, 2, 1, 2):
        graphs.prepare({"x": torch.ones(size)})
    assert len(graphs) == 2
    assert [graphs.run({"x": torch.ones(size)}).item() for size in (1, 2, 3)] == [1, 2, 3]
    assert recorder.replays == [1, 1]


def test_inputs_of_all_shapes_share_one_buffer():
    given = []
    graphs = StepGraphs(lambda given_now: given.append(given_now) or torch.ones(()), Recorder(), 8)
    for size in (6, 4):
        graphs.prepare({"x": torch.ones(size, 2)})
    assert given[0]["x"].data_ptr() == given[1]["x"].data_ptr()


def test_a_step_that_cannot_be_recorded_runs_without_a_graph(model, caplog):
    def refuse(step):
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    passes = passes_of(model, refuse)
    batch = inputs(3)
    with passes.flat.attached(model):
        passes.prepare(lambda: [{"x": batch["x"]}])
        assert not model.weight.grad.any()  # that of the trial is gone
        loss = run(passes, batch)
        assert model.weight.grad.any()
    torch.testing.assert_close(loss, (model(batch["x"]).square().sum() / 3).detach())
    assert "(train.capture): operation not permitted when stream is capturing" in caplog.text


def test_dropped_gradients_are_zero_again(model):
    passes = passes_of(model, Recorder())
    with passes.flat.attached(model):
        run(passes, inputs(3))
        nn.Module.zero_grad(model)  # as a wrapper of the model calls it
        assert model.weight.grad is None
        batch = inputs(3)
        run(passes, batch)
        gradient = model.weight.grad.clone()
    assert model.weight.grad is None
    (model(batch["x"]).square().sum() / 3).backward()
    torch.testing.assert_close(gradient, model.weight.grad)


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_flat_gradients_are_clipped_as_torch_does(model, limit):
    passes = passes_of(model, Recorder())
    batch = inputs(4)
    with passes.flat.attached(model):
        run(passes, batch)
        norm = passes.flat.clip(limit)
        clipped = [parameter.grad.clone() for parameter in model.parameters()]
    (model(batch["x"]).square().sum() / 4).backward()
    expected = nn.utils.clip_grad_norm_(model.parameters(), limit)
    assert norm.item() == pytest.approx(expected.item())
    for gradient, parameter in zip(clipped, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_gradients_are_averaged_over_processes(model, monkeypatch):
    """Here the other process has twice the gradients of this one."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(3))
    passes = passes_of(model, Recorder())
    with passes.flat.attached(model):
        run(passes, inputs(3))
        own = model.weight.grad.clone()
        passes.flat.average(2)
        torch.testing.assert_close(model.weight.grad, 1.5 * own)


def test_a_loss_that_is_not_finite_names_its_step():
    losses = FiniteLosses()
    losses.add(1, torch.ones(2))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 2; set train.learning"):
        losses.add(2, torch.tensor([1.0, float("nan")]))
    losses.check()  # it was said once
