"""Who imports whom, read from the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENQUEUE = sorted(ROOT.glob("enqueue/**/*.py"))
RELEASER = sorted(ROOT.glob("releaser/**/*.py"))
MODULES = [str(path.relative_to(ROOT)) for path in ENQUEUE + RELEASER]

# What the releaser depends on, by the name that it is imported by.
DEPENDENCIES = {"pymysql", "watchdog", "click", "rich"}


def imported(module: str, source: str | None = None) -> set[str]:
    """The full names that a module imports, anywhere in it; of `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source or (ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(Path(module).parts[:-1][: len(Path(module).parts) - node.level]) if node.level else ""
            base = ".".join(filter(None, [package, node.module]))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def importers(package: str) -> list[str]:
    return [module for module in MODULES if package in packages(imported(module))]


def test_there_is_something_to_read() -> None:
    """Both packages are found, and an import is seen wherever it stands."""
    assert len(ENQUEUE) > 5 and len(RELEASER) > 15
    source = "import a.b\ndef f():\n    from c import d as e\n    if 1:\n        import g, h as i\n"
    assert imported("x.py", source) == {"a.b", "c", "c.d", "g", "h"}
    assert packages(imported("p/x.py", "from . import y\nfrom .z import w\n")) == {"p"}


@pytest.mark.parametrize("module", [str(path.relative_to(ROOT)) for path in ENQUEUE])
def test_enqueue_imports_the_standard_library_only(module: str) -> None:
    """enqueue needs nothing but Python, and never the releaser."""
    assert packages(imported(module)) <= sys.stdlib_module_names | {"enqueue"}


def test_the_command_imports_the_standard_library_only() -> None:
    """So does the script that is installed."""
    source = (ROOT / "enqueue/secure-sendmail-enqueue.in").read_text()
    assert packages(imported("enqueue/secure-sendmail-enqueue.in", source)) <= sys.stdlib_module_names | {"enqueue"}


@pytest.mark.parametrize("module", [str(path.relative_to(ROOT)) for path in RELEASER])
def test_releaser_imports_its_dependencies_only(module: str) -> None:
    """The releaser never imports enqueue, and nothing that is not declared."""
    assert packages(imported(module)) <= sys.stdlib_module_names | DEPENDENCIES | {"releaser"}


def test_nothing_is_imported_by_a_name_that_cannot_be_read() -> None:
    """No module imports through importlib or __import__, so that the tests here see everything."""
    assert importers("importlib") == []
    assert [module for module in MODULES if "__import__" in (ROOT / module).read_text()] == []


def test_watchdog_in_one_module() -> None:
    """watchdog is imported in watch.py alone."""
    assert importers("watchdog") == ["releaser/watch.py"]


def test_pymysql_in_one_module() -> None:
    """PyMySQL is imported in at most one module, which is none of the command's."""
    found = importers("pymysql")
    assert len(found) <= 1 and not any(module.startswith("releaser/cli/") for module in found)


@pytest.mark.parametrize("package", ["click", "rich"])
def test_the_daemon_draws_no_tables(package: str) -> None:
    """click and rich belong to the command."""
    assert importers(package) and all(module.startswith("releaser/cli/") for module in importers(package))


def test_the_command_stands_on_the_rest() -> None:
    """Nothing outside releaser/cli/ imports from it."""
    inside = [str(path.relative_to(ROOT)) for path in ROOT.glob("releaser/cli/*.py")]
    found = [module for module in MODULES if any(name.startswith("releaser.cli") for name in imported(module))]
    assert set(found) <= set(inside)


# The system, a clock, the network, a database.
IMPURE = {
    "os", "io", "time", "datetime", "socket", "sqlite3", "pathlib", "shutil", "subprocess", "threading", "queue", "random",
    "secrets",
    "select", "signal", "smtplib", "logging", "sys", "tempfile", "pwd", "grp", "fcntl",
}  # fmt: skip


@pytest.mark.parametrize("module", ["releaser/limits.py", "releaser/envelope.py", "releaser/message.py"])
def test_pure_modules(module: str) -> None:
    """Limits, envelope and message read no file and no clock: everything comes in as an argument."""
    assert not packages(imported(module)) & (IMPURE | DEPENDENCIES)
    calls = [node.func for node in ast.walk(ast.parse((ROOT / module).read_text())) if isinstance(node, ast.Call)]
    assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"open", "print", "input", "exec", "eval"}


# Each of these alone costs a mail more than all that enqueue does.
SLOW = {
    "re",
    "email",
    "argparse",
    "json",
    "logging",
    "socket",
    "pathlib",
    "subprocess",
    "tempfile",
    "typing",
    "random",
    "datetime",
    "asyncio",
    "collections",
    "os",
}


def test_cold_start() -> None:
    """enqueue starts without the modules that are slow to load; only a failure, a name to be encoded or an IDN needs more."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import enqueue.main; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-IS", "-c", program, ROOT], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "enqueue.main" in loaded
    assert not SLOW & set(loaded)
