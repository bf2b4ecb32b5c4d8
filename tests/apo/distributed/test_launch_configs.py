"""The launch configs under recipes/accelerate, read by accelerate's own launcher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from apo.distributed import launch as processes
from apo.distributed.launch import check_launch
from clair.core.errors import UserError

FOLDER = Path(__file__).resolve().parents[3] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
WORKERS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
EXPECTED = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def launched(file: Path) -> dict[str, str]:
    """The environment that accelerate's launcher gives each process, by the command in the file's header."""
    command = re.search(r"^#\s+accelerate launch (.+)$", file.read_text("utf-8"), re.MULTILINE)
    assert command, f"{file.name} does not say how it is used"
    arguments = command[1].replace("recipes/accelerate", str(FOLDER)).split()
    args = launch_command_parser().parse_args([*arguments, "--main_process_port", "0"])
    assert args.module
    assert (args.training_script, args.training_script_args[0]) == ("apo.cli", "train")
    args, config, _ = _validate_launch_command(args)
    assert args.num_processes == 8
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config or {})  # as its launch_command does
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def test_every_config_is_read_by_accelerate_for_eight_gpus():
    configs = {file.stem: load_config_from_file(str(file)) for file in FILES}
    assert {name: str(config.distributed_type.value) for name, config in configs.items()} == EXPECTED
    for config in configs.values():
        assert (config.num_processes, config.num_machines, config.use_cpu) == (8, 1, False)
        assert config.mixed_precision == "bf16"
        for section in ("fsdp_config", "deepspeed_config"):
            options = vars(launch_command_parser().parse_args(["x.py"]))
            assert set(getattr(config, section) or {}) <= set(options), "a key that the launcher would not know"
    assert configs["zero2"].deepspeed_config["zero_stage"] == 2
    assert configs["zero3"].deepspeed_config["zero_stage"] == 3
    assert configs["zero3"].deepspeed_config["zero3_save_16bit_model"] is True
    print(f"looked at {len(configs)} configs")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_launcher_gives_the_processes_the_settings_that_the_file_is_named_after(file, monkeypatch):
    environ = {**launched(file), **WORKERS}
    assert environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (environ.get("ACCELERATE_USE_FSDP") == "true") == (file.stem == "fsdp2")
    assert (environ.get("ACCELERATE_USE_DEEPSPEED") == "true") == file.stem.startswith("zero")
    monkeypatch.setattr(processes, "find_spec", lambda name: object())
    assert check_launch(environ) == 8
    if file.stem == "fsdp2":
        assert environ["FSDP_VERSION"] == "2"
        assert environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"  # apo.distributed.launch.check_devices refuses it
    if file.stem.startswith("zero"):
        assert environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == file.stem[-1]
        assert environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"  # a number must match the recipe's
        assert environ["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
        assert environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
        monkeypatch.setattr(processes, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install 'clair-apo\[deepspeed\]'"):
            check_launch(environ)
