"""Series of a run, and their picture."""

from __future__ import annotations

import json

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from apo.monitoring.drawing import COLORS
from apo.monitoring.metrics import adjusted_logps, series
from apo.monitoring.plots import draw_dynamics
from apo.run_dir.files import append_log, read_log, truncate_logs


def row(step, chosen=0.0, rejected=0.0, length=1.0):
    """A log of pairs that are `length` times as long as usual."""
    return {
        "step": step, "loss": 1.0, "rewards/chosen": chosen / 10, "rewards/rejected": rejected / 10,
        "logratios/chosen": chosen, "logratios/rejected": rejected,
        "logps/chosen": -50 * length + chosen, "logps/rejected": -60 * length + rejected,
    }  # fmt: skip


def test_a_torn_last_line_is_left_out(tmp_path):
    for step in (1, 2):
        append_log(tmp_path / "metrics.jsonl", [{"step": step, "loss": 0.5}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert read_log(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    truncate_logs(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_nan_is_written_as_null(tmp_path):
    append_log(tmp_path / "metrics.jsonl", [{"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "epoch": 0.5}])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "epoch": 0.5}


def test_no_file_is_no_rows(tmp_path):
    assert read_log(tmp_path / "none.jsonl") == []


def test_a_series_skips_rows_without_its_key():
    rows = [{"step": 1, "a": 2.0}, {"step": 2, "b": 3.0}, {"step": 3, "a": 4.0}]
    assert series(rows, "a") == ([1, 3], [2.0, 4.0])


def test_settled_logps_by_hand():
    # Reference log-probs -50 and -150: the average pair has -100, whichever pairs a log has.
    rows = [row(1, chosen=0.0, length=1), row(2, chosen=4.0, length=3)]
    assert adjusted_logps(rows, "chosen") == ([1, 2], [-100.0, -96.0])


PICTURES = {
    "a usual run": [row(s, chosen=s / 3, rejected=-s / 2, length=1 + s % 3 / 5) for s in range(1, 40)],
    "a single log": [row(1)],
    "with held-out pairs": [row(1), row(2, 1, -1), {f"eval_{key}": v for key, v in row(2).items()} | {"step": 2}],
    "without a reference": [{"step": s, "loss": 1, "logps/chosen": -50 + s, "logps/rejected": -60} for s in (1, 2, 3)],
    "with a lost number": [row(1), {**row(2), "rewards/chosen": None, "logratios/chosen": None}],
    "one side at a time": [
        {key: value for key, value in row(step, 1, -1).items() if side not in key}
        for step, side in ((1, "chosen"), (2, "rejected"), (3, "none"))
    ],
    "chosen alone": [{key: value for key, value in row(step, 1).items() if "rejected" not in key} for step in (1, 2)],
    "nothing": [],
}


@pytest.mark.parametrize("which", PICTURES)
def test_every_run_has_a_picture(which, tmp_path):
    draw_dynamics(PICTURES[which], tmp_path / "dynamics.png", title="apo_zero, /models/$HOME/{x_$/^2")
    image = imread(tmp_path / "dynamics.png")
    assert image.shape[1] > (1200 if "reference" not in which and which != "nothing" else 700)
    if which == "a usual run":
        for color in COLORS.values():
            assert (abs(image[..., :3] - to_rgb(color)).max(-1) < 0.02).sum() > 500
