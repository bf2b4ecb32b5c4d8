"""The command starts again under settings of glibc's heap, once, and only where they help."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from apo import heap


@pytest.fixture
def restarts(monkeypatch):
    """The environments of the processes that would replace this one; by default with glibc, no GPU, nothing set."""
    started = []
    for name in [name for name in os.environ if name.startswith(("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(heap, "_GPUS", ())
    monkeypatch.setattr(heap, "_has_glibc", lambda: True)
    monkeypatch.setattr(os, "execve", lambda *command: started.append(command))
    return started


def test_the_same_command_starts_again_with_the_settings(restarts):
    heap.restart_with_tunables()
    assert restarts == [(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": heap.TUNABLES})]


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "LD_PRELOAD"])
def test_an_allocator_that_the_user_configured_is_left_alone(restarts, monkeypatch, name):
    monkeypatch.setenv(name, "")
    heap.restart_with_tunables()
    assert not restarts


def test_nothing_happens_beside_a_gpu_or_without_glibc(restarts, monkeypatch, tmp_path):
    (tmp_path / "gpu").touch()
    monkeypatch.setattr(heap, "_GPUS", (str(tmp_path / "gpu"),))
    heap.restart_with_tunables()
    monkeypatch.setattr(heap, "_GPUS", ())
    monkeypatch.setattr(heap, "_has_glibc", lambda: False)
    heap.restart_with_tunables()
    assert not restarts


@pytest.mark.parametrize("error", [ValueError, AttributeError])
def test_a_system_that_names_no_c_library_has_no_glibc(monkeypatch, error):
    def confstr(_):
        raise error

    monkeypatch.setattr(os, "confstr", confstr, raising=False)
    assert not heap._has_glibc()


@pytest.mark.skipif(
    not heap._has_glibc() or any(map(os.path.exists, heap._GPUS)), reason="the settings are glibc's, without a GPU"
)
@pytest.mark.parametrize("module", ["apo", "apo.cli"])
def test_the_command_starts_again_once_in_the_same_process(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"with open({str(tmp_path / 'started')!r}, 'a') as file:\n"
        "    print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), file=file)\n"
    )
    names = ("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", module, "merge", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "Merge an adapter" in result.stdout
    first, second = (line.split() for line in (tmp_path / "started").read_text().splitlines())
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("None", heap.TUNABLES)


@pytest.mark.skipif(not heap._has_glibc(), reason="the settings are glibc's")
def test_glibc_knows_every_setting():
    with open("/proc/self/maps") as file:
        loader = next(path for line in file if "/ld-linux" in (path := line.split()[-1]))
    command = [loader, "--list-tunables"]
    environment = {"GLIBC_TUNABLES": heap.TUNABLES}
    listed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout
    if not listed:
        pytest.skip("this glibc does not list its settings")
    values = dict(line.split(":", 1) for line in listed.splitlines())
    for setting in heap.TUNABLES.split(":"):
        name, value = setting.split("=")
        assert int(values[name].split()[0], 0) == int(value)
