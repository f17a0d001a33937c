"""make bench: measures this program beside its peers on one machine, in one run, and prints ratios.

Usage: python bench [--full] [NAME...]

With NAMES only these measurements. What was found is also in var/bench.json. Needs root, and what tests/packages.sh gets.
"""

import importlib
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

# Each is a module beside this one, with a docstring that says what it measures, and measure(Bench). In this order.
MEASUREMENTS = ("submit", "release", "latency", "fairness", "scale", "log_rows")


def main() -> None:
    from measure import Bench, machine

    words = sys.argv[1:]
    if "--help" in words:
        print(__doc__.strip())
        return
    names = [word for word in words if word != "--full"]
    unknown = set(names) - set(MEASUREMENTS)
    if unknown:
        sys.exit(f"no such measurement: {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    bench = Bench("--full" in words)
    print(machine(), end="\n\n")
    kept = ROOT / "var/bench.json"
    kept.parent.mkdir(exist_ok=True)
    for name in names or MEASUREMENTS:
        module = importlib.import_module(name)
        assert module.__doc__
        print(f"{name}: {module.__doc__.strip()}\n", flush=True)
        began = time.monotonic()
        module.measure(bench)
        print(f"  ({name} took {time.monotonic() - began:.0f} s)\n", flush=True)
        earlier = json.loads(kept.read_text()) if kept.exists() else {}
        kept.write_text(json.dumps({**earlier, **bench.found}, indent=1, sort_keys=True) + "\n")


main()
