"""Errors that are planted to see that tests catch them: the table holds, the results are of what it says, and a few are tried here.

All of them are tried by hand: `./justw mutate`.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import pytest

import mutate

TABLE = mutate.read_table()
ROOT = mutate.ROOT
# Nothing is compiled for these.
TRIED_HERE = ("python-dtype-missing-in-the-signature", "python-read-only-output-written")


def test_table__each_error__can_still_be_planted_in_one_place():
    for mutation in TABLE:
        source = (ROOT / mutation.file).read_text(encoding="utf-8")
        assert mutation.plant(source) != source


def test_table__covers_the_whole_product():
    parts = collections.Counter(mutation.part.partition(":")[0] for mutation in TABLE)
    assert len(TABLE) >= 48
    assert set(parts) == {
        "CPU kernels", "Swift core", "Metal kernels", "Metal backend, host", "Software device", "Python package", "Rust crate",
        "Objective-C bridge",
    }  # fmt: skip


def test_table__tests_that_should_notice__are_there():
    for mutation in TABLE:
        for line in mutation.tests:
            paths = [word for word in mutate.command_of(line, ROOT) if word.endswith(".py") and word[0] != "-"]
            assert paths, line
            assert all((ROOT / path).is_file() for path in paths), line


def test_records__every_error_of_the_table__was_caught_as_it_stands():
    known = mutate.read_records()
    assert list(known) == [mutation.name for mutation in TABLE]
    for mutation in TABLE:
        assert known[mutation.name]["digest"] == mutation.digest, f"run `./justw mutate {mutation.name}`"
        assert known[mutation.name]["caught_by"], f"nobody has caught {mutation.name}"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> mutate.Tree:
    """A copy of the tree that uses the libraries of this one."""
    made = mutate.Tree(tmp_path_factory.mktemp("tree"))
    made.refresh()
    for library in (ROOT / "python" / "src" / "umfa").glob("lib*"):
        (made.package / library.name).symlink_to(library.resolve())
    return made


@pytest.mark.parametrize("name", TRIED_HERE)
def test_mutate__an_error_in_python__is_caught(name, tree):
    """By a test that this run of the tests makes too, without the error."""
    mutation = next(mutation for mutation in TABLE if mutation.name == name)
    result = mutate.try_one(mutation, tree, only_chosen=True)
    assert result["stage"] == "chosen tests"
    assert result["caught_by"].startswith("tests/test_python_")


def test_mutate__a_change_that_is_no_error__is_caught_by_nobody(tree):
    mutation = next(mutation for mutation in TABLE if mutation.name == "python-read-only-output-written")
    source = tree.folder / mutation.file
    before = source.read_bytes()
    harmless = dataclasses.replace(mutation, replacement=f"    # Harmless.\n{mutation.text}")
    result = mutate.try_one(harmless, tree, only_chosen=True)
    assert (result["caught_by"], result["stage"]) == (None, "not caught")
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("tests/a.py::test_one PASSED [ 50%]\ntests/a.py::test_two[1 2-x] FAILED [100%]\n", "tests/a.py::test_two[1 2-x]"),
        ("tests/a.py::test_one PASSED\ntests/a.py::test_two ERROR\n", "tests/a.py::test_two"),
        ("tests/a.py::test_one PASSED\ntests/a.py::test_two Fatal Python error: Segmentation fault\n", "tests/a.py::test_two"),
        ("tests/a.py::test_one PASSED\n", None),
    ],
)
def test_failing_test__is_read_from_what_pytest_prints(output, found):
    assert mutate.failing_test(output) == found


@pytest.mark.parametrize(
    ("source", "after", "words"),
    [("a = 1\na = 1\n", "", "has it 2 times"), ("b = 1\n", "", "has it 0 times"), ("# here\nb = 1\n", "# here\n", "behind the other one")],
)
def test_plant__a_place_that_is_not_clear__is_an_error(source, after, words):
    mutation = dataclasses.replace(TABLE[0], text="a = 1", after=after)
    with pytest.raises(mutate.TableError, match=words):
        mutation.plant(source)


def test_plant__behind_a_text__replaces_the_first_one_there():
    mutation = dataclasses.replace(TABLE[0], text="a = 1", replacement="a = 2", after="# here\n")
    assert mutation.plant("a = 1\n# here\na = 1\na = 1\n") == "a = 1\n# here\na = 2\na = 1\n"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('name = "x"', "missing"),
        ('name = "x"\npart = ""\nerror = ""\nfile = ""\ntext = "a"\nreplacement = "a"\nbuild = "none"\ntests = ["t"]', "expected a change"),
        ('name = "x"\npart = ""\nerror = ""\nfile = ""\ntext = "a"\nreplacement = "b"\nbuild = "some"\ntests = ["t"]', "must be one of"),
    ],
)
def test_read_table__an_entry_that_is_wrong__is_named(entry, words, tmp_path: Path):
    table = tmp_path / "table.toml"
    table.write_text(f"[[mutation]]\n{entry}\n")
    with pytest.raises(mutate.TableError, match=words):
        mutate.read_table(table)
