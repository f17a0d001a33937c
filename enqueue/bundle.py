"""What `make install` adds to the modules of enqueue, so that the command starts sooner.

Usage: python3 -I bundle.py DIRECTORY

Makes, for the interpreter that runs it, beside the modules the code of all of them in one file, which is one version's, as files
of bytecode are: the command looks for that of the interpreter which it runs in, and goes without where there is none. And in
DIRECTORY, each at once, what the command is started through: a link to the interpreter and, found before its standard library,
utf8.py.
"""

import marshal
import os
import py_compile
import sys
from types import CodeType

# Each behind those that it imports.
MODULES = ("failure", "address", "message", "options", "maildrop", "main")
HERE = os.path.dirname(os.path.abspath(__file__))

# What the command runs first, with MODULES as pairs of a name and its code.
START = """
import gc, sys
# It ends before there is anything to collect.
gc.disable()
package = sys.modules["enqueue"] = type(sys)("enqueue")
package.__path__ = []
for name, code in modules:
    module = sys.modules[f"enqueue.{name}"] = type(sys)(f"enqueue.{name}")
    setattr(package, name, module)
    exec(code, module.__dict__)
main = module.main
"""


def main() -> None:
    modules = []
    for name in MODULES:
        with open(f"{HERE}/{name}.py", encoding="utf-8") as source:
            # What --help says is the one docstring that is read.
            modules.append((name, _bare(compile(source.read(), name, "exec", optimize=1 if name == "main" else 2))))
    start = _bare(compile(START, "start", "exec"))
    os.makedirs(f"{HERE}/__pycache__", exist_ok=True)
    with open(f"{HERE}/__pycache__/program.{sys.implementation.cache_tag}", "wb") as program:
        program.write(marshal.dumps((start, modules)))
    _make_start(*sys.argv[1:])


def _make_start(directory: str) -> None:
    os.makedirs(directory, exist_ok=True)
    # By the name that stays when the system gets another Python; that of a virtual environment is not for everybody.
    python = sys.executable if sys.prefix == sys.base_prefix else os.path.realpath(sys.executable)
    new = f"{directory}/python3.new"
    if os.path.lexists(new):
        # An interrupted installation's.
        os.unlink(new)
    os.symlink(python, new)
    os.replace(new, f"{directory}/python3")
    with open(f"{HERE}/utf8.py", encoding="utf-8") as source:
        utf8 = source.read().replace("@BASE@", sys.base_prefix)
    # https://docs.python.org/3/library/sys_path_init.html#pth-files: nothing but this directory is searched.
    for name, text in ("encodings.py", utf8), ("python3._pth", ".\n"):
        with open(f"{directory}/{name}.new", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{directory}/{name}.new", f"{directory}/{name}")
    as_it_is = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(f"{directory}/encodings.py", dfile="encodings.py", doraise=True, invalidation_mode=as_it_is)


def _bare(code: CodeType) -> CodeType:
    """CODE without the line numbers, which nobody sees: enqueue prints no traceback."""
    constants = tuple(_bare(constant) if isinstance(constant, CodeType) else constant for constant in code.co_consts)
    return code.replace(co_linetable=b"", co_consts=constants)


if __name__ == "__main__":
    main()
