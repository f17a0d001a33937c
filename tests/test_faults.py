"""faults.md == the tests that there are, in both directions, and proof that the comparison can fail."""

import ast
from pathlib import Path

import page
import pytest

TESTS = Path(__file__).parent
SECTIONS = ("spool", "crashes", "mta", "mysql")
# Modules whose tests are faults, all of them.
WHOLE = ("test_e2e_hostile_spool", "test_e2e_mta_faults", "test_e2e_mysql_nodes")


def named(text: str) -> list[str]:
    """The tests that the page names."""
    return [row[2] for section in SECTIONS for row in page.table(text, section)]


def there_are(module: str) -> set[str]:
    """The tests that there are, as the page names them."""
    file = TESTS / f"{module}.py"
    body = ast.parse(file.read_text()).body if file.exists() else []
    names = {each.name for each in body if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")}
    return {f"{module}::{name}" for name in names}


def differences(text: str) -> set[str]:
    """Tests that the page names and that are not there, and those of WHOLE that it does not name."""
    tests = set(named(text))
    there = set().union(*(there_are(test.partition("::")[0]) for test in tests), *map(there_are, WHOLE))
    return (tests - there) | {test for test in there - tests if test.partition("::")[0] in WHOLE}


def test_faults_and_tests_agree() -> None:
    """Every row names a test that is there, and no test of a fault has no row."""
    text = page.text("faults.md")
    assert differences(text) == set()
    assert all(len(row) == 3 and all(row) for section in SECTIONS for row in page.table(text, section))


@pytest.mark.parametrize("section", ["spool", "mta"])
def test_faults_without_a_row_are_seen(section: str) -> None:
    """On a copy of the page without its first row the comparison fails, and on one with a test that is not there, too."""
    text = page.text("faults.md")
    first = page.table(text, section)[0][2]
    assert differences(page.without_row(text, section, 0)) == {first}
    assert differences(text.replace(first, f"{first}_again")) == {first, f"{first}_again"}


def test_faults_are_each_one_row() -> None:
    """No fault, and no test, has two rows; and every marked section is read."""
    text = page.text("faults.md")
    rows = [row for section in SECTIONS for row in page.table(text, section)]
    assert len({row[0] for row in rows}) == len(rows) == len(set(named(text)))
    assert text.count("<!-- read by tests/: ") == len(SECTIONS)


def test_faults_are_installed() -> None:
    """README and `make install` know the page."""
    assert "`faults.md`" in page.text("README.md") and " faults.md" in page.text("Makefile")
