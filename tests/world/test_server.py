"""The embedded endpoint over real HTTP: formats, misbehaviour, errors in OpenAI's form, and what it counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from clair.data.records import Revision
from clair.prompting.edits import parse_edits
from recipes.world.judge import Leanings
from recipes.world.reviser import REFUSAL, SOLUTION, STYLES, Misbehaviour, corrected
from recipes.world.running import ROOT, Running, running
from recipes.world.server import ServerOptions, parse_options
from recipes.world.tasks import Task, distinct_tasks, is_right

TASKS = distinct_tasks("train", 300, seed=3)
RATES = Misbehaviour(too_many=0.1, server_error=0.1, refusal=0.1, label_in_reasoning=0.1, truncation=0.1, allusion=0.1)


class Heard(NamedTuple):
    status: int
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        return self.body["choices"][0]["message"]["content"]


def ask(url: str, body: dict[str, Any] | bytes, *, key: str | None = None) -> Heard:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url}/chat/completions", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return Heard(response.status, dict(response.headers), json.load(response))
    except urllib.error.HTTPError as error:
        with error:
            return Heard(error.code, dict(error.headers), json.load(error))


def revision(task: Task, student: str) -> dict[str, Any]:
    message = (
        f"You are a teacher.\n<task>\n{task.prompt}\n</task>\n\n<student_solution>\n{student}\n</student_solution>\n"
        "Reason under {teacher_reasoning}, then write {corrected_student_solution}."
    )
    return {"model": "world-reviser", "messages": [{"role": "user", "content": message}], "temperature": 0.7}


def bare(task: Task) -> dict[str, Any]:
    return {"model": "world-target", "messages": [{"role": "user", "content": task.prompt}]}


def solution(text: str) -> str:
    """The text under the last label, without its mark-up: enough to read this server's own styles."""
    return text.rpartition(SOLUTION)[2].strip("*: \n")


@pytest.fixture(scope="module")
def calm() -> Iterator[Running]:
    with running(ServerOptions(max_seconds=120)) as server:
        yield server


@pytest.fixture(scope="module")
def wild() -> Iterator[Running]:
    with running(ServerOptions(max_seconds=120, misbehaviour=RATES, retry_after=3)) as server:
        yield server


def test_an_answer_has_the_form_of_a_chat_completion(calm: Running) -> None:
    heard = ask(calm.url, revision(TASKS[0], TASKS[0].wrong))
    assert heard.status == 200
    assert heard.body["object"] == "chat.completion"
    assert heard.body["id"].startswith("chatcmpl-")
    assert heard.body["model"] == "world-reviser"
    assert heard.body["choices"][0]["finish_reason"] == "stop"
    usage = heard.body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 100


def test_the_reviser_changes_the_wrong_value_alone_and_uses_every_style(calm: Running) -> None:
    styles: Counter[str] = Counter()
    for task in TASKS[:100]:
        text = ask(calm.url, revision(task, f"Hm. {task.wrong}")).text
        assert solution(text) == f"Hm. {task.right}"
        assert text.index("{teacher_reasoning}") < text.index(SOLUTION)
        styles[
            text.partition("{teacher_reasoning}")[0]
            + text.partition(SOLUTION)[2][:3].strip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        ] += 1
    print(f"100 replies looked at, {len(styles)} label styles: {dict(styles)}")
    assert len(styles) >= len(STYLES)


def test_a_right_student_is_copied_unchanged_and_an_empty_one_gets_the_right_sentence(calm: Running) -> None:
    for task in TASKS[:20]:
        spoken = f"{task.right} I am sure."
        assert solution(ask(calm.url, revision(task, spoken)).text) == spoken
        assert solution(ask(calm.url, revision(task, "No idea")).text) == task.right


def test_a_task_of_another_world_is_left_as_it_is(calm: Running) -> None:
    foreign = replace(TASKS[0], prompt="Write a poem.")
    assert solution(ask(calm.url, revision(foreign, "Roses are red.")).text) == "Roses are red."


def test_at_a_request_for_edits_it_names_the_smallest_unique_one(calm: Running) -> None:
    for task in TASKS[:60]:
        for student in (task.wrong, task.right, "No idea", f"{task.wrong_value} {task.wrong}"):
            body = revision(task, student)
            body["messages"][0]["content"] = body["messages"][0]["content"].replace(SOLUTION, "{minimal_edits}")
            parsed = parse_edits(ask(calm.url, body).text, "stop", student)
            assert parsed == Revision(parsed.reasoning, corrected(task, student))


def test_at_a_repeated_request_it_answers_the_first_one_and_behaves() -> None:
    with running(ServerOptions(max_seconds=60, misbehaviour=Misbehaviour(refusal=0.5, allusion=0.5))) as server:
        for task in TASKS[:30]:
            body = revision(task, task.wrong)
            body["messages"] += [{"role": "assistant", "content": "?"}, {"role": "user", "content": "Give it again."}]
            text = ask(server.url, body).text
            assert text.startswith("{teacher_reasoning}: ")
            assert solution(text) == task.right
        assert server.stats()["misbehaviours"] == {}


def test_the_last_turn_of_a_conversation_is_the_task(calm: Running) -> None:
    task = TASKS[0]
    conversation = f"User:\nHello.\n\nAssistant:\nHello, what can I do?\n\nUser:\n{task.prompt}"
    text = ask(calm.url, revision(replace(task, prompt=conversation), task.wrong)).text
    assert solution(text) == task.right


def verdict(url: str, task: Task, first: str, second: str) -> str:
    message = (
        f"<task>\n{task.prompt}\n</task>\n<student_solution_1>\n{first}\n</student_solution_1>\n"
        f"<student_solution_2>\n{second}\n</student_solution_2>"
    )
    heard = ask(url, {"model": "world-judge", "messages": [{"role": "user", "content": message}]})
    return heard.text.rpartition("{best_student_solution}")[2].strip("*: \n")


def test_the_judge_prefers_the_right_solution_in_either_order(calm: Running) -> None:
    for task in TASKS[:25]:
        assert verdict(calm.url, task, task.right, task.wrong) == "[1]"
        assert verdict(calm.url, task, task.wrong, task.right) == "[2]"
        assert verdict(calm.url, task, task.wrong, task.wrong) == "[tie]"


def test_a_judge_with_position_bias_prefers_the_first_at_that_rate() -> None:
    with running(ServerOptions(leanings=Leanings(position_bias=0.4), max_seconds=60)) as server:
        firsts = [verdict(server.url, task, task.wrong, task.right) == "[1]" for task in TASKS[:200]]
    print(f"{len(firsts)} verdicts looked at, {sum(firsts)} for the first")
    assert 0.3 < sum(firsts) / len(firsts) < 0.5


def test_the_target_is_right_about_half_of_the_time_and_else_follows_the_wrong_rule(calm: Running) -> None:
    texts = [ask(calm.url, bare(task)).text for task in TASKS]
    assert all(text in (task.right, task.wrong) for task, text in zip(TASKS, texts, strict=True))
    right = sum(is_right(task, text) for task, text in zip(TASKS, texts, strict=True))
    print(f"{len(TASKS)} answers looked at, {right} right")
    assert 0.4 < right / len(TASKS) < 0.6


def test_a_token_limit_cuts_the_reply_and_reports_it(calm: Running) -> None:
    heard = ask(calm.url, revision(TASKS[0], TASKS[0].wrong) | {"max_tokens": 5})
    assert len(heard.text) == 20
    assert heard.body["choices"][0]["finish_reason"] == "length"


def test_n_gives_that_many_choices(calm: Running) -> None:
    choices = [ask(calm.url, bare(task) | {"n": 2}).body["choices"] for task in TASKS[:30]]
    assert all(len(two) == 2 for two in choices)
    assert any(first["message"] != second["message"] for first, second in choices)


def test_misbehaviour_comes_at_its_rate_and_ends_after_three_attempts_at_most(wild: Running) -> None:
    finals: list[Heard] = []
    refused: list[int] = []
    for task in TASKS:
        tries = [ask(wild.url, revision(task, task.wrong))]
        while tries[-1].status != 200 and len(tries) < 9:
            tries.append(ask(wild.url, revision(task, task.wrong)))
        finals.append(tries[-1])
        refused.append(len(tries) - 1)
        for heard in tries[:-1]:
            assert heard.status in (429, 500)
            assert heard.body["error"]["message"]
            assert heard.headers.get("Retry-After") == ("3" if heard.status == 429 else None)
    assert max(refused) == 3
    kinds = {
        "refusal": sum(heard.text == REFUSAL for heard in finals),
        "truncation": sum(heard.body["choices"][0]["finish_reason"] == "length" for heard in finals),
        "label_in_reasoning": sum("stands under {corrected" in heard.text for heard in finals),
        "allusion": sum("Here is the corrected version" in heard.text for heard in finals),
        "refused first": sum(count > 0 for count in refused) / 2,
    }
    print(f"{len(finals)} requests looked at: {kinds}, {sum(refused)} refusals")
    for kind, count in kinds.items():
        assert 0.04 < count / len(finals) < 0.17, kind
    stats = wild.stats()
    assert stats["statuses"]["200"] == stats["paid_distinct"] == len(TASKS)
    assert stats["paid_more_than_once"] == 0
    assert stats["statuses"]["429"] + stats["statuses"]["500"] == sum(refused)
    assert stats["misbehaviours"]["refusal"] == kinds["refusal"]


def test_a_request_answered_twice_shows_in_the_stats_whatever_the_order_of_its_keys() -> None:
    body = revision(TASKS[0], TASKS[0].wrong)
    with running(ServerOptions(max_seconds=60)) as server:
        ask(server.url, body)
        ask(server.url, dict(reversed(body.items())))
        ask(server.url, revision(TASKS[1], TASKS[1].wrong))
        stats = server.stats()
    assert stats["requests"] == 3
    assert stats["paid_more_than_once"] == 1
    assert sorted(stats["paid"].values()) == [1, 2]


def test_more_requests_in_flight_than_the_cap_are_refused() -> None:
    with running(ServerOptions(cap=2, latency=3.0, max_seconds=60)) as server, ThreadPoolExecutor(6) as pool:
        heard = list(pool.map(lambda task: ask(server.url, bare(task)).status, TASKS[:6]))
        stats = server.stats()
    assert Counter(heard) == {200: 2, 429: 4}
    assert stats["max_in_flight"] >= 3


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "gpt-9", "messages": [{"role": "user", "content": "Hi"}]}, 404, "model_not_found"),
        ({"model": "world-target", "messages": []}, 400, "invalid_messages"),
        ({"model": "world-target", "messages": [{"role": "system", "content": "Hi"}]}, 400, "invalid_messages"),
        (
            {"model": "world-target", "messages": [{"role": "user", "content": "Hi"}], "stream": True},
            400,
            "unsupported_value",
        ),
        (b"{", 400, "invalid_json"),
    ],
)
def test_a_bad_request_gets_an_error_in_openai_form(calm: Running, body, status: int, code: str) -> None:
    heard = ask(calm.url, body)
    assert heard.status == status
    assert heard.body["error"]["code"] == code
    assert heard.body["error"]["message"]


def test_with_a_key_the_server_asks_for_it() -> None:
    with running(ServerOptions(api_key="secret", max_seconds=60)) as server:
        body = bare(TASKS[0])
        assert [ask(server.url, body, key=key).status for key in (None, "wrong", "secret")] == [401, 401, 200]
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(f"{server.url}/models", timeout=10)
        refused.value.close()


def test_the_models_are_listed(calm: Running) -> None:
    with urllib.request.urlopen(f"{calm.url}/models", timeout=10) as response:
        assert [model["id"] for model in json.load(response)["data"]] == [
            "world-reviser",
            "world-target",
            "world-stronger",
            "world-judge",
            "world-second-judge",
        ]


def gone(pid: int, seconds: float) -> bool:
    """True if a process ends within this time (a zombie has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_the_server_ends_with_its_block_and_after_its_time() -> None:
    with running(ServerOptions(max_seconds=60)) as server:
        pass
    assert gone(server.pid, 0.5)
    with running(ServerOptions(max_seconds=0.5)) as server:
        assert gone(server.pid, 10)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads process states from /proc")
def test_the_server_ends_when_the_process_that_started_it_is_killed() -> None:
    program = (
        "import time; from recipes.world.running import running\n"
        "with running() as server: print(server.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    assert gone(pid, 10)


def test_a_server_that_cannot_start_is_a_clear_error(calm: Running) -> None:
    taken = int(calm.url.split(":")[2].removesuffix("/v1"))
    with pytest.raises(RuntimeError, match="did not start"), running(ServerOptions(port=taken)):
        pass


def test_rates_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"slow is 1\.5"):
        Misbehaviour(slow=1.5)
    with pytest.raises(ValueError, match=r"add up to 1\.2"):
        Misbehaviour(refusal=0.6, allusion=0.6)


def test_the_command_line_reaches_every_option() -> None:
    options = parse_options(["--port=7", "--cap=3", "--api-key=k", "--too-many=0.25", "--latency=0.5", "--seed=9"])
    assert options == ServerOptions(
        port=7, cap=3, api_key="k", latency=0.5, seed=9, misbehaviour=Misbehaviour(too_many=0.25)
    )
