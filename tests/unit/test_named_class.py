"""Dotted names of settings are imported from this package and from plug-ins alone."""

import sys

import pytest

from emloc.config.named_class import import_named
from emloc.emulators.svd import Svd


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module on Python's path; importing it writes a file."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Part: ...\n")
    monkeypatch.delitem(sys.modules, "strange", raising=False)
    return tmp_path


def test_a_name_of_the_package_is_imported():
    assert import_named("emloc.emulators.svd.Svd") is Svd


@pytest.mark.parametrize(
    "name",
    [
        *("strange.Part", "subprocess.Popen", "builtins.exec", "os.system", "Popen", ""),
        *("emlocal.Part", ".strange.Part", "strange..Part", "emloc-x.Part", "torch.load"),
    ],
)
def test_other_names_are_refused_before_any_import(module, name):
    with pytest.raises(ImportError, match="neither of emloc nor of a folder in EMLOC_PLUGINS"):
        import_named(name)
    assert not (module / "ran").exists()
    assert "strange" not in sys.modules


@pytest.mark.parametrize(
    "name", ["emloc.console.verbs.Counter", "emloc.runtime.provenance.os.system"]
)
def test_the_package_does_not_pass_on_what_it_imports_from_elsewhere(name):
    with pytest.raises(ImportError):
        import_named(name)


def test_a_plug_in_is_imported_from_its_folder_alone(module, tmp_path, monkeypatch):
    other = tmp_path / "plugin"
    other.mkdir()
    monkeypatch.setenv("EMLOC_PLUGINS", str(other))
    with pytest.raises(ImportError, match="neither"):
        import_named("strange.Part")
    (other / "subprocess.py").write_text("raise SystemExit")
    with pytest.raises(ImportError, match="neither"):
        import_named("subprocess.Popen")
    monkeypatch.setenv("EMLOC_PLUGINS", str(module))
    assert import_named("strange.Part").__name__ == "Part"
    assert (module / "ran").exists()
