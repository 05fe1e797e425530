"""A part with missing methods is refused by their names when it is created."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from emloc.adapters import Adapter
from emloc.adapters.dora import Dora
from emloc.adapters.lora import Lora
from emloc.adapters.none import NoAdapter
from emloc.emulators import Emulator
from emloc.emulators.full import Full
from emloc.errors import ConfigError
from emloc.recovery import Recovery
from emloc.recovery.none import NoRecovery
from emloc.stages.run_config import instantiate


@dataclass(frozen=True, kw_only=True)
class HalfEmulator(Emulator):
    """Defines `plan` and `build`, but not how the emulator is opened and its residual."""

    width: int = 3

    def plan(self, source, layers, budget):
        return None

    def build(self, folder, source, build_inputs, *, device, limits=None):
        return {}


@dataclass(frozen=True, kw_only=True)
class HalfAdapter(Lora):
    """Inherits all methods."""


class BareAdapter(Adapter):
    """Defines no method."""


class BareRecovery(Recovery):
    """Defines no method to recover an adapter."""


@pytest.mark.parametrize(
    ("cls", "missing", "group"),
    [
        (HalfEmulator, "open, residual", "emloc.emulators.Emulator"),
        (BareAdapter, "attach, load, merge, save", "emloc.adapters.Adapter"),
        (BareRecovery, "recover", "emloc.recovery.Recovery"),
    ],
)
def test_a_part_with_missing_methods_is_refused_by_their_names(cls, missing, group):
    with pytest.raises(ConfigError) as caught:
        cls()
    assert str(caught.value) == (
        f"{__name__}.{cls.__name__} does not define {missing}, which every {group} has; "
        "define it in that class"
    )


def test_a_configured_part_with_missing_methods_is_refused(monkeypatch):
    monkeypatch.setenv("EMLOC_PLUGINS", str(Path(__file__).parent))
    node = OmegaConf.create({"_target_": f"{__name__}.HalfEmulator", "width": 4})
    with pytest.raises(ConfigError, match=r"HalfEmulator does not define open, residual, which"):
        instantiate(node)


@pytest.mark.parametrize("cls", [Full, Lora, Dora, HalfAdapter, NoAdapter, NoRecovery])
def test_a_part_with_all_methods_is_created(cls):
    assert cls() == cls()


def test_an_adapter_that_trains_nothing_needs_no_methods():
    assert not NoAdapter().trains
    assert not isinstance(NoAdapter(), Adapter)
    assert Lora().trains
