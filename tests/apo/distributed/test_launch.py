"""The settings that a launcher gives its processes: used if they are consistent, else refused in one line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from apo.distributed import launch as processes
from apo.distributed.launch import Group, check_devices, check_launch
from apo.monitoring.failures import TrainingStopped
from apo.packing.batch import PairBatch
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
# What `accelerate launch --cpu --num_processes 2` (1.15) leaves in the environment of the one process it starts.
ACCELERATE_ON_A_CPU = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 1),
        (TORCHRUN, 2),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}, 2),  # one torchrun per node
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1),  # inside sbatch, not yet in a step
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}, 1),  # accelerate launch, one process
    ],
)
def test_a_launch_that_holds_together_is_believed(environ, count):
    assert check_launch(environ) == count


@pytest.mark.parametrize(
    ("environ", "match"),
    [
        (ACCELERATE_ON_A_CPU, "accelerate launch was asked for several processes and started one .* use torchrun"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4"},
            "OMPI_COMM_WORLD_SIZE says that 4 processes were started, and each would train",
        ),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS says that 8 processes"),
        ({"WORLD_SIZE": "1", "RANK": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS says that 2 processes"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is set but WORLD_SIZE is not; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set; start with torchrun --nproc_per_node 2"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "WORLD_SIZE is 2 but MASTER_PORT is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment; it must be a number"),
        ({**TORCHRUN, "ACCELERATE_USE_DEEPSPEED": "true"}, r"pip install 'clair-apo\[deepspeed\]'"),
    ],
)
def test_a_launch_that_would_train_otherwise_than_asked_is_refused(environ, match, monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=match):
        check_launch(environ)


def args(kind, **options):
    values = {"n_gpu": 1, "world_size": 1, "fsdp": False, "deepspeed": None, **options}
    return SimpleNamespace(**values, distributed_state=SimpleNamespace(distributed_type=kind))


@pytest.mark.parametrize(
    ("arguments", "environ", "match"),
    [
        (args("NO", n_gpu=8), {}, "8 GPUs and one process was started; use torchrun --nproc_per_node 8 .*, or one GPU"),
        (args("NO"), {"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but this process is one of 1"),
        (args("NO", fsdp=True), {}, "FSDP was asked for, and on one process accelerate would train without it"),
        (args("MULTI_CPU", world_size=2), {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP .* on CPUs"),
        (args("MULTI_CPU", world_size=2), {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "1"}, "DeepSpeed .* on CPUs"),
        (
            args("MULTI_GPU", world_size=2, fsdp=True),
            {"WORLD_SIZE": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading leaves the weights",
        ),
    ],
)
def test_launches_that_would_silently_run_differently_are_refused(arguments, environ, match, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=match):
        check_devices(arguments)


def test_launches_that_run_as_requested_are_accepted(monkeypatch):
    check_devices(args("NO"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_devices(args("MULTI_GPU", world_size=2, fsdp=True))
    check_devices(args("DEEPSPEED", world_size=2, deepspeed="zero2.json"))


def test_sharding_on_a_cpu_is_refused_by_the_trainer_itself(tmp_path, pairs, tokenizer):
    from tests.apo.conftest import make_model

    with pytest.raises(UserError, match="FSDP was asked for, and on one process"):
        APOTrainer(
            make_model(), args=APOConfig(output_dir=str(tmp_path), fsdp=True), train_dataset=pairs,
            processing_class=tokenizer,
        )  # fmt: skip


# ---- agreeing


class Both(Group):
    """Process 0 of two, the other one's values given."""

    def __init__(self, *theirs):
        super().__init__(0, 2)
        object.__setattr__(self, "theirs", list(theirs))

    def gather(self, value):
        return [value, self.theirs.pop(0)]


def test_one_process_asks_nobody():
    group = Group()
    assert group.gather(3) == [3]
    assert group.any(True) is True
    assert group.broadcast_from_main(lambda: 5) == 5
    group.check_equal(pairs=1)
    with pytest.raises(UserError, match="mine"), group.raise_on_all():
        raise UserError("mine")


def test_the_mistake_of_one_is_raised_by_all():
    with pytest.raises(TrainingStopped, match="theirs"), Both(TrainingStopped("theirs")).raise_on_all():
        pass
    with pytest.raises(UserError, match="mine"), Both(UserError("theirs")).raise_on_all():
        raise UserError("mine")
    with Both(None).raise_on_all():
        pass


def test_machines_that_see_other_files_are_reported():
    Both(["new", 9]).check_equal(run="new", steps=9)
    with pytest.raises(UserError, match=r"process 0 found steps 9 and process 1 8; .* shared file system"):
        Both(["new", 8]).check_equal(run="new", steps=9)


# ---- the end of an epoch


@given(st.integers(2, 60), st.integers(1, 5), st.integers(2, 4))
@settings(max_examples=150, deadline=None)
def test_processes_see_every_pair_once_an_epoch_in_the_samplers_order(pairs, size, count):
    """accelerate repeats pairs so that all processes have equally many; those are taken out again."""
    batches = {}
    for rank in range(count):
        shard = list(BatchSamplerShard(BatchSampler(SequentialSampler(range(pairs)), size, False), count, rank))
        for number, indices in enumerate(shard):
            state = SimpleNamespace(
                end_of_dataloader=number == len(shard) - 1, active_dataloader=SimpleNamespace(dataset=range(pairs))
            )
            trainer = SimpleNamespace(
                accelerator=SimpleNamespace(gradient_state=state, num_processes=count, process_index=rank),
                args=SimpleNamespace(dataloader_drop_last=False),
            )
            batch = PairBatch([{"index": index} for index in indices], list)
            unrepeated = APOTrainer._drop_repeats(trainer, batch, size)
            assert len(unrepeated)
            if unrepeated.dummy:
                assert unrepeated.weights.tolist() == [0.0]
            else:
                batches[number, rank] = [example["index"] for example in unrepeated.examples]
                assert unrepeated.weights.tolist() == [1.0] * len(unrepeated)
    assert [index for key in sorted(batches) for index in batches[key]] == list(range(pairs))
