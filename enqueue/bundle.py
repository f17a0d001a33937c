"""What `make install` adds to the modules of enqueue, so that the command starts sooner.

Usage: python3 -I bundle.py

Makes, for the interpreter that runs it,

* the code of all modules in one file, which is one version's, as files of bytecode are: the command looks for that of the
  interpreter which it runs in, and goes without where there is none;
* beside the package, start/ with a link to the interpreter and, found before its standard library, utf8.py.
"""

import marshal
import os
import shutil
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
    with open(f"{HERE}/__pycache__/bundle.{sys.implementation.cache_tag}", "wb") as bundle:
        bundle.write(marshal.dumps((start, modules)))

    directory = f"{os.path.dirname(HERE)}/start"
    os.mkdir(directory)
    python = sys.executable
    # By the name that stays when the system gets another Python, if its standard library is found from that.
    os.symlink(python if python.startswith(f"{sys.base_prefix}/bin/") else os.path.realpath(python), f"{directory}/python3")
    # https://docs.python.org/3/library/sys_path_init.html#pth-files: nothing but this directory is searched.
    with open(f"{directory}/python3._pth", "w", encoding="utf-8") as path:
        path.write(".\n")
    shutil.copyfile(f"{HERE}/utf8.py", f"{directory}/encodings.py")


def _bare(code: CodeType) -> CodeType:
    """CODE without the line numbers, which nobody sees: enqueue prints no traceback."""
    constants = tuple(_bare(constant) if isinstance(constant, CodeType) else constant for constant in code.co_consts)
    return code.replace(co_linetable=b"", co_consts=constants)


if __name__ == "__main__":
    main()
