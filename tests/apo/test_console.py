"""The progress that a run prints, in lines that fit a terminal, and the start of a command."""

from __future__ import annotations

import gc
import importlib

import pytest

from apo.console import quieten
from apo.monitoring.callbacks import format_inspection, format_log
from apo.training.config import TrainConfig
from apo.training.train import train
from clair.core.progress import Progress

SPEED = {"loss": 1.0, "pairs_per_second": 1117.3}


@pytest.mark.slow
def test_the_references_pass_says_how_far_it_is(recipe, monkeypatch):
    counts = []
    monkeypatch.setattr(Progress, "advance", lambda self, count: counts.append((self.title, self.total, count)))
    train(TrainConfig(**{**recipe, "trainer": {**recipe["trainer"], "pack_tokens": 120}}), log=lambda _: None)
    counts = [count for label, total, count in counts if (label, total) == ("reference log-probs, train", 24)]
    assert len(counts) > 2
    assert sum(counts) == 24


@pytest.mark.slow
def test_in_a_terminal_of_80_columns_the_bar_and_every_number_can_be_read(recipe, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    train(TrainConfig(**recipe), log=lambda _: None)
    stderr = capsys.readouterr().err
    assert "training" in stderr
    assert "6/6" in stderr  # the steps, beside the bar
    assert "━" * 20 in stderr
    assert "step 6/6  loss " in stderr  # and the numbers above it, where they stay


@pytest.mark.parametrize(
    ("speed", "text"), [(1117.3, "1,117 pairs/s"), (99.96, "100 pairs/s"), (2.494, "2.49 pairs/s"), (0.0317, "0.0317")]
)
def test_speed_is_a_number_that_one_can_read(speed, text):
    assert text in format_log({**SPEED, "pairs_per_second": speed})
    assert "rows/s" in format_log({**SPEED, "rows/chosen": 4})


def test_each_look_is_a_line_and_a_log_of_training_none():
    logs = {"guard/text_loss": 3.7, "guard/text_loss_rise": 0.01, "guard/text_loss_rise_noise": 0.005,
            "probe/kl": 0.0069, "probe/edited_chosen": 0.146, "probe/shared_chosen": 0.11}  # fmt: skip
    assert format_inspection(logs) == [
        "guard: loss on the text 3.7000 (+0.0100 +- 0.0050)",
        "probe: KL 0.0069 nats a token, chosen edited +0.146, shared +0.110",
    ]
    assert format_inspection(SPEED) == []


def test_the_garbage_collector_is_off_while_libraries_are_imported_and_only_then(tmp_path, monkeypatch):
    (tmp_path / "library_of_this_test.py").write_text("import gc\nwhile_imported = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    quieten("library_of_this_test")
    assert gc.isenabled()
    assert not importlib.import_module("library_of_this_test").while_imported
    with pytest.raises(ImportError):
        quieten("no_library_of_this_test")
    assert gc.isenabled()
