"""One recipe in, one dataset folder out: resumable, and the same bytes however often it was interrupted."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from clair.config import BuildConfig, ModelConfig, lasting, public
from clair.dataset import DatasetWriter, card
from clair.filters import make_filters
from clair.ledger import Ledger
from clair.limits import Limiter
from clair.models import Model, Refused
from clair.models.asking import Asker, Stop, Stopped, Tally
from clair.models.local import LocalModel, check_model_folder
from clair.models.openai import OpenAIModel
from clair.pipelines import judged, revised, stronger
from clair.prompts import JUDGE_NEEDS, REVISER_NEEDS, load_template
from clair.recipe import UserError, changed_keys, provenance, write_atomically, write_json
from clair.records import Dropped, Pair, Prompt
from clair.sources import Scan, each_prompt, scan
from clair.statistics import wilson
from clair.steps import Judge, Reviser
from clair.urls import api_key, environment_headers

_AHEAD_PER_PLACE = 16
_AHEAD_AT_LEAST = 256


@dataclass(frozen=True, slots=True)
class Built:
    """What a build did. `stopped` tells why it ended early; the folder then still holds what it held before."""

    out: Path
    manifest: Mapping[str, Any]
    failed: int
    stopped: str | None = None


Progress = Callable[[DatasetWriter, Mapping[str, Asker]], None]


def check(config: BuildConfig) -> Scan:
    """Everything that can be wrong before a request is sent. Raises UserError; spends nothing, writes nothing."""
    _templates(config)
    for role, model in config.models.items():
        api_key(model.api_key_env, role)
        environment_headers(model.extra.get("headers", {}))
        if model.path is not None:
            check_model_folder(model.path, role)
    found = scan(config.prompts, config.limit)
    given = found.compared if config.pipeline == "judged" else found.answered
    if config.target is None and given < found.unique:
        column = "answers column" if config.pipeline == "judged" else "answer column"
        raise UserError(
            f"{found.unique - given} of {found.unique} prompts have no answer and the recipe has no target; "
            f"add target: or an {column}"
        )
    if config.pipeline == "judged" and config.judge is None and found.scored < found.unique:
        raise UserError(
            f"{found.unique - found.scored} of {found.unique} prompts have no scores and the recipe has no judge; add "
            f"judge: or a scores column"
        )
    return found


def _templates(config: BuildConfig) -> dict[str, str]:
    """The words for each role that has any: the recipe's own file or the built-in ones."""
    words = {}
    if config.reviser:
        own, edits = config.reviser.template, config.reviser.mode == "edits"
        words["reviser"] = load_template(None if edits else own, "reviser.j2", REVISER_NEEDS)
        if edits:
            words["edits"] = load_template(own, "reviser_edits.j2", REVISER_NEEDS)
    if config.judge:
        words["judge"] = load_template(config.judge.template, "judge.j2", JUDGE_NEEDS)
    return words


def build(
    config: BuildConfig, *, found: Scan | None = None, update: bool = False, on_progress: Progress | None = None
) -> Built:
    """Build the dataset folder `config.out`, going on from whatever its ledger holds.

    `found` is what `check` returned, where the caller has looked already.
    Raises UserError for the user's mistakes (docs/data.md lists them) before any work, and for a refusing endpoint.
    """
    found = found or check(config)
    out = Path(config.out)
    with locked(out):
        _same_recipe(config, out, update=update)
        with Ledger(config.ledger_path) as ledger:
            return asyncio.run(_build(config, found, ledger, on_progress or (lambda *_: None)))


async def _build(config: BuildConfig, found: Scan, ledger: Ledger, on_progress: Progress) -> Built:
    started = time.monotonic()
    stop = Stop()
    askers = _askers(config, ledger, stop)
    out = Path(config.out)
    writer = DatasetWriter(out, seed=config.seed, test_fraction=config.test_fraction)
    line = _line(config, askers)
    finished = False
    try:
        with _ctrl_c(stop):
            await _fill(config, line.run, askers, writer, on_progress)
        if isinstance(stop.error, Exception):
            raise stop.error
        finished = stop.reason is None
    finally:
        hashes = writer.close(keep=finished)
        for asker in askers.values():
            await asker.model.close()
    if not finished:
        return Built(out, {}, writer.failed, stop.reason)
    manifest = _manifest(config, found, writer, askers, hashes, time.monotonic() - started)
    if line.judge and line.judge.seen:
        manifest["position"] = position_bias(line.judge.seen)
    write_json(out / "manifest.json", manifest)
    write_atomically(out / "README.md", card(manifest))
    return Built(out, manifest, writer.failed)


async def _fill(
    config: BuildConfig,
    run: Callable[[Prompt], Awaitable[Pair]],
    askers: Mapping[str, Asker],
    writer: DatasetWriter,
    on_progress: Progress,
) -> None:
    """Run every prompt through the pipeline, and write the outcomes in the order of the prompts."""
    ahead = _AHEAD_AT_LEAST + _AHEAD_PER_PLACE * config.concurrency
    if config.accept:  # what is begun beyond the last pair wanted is paid for and not used: begin little
        ahead = 2 * config.concurrency
    prompts = each_prompt(config.prompts, config.limit)

    async def drain() -> None:
        await asyncio.gather(*(asker.drain() for asker in askers.values()))

    async with aclosing(in_order(partial(_row, run), prompts, ahead, drain)) as outcomes:
        async for id, outcome in outcomes:
            if isinstance(outcome, Stopped):
                return
            if isinstance(outcome, Pair):
                writer.add(outcome)
            else:
                writer.drop(id, outcome)
            on_progress(writer, askers)
            if writer.pairs == config.accept:
                return


async def _row(
    pipeline: Callable[[Prompt], Awaitable[Pair]], item: tuple[Prompt, bool]
) -> tuple[str, Pair | Dropped | Stopped]:
    prompt, repeated = item
    if repeated:
        return prompt.id, Dropped("prompts", "duplicate", "the same prompt came before")
    try:
        return prompt.id, await pipeline(prompt)
    except (Dropped, Stopped) as outcome:
        return prompt.id, outcome


@dataclass(frozen=True, slots=True)
class Line:
    """The assembled pipeline: one coroutine a prompt, and the judge whose verdicts it counts, if there is one."""

    run: Callable[[Prompt], Awaitable[Pair]]
    judge: Judge | None = None


def _line(config: BuildConfig, askers: Mapping[str, Asker]) -> Line:
    words, filters, target = _templates(config), make_filters(config.filters), askers.get("target")
    if config.reviser:
        own = config.reviser
        reviser = Reviser(askers["reviser"], words["reviser"], words.get("edits"), own.system, own.ask_again)
        return Line(partial(revised, target=target, reviser=reviser, filters=filters))
    if config.stronger:
        return Line(partial(stronger, target=target, stronger=askers["stronger"], filters=filters))
    judge = None
    if config.judge:
        own_judge = config.judge
        judge = Judge(askers["judge"], words["judge"], own_judge.order, own_judge.system, own_judge.ask_again)
    return Line(partial(judged, target=target, judge=judge, samples=config.samples, filters=filters), judge)


Item = TypeVar("Item")
Result = TypeVar("Result")


async def in_order(
    work: Callable[[Item], Awaitable[Result]],
    items: Iterable[Item],
    ahead: int,
    drain: Callable[[], Awaitable[None]],
) -> AsyncGenerator[Result]:
    """`work` on every item at once, at most `ahead` begun or waiting to be taken, results in the order of the items.

    However it ends, `drain` is awaited before the rest is cancelled, so that what is under way can be kept.
    """
    pending: deque[asyncio.Future[Result]] = deque()
    try:
        for item in items:
            pending.append(asyncio.ensure_future(work(item)))
            while pending and (pending[0].done() or len(pending) >= ahead):
                yield await _first(pending)
        while pending:
            yield await _first(pending)
    finally:
        if pending:
            await drain()
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)


async def _first(pending: deque[asyncio.Future[Result]]) -> Result:
    result = await pending[0]
    pending.popleft()
    return result


def _askers(config: BuildConfig, ledger: Ledger, stop: Stop) -> dict[str, Asker]:
    askers: dict[str, Asker] = {}
    checked: asyncio.Future[None] | None = None

    async def check_all() -> None:
        for asker in askers.values():
            await asker.model.check()

    async def ready() -> None:
        nonlocal checked
        if checked is None:
            checked = asyncio.ensure_future(check_all())
        try:
            await asyncio.shield(checked)
        except Refused as error:
            stop.now(str(error), error)
            raise

    for role, model in config.models.items():
        askers[role] = Asker(
            role=role,
            model=_open_model(role, model),
            options=model.options(config.seed),
            ledger=ledger,
            limiter=Limiter(config.concurrency),
            stop=stop,
            ready=ready,
            attempts=config.attempts,
        )
    return askers


def _open_model(role: str, config: ModelConfig) -> Model:
    if config.path is not None:
        return LocalModel(config.path, batch_size=config.batch_size, trust_remote_code=config.trust_remote_code)
    assert config.url is not None
    assert config.model is not None
    return OpenAIModel(
        config.url, config.model, key=api_key(config.api_key_env, role), id=config.id, timeout=config.timeout, role=role
    )


@contextmanager
def _ctrl_c(stop: Stop) -> Iterator[None]:
    """Ctrl-C once: send nothing more, keep what is in flight. Twice: leave at once."""
    loop = asyncio.get_running_loop()

    def interrupt(number: signal.Signals) -> None:
        stop.now("interrupted")
        loop.remove_signal_handler(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        try:
            loop.add_signal_handler(number, interrupt, number)
        except (ValueError, RuntimeError):  # not in the main thread: signals are the caller's
            break
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the output folder for this process. Raises UserError naming the process that holds it already."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(f"{out} is in use by process {owner}; wait for it, or choose another --out") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _same_recipe(config: BuildConfig, out: Path, *, update: bool) -> None:
    """The folder remembers its recipe from before the first call. Raises UserError where this is another one."""
    file = out / "recipe.json"
    recipe = public(config)
    if file.is_file() and not update:
        changed = changed_keys(lasting(json.loads(file.read_text("utf-8"))), lasting(recipe))
        if changed:
            raise UserError(
                f"{out} holds the run of another recipe (it differs in {', '.join(changed)}); choose another --out, or "
                f"add --update to rebuild it with this one: replies that still fit are reused, only the rest is asked"
            )
    elif not file.is_file():
        strange = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith((".lock", "ledger.sqlite")))
        if strange:
            raise UserError(f"{out} is no dataset folder and not empty (it holds {strange[0]}); choose another --out")
    write_json(file, recipe)


def _manifest(
    config: BuildConfig,
    found: Scan,
    writer: DatasetWriter,
    askers: Mapping[str, Asker],
    hashes: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    prompts = writer.pairs + writer.counts["dropped"]
    assert prompts == found.rows or writer.pairs == config.accept, (prompts, found.rows)
    counts = {"prompts": prompts, "pairs": writer.pairs, **{s: writer.counts[s] for s in ("train", "test")}}
    counts["dropped"] = writer.counts["dropped"]
    models = config.models
    return {
        "format": 1,
        "pipeline": config.pipeline,
        "counts": counts,
        "drop_reasons": dict(sorted(writer.reasons.items())),
        "failed": writer.failed,
        "contrast": writer.contrast_means(),
        "models": {role: {"model": a.model.name, "identity": a.model.identity} for role, a in askers.items()},
        "sampling": {role: models[role].options(config.seed) for role in askers},
        "tokens": {role: _told(asker.tally) for role, asker in askers.items()},
        "prompts_sha256": found.sha256,
        "files": dict(hashes),
        "seed": config.seed,
        "recipe": public(config),
        **provenance(),
        "seconds": round(seconds, 1),
    }


def position_bias(seen: Mapping[int, int]) -> dict[str, Any]:
    """How often the judge preferred what was shown first, of its verdicts for either; biased where 1/2 is not in it.

    Every pair is shown in both orders or in one drawn by hash, so that an unbiased judge comes to one half.
    """
    first, second = seen.get(1, 0), seen.get(2, 0)
    interval = wilson(first, first + second)
    return {
        "first": first,
        "second": second,
        "ties": seen.get(0, 0),
        "share_first": interval.mean,
        "ci95": [interval.lo, interval.hi],
        "biased": not interval.lo <= 0.5 <= interval.hi,
    }


def _told(tally: Tally) -> dict[str, int]:
    return {
        "prompt": tally.prompt_tokens,
        "completion": tally.completion_tokens,
        "calls": tally.calls,
        "reused": tally.reused,
        "retries": tally.retries,
    }
