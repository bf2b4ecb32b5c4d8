"""A build on a Ray cluster: workers build the shards, which share limits and money, and the driver merges them.

The driver hands shards to workers and starts what died again; every shard goes on from its own ledger, so that an
actor, a worker or a node that dies costs at most the requests it had in flight. Ray is imported when a job begins.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from importlib.metadata import version
from typing import Any

from clair.cluster.crash_isolation import HOPELESS, CrashHistory
from clair.cluster.leased_limits import LOST
from clair.cluster.merge import merge
from clair.cluster.ray_session import LimitsActor, connected
from clair.cluster.shared_limits import GONE, RoleLimits
from clair.cluster.worker import Done, Order, Worker
from clair.core.errors import UserError, one_line
from clair.core.urls import environment_names
from clair.data.dataset import read_manifest
from clair.data.prompt_sources import Scan
from clair.inference.budget import Budget, prices_of
from clair.inference.local import weights_identity
from clair.pipeline.build import BuildResult, check_resumable, recorded_recipe
from clair.pipeline.config import BuildConfig, changed_content_keys
from clair.pipeline.output_dir import CURRENT_ROW, lock_output
from clair.pipeline.shards import Shard, can_share_budget, list_shards, shard_config, shards_location
from clair.storage.object_store import InUse, Store, account_of, is_url, public_path

_LOOK = 0.3
"""Seconds between two looks at the workers."""
_PATIENCE = 60.0
"""Seconds for workers of a driver that died to end, before the first shard."""
_A_MOMENT = 2.0
_LOOKS = 32
"""Shards looked at at the same time: one at a URL may have to be watched for a minute, by clair.storage.url_lock."""
_ANSWERED = "SELECT total(prompt_tokens) + total(completion_tokens) FROM calls WHERE payer = ?"
Tell = Callable[[int, str], None]


def build_on_ray(
    config: BuildConfig,
    found: Scan,
    *,
    address: str | None = None,
    shards: int | None = None,
    update: bool = False,
    tell: Tell | None = None,
) -> BuildResult:
    """Build all shards on a cluster and merge them into `config.out`, going on from what is there.

    `found` is what `check` returned. `address`: of the cluster's head, `auto` for the one of this machine; else that of
    RAY_ADDRESS, else a Ray of its own on this machine. `shards`: how many; by default as many as there are, or as
    workers have room. `tell(rows, words)` is called a few times a second.
    Raises UserError before any work where Ray, the cluster or the shards that lie there do not fit.
    """
    shard_config(config, Shard(1, 1), shared=True)
    folder = shards_location(config.out)
    with lock_output(folder):
        there, _ = list_shards(folder)
        of = _number(folder, there, shards)
        with lock_output(config.out) as output:
            if not there:
                _check_fresh(config)
            check_resumable(config, output.folder, update=update)
            output.upload("recipe.json")
        with connected(address) as ray, ThreadPoolExecutor(_LOOKS) as pool:
            of = of or shards or _room(ray, config)
            stopped = _Job(ray, pool, config, found, of, there, update, tell or (lambda *_: None)).run()
        if stopped:
            return BuildResult(output.folder, {}, 0, stopped)
    manifest = merge(folder, config.out)
    return BuildResult(output.folder, manifest, manifest["failed"])


# ---- before any work


def _number(folder: str, there: Set[Shard], wanted: int | None) -> int | None:
    """How many shards lie there, if any. Raises UserError where another number is wanted, or several numbers lie."""
    told, numbers = public_path(folder), {shard.count for shard in there}
    if len(numbers) > 1:
        several = ", ".join(map(str, sorted(numbers)))
        raise UserError(f"{told} holds shards of several numbers ({several}); move those away that do not belong")
    of = next(iter(numbers), None)
    if of and wanted and of != wanted:
        raise UserError(f"{told} holds shards of {of}; go on with --shards {of}, or move them away")
    return of


def _check_fresh(config: BuildConfig) -> None:
    """Replies of a run without shards would be paid for again. Raises UserError."""
    url = is_url(config.out)
    if config.ledger is None and (Store(config.out).names("ledger") if url else config.ledger_path.is_file()):
        raise UserError(
            f"{public_path(config.out)} holds the replies of a run without shards; go on without --runner, or choose "
            f"another --out"
        )


def _local(config: BuildConfig) -> bool:
    return any(model.path is not None for model in config.models.values())


def _room(ray: Any, config: BuildConfig) -> int:
    """How many workers the cluster takes now: one a device where a model is local, else one a CPU."""
    has = ray.cluster_resources()
    return max(1, int(has.get("GPU", 0) if _local(config) and has.get("GPU") else has.get("CPU", 1)))


def _secrets(config: BuildConfig) -> dict[str, str]:
    """The environment variables that the recipe names, as far as they are set."""
    names = [model.api_key_env for model in config.models.values() if model.api_key_env]
    for model in config.models.values():
        names += environment_names(model.extra) + environment_names(model.urls)
    return {name: os.environ[name] for name in names if name in os.environ}


# ---- the job


class _Job:
    """Shards waiting, shards being built, and what became of them."""

    def __init__(
        self,
        ray: Any,
        pool: Executor,
        config: BuildConfig,
        found: Scan,
        of: int,
        there: Set[Shard],
        update: bool,
        tell: Tell,
    ) -> None:
        self.ray, self.pool, self.config, self.found = ray, pool, config, found
        self.update, self.tell = update, tell
        self.shards = {shard.name: shard for shard in (Shard(index, of) for index in range(1, of + 1))}
        self.configs = {name: shard_config(config, shard, shared=True) for name, shard in self.shards.items()}
        self.deaths = {name: CrashHistory() for name in self.shards}
        self.running: dict[Any, _Running] = {}
        self.dead: dict[Future[_Look], tuple[str, str]] = {}
        self.idle: list[Any] = []
        self.lost = False
        self.stopped: str | None = None
        self.error: Exception | None = None
        self.rows: dict[str, int] = {}
        self.todo = deque(self._unfinished(there))

    def run(self) -> str | None:
        """Why it stopped early, if it did. Raises UserError as a shard did."""
        with _ctrl_c(self._interrupted):
            while self.todo and not self.stopped and not self.error:
                self._round()
        if self.error:
            raise self.error
        return self.stopped

    def _unfinished(self, there: Set[Shard]) -> Iterator[str]:
        local = {role: model for role, model in self.config.models.items() if model.path is not None}
        identities = {role: weights_identity(model.path) for role, model in local.items() if model.path}
        begun = [name for name, shard in self.shards.items() if shard in there]
        finished = dict(zip(begun, self.pool.map(partial(self._finished, identities), begun), strict=True))
        for name in self.shards:
            if rows := finished.get(name):
                self.rows[name] = rows
            else:
                yield name

    def _finished(self, identities: Mapping[str, str], name: str) -> int | None:
        """The rows of a shard that is built as it would be now; None where there is something to do."""
        config = self.configs[name]
        with lock_output(config.out, _PATIENCE) as output:
            check_resumable(config, output.folder, update=self.update)
            if not (output.folder / "manifest.json").is_file():
                return None
            manifest = read_manifest(output.folder)
        same = not changed_content_keys(manifest["recipe"], recorded_recipe(self.config))
        same &= manifest["prompts_sha256"] == self.found.sha256 and not manifest["failed"]
        same &= all(manifest["models"].get(role, {}).get("identity") == known for role, known in identities.items())
        return int(manifest["counts"]["prompts"]) if same else None

    # ---- one keeper of limits after another, should one die

    def _round(self) -> None:
        ray = self.ray
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            node_id=ray.get_runtime_context().get_node_id(), soft=False
        )
        self.quotas = ray.remote(num_cpus=0, scheduling_strategy=here)(LimitsActor).remote(*self._limits())
        for name, spent in zip(self.shards, self.pool.map(self._spent, self.shards), strict=True):
            self.quotas.begin.remote(name, None, spent)
        self.lost = False
        while self.running or self.dead or (self.todo and not self._ending()):
            while self.todo and not self._ending() and len(self.running) < self._most():
                self._start(self.todo.popleft())
            for ref in ray.wait(list(self.running), timeout=_LOOK)[0] if self.running else ():
                self._ended(ref, self.running.pop(ref))
            for look in wait(self.dead, timeout=0 if self.running else _LOOK).done:
                self._died(*self.dead.pop(look), look)
            self._take_back(len(self.running if self._ending() else self.idle))
            self._show()
        ray.kill(self.quotas)
        for worker in self.idle:
            ray.kill(worker)
        self.idle = []

    def _limits(self) -> tuple[dict[str, RoleLimits], Budget | None]:
        config = self.config
        roles = {
            role: RoleLimits(config.concurrency, model.requests_per_minute, model.tokens_per_minute)
            for role, model in config.models.items()
        }
        shared = config.budget if can_share_budget(config) else None
        return roles, Budget(shared, prices_of(config.models), {}) if shared else None

    def _spent(self, name: str) -> Decimal | None:
        """What a shard has spent of the job's budget, where there is one; None where that cannot be known now."""
        return self._look(name, _PATIENCE).spent if self.config.budget else Decimal(0)

    def _look(self, name: str, patience: float) -> _Look:
        """What a shard has come to, by its ledger, which may be open on one machine at a time."""
        config = self.configs[name]
        if not is_url(config.out) and not config.ledger_path.is_file():
            return _Look(Decimal(0), 0)
        account = account_of(config.out)
        try:
            with lock_output(config.out, patience) as output, output.ledger(config.ledger_path) as ledger:
                spent = ledger.spent(account)
                ((tokens,),) = ledger.read(_ANSWERED, account)
                noted = output.folder / CURRENT_ROW
                row = noted.read_text("utf-8") if noted.is_file() else None
        except InUse:
            return _Look()
        return _Look(Budget(config.budget, prices_of(config.models), spent).spent, int(tokens), row)

    def _ending(self) -> bool:
        return bool(self.error or self.stopped or self.lost)

    def _most(self) -> int:
        return min(len(self.shards), _room(self.ray, self.config))

    def _start(self, name: str) -> None:
        worker = self.idle.pop() if self.idle else self._hire()
        attempt = uuid.uuid4().hex[:12]
        self.quotas.begin.remote(name, attempt, None)
        order = Order(
            config=self.config,
            shard=self.shards[name],
            attempt=attempt,
            update=self.update,
            care=self.deaths[name].care,
            folder=os.getcwd(),
            version=version("clair-apo"),
            environment=_secrets(self.config),
        )
        here = worker.here.remote()
        self.running[worker.build.remote(order, self.quotas)] = _Running(worker, name, here)

    def _hire(self) -> Any:
        devices = {"num_gpus": 1} if _local(self.config) and self.ray.cluster_resources().get("GPU") else {}
        return self.ray.remote(num_cpus=1, max_restarts=0, **devices)(Worker).remote()

    def _take_back(self, most: int) -> None:
        """Take shards back from workers that no node has room for yet, which would be waited for without end.

        A worker without a shard keeps its place, and is the one that such a worker would wait for.
        """
        waiting = [ref for ref, one in self.running.items() if not self.ray.wait([one.here], timeout=0)[0]]
        for ref in waiting[:most]:
            running = self.running.pop(ref)
            self.ray.kill(running.worker)
            self.todo.append(running.name)

    def _ended(self, ref: Any, running: _Running) -> None:
        ray, worker, name = self.ray, running.worker, running.name
        try:
            done: Done = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # a mistake of ours, in the worker: no other shard may go on
            self._failed(error.as_instanceof_cause())
            return
        except ray.exceptions.RayError as error:
            ray.kill(worker)
            self.dead[self.pool.submit(self._look, name, _A_MOMENT)] = name, str(error)
            return
        self.idle.append(worker)
        if done.error:
            error = UserError(done.error)
            error.exit_code = done.code
            self._failed(error)
        elif done.stopped in (LOST, GONE):
            self.todo.append(name)
        elif done.stopped:
            self.stopped = self.stopped or done.stopped

    def _failed(self, error: Exception) -> None:
        self.error = self.error or error
        self.quotas.stop.remote("another shard failed")

    def _died(self, name: str, told: str, looked: Future[_Look]) -> None:
        """Build the shard again; where it keeps dying without coming any further, find the row it dies of."""
        self.todo.append(name)
        try:
            look = looked.result()
        except Exception as error:
            self._failed(error)
            return
        self.quotas.begin.remote(name, None, look.spent)
        if not self.deaths[name].one_more(look.answered, look.row):
            self._failed(UserError(f"shard {name} died {HOPELESS} times before it came to any row: {one_line(told)}"))

    def _interrupted(self) -> None:
        self.stopped = self.stopped or "interrupted"
        self.quotas.stop.remote("interrupted")

    def _show(self) -> None:
        try:
            told = self.ray.get(self.quotas.progress.remote(), timeout=5)
        except self.ray.exceptions.RayActorError:  # its process died: the shards end, and go on under a new one
            self.lost = True
            return
        except self.ray.exceptions.GetTimeoutError:
            return
        for name, numbers in told.items():
            if "pairs" in numbers:
                self.rows[name] = int(numbers["pairs"] + numbers["dropped"])
        flying = int(sum(numbers["in_flight"] for numbers in told.values()))
        waiting = f", {len(self.todo)} waiting" if self.todo else ""
        words = f"{len(self.running)} shards of {len(self.shards)} at work{waiting}, {flying} in flight"
        self.tell(sum(self.rows.values()), words)


@dataclass(frozen=True, slots=True)
class _Look:
    """What a ledger tells of a shard; None where another process has it still."""

    spent: Decimal | None = None
    """Open calls included."""
    answered: int | None = None
    """How many tokens its replies have."""
    row: str | None = None
    """The one it was at, where it takes care."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A shard at work; `here` is there as soon as its worker has found a place on the cluster."""

    worker: Any
    name: str
    here: Any


@contextmanager
def _ctrl_c(interrupted: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C once: the shards send nothing more and keep what is in flight. Twice: leave at once."""

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, before[number])
        interrupted()

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, interrupt)
        except ValueError:  # not in the main thread: signals are the caller's
            break
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
