"""The table of training speed is what the raw results say."""

from __future__ import annotations

import importlib.util

from tests.house.pages import ROOT


def make_speed():
    spec = importlib.util.spec_from_file_location("make_speed", ROOT / "docs" / "make_speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_have_the_table_of_the_raw_results():
    module = make_speed()
    table = module.table(module.cases())
    for page in module.PAGES:
        assert f"{module.MARK}{table}\n" in page.read_text("utf-8"), "run python docs/make_speed.py"


def test_the_real_model_comes_first_and_a_killed_run_says_so():
    module = make_speed()
    tiny = {"seconds": {"ours": [2.0, 1.0], "trl defaults": [4.0], "trl best": [3.0]}, "peak_mb": {"ours": 10.4},
            "ratio": {mode: {"min": 2.04, "max": 4.0} for mode in ("trl defaults", "trl best")}}  # fmt: skip
    real = {
        "seconds": {"ours": [217.0], "trl defaults": [697.0]}, "ratio": {"trl defaults": {"min": 3.2, "max": 3.2}},
        "step_ratio": {"trl best": {"min": 2.8, "max": 2.9}}, "peak_mb": {"ours": 7000, "trl defaults": 11200.2},
        "memory_limit_gb": 24.0,
    }  # fmt: skip
    assert next(iter(module.ROWS))[1] == "real model"
    table = module.table([("SmolLM2-135M in full", real), ("CLAIR lengths, 4 a batch", tiny)])
    assert table.splitlines()[2:] == [
        "| SmolLM2-135M in full | 217.0 s | 697.0 s (3.2-3.2x) | killed above 24 GB; a step: 2.8-2.9x |",
        "| CLAIR lengths, 4 a batch | 1.0 s | 4.0 s (2.0-4.0x) | 3.0 s (2.0-4.0x) |",
        "| peak memory of each, MB | 7,000, 10 | 11,200, – | –, – |",
    ]
    page = f"before\n\n{module.MARK}| old |\n|---|\n\nafter\n"
    assert module.with_table(page, table) == f"before\n\n{module.MARK}{table}\nafter\n"
    assert module.with_table(module.with_table(page, table), table) == module.with_table(page, table)
