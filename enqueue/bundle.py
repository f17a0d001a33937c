"""The code of all modules of enqueue in one file, as `make install` makes it: that starts sooner than six files of bytecode.

Usage: python3 -I -X no_debug_ranges bundle.py DIRECTORY

DIRECTORY is the one that the package is in, when it is installed. The file is one interpreter's, as those of bytecode are: the
command looks for that of the interpreter which it runs in, and goes without where there is none.
"""

import marshal
import os
import sys

# Each behind those that it imports.
MODULES = ("failure", "address", "message", "options", "maildrop", "main")
HERE = os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    (installed,) = sys.argv[1:]
    codes = []
    for name in MODULES:
        with open(f"{HERE}/{name}.py", encoding="utf-8") as source:
            code = compile(source.read(), f"{installed}/enqueue/{name}.py", "exec", dont_inherit=True)
        codes.append((name, code))
    os.makedirs(f"{HERE}/__pycache__", exist_ok=True)
    with open(f"{HERE}/__pycache__/bundle.{sys.implementation.cache_tag}", "wb") as bundle:
        bundle.write(marshal.dumps(codes))


if __name__ == "__main__":
    main()
