"""Compose a configuration."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, OmegaConf

from emloc.config.choices import refuse_bases
from emloc.config.experiments import read_experiment
from emloc.config.folder_words import require_word
from emloc.config.paths import CONF, EXPERIMENTS, conf_folders
from emloc.config.run_folder import folder_name
from emloc.config.settings import schema
from emloc.config.sources import register_sources
from emloc.runtime.folders import runs_folder

# Choice of a group of Hydra -> the extra of this package that installs its plugin.
EXTRAS = {
    "hydra/launcher/joblib": "parallel",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/sweeper/optuna": "search",
}


# Word that nobody knows before this launch. Files that workers return are read by pickle, so they
# lie in a folder of this name, and never in one that came with the folder of a sweep.
_LAUNCH = secrets.token_hex(4)


class PluginGroups(SearchPathPlugin):
    """Search path of Hydra that includes the folders of plug-ins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra when it composes."""
        for folder in conf_folders()[1:]:
            search_path.append("emloc-plugins", f"file://{folder}")


# Placeholder for experiments that the command line does not name. Composing one fails with "name is
# missing".
_UNNAMED = OmegaConf.create({"name": MISSING})
# Marks placeholders in Hydra's store, which takes long to store one again.
_UNNAMED_PROVIDER = "emloc: not named"


def register(words: Sequence[str] = ()) -> None:
    """Register schema, experiments and resolvers in Hydra.

    Args:
        words: the command line. The contents of other experiments than it names are left out, since
            it takes time to register them.

    Raises:
        ConfigError: `words` choose a base, which is no choice.
    """
    Plugins.instance().register(PluginGroups)
    folders = tuple(conf_folders())
    register_sources()
    refuse_bases(words)
    store = ConfigStore.instance()
    store.store(name="schema", node=schema())
    store.repo.pop("cell", None)  # of experiments that an earlier call registered
    group = "experiments"
    nodes = store.repo.get(group, {})
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        experiment = {"group": group, "name": path.stem, "package": "_global_"}
        if any(path.stem in word or "glob(" in word for word in words):
            file = read_experiment(path)
            for name, overrides in file.cells.items():
                cell = _preset(overrides, folders)
                store.store(group=f"cell/{path.stem}", name=name, node=cell, package="_global_")
            store.store(**experiment, node=file.node)
        elif getattr(nodes.get(f"{path.stem}.yaml"), "provider", None) != _UNNAMED_PROVIDER:
            store.store(**experiment, node=_UNNAMED, provider=_UNNAMED_PROVIDER)
    _replace_launchers(store)
    OmegaConf.register_new_resolver(
        "emloc.runs", lambda *, _root_: _experiment_folder(_root_.name), replace=True
    )
    OmegaConf.register_new_resolver("emloc.launch", lambda: _LAUNCH, replace=True)
    OmegaConf.register_new_resolver(
        "emloc.folder", lambda *, _root_: folder_name(_root_), replace=True
    )


def _experiment_folder(name: str) -> str:
    """The folder of the runs with the setting `name`.

    Raises:
        ConfigError: the name would lead out of the folder of all experiments.
    """
    require_word("name", name, "demo")
    return str(runs_folder() / name)


def _replace_launchers(store: ConfigStore) -> None:
    """Make the launchers `basic` and `joblib` our own, which survive a job that cannot start."""
    Plugins.instance()  # registers the plugins' own settings first, which ours replace
    basic = store.load("hydra/launcher/basic.yaml").node
    basic._target_ = "hydra_plugins.emloc_sweeps.OwnBasicLauncher"
    store.store(group="hydra/launcher", name="basic", node=basic, provider="emloc")
    try:
        node = store.load("hydra/launcher/joblib.yaml").node
    except ConfigLoadError:
        return
    node._target_ = "hydra_plugins.emloc_sweeps.Joblib"
    node.batch_size = "1"  # jobs take long, so none may wait for a busy worker
    store.store(group="hydra/launcher", name="joblib", node=node, provider="emloc")


@cache
def _preset(overrides: str, folders: tuple[Path, ...]) -> DictConfig:
    """The overrides of a command line, as a node for Hydra's defaults list.

    `folders` have the groups. The store copies the node, so that it never changes.
    """
    pairs = [override.split("=", 1) for override in overrides.split()]
    choices = {key for key, _ in pairs if any((folder / key).is_dir() for folder in folders)}
    values = OmegaConf.from_dotlist(
        [f"{key}={value}" for key, value in pairs if key not in choices]
    )
    defaults = [{f"override /{key}": value} for key, value in pairs if key in choices]
    return OmegaConf.create({"defaults": [*defaults, "_self_"], **values})


def compose(overrides: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
    """The configuration of one run, as the command line would compose it.

    `with_hydra` adds Hydra's own settings, under `hydra`.
    """
    register(overrides)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", list(overrides), return_hydra_config=with_hydra)


def experiment_names() -> list[str]:
    """Name of every experiment of the project, in alphabetical order."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def cell_names() -> Iterator[str]:
    """Name of every cell of every experiment, such as `demo_vqa/lora`."""
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        yield from (f"{path.stem}/{name}" for name in read_experiment(path).cells)
