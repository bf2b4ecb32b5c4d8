"""Several processes as one run: what was launched, what all agree on, and how they end together.

`torchrun` starts the processes. Nothing here looks at the model: how a step's pairs are spread is the trainer's matter.
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
from typing import Any, TypeVar

from clair.core.errors import EXIT_INTERRUPTED, UserError

T = TypeVar("T")
_SILENT = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where mpirun and srun say how many processes they started."""
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = "torchrun --nproc_per_node {count} -m apo.cli train ..."
_ENDED = "apo/ended"
_PATIENCE = 1.0
"""Seconds that a process gives the one that failed first to say so: torchrun kills all when one has ended."""
_DAY = timedelta(days=1)
"""How long processes wait for each other where one works and the others cannot, as while pairs are tokenised."""


# ---- what was launched


def check_launch(environ: Mapping[str, str] | None = None) -> int:
    """How many processes this run has, by what its launcher says in the environment.

    Raises UserError where several were asked for and this one would train alone, or where DeepSpeed was asked for and
    is not installed.
    """
    environ = os.environ if environ is None else environ
    count = _number(environ, "WORLD_SIZE")
    others = next((name for name in _SILENT if (_number(environ, name) or 1) > 1), None)
    if (count or 1) == 1 and others:
        started = environ[others]
        raise UserError(
            f"{others} says that {started} processes were started, and each would train alone; start one per machine: "
            + _TORCHRUN.format(count="N")
        )
    if count is None:
        if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
            raise UserError(
                "accelerate launch was asked for several processes and started one (it does so without --multi_gpu, "
                f"and always on a CPU); use {_TORCHRUN.format(count='N')}"
            )
        if lonely := next((name for name in _NEEDED[:2] if name in environ), None):
            raise UserError(f"{lonely} is set but WORLD_SIZE is not; start with {_TORCHRUN.format(count='N')}")
        count = 1
    elif missing := [name for name in _NEEDED if count > 1 and name not in environ]:
        raise UserError(
            f"WORLD_SIZE is {count} but {missing[0]} is not set; start with {_TORCHRUN.format(count=count)}"
        )
    check_deepspeed(_true(environ, "ACCELERATE_USE_DEEPSPEED"))
    return count


def is_main(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process is the first of its run, by its launcher's word."""
    return (os.environ if environ is None else environ).get("RANK", "0") == "0"


def check_deepspeed(asked: bool) -> None:
    """Raises UserError where DeepSpeed was asked for and is not there."""
    if asked and find_spec("deepspeed") is None:
        raise UserError("DeepSpeed was asked for and is not installed: pip install 'clair-apo[deepspeed]'")


def check_devices(args: Any) -> None:
    """What the launcher and the trainer's options (`APOConfig`) ask for is what will run.

    Raises UserError for several GPUs in one process, for processes that do not know of each other, and for sharding
    that accelerate would quietly leave out.
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
    for name, asked, plain in (("FSDP", fsdp, ("NO", "MULTI_CPU")), ("DeepSpeed", deepspeed, ("NO", "MULTI_CPU"))):
        if asked and kind in plain:
            told = "on one process" if kind == "NO" else "on CPUs"
            raise UserError(
                f"{name} was asked for, and {told} accelerate would train without it, every process holding the whole "
                f"model; take {name} out, or start several processes with a GPU each"
            )
    if fsdp and _true(os.environ, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise UserError(
            "fsdp_cpu_ram_efficient_loading leaves the weights of all processes but one empty, and the reference's "
            "log-probs are computed from them before they are sharded; set it to false"
        )


def fsdp_requested(args: Any) -> bool:
    """Whether the trainer's options or the launcher ask for a model sharded by FSDP."""
    return bool(args.fsdp) or _true(os.environ, "ACCELERATE_USE_FSDP")


def deepspeed_requested(args: Any) -> bool:
    """Whether the trainer's options or the launcher ask for DeepSpeed."""
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


# ---- what all agree on


@dataclass(frozen=True)
class Group:
    """The processes of a run. With one, every method is what its name says without any of them asked."""

    rank: int = 0
    count: int = 1
    channel: Any = None
    """A process group of gloo, so that agreeing never waits for a GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, everywhere."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.channel)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.count == 1:
            return flag
        import torch
        import torch.distributed as dist

        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.channel)
        return bool(found)

    @contextlib.contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Let the mistake that one process finds be found by all: every one of them raises the same UserError."""
        found = None
        try:
            yield
        except UserError as error:
            found = error
        if first := next(filter(None, self.gather(found)), None):
            raise first

    def broadcast_from_main(self, do: Callable[[], T]) -> T:
        """What the first process gets from `do`, everywhere; its mistake is everybody's."""
        value = None
        with self.raise_on_all():
            if self.is_main:
                value = do()
        return self.gather(value)[0]  # type: ignore[return-value]

    def check_equal(self, **values: Any) -> None:
        """Raises UserError where a value differs between processes, as on machines without a shared file system."""
        for name, found in zip(values, zip(*self.gather(list(values.values())), strict=True), strict=True):
            if other := next((rank for rank, value in enumerate(found) if value != found[0]), 0):
                raise UserError(
                    f"process 0 found {name} {found[0]!r} and process {other} {found[other]!r}; all machines must see "
                    "the same files, on a shared file system"
                )


@contextlib.contextmanager
def join_processes(*, cpu: bool, seconds: float = 1800) -> Iterator[Group]:
    """The processes that the launcher started; `seconds` is how long a collective of the training may take.

    An error in any of them ends all, with the words and the exit code of the one that failed first: in that process the
    error is raised as it is, in the others SystemExit.
    """
    if check_launch() == 1:
        yield Group()
        return
    import torch.distributed as dist
    from accelerate import PartialState

    patience = timedelta(seconds=seconds)
    met = {} if _true(os.environ, "ACCELERATE_USE_DEEPSPEED") else _rendezvous(patience)
    state = PartialState(cpu=cpu, timeout=patience, **met)
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


def _rendezvous(patience: timedelta) -> dict[str, Any]:
    """The launcher's store, this attempt's own part of it, and who we are there, for `init_process_group`.

    Processes that torchrun starts again would else find the addresses of those that are gone: torch 2.13 keeps the
    store over attempts and no longer keeps these apart.
    """
    import torch.distributed as dist

    store, rank, count = next(dist.rendezvous("env://", timeout=patience))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"apo/attempt/{attempt}", store), "rank": rank, "world_size": count}


def run_and_exit(command: Callable[[], None]) -> None:
    """Run the command of one process of several, and end the process with its exit code, at once.

    The usual end of an interpreter now and then meets threads of gloo that still run, and is aborted by them.
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
    """Raises SystemExit, without a word, in every process but the one that failed first."""
    import torch.distributed as dist

    code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    mine = f"{os.getpid()}@{os.uname().nodename} {code}"
    try:
        first = dist.distributed_c10d._get_default_store().compare_set(_ENDED, "", mine).decode()
    except (RuntimeError, ValueError):  # the store is gone with the process that kept it: everyone for himself
        return
    if first != mine:
        time.sleep(_PATIENCE)
        raise SystemExit(int(first.rpartition(" ")[2])) from error


def _is_lost(error: BaseException) -> bool:
    """Whether an error says that a process at the other end of a connection is gone."""
    import torch.distributed as dist

    told = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in told or "nccl" in told or "connection" in told)
    )
