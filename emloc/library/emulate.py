"""Build an emulator of a model in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

from torch import Tensor, nn

from emloc.calibration.blockwise import Batch, Block, by_block, iterate_blocks
from emloc.calibration.calibrate import UnreachedLayerError, record_moments
from emloc.calibration.moments import Statistics
from emloc.emulators import Ranks
from emloc.emulators.size import Groups, joint_layers, ranks_at
from emloc.emulators.svd.factors import factorize, refine
from emloc.errors import ConfigError
from emloc.library.arguments import batches_of, original_model, target_linears
from emloc.library.identity import Stamp, factor_digests, put_stamp, weight_digests
from emloc.library.training_check import guard
from emloc.models.shared_inputs import names_by_input
from emloc.tensors.linalg.factorize import Factors
from emloc.tensors.nn.factorized import Factorized
from emloc.tensors.nn.surgery import alias_of, with_modules

Model = TypeVar("Model", bound=nn.Module)


def build_emulator(
    model: Model,
    batches: Iterable[Batch],
    ratio: float,
    *,
    targets: str | None = None,
    multiple: int = 1,
    share: bool = True,
    shared: str = "none",
) -> Model:
    """Build an emulator of `model`, a smaller model to train a LoRA on (EMLoC paper, stage 1).

    The emulator checks the adapter that it is trained with: settings of PEFT that `correct` cannot
    recover are refused at the first training step, if not by `get_peft_model` itself.

    Args:
        model: any transformer whose blocks consist of `nn.Linear` layers; it is not changed. A
            model in DistributedDataParallel or torch.compile is taken out of the wrapper.
        batches: a few dozen samples of the task, as keyword arguments of `model.forward`. Padding
            is ignored in batches with an `attention_mask` (rows, tokens). A generator is read into
            a list.
        ratio: share of the compressed layers' parameters to keep, in (0, 1).
        targets: regular expression that has to match the full name of a layer; default: every
            linear layer in a numbered block.
        multiple: ranks are rounded down to a multiple of this number.
        share: whether uncompressed parameters use the memory of those of `model`. They are frozen,
            and to cast or move the emulator does not change `model`; only what is written into
            them in place, as by `load_state_dict`, reaches it. False: copy them.
        shared: `inputs`: query, key and value of a module have one factor v, and so do gate and up.
            For the same ratio the emulator is better. Its tensors share memory, so save it with
            `safetensors.torch.save_model`. `none`: each layer has its own.

    Returns:
        A model of the same class, in the same mode (`training`) as `model`.

    Raises:
        ConfigError: no layer matches, a batch is empty, the ratio leaves a layer without rank,
            `shared` is another word, layers of one factor read different inputs, or `model` is an
            emulator, has an adapter, or is quantised, sharded or not loaded.
    """
    original = original_model(model)
    layers = target_linears(original, targets)
    batch_list = batches_of(batches, original)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    ranks = ranks_at(ratio, shapes, multiple, _groups(shapes, shared))
    factors = _factors(original, batch_list, layers, ranks, shared)
    # One parameter for each v, however many layers have it.
    vs = {id(one.v): nn.Parameter(one.v, requires_grad=False) for one in factors.values()}
    modules = {
        name: factorized_layer(one.u, vs[id(one.v)], layers[name], share=share)
        for name, one in factors.items()
    }
    stamp = Stamp(
        base=str(vars(original).get("name_or_path") or ""),
        ratio=ratio,
        weights=weight_digests(original),
        factors=factor_digests(modules),
    )
    emulator = emulator_of(original, modules, stamp, share=share)
    assert isinstance(emulator, type(original))
    return cast(Model, emulator)


def _groups(layers: Iterable[str], shared: str) -> Groups:
    """Names of the layers that get one v.

    Raises:
        ConfigError: `shared` is another word.
    """
    if shared == "inputs":
        return names_by_input(layers)
    if shared == "none":
        return [[layer] for layer in layers]
    raise ConfigError(f'shared={shared!r}: pass shared="inputs" or shared="none"')


def _factors(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Linear],
    ranks: Ranks,
    shared: str,
) -> dict[str, Factors]:
    """Layer name -> its factors, from two blockwise forwards over the batches."""
    blocks, joint = by_block(layers), joint_layers(_groups(layers, shared))
    with eval_mode(model):
        statistics = {
            block.name: _record(block, blocks[block.name], joint)
            for block in blocks_of(model, batches, blocks)
        }
        factors: dict[str, Factors] = {}
        for block in blocks_of(model, batches, blocks):
            names, block_statistics = blocks[block.name], statistics.pop(block.name)
            weights = {name: layers[name].weight for name in names}
            factorized = factorize(
                *(weights, ranks, block_statistics, "subspace"), groups=_groups(names, shared)
            )
            names_to_refine = [name for name in names if name in block_statistics.outputs]
            factorized = refine(block, factorized, names_to_refine)
            factors |= {name: factorized[name].factors for name in names}
    return factors


def _record(block: Block, layers: Sequence[str], joint: Collection[str]) -> Statistics:
    """The second moments of a block's layers.

    Raises:
        ConfigError: no batch reaches one of the layers.
    """
    try:
        return record_moments(block, layers, inputs_only=False, joint=joint)
    except UnreachedLayerError as error:
        raise ConfigError(
            f"no batch reaches {error.layer}; pass batches that do (with images, for a vision "
            "tower), or set targets to a regular expression without this layer"
        ) from error


def blocks_of(model: nn.Module, batches: Sequence[Batch], blocks: Iterable[str]) -> Iterator[Block]:
    """Run a blockwise forward over the batches, on the device of the model."""
    return iterate_blocks(model, batches, list(blocks), next(model.parameters()).device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def emulator_of(
    model: nn.Module, layers: Mapping[str, Factorized], stamp: Stamp, *, share: bool
) -> nn.Module:
    """Return a copy of `model` with factorised layers, the stamp and the emulator's guards."""
    emulator = with_modules(model, layers, share=share)
    put_stamp(emulator, stamp)
    guard(emulator)
    return emulator


def factorized_layer(u: Tensor, v: Tensor, linear: nn.Linear, *, share: bool) -> Factorized:
    """Return the layer with these factors and the bias of `linear`, whose memory it may use."""
    bias = None if linear.bias is None else alias_of(linear.bias if share else linear.bias.clone())
    layer = Factorized(u, v, bias)
    layer.training = linear.training
    return layer
