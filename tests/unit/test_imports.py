"""Imports of large libraries: garbage collection pauses, and what they make is exempt from it."""

import gc
import os
import sys

import pytest

from emloc.runtime.imports import exempt_imports, import_without_compiler


@pytest.fixture
def _not_imported(monkeypatch):
    """As in a process that has not imported torch; no object that exists is exempt."""
    monkeypatch.delitem(sys.modules, "torch")
    gc.unfreeze()


@pytest.mark.usefixtures("_not_imported")
def test_collection_pauses_during_the_import_and_then_skips_what_there_is():
    with exempt_imports():
        assert not gc.isenabled()
        made = [[]]
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    assert not any(made is one for one in gc.get_objects())


@pytest.mark.usefixtures("_not_imported")
def test_a_failed_import_does_not_leave_collection_paused():
    with pytest.raises(ImportError), exempt_imports():
        raise ImportError
    assert gc.isenabled()


def test_once_torch_is_imported_nothing_is_exempt_since_models_may_exist():
    gc.unfreeze()
    with exempt_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("_not_imported")
def test_a_program_that_has_disabled_collection_keeps_it_disabled():
    gc.disable()
    try:
        with exempt_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.fixture
def _no_bitsandbytes(monkeypatch):
    """As in a process that has not imported bitsandbytes; restores what there was."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes")


@pytest.mark.usefixtures("_no_bitsandbytes")
@pytest.mark.parametrize("before", [None, "0"])
def test_the_compiler_is_off_for_the_import_of_bitsandbytes_alone(monkeypatch, tmp_path, before):
    name = "TORCHDYNAMO_DISABLE"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    (tmp_path / "bitsandbytes.py").write_text(f"import os\nseen = os.environ['{name}']\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_without_compiler("bitsandbytes")
    assert sys.modules["bitsandbytes"].seen == "1"
    assert os.environ.get(name) == before


@pytest.mark.usefixtures("_no_bitsandbytes")
def test_without_bitsandbytes_the_import_is_left_out(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    import_without_compiler("bitsandbytes")
    assert "bitsandbytes" not in sys.modules
