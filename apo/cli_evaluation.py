"""apo eval: what is typed to evaluate. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from apo.console import end_early, tell
from clair.core.errors import EXIT_SOME_FAILED, UserError
from clair.storage.object_store import local

app = typer.Typer(
    help="Measure a model: how good it is, and how sure that is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _eval() -> None:
    """Measure a model: how good it is, and how sure that is."""


@app.command()
def mixeval(
    data: Annotated[Path, typer.Option(help="The benchmark's data folder; `apo eval fetch-mixeval` gets it.")],
    out: Annotated[Path, typer.Option(callback=local, help="The result folder.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Who answers: a model or adapter folder, or an endpoint's URL. Several folders: repeat it."),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="The name the endpoint serves it under.")] = None,
    responses: Annotated[Path | None, typer.Option(help="Score the answers in this folder instead.")] = None,
    judge: Annotated[str | None, typer.Option(help="`rule`: score by the benchmark's rule parser, no judge.")] = None,
    judge_base_url: Annotated[
        list[str] | None, typer.Option(help="The judge's URL; repeat it where several serve the same judge.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name; upstream's is gpt-3.5-turbo-0125.")] = None,
    version: Annotated[str, typer.Option(help="Release of the questions.")] = "2024-06-01",
    split: Annotated[str, typer.Option(help="hard or full.")] = "hard",
    profile: Annotated[
        str, typer.Option(help="faithful: as upstream. strict: repeatable, nothing random.")
    ] = "faithful",
    samples: Annotated[int, typer.Option(help="Answers to each row.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Only the first N rows of each split.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt; the benchmark has none.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Instead of what the model's generation config says.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer; 512 as upstream.")] = 512,
    seed: Annotated[int, typer.Option(help="What random draws start from; 42 as upstream.")] = 42,
    independent_judgements: Annotated[
        bool,
        typer.Option("--independent-judgements", help="Ask for every judgement by itself; equal requests share one."),
    ] = False,
    ledger: Annotated[
        Path | None, typer.Option(help="A ledger to share between runs; absent: OUT/ledger.sqlite.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight for each role.")] = 100,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds without any answer of a server, after which the command ends.")
    ] = 120.0,
    budget: Annotated[str | None, typer.Option(help="The most that may be spent; needs prices.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="The same in tokens, of both roles.")] = None,
    judge_price: Annotated[
        str | None, typer.Option(help="For a million tokens in,out: `0.5,1.5`; `table`: what genai-prices has.")
    ] = None,
    model_price: Annotated[str | None, typer.Option(help="The same for an endpoint that answers.")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="Environment variable with the judge's key.")] = None,
    model_key_env: Annotated[str | None, typer.Option(help="Environment variable with the model's key.")] = None,
    judge_id: Annotated[str | None, typer.Option(help="What judgements are filed under, whatever the URL.")] = None,
    model_id: Annotated[str | None, typer.Option(help="The same for an endpoint's answers.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a batch of a local model, answers included; absent: by the device.")
    ] = None,
    upstream_files: Annotated[
        bool, typer.Option("--upstream-files", help="Also write the benchmark's own files, under OUT/upstream.")
    ] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Tell what it will cost; ask nothing.")] = False,
    probe: Annotated[int, typer.Option(help="With --estimate: items to run and pay for first; they are kept.")] = 0,
    runner: Annotated[str | None, typer.Option(help="ray: the models answer on a Ray cluster.")] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's head, such as node-1:6379, or auto; for --runner ray.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all and print the settings; write nothing.")
    ] = False,
) -> None:
    """Score models on MixEval-Hard. Run it again to go on where it stopped; nothing is paid for twice."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    from apo.evaluation.mixeval.cli import print_settings, run_many, run_one
    from apo.evaluation.mixeval.config import MixEvalConfig, check
    from clair.core.recipe import resolve

    options = (model_name, model_key_env, model_id, model_price, temperature, max_tokens, batch_tokens)
    several = [_model(one, *options) for one in model or [None]]
    who = several[0]
    values: dict[str, Any] = {
        "data": str(data),
        "out": str(out),
        "model": who,
        "responses": str(responses) if responses else None,
        "judge": _judge(judge, judge_base_url, judge_model, judge_key_env, judge_id, judge_price),
        "ledger": str(ledger) if ledger else None,
        "budget": budget_of(budget, budget_tokens),
        **{
            "version": version,
            "split": split,
            "profile": profile,
            "samples": samples,
            "limit": limit,
            "system": system,
        },
        **{"seed": seed, "independent_judgements": independent_judgements, "concurrency": concurrency},
        "upstream_files": upstream_files,
    }
    config = resolve(MixEvalConfig, _patient(values, patience), "options")
    _check_runner(runner, address)
    if runner or len(several) > 1:
        if estimate or probe:
            raise UserError("--estimate is for one model in this process; leave out --runner and all --model but one")
        run_many(config, several, runner, address, dry_run=dry_run)
        return
    checked = check(config)
    for note in checked.benchmark.notes:
        tell(f"note: {note}")
    if dry_run:
        print_settings(config, checked)
    elif estimate or probe:
        from apo.evaluation.mixeval.estimate import MIN_PROBE
        from apo.evaluation.mixeval.estimate import estimate as estimated
        from clair.core.console import show as print_
        from clair.terminal import client_progress, cost_table

        rows = max(MIN_PROBE, probe)
        with client_progress("evaluating", rows, dict.fromkeys(config.models, rows), shown=probe > 0) as on_progress:
            roles = estimated(config, probe, checked, on_progress)
        print_(cost_table(roles))
    else:
        run_one(config, checked)


def _patient(values: dict[str, Any], patience: float) -> dict[str, Any]:
    """The values, with the patience of every role that is behind a URL."""
    roles = {name: role for name, role in values.items() if isinstance(role, dict) and "url" in role}
    return values | {name: role | {"patience": patience} for name, role in roles.items()}


def _check_runner(runner: str | None, address: str | None) -> None:
    if runner not in (None, "ray"):
        raise UserError(f"unknown runner {runner!r}; allowed: ray, or none for this process")
    if address and not runner:
        raise UserError("--address is for --runner ray; add it, or leave that out")


def _model(
    model: str | None,
    name: str | None,
    key_env: str | None,
    id_: str | None,
    price: str | None,
    temperature: float | None,
    max_tokens: int,
    batch_tokens: int | None,
) -> dict[str, Any] | None:
    from apo.evaluation.mixeval.answers import batch_tokens_here
    from apo.evaluation.results import MAX_NEW_TOKENS

    if batch_tokens is not None and (model is None or model.startswith(("http://", "https://"))):
        raise UserError("--batch-tokens is for a model in a folder; leave it out")
    for_endpoints = {"--model-name": name, "--model-key-env": key_env, "--model-id": id_, "--model-price": price}
    is_endpoint = model is not None and model.startswith(("http://", "https://"))
    given = [option for option, value in for_endpoints.items() if value is not None]
    if given and not is_endpoint:
        raise UserError(f"{given[0]} is for an endpoint; give its URL as --model, or leave it out")
    if model is None:
        if temperature is not None or max_tokens != MAX_NEW_TOKENS:
            option = "--temperature" if temperature is not None else "--max-tokens"
            raise UserError(f"{option} is for a model that answers; give --model, or leave it out")
        return None
    common = {"temperature": temperature, "max_tokens": max_tokens}
    if not is_endpoint:
        return {"path": model, "batch_tokens": batch_tokens or batch_tokens_here(), **common}
    if name is None:
        raise UserError("an endpoint needs --model-name, the name it serves the model under")
    return {"url": model, "model": name, "api_key_env": key_env, "id": id_, "price": price_of(price), **common}


def _judge(
    judge: str | None, urls: list[str] | None, name: str | None, key_env: str | None, id_: str | None, price: str | None
) -> dict[str, Any] | str:
    options = {"--judge-base-url": urls, "--judge-model": name, "--judge-key-env": key_env, "--judge-id": id_}
    options |= {"--judge-price": price}
    if judge is not None:
        given = [option for option, value in options.items() if value]
        if judge != "rule":
            raise UserError(
                f"--judge takes rule, found {judge!r}; a model that judges is --judge-base-url, --judge-model"
            )
        if given:
            raise UserError(f"--judge rule asks no model; leave out {given[0]}, or leave out --judge")
        return "rule"
    if not urls or name is None:
        raise UserError("who judges? give --judge-base-url and --judge-model, or --judge rule for the rule parser")
    where = tuple(urls) if len(urls) > 1 else urls[0]
    return {"url": where, "model": name, "api_key_env": key_env, "id": id_, "price": price_of(price)}


def price_of(text: str | None) -> dict[str, str] | str | None:
    """A price as it is typed. Raises UserError."""
    if text is None or text == "table":
        return text
    parts = text.split(",")
    if len(parts) != 2:
        raise UserError(f"a price is input,output of a million tokens, such as 0.5,1.5, or table; found {text!r}")
    return {"input": parts[0].strip(), "output": parts[1].strip()}


def budget_of(money: str | None, tokens: int | None) -> dict[str, Any] | None:
    """A budget as it is typed. Raises UserError where both are given."""
    if money is not None and tokens is not None:
        raise UserError("--budget and --budget-tokens: give one of them")
    return {"money": money} if money is not None else {"tokens": tokens} if tokens is not None else None


@app.command()
def fetch_mixeval(
    out: Annotated[Path, typer.Argument(callback=local, help="The data folder to write.")],
    version: Annotated[list[str] | None, typer.Option(help="A release of the questions; repeatable.")] = None,
    full: Annotated[bool, typer.Option("--full", help="The full benchmark too, not only Hard.")] = False,
    from_: Annotated[
        str | None, typer.Option("--from", help="A copy of upstream's repository: a URL or file:///PATH.")
    ] = None,
) -> None:
    """Get MixEval's questions and judge messages from upstream, at one pinned commit, checked by SHA-256."""
    from apo.evaluation.mixeval.benchmark import VERSIONS
    from apo.evaluation.mixeval.fetch import BASE, fetch

    written = fetch(out, version or VERSIONS, ("hard", "full") if full else ("hard",), from_ or BASE)
    tell(f"wrote {len(written)} files into {out}: {', '.join(written)}")


@app.command()
def winrate(
    prompts: Annotated[Path, typer.Option(help="Held-out prompts: a .jsonl, .json, .csv or .parquet file.")],
    base: Annotated[str, typer.Option(help="The base: a model or adapter folder, a URL, or a file of its answers.")],
    tuned: Annotated[str, typer.Option(help="The tuned model, likewise.")],
    judge_base_url: Annotated[list[str], typer.Option(help="The judge's URL; repeat it where several serve it.")],
    judge_model: Annotated[str, typer.Option(help="The judge's name.")],
    out: Annotated[Path, typer.Option(callback=local, help="The result folder.")],
    base_name: Annotated[str | None, typer.Option(help="The name an endpoint serves the base under.")] = None,
    tuned_name: Annotated[str | None, typer.Option(help="The same for the tuned model.")] = None,
    base_key_env: Annotated[str | None, typer.Option(help="Environment variable with that endpoint's key.")] = None,
    tuned_key_env: Annotated[str | None, typer.Option(help="The same for the tuned model.")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="Environment variable with the judge's key.")] = None,
    judge_template: Annotated[Path | None, typer.Option(help="Your own words for the judge, in Jinja.")] = None,
    samples: Annotated[int, typer.Option(help="Answers of each side to each prompt.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Of answers, instead of what the model's generation config says.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 1024,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    seed: Annotated[int, typer.Option(help="What local models sample from.")] = 0,
    ledger: Annotated[Path | None, typer.Option(help="A ledger to share; absent: OUT/ledger.sqlite.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight for each role.")] = 100,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds without any answer of a server, after which the command ends.")
    ] = 120.0,
    budget: Annotated[str | None, typer.Option(help="The most that may be spent; needs prices.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="The same in tokens, of all roles.")] = None,
    judge_price: Annotated[str | None, typer.Option(help="For a million tokens in,out: `0.5,1.5`; `table`.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all and print the settings; write nothing.")
    ] = False,
) -> None:
    """Which of two models a judge prefers, asked in both orders; raw and at equal lengths, with intervals."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    from apo.evaluation.winrate.run import WinrateConfig, check
    from clair.core.recipe import resolve

    answers = {"temperature": temperature, "max_tokens": max_tokens}
    judge = {"url": tuple(judge_base_url), "model": judge_model, "api_key_env": judge_key_env}
    judge |= {"price": price_of(judge_price), "template": str(judge_template) if judge_template else None}
    values = {
        "prompts": {"path": str(prompts)},
        "base": _side("base", base, base_name, base_key_env, answers),
        "tuned": _side("tuned", tuned, tuned_name, tuned_key_env, answers),
        "judge": judge,
        **{"samples": samples, "limit": limit, "seed": seed, "concurrency": concurrency, "out": str(out)},
        "ledger": str(ledger) if ledger else None,
        "budget": budget_of(budget, budget_tokens),
    }
    config = resolve(WinrateConfig, _patient(values, patience), "options")
    checked = check(config)
    if dry_run:
        _print_winrate(config, checked)
        return
    _run_winrate(config, checked)


def _side(side: str, who: str, name: str | None, key_env: str | None, answers: dict[str, Any]) -> dict[str, Any] | str:
    if who.startswith(("http://", "https://")):
        if name is None:
            raise UserError(f"--{side} is an endpoint and needs --{side}-name, the name it serves the model under")
        return {"url": who, "model": name, "api_key_env": key_env, **answers}
    if given := [option for option, value in (("name", name), ("key-env", key_env)) if value is not None]:
        raise UserError(f"--{side}-{given[0]} is for an endpoint; give its URL as --{side}, or leave it out")
    if Path(who).is_dir():
        return {"path": who, "batch_tokens": 65_536, **answers}
    if not Path(who).is_file():
        raise UserError(f"--{side} {who} is no folder, file or http(s) URL; give a model, its URL or its answers")
    return who


def _print_winrate(config: Any, checked: Any) -> None:
    import yaml

    from apo.evaluation.config import public

    print(yaml.safe_dump(public(config), sort_keys=False, allow_unicode=True), end="")
    pairs = len(checked.prompts) * config.samples
    print(f"# {len(checked.prompts):,} prompts, {pairs:,} pairs of answers, at most {2 * pairs:,} verdicts")


def _run_winrate(config: Any, checked: Any) -> None:
    from apo.evaluation.tables import winrate_table
    from apo.evaluation.winrate.run import compare
    from clair.core.console import show as print_
    from clair.terminal import client_progress

    total = len(checked.prompts) * config.samples
    calls = {role: total * (2 if role == "judge" else 1) for role in config.models}
    with client_progress("evaluating", total, calls, closing=True) as on_progress:
        done = compare(config, checked=checked, on_progress=on_progress)
    failed = (
        f"{done.failed} pairs got no reply ({done.first_failure}), so there is no win rate; everything else is "
        f"kept, run the same command again"
    )
    end_early(done.stopped, failed if done.result is None else None)
    print_(winrate_table(done.result))
    if done.result["distrust"]:
        print_(done.result["distrust"])
    if done.refused:
        tell(
            f"{done.result['unanswered']} comparisons were refused ({done.refused}), so there is no win rate, only its "
            f"bracket: all of them lost, all won; run the same command again to ask for them again"
        )
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
def pairs(
    model: Annotated[Path, typer.Option(help="The trained model or adapter, such as the folder of a run.")],
    out: Annotated[Path, typer.Option(callback=local, help="Where pairs.json and pairs.jsonl go.")],
    dataset: Annotated[str | None, typer.Option(help="The pairs; absent: those of the run.")] = None,
    reference: Annotated[str | None, typer.Option(help="What training started from; absent: the run's model.")] = None,
    split: Annotated[
        str | None, typer.Option(help="The split that was held out; absent: all of a single file, else test.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Beta of the rewards; absent: the run's, else 0.1.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N pairs.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Leave longer pairs out; absent: what the model takes.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    batch_tokens: Annotated[int, typer.Option(help="Tokens that are run at once, padding included.")] = 4096,
) -> None:
    """Held-out pairs: reward accuracy, margins, displacement, length and KL to the reference, with intervals."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    from apo.console import quieten
    from apo.evaluation.pairs import config_of, evaluate
    from apo.evaluation.tables import pairs_table
    from clair.core.console import show as print_

    given = {"dataset": dataset, "reference": reference, "split": split, "beta": beta, "limit": limit}
    more = {"max_length": max_length, "dtype": dtype, "batch_tokens": batch_tokens, "out": str(out)}
    quieten()
    print_(pairs_table(evaluate(config_of(model, **given, **more), tell=tell)))


@app.command()
def show(
    results: Annotated[list[Path], typer.Argument(help="Result folders of `apo eval mixeval`.")],
) -> None:
    """Print the scores of result folders, with intervals and what is unresolved."""
    from apo.evaluation.results import read_results
    from apo.evaluation.tables import score_table
    from clair.core.console import show as print_

    for folder in results:
        print_(score_table(read_results(folder)))
