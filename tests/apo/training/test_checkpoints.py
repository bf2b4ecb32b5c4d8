"""A checkpoint is whole or is not there."""

from __future__ import annotations

import json

import pytest

from apo.run_dir.checkpoints import (
    MARKER,
    UNFINISHED,
    checkpoints,
    complete_checkpoint,
    find_newest_checkpoint,
    resume_problem,
)


def write(out, step, resumable=True):
    folder = out / UNFINISHED / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    (folder / "sub" / "optimizer.pt").write_bytes(b"state")
    complete_checkpoint(folder, out / f"checkpoint-{step}", resumable=resumable)
    return out / f"checkpoint-{step}"


def test_the_newest_is_the_highest_step_not_the_last_in_the_alphabet(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    search = find_newest_checkpoint(tmp_path)
    assert (search.newest, search.notes) == (tmp_path / "checkpoint-100", [])
    assert not (tmp_path / UNFINISHED).exists()


def test_an_empty_folder_has_none(tmp_path):
    assert find_newest_checkpoint(tmp_path).newest is None


def truncated(folder):
    (folder / "model.safetensors").write_bytes(b"weig")


def grown(folder):
    (folder / "model.safetensors").write_bytes(b"weights" * 99)


def flipped(folder):
    file = folder / "model.safetensors"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 0xFF]) + file.read_bytes()[1:])


def zeroed(folder):
    (folder / "sub" / "optimizer.pt").write_bytes(bytes(len(b"state")))


def exchanged(folder):
    marker = json.loads((folder / MARKER).read_text())
    marker["sha256"] = {"model.safetensors": "0" * 64}
    (folder / MARKER).write_text(json.dumps(marker))


def lost(folder):
    (folder / "sub" / "optimizer.pt").unlink()


def unmarked(folder):
    (folder / MARKER).unlink()


def marker_torn(folder):
    (folder / MARKER).write_text('{"resumable": true, "fil')


def marker_of_another_kind(folder):
    (folder / MARKER).write_text(json.dumps(["model.safetensors"]))


DAMAGES = [truncated, grown, flipped, zeroed, exchanged, lost, unmarked, marker_torn, marker_of_another_kind]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_reported_and_the_previous_one_used(tmp_path, damage):
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    damage(newer)
    search = find_newest_checkpoint(tmp_path)
    assert search.newest == older
    assert search.notes[0].startswith("set aside checkpoint-10 as incomplete-checkpoint-10: ")
    assert (tmp_path / "incomplete-checkpoint-10").is_dir()
    assert not newer.exists()
    assert find_newest_checkpoint(tmp_path).notes == []


def test_a_second_damaged_one_gets_another_name(tmp_path):
    for _ in range(2):
        truncated(write(tmp_path, 3))
        assert find_newest_checkpoint(tmp_path).newest is None
    assert (tmp_path / "incomplete-checkpoint-3-2").is_dir()


def test_unfinished_checkpoints_are_removed_and_reported(tmp_path):
    complete = write(tmp_path, 5)
    (tmp_path / UNFINISHED / "checkpoint-10").mkdir(parents=True)
    (tmp_path / UNFINISHED / "checkpoint-10" / "model.safetensors").write_bytes(b"half")
    search = find_newest_checkpoint(tmp_path)
    assert search.newest == complete
    assert search.notes == ["removed checkpoint-10, which was being written when the run was stopped"]
    assert not (tmp_path / UNFINISHED).exists()


def test_a_model_without_trainer_state_is_not_gone_on_from_and_stays(tmp_path):
    resumable = write(tmp_path, 5)
    model_only = write(tmp_path, 10, resumable=False)
    search = find_newest_checkpoint(tmp_path)
    assert search.newest == resumable
    assert search.notes == ["cannot go on from checkpoint-10: it holds the model only (save_only_model)"]
    assert model_only.is_dir()


def test_a_step_saved_twice_keeps_the_complete_one(tmp_path):
    first = write(tmp_path, 5)
    modified = (first / MARKER).stat().st_mtime_ns
    write(tmp_path, 5)
    assert (first / MARKER).stat().st_mtime_ns == modified
    truncated(first)
    write(tmp_path, 5)
    assert resume_problem(first) is None
