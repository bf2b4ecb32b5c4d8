"""Run the benchmarks, and write what each measured to results/NAME.json, raw.

python tests/benchmarks/run.py [NAME ...]
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def machine() -> dict[str, object]:
    """The machine: as much as a reader needs to compare, and nothing that names it."""
    cpu = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"system": platform.system(), "cpu": cpu, "cores": len(os.sched_getaffinity(0))}


def main() -> None:
    """Each NAME.py or bench_NAME.py has a `measure()` that returns plain values, None where it cannot run."""
    sys.path.insert(0, str(ROOT))
    from clair.core.files import write_json
    from clair.core.provenance import provenance

    selected = sys.argv[1:]
    for file in sorted(set(FOLDER.glob("*.py")) - {Path(__file__)}):
        name = file.stem.removeprefix("bench_")
        if selected and name not in selected:
            continue
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        measured = module.measure()
        if measured is None:
            print(f"{name}: left out, its machine is another", flush=True)
            continue
        print(f"{name}: {json.dumps(measured)}", flush=True)
        when = datetime.now(UTC).date().isoformat()
        write_json(
            FOLDER / "results" / f"{name}.json", {**measured, "date": when, "machine": machine(), **provenance()}
        )


if __name__ == "__main__":
    main()
