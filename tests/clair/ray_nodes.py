"""A Ray cluster of several nodes on this machine, and a build on it that takes some seconds."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.clair.building import ScriptedServer, scripted_rows, write_prompts, write_recipe

CONCURRENCY = 8
STORE = 80 * 2**20
FATES = ("wait:0.3", "ok", "wait:0.2", "429:0.1 ok", "500 ok", "400")


@dataclass
class Nodes:
    """A cluster: a head without workers, and nodes of one worker each."""

    cluster: Any

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self) -> Any:
        """One more node; tried again where a busy machine takes longer to start it than Ray waits for it."""
        for tries_left in (2, 1, 0):
            running = set(psutil.Process().children(recursive=True))
            try:
                return self.cluster.add_node(num_cpus=1, object_store_memory=STORE)
            except Exception as error:
                if "timed out during startup" not in str(error) or not tries_left:
                    raise
                for process in set(psutil.Process().children(recursive=True)) - running:
                    process.kill()
        raise AssertionError

    def kill(self, node: Any) -> None:
        """Kill it as if its machine lost power: none of its processes ends by itself."""
        self.cluster.remove_node(node, allow_graceful=False)

    def processes(self, doing: str) -> list[psutil.Process]:
        """The processes of actors that call themselves so."""
        members = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if doing in " ".join(process.cmdline()):
                    members.append(process)
        return members


@contextlib.contextmanager
def cluster() -> Iterator[Nodes]:
    """A head for the length of a `with` block; of all that was started, nothing is left behind it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    running = set(psutil.Process().children(recursive=True))
    ray_cluster = Cluster(initialize_head=True, head_node_args=head)
    started = set(psutil.Process().children(recursive=True)) - running
    try:
        yield Nodes(ray_cluster)
    finally:
        ray_cluster.shutdown()
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not alive, alive


def write_all_fates(folder: Path, url: str, rows: int) -> Path:
    """A recipe whose rows are answered, late, refused, failing or dropped; its prompts are in the same folder."""
    draw = random.Random(0)
    write_prompts(folder / "prompts.jsonl", scripted_rows([draw.choice(FATES) for _ in range(rows)]))
    reviser = {"url": url, "model": "m", "max_tokens": 50, "price": {"input": 1, "output": 1}}
    return write_recipe(folder, url, reviser=reviser, concurrency=CONCURRENCY, budget={"money": 1})


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    """Until it is so; an AssertionError where it takes longer."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.05)


def paid_twice(server: ScriptedServer) -> int:
    """Requests that were answered well more often than once."""
    answered = (r for r in server.requests() if r["step"].startswith(("ok", "wait")))
    counts = Counter(str(r["body"]["messages"]) for r in answered)
    return sum(count - 1 for count in counts.values())
