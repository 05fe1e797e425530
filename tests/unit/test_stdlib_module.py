"""The task stdlib_module, made of the documentation of the running Python."""

import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from emloc.errors import ConfigError
from emloc.tasks import stdlib_module
from emloc.tasks.stdlib_module import (
    LONGEST,
    MASK,
    MODULES,
    SHORTEST,
    StdlibModule,
    generic_docstrings,
    mask,
    module_texts,
)


def task(**overrides) -> StdlibModule:
    return StdlibModule(**({"name": "stdlib_module", "prompt": "{{text}}"} | overrides))


# Tests with a fake library come last: they clear caches that took seconds to fill.
@pytest.fixture
def library(tmp_path, monkeypatch):
    """Function that writes a fake standard library with one file per module."""

    def make(**docstrings: list[str]) -> Path:
        for name in MODULES:
            lines = [
                f'def f{index}():\n    """{doc}"""\n'
                for index, doc in enumerate(docstrings.get(name, []))
            ]
            (tmp_path / f"{name}.py").write_text("".join(lines))
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        module_texts.cache_clear()
        generic_docstrings.cache_clear()
        return tmp_path

    yield make
    module_texts.cache_clear()
    generic_docstrings.cache_clear()


def test_sizes_and_classes():
    train, held_out = task().train(), task().held_out(None)
    assert len(MODULES) == len(set(MODULES)) == 30
    assert len(held_out) == 512
    assert len(train) > 3000
    counts = Counter(row.target for row in train)
    assert set(counts) == {row.target for row in held_out} == set(MODULES)
    assert min(counts.values()) >= 30
    assert max(counts.values()) < len(train) / 10


def test_texts_are_short_and_do_not_contain_the_answer():
    for row in (*task().train(), *task().held_out(None)):
        assert SHORTEST <= len(row.prompt) <= LONGEST
        assert row.prompt == " ".join(row.prompt.split())
        assert row.target not in row.prompt.lower()


def test_no_text_occurs_twice():
    texts = [row.prompt for row in (*task().train(), *task().held_out(None))]
    assert len(texts) == len(set(texts))


def test_the_first_rows_are_a_random_sample():
    whole = task().held_out(None)
    some = task().held_out(100)
    assert some.rows == whole.rows[:100]
    assert len({row.target for row in some}) >= 15
    assert max(Counter(row.target for row in some).values()) <= 25
    assert task(limit=7).train().rows == task().train().rows[:7]


@pytest.mark.parametrize(
    ("spelled", "text", "masked"),
    [
        ("asyncio", "See asyncio.Future and AsyncIO.", "See ___.Future and ___."),
        ("http", "class BaseHTTPRequestHandler for HTTPS", "class Base___RequestHandler for ___S"),
        ("tar file", "A TarFile, a tar file, a tar-file", "A ___, a ___, a ___"),
        ("tar file", "a star file", "a star file"),
        ("e mail", "the mailbox of e-mail, Email", "the mailbox of ___, ___"),
        ("xml rpc", "XML-RPC of SimpleXMLRPCServer in xml", "___ of Simple___Server in xml"),
        ("date time", "A date/time or datetimes", "A ___ or ___s"),
    ],
)
def test_mask(spelled, text, masked):
    assert MASK == "___"
    assert mask(text, spelled) == masked


def test_prompt_and_target_templates():
    row = task(prompt="Q: {{text}}", target="The {{module}} module").held_out(1).rows[0]
    plain = task().held_out(1).rows[0]
    assert (row.id, row.prompt, row.target) == (
        plain.id,
        f"Q: {plain.prompt}",
        f"The {plain.target} module",
    )
    with pytest.raises(ConfigError, match=r"task.prompt: 'module' is undefined; the columns are t"):
        task(prompt="{{module}}").train()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval_rows": 0}, "task.eval_rows must be at least 1, got 0; set task.eval_rows=512"),
        ({"limit": -1}, "task.limit must be at least 1 or null, got -1; set task.limit=null"),
    ],
)
def test_refused_values(overrides, message):
    with pytest.raises(ConfigError) as caught:
        task(**overrides)
    assert str(caught.value) == message


def test_the_generic_corpus_contains_no_text_of_the_task():
    rows = generic_docstrings()
    assert len(rows) >= 500
    assert {row.prompt for row in rows} == {""}
    assert min(len(row.target) for row in rows) >= 200
    modules = [row.id.split(".")[0] for row in rows]
    assert not set(modules) & ({*MODULES, "test", "idlelib", "tkinter"})
    assert not [name for name in modules if name.startswith("_")]
    assert modules != sorted(modules)
    prompts = {row.prompt for row in (*task().train(), *task().held_out(None))}
    for row in rows:
        first = " ".join(re.split(r"\n\s*\n", row.target)[0].split())[:LONGEST].rstrip()
        assert first not in prompts


def test_no_module_of_the_library_is_imported():
    task().train()
    generic_docstrings()
    assert not {"turtle", "antigravity", "this"} & set(sys.modules)


def test_the_order_depends_only_on_the_seed(monkeypatch):
    rows = task().train().rows
    sources = stdlib_module._sources
    monkeypatch.setattr(stdlib_module, "_sources", lambda module: sources(module)[::-1])
    module_texts.cache_clear()
    assert task().train().rows == rows
    assert task(seed=1).train().rows != rows
    assert task(seed=1).key != task().key
    same = {row.prompt for row in task().held_out(None)} & {
        row.prompt for row in task(seed=1).held_out(None)
    }
    assert len(same) < 150  # 512 of 3,600 texts overlap in about 73 by chance


def test_the_key_depends_on_the_texts(library):
    library(asyncio=["Wait for the first of them.", "Wait for the second of them."])
    first = task(eval_rows=1).key
    library(asyncio=["Wait for the first of them.", "Wait for the third one of them."])
    assert task(eval_rows=1).key != first


def test_texts_are_the_first_paragraphs_of_all_docstrings(library):
    root = library()
    (root / "asyncio.py").unlink()
    package = root / "asyncio"
    (package / "test").mkdir(parents=True)
    (package / "__init__.py").write_text('"""The asyncio package\n  in two lines.\n\nMore."""\n')
    (package / "test" / "case.py").write_text('"""A text of a test, not of the package."""')
    (package / "inner.py").write_text(
        "try:\n    class A:\n        '''Documented inside a try block.'''\n"
        "        async def f(self):\n            '''Nested in a class, asynchronous.'''\n"
        "except ImportError:\n    def g():\n        '''Short one.'''\n"
        f"def long():\n    '''{'word ' * 100}'''\n"
    )
    assert module_texts() == (
        ("Documented inside a try block.", "asyncio.inner.A", "asyncio"),
        ("Nested in a class, asynchronous.", "asyncio.inner.A.f", "asyncio"),
        ("The ___ package in two lines.", "asyncio", "asyncio"),
        (("word " * 60).rstrip(), "asyncio.inner.long", "asyncio"),
    )


def test_texts_that_occur_in_two_modules_are_skipped(library):
    library(
        logging=["Close this one for good.", "Only here, although it is twice."] * 2,
        zipfile=["Close this one for good.", "Closes this zipfile for good."],
        tarfile=["Closes this tarfile for good."],
    )
    assert module_texts() == (("Only here, although it is twice.", "logging.f1", "logging"),)


def test_private_implementations_count_as_their_public_module(library):
    root = library()
    (root / "_pydecimal.py").write_text('"""Arithmetic of decimal numbers."""')
    assert module_texts() == (("Arithmetic of ___ numbers.", "_pydecimal", "decimal"),)


def test_more_held_out_rows_than_texts_are_refused(library):
    library(xml=["The only text there is."])
    with pytest.raises(ConfigError) as caught:
        task().train()
    assert str(caught.value) == (
        "task.eval_rows=512 leaves no training rows of 1; set task.eval_rows=512"
    )


def test_a_python_without_sources_is_refused(library):
    root = library()
    (root / "wsgiref.py").unlink()
    with pytest.raises(ConfigError) as caught:
        task().train()
    assert str(caught.value) == (
        f"task stdlib_module: this Python has no source files of wsgiref in {root}; "
        "use a Python with its standard library, or set task=gsm8k"
    )


def test_the_generic_corpus_skips_paragraphs_of_the_task(library):
    root = library(logging=["Close the logging handler and free it."])
    tail = "\n\n" + "Further words on the matter. " * 10
    (root / "copy.py").write_text(f'"""Close the logging handler and free it.{tail}"""')
    (root / "json.py").write_text(f'"""Something else altogether.{tail}"""')
    assert [row.id for row in generic_docstrings()] == ["json"]
