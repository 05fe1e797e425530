"""A part that forgets a method is refused where it is made, by the names of what it forgot."""

from dataclasses import dataclass

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
    """Says what it builds, and neither how it is opened nor what it leaves out."""

    width: int = 3

    def plan(self, source, layers, budget):
        return None

    def build(self, folder, source, given, *, device, host_bytes=None):
        return {}


@dataclass(frozen=True, kw_only=True)
class HalfAdapter(Lora):
    """All of it is inherited."""


class BareAdapter(Adapter):
    """Nothing is."""


class BareRecovery(Recovery):
    """Carries nothing."""


@pytest.mark.parametrize(
    ("cls", "missing", "group"),
    [
        (HalfEmulator, "open, residual", "emloc.emulators.Emulator"),
        (BareAdapter, "attach, load, merge, save", "emloc.adapters.Adapter"),
        (BareRecovery, "recover", "emloc.recovery.Recovery"),
    ],
)
def test_a_part_that_forgets_a_method_is_refused_by_its_name(cls, missing, group):
    with pytest.raises(ConfigError) as caught:
        cls()
    assert str(caught.value) == (
        f"{__name__}.{cls.__name__} does not define {missing}, which every {group} has; "
        "define it in that class"
    )


def test_so_is_one_that_a_configuration_names():
    node = OmegaConf.create({"_target_": f"{__name__}.HalfEmulator", "width": 4})
    with pytest.raises(ConfigError, match=r"HalfEmulator does not define open, residual, which"):
        instantiate(node)


@pytest.mark.parametrize("cls", [Full, Lora, Dora, HalfAdapter, NoAdapter, NoRecovery])
def test_a_part_that_defines_all_of_them_is_made(cls):
    assert cls() == cls()


def test_what_trains_nothing_is_asked_for_nothing():
    assert not NoAdapter().trains
    assert not isinstance(NoAdapter(), Adapter)
    assert Lora().trains
