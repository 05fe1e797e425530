"""`compose_cached` of the tests composes as the command does."""

import pytest
from composed import compose_cached
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from emloc.config.compose import compose

WORDS = [
    [],
    ["seed=3", "name=mine", "method=emloc", "compression.ratio=0.3"],
    ["compression.bits=4", "model.shape.hidden_size=32", "model=llama3_8b", "++train.new=1"],
    ["anchor.places=[0,2]", "method=emloc_anchored", "task.prompt='a, {{b}}'", "~budget"],
    ["compression.ratio=0.3", "experiments=ablate_ratio", "cell=ablate_ratio/lora"],
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_it_is_composed_as_by_the_command(words):
    expected = compose(words)
    for _ in range(2):
        config = compose_cached(words)
        assert config == expected
        assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(expected)
        config.lora.rank += 1  # changes no later one


@pytest.mark.parametrize("function", [compose, compose_cached])
def test_a_setting_that_does_not_exist_is_refused(function):
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'lora\.rnk'"):
        function(["lora.rnk=3"])
