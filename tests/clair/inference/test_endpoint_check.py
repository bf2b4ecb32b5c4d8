"""clair check-endpoint: a few short requests expose a server that is not what it seems."""

from __future__ import annotations

import asyncio

import pytest

from clair.core.errors import UserError
from clair.inference.endpoint_check import check_endpoints
from clair.inference.model import Refused
from tests.clair import tiny_model
from tests.clair.building import clair
from tests.clair.raw_server import http, serving, writes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_model.make_tokenizer().save_pretrained(folder)
    return folder


def test_a_server_that_counts_and_cuts_otherwise_is_reported(server, tokenizer):
    checks = {check.name: check for check in check_endpoints([server.url], tokenizer, model="m")[server.url]}
    # By the tiny template: BOS, start, user, Hello, end, start, assistant. The server says 10, whatever it is sent.
    assert checks["chat template"].ok is False
    assert checks["chat template"].message.startswith("10 tokens at the server, 7 by the tokenizer's template")
    assert checks["end of turn"].ok is True
    assert checks["truncation"].ok is False
    assert checks["truncation"].message == "max_tokens 2, and finish_reason 'stop' after 20 tokens"
    assert checks["logprobs"].ok is None
    assert checks["samples"].message == "two answers at temperature 1 are the same: judged pairs need others"
    assert checks["tokens a second"].ok is True


def test_a_server_that_ignores_the_thinking_switch_is_reported(server, tmp_path):
    text = tiny_model.TEMPLATE.replace(
        "assistant {% endif %}", "assistant {% if enable_thinking %}one {% endif %}{% endif %}"
    )
    tiny_model.make_tokenizer(chat_template=text).save_pretrained(tmp_path)
    checks = {check.name: check for check in check_endpoints([server.url], tmp_path, model="m")[server.url]}
    assert checks["thinking switch"].ok is None
    found = "10 tokens at the server, 8 by the tokenizer's template"
    assert checks["thinking switch"].message == f"no effect: chat_template_kwargs {{'enable_thinking': True}}: {found}"


def test_the_command_ends_with_the_first_thing_that_is_wrong(server, tokenizer):
    result = clair("check-endpoint", server.url, "--model", "m", "--tokenizer", tokenizer)
    assert result.code == 2
    assert result.err.startswith(f"error: {server.url}: chat template (10 tokens at the server, 7 by")
    assert "WRONG" in result.out


def test_a_special_token_in_an_answer_is_no_stop_token(server, tmp_path):
    loaded = tiny_model.make_tokenizer(eos_token="answer")  # the scripted server says: bad answer to: Hello
    loaded.save_pretrained(tmp_path)
    checks = {check.name: check for check in check_endpoints([server.url], tmp_path, model="m")[server.url]}
    assert checks["end of turn"].ok is False
    assert "answer stands in the answer" in checks["end of turn"].message


@pytest.mark.parametrize(
    ("urls", "model", "match"),
    [
        (["ftp://a"], None, "is no http"),
        (["{url}"], None, "serves m, t; name one with --model"),
        (["{url}"], "unknown", None),
        (["http://127.0.0.1:9/v1"], "m", "cannot reach"),
    ],
)
def test_an_endpoint_that_cannot_answer_is_reported_in_one_line(server, urls, model, match):
    urls = [url.format(url=server.url) for url in urls]
    if match is None:  # a server may serve what it does not list: it answers, and that counts
        assert check_endpoints(urls, model=model)[server.url][0].message == model
        return
    with pytest.raises(UserError, match=match):
        check_endpoints(urls, model=model)


def test_an_invalid_tokenizer_is_refused(server, tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        check_endpoints([server.url], tmp_path, model="m")


def test_the_questions_are_printed_before_they_are_sent(server):
    steps: list[str] = []
    check_endpoints([server.url], model="m", on_step=steps.append)
    assert [step.removeprefix(f"{server.url}: ") for step in steps] == [
        "which model is served", "chat template", "end of turn", "truncation", "thinking switch", "samples", "logprobs",
        "tokens a second",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "match"), [("401 X", "refuses the key .401: no such user"), ("402 X", "wants to be paid")]
)
def test_a_server_that_refuses_everything_gets_one_request(status, match):
    async def handle(path: list[str]) -> None:
        models = writes(http(b'{"data": [{"id": "m"}]}'))
        refusal = writes(http(b'{"detail": "no such user"}', status=status))
        async with serving(models, refusal, path=path) as url:
            await asyncio.to_thread(check_endpoints, [url], model="m")

    path: list[str] = []
    with pytest.raises(Refused, match=match):
        asyncio.run(handle(path))
    assert len(path) == 2
