"""Build on a Ray cluster: workers build the shards within shared limits and one budget, and the driver merges them.

The driver assigns shards to workers and restarts those that died. Each shard goes on from its own ledger, so that the
death of an actor, a worker or a node costs at most its requests in flight. Ray is imported when a job begins.
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

from clair.cluster.crash_isolation import MAX_CRASHES, CrashHistory
from clair.cluster.leased_limits import LIMITS_LOST
from clair.cluster.merge import merge
from clair.cluster.ray_session import LimitsActor, check_no_servers, connected
from clair.cluster.shared_limits import REPLACED, RoleLimits
from clair.cluster.worker import ShardResult, ShardTask, Worker
from clair.core.errors import UserError, one_line
from clair.core.urls import environment_names
from clair.data.dataset import read_manifest
from clair.data.prompt_sources import Scan
from clair.inference.budget import Budget, role_prices
from clair.inference.model_folder import weights_identity
from clair.pipeline.build import BuildResult, check_resumable, recorded_recipe
from clair.pipeline.config import BuildConfig, changed_content_keys
from clair.pipeline.output_dir import CURRENT_ROW, lock_output
from clair.pipeline.shards import Shard, can_share_budget, list_shards, shard_config, shard_count, shards_location
from clair.storage.object_store import InUse, Store

_POLL_SECONDS = 0.3
"""Seconds between two polls of the workers."""
_PATIENCE = 60.0
"""Seconds to wait for the workers of a dead driver to end, before the first shard."""
_SHORT_PATIENCE = 2.0
_INSPECTION_THREADS = 32
"""Shards inspected concurrently: clair.storage.url_lock may have to watch one at a URL for a minute."""
_ANSWERED_TOKENS = "SELECT total(prompt_tokens) + total(completion_tokens) FROM calls WHERE payer = ?"
OnProgress = Callable[[int, str], None]


def build_on_ray(
    config: BuildConfig,
    prompt_scan: Scan,
    *,
    address: str | None = None,
    shards: int | None = None,
    update: bool = False,
    on_progress: OnProgress | None = None,
) -> BuildResult:
    """Build all shards on a cluster and merge them into `config.out`, going on from what is there.

    `prompt_scan` is the result of `check`. `address`: the address of the cluster's head, `auto` for the cluster of this
    machine; the default is RAY_ADDRESS, or else a new local Ray. `shards`: their number; by default the number of
    existing shards, or of workers that fit. `on_progress(rows, message)` is called a few times a second.
    Raises UserError before any work if Ray, the cluster or the existing shards do not fit.
    """
    check_no_servers(config.models)
    shard_config(config, Shard(1, 1), shared=True)
    folder = shards_location(config.out)
    with lock_output(folder):
        existing, _ = list_shards(folder)
        count = shard_count(folder, existing)
        if count and shards and count != shards:
            raise UserError(f"{folder.public} holds shards of {count}; go on with --shards {count}, or move them away")
        with lock_output(config.out) as output:
            if not existing:
                _check_no_unsharded_ledger(config)
            check_resumable(config, output.folder, update=update)
            output.upload("recipe.json")
        with connected(address) as ray, ThreadPoolExecutor(_INSPECTION_THREADS) as pool:
            count = count or shards or _max_workers(ray, config)
            job = _Job(ray, pool, config, prompt_scan, count, existing, update, on_progress or (lambda *_: None))
            stopped = job.run()
        if stopped:
            return BuildResult(output.folder, {}, 0, stopped)
    manifest = merge(folder, config.out)
    return BuildResult(output.folder, manifest, manifest["failed"])


# ---- before any work


def _check_no_unsharded_ledger(config: BuildConfig) -> None:
    """Raise UserError if the folder holds replies of a run without shards, which would be paid for again."""
    url = config.out.is_url
    if config.ledger is None and (Store(config.out).names("ledger") if url else config.ledger_path.is_file()):
        raise UserError(
            f"{config.out.public} holds the replies of a run without shards; go on without --runner, or choose "
            f"another --out"
        )


def _has_local_model(config: BuildConfig) -> bool:
    return any(model.path is not None for model in config.models.values())


def _max_workers(ray: Any, config: BuildConfig) -> int:
    """The number of workers that the cluster takes now: one per GPU if a model is local, else one per CPU."""
    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0) if _has_local_model(config) else 0
    return max(1, int(gpus or resources.get("CPU", 1)))


def _secrets(config: BuildConfig) -> dict[str, str]:
    """The environment variables that the recipe names and that are set."""
    names = [model.api_key_env for model in config.models.values() if model.api_key_env]
    for model in config.models.values():
        names += environment_names(model.extra) + environment_names(model.urls)
    return {name: os.environ[name] for name in names if name in os.environ}


# ---- the job


class _Job:
    """The state of a job: shards that wait, shards in progress, and their results."""

    def __init__(
        self,
        ray: Any,
        pool: Executor,
        config: BuildConfig,
        prompt_scan: Scan,
        count: int,
        existing: Set[Shard],
        update: bool,
        on_progress: OnProgress,
    ) -> None:
        self.ray, self.pool, self.config, self.prompt_scan = ray, pool, config, prompt_scan
        self.update, self.on_progress = update, on_progress
        self.shards = {shard.name: shard for shard in (Shard(index, count) for index in range(1, count + 1))}
        self.configs = {name: shard_config(config, shard, shared=True) for name, shard in self.shards.items()}
        self.crashes = {name: CrashHistory() for name in self.shards}
        self.running: dict[Any, _Running] = {}
        self.inspections: dict[Future[_Inspection], tuple[str, str]] = {}
        self.idle: list[Any] = []
        self.limits_lost = False
        self.stopped: str | None = None
        self.error: Exception | None = None
        self.rows: dict[str, int] = {}
        self.waiting = deque(self._unfinished(existing))

    def run(self) -> str | None:
        """Run the job; return the reason if it stopped early. Raises the error of a failed shard."""
        with _on_interrupt(self._interrupt):
            while self.waiting and not self.stopped and not self.error:
                self._run_with_limits()
        if self.error:
            raise self.error
        return self.stopped

    def _unfinished(self, existing: Set[Shard]) -> Iterator[str]:
        identities = {role: weights_identity(model.path) for role, model in self.config.models.items() if model.path}
        started = [name for name, shard in self.shards.items() if shard in existing]
        finished = dict(zip(started, self.pool.map(partial(self._finished_rows, identities), started), strict=True))
        for name in self.shards:
            if rows := finished.get(name):
                self.rows[name] = rows
            else:
                yield name

    def _finished_rows(self, identities: Mapping[str, str], name: str) -> int | None:
        """The rows of a shard that is finished and up to date; None if there is work to do."""
        config = self.configs[name]
        with lock_output(config.out, _PATIENCE) as output:
            check_resumable(config, output.folder, update=self.update)
            if not (output.folder / "manifest.json").is_file():
                return None
            manifest = read_manifest(output.folder)
        same = not changed_content_keys(manifest["recipe"], recorded_recipe(self.config))
        same &= manifest["prompts_sha256"] == self.prompt_scan.sha256 and not manifest["failed"]
        same &= all(
            manifest["models"].get(role, {}).get("identity") == identity for role, identity in identities.items()
        )
        return int(manifest["counts"]["prompts"]) if same else None

    # ---- one limits actor after another, if one dies

    def _run_with_limits(self) -> None:
        ray = self.ray
        this_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            node_id=ray.get_runtime_context().get_node_id(), soft=False
        )
        self.limits = ray.remote(num_cpus=0, scheduling_strategy=this_node)(LimitsActor).remote(*self._limits_config())
        for name, spent in zip(self.shards, self.pool.map(self._spent, self.shards), strict=True):
            self.limits.begin.remote(name, None, spent)
        self.limits_lost = False
        while self.running or self.inspections or (self.waiting and not self._is_ending()):
            while self.waiting and not self._is_ending() and len(self.running) < self._worker_limit():
                self._start(self.waiting.popleft())
            for ref in ray.wait(list(self.running), timeout=_POLL_SECONDS)[0] if self.running else ():
                self._on_end(ref, self.running.pop(ref))
            for inspection in wait(self.inspections, timeout=0 if self.running else _POLL_SECONDS).done:
                self._on_crash(*self.inspections.pop(inspection), inspection)
            self._withdraw_unplaced(len(self.running if self._is_ending() else self.idle))
            self._report_progress()
        ray.kill(self.limits)
        for worker in self.idle:
            ray.kill(worker)
        self.idle = []

    def _limits_config(self) -> tuple[dict[str, RoleLimits], Budget | None]:
        config = self.config
        roles = {
            role: RoleLimits(config.concurrency, model.requests_per_minute, model.tokens_per_minute)
            for role, model in config.models.items()
        }
        shared = config.budget if can_share_budget(config) else None
        return roles, Budget(shared, role_prices(config.models), {}) if shared else None

    def _spent(self, name: str) -> Decimal | None:
        """The amount that a shard has spent of the job's budget, 0 without a budget; None if it cannot be known now."""
        return self._inspect(name, _PATIENCE).spent if self.config.budget else Decimal(0)

    def _inspect(self, name: str, patience: float) -> _Inspection:
        """Read the state of a shard from its ledger, which only one machine may have open."""
        config = self.configs[name]
        if not config.out.is_url and not config.ledger_path.is_file():
            return _Inspection(Decimal(0), 0)
        account = config.out.account
        try:
            with lock_output(config.out, patience) as output, output.ledger(config.ledger_path) as ledger:
                spent = ledger.spent(account)
                ((tokens,),) = ledger.read(_ANSWERED_TOKENS, account)
                row_file = output.folder / CURRENT_ROW
                row = row_file.read_text("utf-8") if row_file.is_file() else None
        except InUse:
            return _Inspection()
        return _Inspection(Budget(config.budget, role_prices(config.models), spent).spent, int(tokens), row)

    def _is_ending(self) -> bool:
        return bool(self.error or self.stopped or self.limits_lost)

    def _worker_limit(self) -> int:
        return min(len(self.shards), _max_workers(self.ray, self.config))

    def _start(self, name: str) -> None:
        worker = self.idle.pop() if self.idle else self._start_worker()
        attempt = uuid.uuid4().hex[:12]
        self.limits.begin.remote(name, attempt, None)
        task = ShardTask(
            config=self.config,
            shard=self.shards[name],
            attempt=attempt,
            update=self.update,
            crash_policy=self.crashes[name].policy,
            folder=os.getcwd(),
            version=version("clair-apo"),
            environment=_secrets(self.config),
        )
        placed = worker.is_placed.remote()
        self.running[worker.build.remote(task, self.limits)] = _Running(worker, name, placed)

    def _start_worker(self) -> Any:
        devices = {"num_gpus": 1} if _has_local_model(self.config) and self.ray.cluster_resources().get("GPU") else {}
        return self.ray.remote(num_cpus=1, max_restarts=0, **devices)(Worker).remote()

    def _withdraw_unplaced(self, limit: int) -> None:
        """Withdraw up to `limit` shards from workers that Ray has not placed, which might never be placed.

        An idle worker keeps its place on a node, so that an unplaced worker may wait for it without end.
        """
        unplaced = [ref for ref, item in self.running.items() if not self.ray.wait([item.placed], timeout=0)[0]]
        for ref in unplaced[:limit]:
            running = self.running.pop(ref)
            self.ray.kill(running.worker)
            self.waiting.append(running.name)

    def _on_end(self, ref: Any, running: _Running) -> None:
        ray, worker, name = self.ray, running.worker, running.name
        try:
            result: ShardResult = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # a bug in the worker: no other shard may go on
            self._failed(error.as_instanceof_cause())
            return
        except ray.exceptions.RayError as error:
            ray.kill(worker)
            self.inspections[self.pool.submit(self._inspect, name, _SHORT_PATIENCE)] = name, str(error)
            return
        self.idle.append(worker)
        if result.error:
            error = UserError(result.error)
            error.exit_code = result.code
            self._failed(error)
        elif result.stopped in (LIMITS_LOST, REPLACED):
            self.waiting.append(name)
        elif result.stopped:
            self.stopped = self.stopped or result.stopped

    def _failed(self, error: Exception) -> None:
        self.error = self.error or error
        self.limits.stop.remote("another shard failed")

    def _on_crash(self, name: str, message: str, inspected: Future[_Inspection]) -> None:
        """Queue the shard again, with a crash policy that identifies the row if workers keep dying without progress."""
        self.waiting.append(name)
        try:
            inspection = inspected.result()
        except Exception as error:
            self._failed(error)
            return
        self.limits.begin.remote(name, None, inspection.spent)
        if not self.crashes[name].add_crash(inspection.answered, inspection.row):
            self._failed(
                UserError(f"shard {name} died {MAX_CRASHES} times before it came to any row: {one_line(message)}")
            )

    def _interrupt(self) -> None:
        self.stopped = self.stopped or "interrupted"
        self.limits.stop.remote("interrupted")

    def _report_progress(self) -> None:
        try:
            progress = self.ray.get(self.limits.progress.remote(), timeout=5)
        except self.ray.exceptions.RayActorError:  # its process died: the shards end, and go on with a new actor
            self.limits_lost = True
            return
        except self.ray.exceptions.GetTimeoutError:
            return
        for name, numbers in progress.items():
            if "pairs" in numbers:
                self.rows[name] = int(numbers["pairs"] + numbers["dropped"])
        in_flight = int(sum(numbers["in_flight"] for numbers in progress.values()))
        waiting = f", {len(self.waiting)} waiting" if self.waiting else ""
        message = f"{len(self.running)} shards of {len(self.shards)} at work{waiting}, {in_flight} in flight"
        self.on_progress(sum(self.rows.values()), message)


@dataclass(frozen=True, slots=True)
class _Inspection:
    """The state of a shard by its ledger; None if another process still has it open."""

    spent: Decimal | None = None
    """Open calls included."""
    answered: int | None = None
    """The number of tokens of its replies."""
    row: str | None = None
    """The row it was at, if its crash policy notes rows."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A shard in progress; `placed` is ready as soon as Ray has placed its worker on a node."""

    worker: Any
    name: str
    placed: Any


@contextmanager
def _on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` on the first Ctrl-C or SIGTERM, and restore the handlers, so that a second one exits at once."""

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, previous[number])
        callback()

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, interrupt)
        except ValueError:  # not in the main thread: the caller handles signals
            break
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
