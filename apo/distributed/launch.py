"""Several processes as one run: checks of the launch, agreement between processes, and a common end.

`torchrun` starts the processes. The trainer divides the pairs of a step among them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from clair.core.errors import EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_LAUNCHER_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which mpirun and srun give the number of processes."""
_REQUIRED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = "torchrun --nproc_per_node {count} -m apo.cli train ..."
_FIRST_TO_END = "apo/ended"
_GRACE_SECONDS = 1.0
"""Seconds that a process waits for the one that failed first to print its error: torchrun kills all when one ends."""
_DAY = timedelta(days=1)
"""How long processes wait for each other while only one works, for example while it tokenizes pairs."""


# ---- checks of the launch


def check_launch(environ: Mapping[str, str] | None = None) -> int:
    """The number of processes of this run, by the environment variables of its launcher.

    Raises UserError if several were requested and this one would train alone, or if DeepSpeed was requested and is not
    installed.
    """
    environ = os.environ if environ is None else environ
    count = _number(environ, "WORLD_SIZE")
    launcher = next((name for name in _LAUNCHER_COUNTS if (_number(environ, name) or 1) > 1), None)
    if (count or 1) == 1 and launcher:
        started = environ[launcher]
        raise UserError(
            f"{launcher} says that {started} processes were started, and each would train alone; start one per "
            "machine: " + _TORCHRUN.format(count="N")
        )
    if count is None:
        if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
            raise UserError(
                "accelerate launch was asked for several processes and started one (it does so without --multi_gpu, "
                f"and always on a CPU); use {_TORCHRUN.format(count='N')}"
            )
        if variable := next((name for name in _REQUIRED[:2] if name in environ), None):
            raise UserError(f"{variable} is set but WORLD_SIZE is not; start with {_TORCHRUN.format(count='N')}")
        count = 1
    elif missing := [name for name in _REQUIRED if count > 1 and name not in environ]:
        raise UserError(
            f"WORLD_SIZE is {count} but {missing[0]} is not set; start with {_TORCHRUN.format(count=count)}"
        )
    check_deepspeed(_true(environ, "ACCELERATE_USE_DEEPSPEED"))
    return count


def is_main() -> bool:
    """True if this process is rank 0, by the environment variables of its launcher."""
    return os.environ.get("RANK", "0") == "0"


def check_deepspeed(requested: bool) -> None:
    """Raises UserError if DeepSpeed was requested and is not installed."""
    if requested and find_spec("deepspeed") is None:
        raise UserError("DeepSpeed was asked for and is not installed: pip install 'clair-apo[deepspeed]'")


def check_devices(args: Any) -> None:
    """Check that the devices and the sharding requested by launcher and options (`APOConfig`) are what will run.

    Raises UserError for several GPUs in one process, for processes that are not connected, and for sharding that
    accelerate would silently leave out.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"this machine has {args.n_gpu} GPUs and one process was started; use {_TORCHRUN.format(count=args.n_gpu)}"
            ", or one GPU: CUDA_VISIBLE_DEVICES=0 apo train ..."
        )
    count = _number(os.environ, "WORLD_SIZE") or 1
    if args.world_size != count:
        raise UserError(f"WORLD_SIZE is {count} but this process is one of {args.world_size}; start with torchrun")
    kind = str(getattr(args.distributed_state.distributed_type, "value", args.distributed_state.distributed_type))
    fsdp = fsdp_requested(args)
    deepspeed = deepspeed_requested(args)
    for name, requested in (("FSDP", fsdp), ("DeepSpeed", deepspeed)):
        if requested and kind in ("NO", "MULTI_CPU"):
            placement = "on one process" if kind == "NO" else "on CPUs"
            raise UserError(
                f"{name} was asked for, and {placement} accelerate would train without it, every process holding the "
                f"whole model; take {name} out, or start several processes with a GPU each"
            )
    if fsdp and _true(os.environ, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise UserError(
            "fsdp_cpu_ram_efficient_loading leaves the weights of all processes but one empty, and the reference's "
            "log-probs are computed from them before they are sharded; set it to false"
        )


def sum_over_processes(accelerator: Any, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes of accelerate's `accelerator`, each of which must call it."""
    return accelerator.reduce(tensor, "sum")


def fsdp_requested(args: Any) -> bool:
    """True if the trainer's options or the launcher request a model sharded by FSDP."""
    return bool(args.fsdp) or _true(os.environ, "ACCELERATE_USE_FSDP")


def deepspeed_requested(args: Any) -> bool:
    """True if the trainer's options or the launcher request DeepSpeed."""
    return bool(args.deepspeed) or _true(os.environ, "ACCELERATE_USE_DEEPSPEED")


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.strip().isdigit() or int(text) < 1:
        raise UserError(f"{name} is {text!r} in the environment; it must be a number of processes, 1 or more")
    return int(text)


def _true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() in ("1", "true", "yes", "on", "y", "t")


# ---- agreement between processes


@dataclass(frozen=True)
class Group:
    """The processes of a run. With one process, every method works without communication."""

    rank: int = 0
    count: int = 1
    channel: Any = None
    """A process group of gloo, so that communication never waits for a GPU."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, the process that writes files and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on every process."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.channel)
        return values

    def any(self, flag: bool) -> bool:
        """True on every process if `flag` is true on any."""
        if self.count == 1:
            return flag
        import torch
        import torch.distributed as dist

        result = torch.tensor(int(flag))
        dist.all_reduce(result, dist.ReduceOp.MAX, group=self.channel)
        return bool(result)

    @contextlib.contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Raise a UserError of any process on all of them: the one of the lowest rank."""
        caught = None
        try:
            yield
        except UserError as error:
            caught = error
        if first := next(filter(None, self.gather(caught)), None):
            raise first

    def broadcast_from_main(self, compute: Callable[[], T]) -> T:
        """Run `compute` on rank 0 and broadcast the result; a UserError on rank 0 is raised on every rank."""
        value = None
        with self.raise_on_all():
            if self.is_main:
                value = compute()
        result: Any = self.gather(value)[0]
        return result

    def check_equal(self, **values: Any) -> None:
        """Raises UserError if a value differs between processes, as on machines without a shared file system."""
        for name, by_rank in zip(values, zip(*self.gather(list(values.values())), strict=True), strict=True):
            if rank := next((rank for rank, value in enumerate(by_rank) if value != by_rank[0]), 0):
                raise UserError(
                    f"process 0 found {name} {by_rank[0]!r} and process {rank} {by_rank[rank]!r}; all machines must "
                    "see the same files, on a shared file system"
                )


@contextlib.contextmanager
def join_processes(*, cpu: bool, seconds: float = 1800) -> Iterator[Group]:
    """Connect the processes that the launcher started. `seconds` is the timeout of a collective of the training.

    An error in any process ends all, with the message and the exit code of the one that failed first: that process
    raises the error unchanged, the others SystemExit.
    """
    if check_launch() == 1:
        yield Group()
        return
    import torch.distributed as dist
    from accelerate import PartialState

    timeout = timedelta(seconds=seconds)
    store = {} if _true(os.environ, "ACCELERATE_USE_DEEPSPEED") else _rendezvous(timeout)
    state = PartialState(cpu=cpu, timeout=timeout, **store)
    group = Group(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=_DAY))
    try:
        yield group
        dist.barrier(group.channel)
    except BaseException as error:
        _exit_unless_first(error)
        if _is_lost(error):
            raise SystemExit(
                "error: another process of this run is gone (killed, or out of memory); the same command goes on from "
                "the last checkpoint"
            ) from error
        raise
    finally:
        if dist.is_initialized() and dist.get_backend() == "gloo":  # its threads abort a process that ends before them
            dist.destroy_process_group()


def _rendezvous(timeout: timedelta) -> dict[str, Any]:
    """The launcher's store with a prefix for this attempt, rank and world size, for `init_process_group`.

    Without the prefix, processes that torchrun restarts would read the addresses of those that are gone: torch 2.13
    keeps the store over attempts and no longer separates them.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": PrefixStore(f"apo/attempt/{attempt}", store), "rank": rank, "world_size": count}


def run_and_exit(command: Callable[[], None]) -> None:
    """Run the command of one process of several, and exit at once with its exit code.

    A normal exit of the interpreter sometimes runs into threads of gloo, which then abort the process.
    """
    code: Any = 0
    try:
        command()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _exit_unless_first(error: BaseException) -> None:
    """Raises SystemExit, without a message, in every process but the one that failed first."""
    import torch.distributed as dist

    code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    entry = f"{os.getpid()}@{os.uname().nodename} {code}"
    try:
        first = dist.distributed_c10d._get_default_store().compare_set(_FIRST_TO_END, "", entry).decode()
    except (
        RuntimeError,
        ValueError,
    ):  # the store ended with the process that held it; each process raises its own error
        return
    if first != entry:
        time.sleep(_GRACE_SECONDS)
        raise SystemExit(int(first.rpartition(" ")[2])) from error


def _is_lost(error: BaseException) -> bool:
    """True if an error means that the process at the other end of a connection is gone."""
    import torch.distributed as dist

    message = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in message or "nccl" in message or "connection" in message)
    )
