"""The command `apo eval`. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from apo.console import end_early, tell
from clair.core.errors import EXIT_SOME_FAILED, UserError
from clair.storage.object_store import local

app = typer.Typer(
    help="Measure a model, with intervals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _eval() -> None:
    """Measure a model, with intervals."""


@app.command()
def mixeval(
    data: Annotated[Path, typer.Option(help="The benchmark's data folder, from `apo eval fetch-mixeval`.")],
    out: Annotated[Path, typer.Option(callback=local, help="The result folder.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="The model: a model or adapter folder, or an endpoint's URL; repeatable for folders."),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="The name the endpoint serves it under.")] = None,
    responses: Annotated[Path | None, typer.Option(help="Score the answers in this folder instead.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="`rule`: score by the benchmark's rule parser, without a judge.")
    ] = None,
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
    temperature: Annotated[float | None, typer.Option(help="Instead of the model's generation config.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer; 512 as upstream.")] = 512,
    seed: Annotated[int, typer.Option(help="The seed of random draws; 42 as upstream.")] = 42,
    independent_judgements: Annotated[
        bool,
        typer.Option(
            "--independent-judgements", help="Request every judgement separately; by default equal requests share one."
        ),
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
        str | None, typer.Option(help="Per million tokens in,out: `0.5,1.5`; `table`: the price in genai-prices.")
    ] = None,
    model_price: Annotated[str | None, typer.Option(help="The same for an endpoint that answers.")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="Environment variable with the judge's key.")] = None,
    model_key_env: Annotated[str | None, typer.Option(help="Environment variable with the model's key.")] = None,
    judge_id: Annotated[
        str | None, typer.Option(help="The judge's identity in the ledger, instead of its URL and name.")
    ] = None,
    model_id: Annotated[str | None, typer.Option(help="The same for an endpoint's answers.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a batch of a local model, answers included; absent: by the device.")
    ] = None,
    upstream_files: Annotated[
        bool, typer.Option("--upstream-files", help="Also write the benchmark's own files, under OUT/upstream.")
    ] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print the expected cost; send no request.")] = False,
    probe: Annotated[
        int, typer.Option(help="With --estimate: items to run and pay for first; their replies are reused.")
    ] = 0,
    runner: Annotated[str | None, typer.Option(help="ray: the models answer on a Ray cluster.")] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's head, such as node-1:6379, or auto; for --runner ray.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all and print the settings; write nothing.")
    ] = False,
) -> None:
    """Score models on MixEval-Hard. Run it again to continue a stopped run; no reply is paid for twice."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    from apo.evaluation.mixeval.cli import print_settings, run_several, run_single
    from apo.evaluation.mixeval.config import MixEvalConfig, load_inputs
    from clair.core.recipe import resolve

    options = (model_name, model_key_env, model_id, model_price, temperature, max_tokens, batch_tokens)
    models = [_model(folder, *options) for folder in model or [None]]
    first = models[0]
    values: dict[str, Any] = {
        "data": str(data),
        "out": str(out),
        "model": first,
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
    if runner or len(models) > 1:
        if estimate or probe:
            raise UserError("--estimate is for one model in this process; leave out --runner and all --model but one")
        run_several(config, models, runner, address, dry_run=dry_run)
        return
    inputs = load_inputs(config)
    for note in inputs.benchmark.notes:
        tell(f"note: {note}")
    if dry_run:
        print_settings(config, inputs)
    elif estimate or probe:
        from apo.evaluation.mixeval.estimate import MIN_PROBE
        from apo.evaluation.mixeval.estimate import estimate as estimated
        from clair.core.console import show as print_
        from clair.terminal import client_progress, cost_table

        rows = max(MIN_PROBE, probe)
        with client_progress("evaluating", rows, dict.fromkeys(config.models, rows), shown=probe > 0) as on_progress:
            roles = estimated(config, probe, inputs, on_progress)
        print_(cost_table(roles))
    else:
        run_single(config, inputs)


def _patient(values: dict[str, Any], patience: float) -> dict[str, Any]:
    """Add `patience` to every role that has a URL."""
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
    from apo.evaluation.mixeval.answers import default_batch_tokens
    from apo.evaluation.results import MAX_NEW_TOKENS

    if batch_tokens is not None and (model is None or model.startswith(("http://", "https://"))):
        raise UserError("--batch-tokens is for a model in a folder; leave it out")
    for_endpoints = {"--model-name": name, "--model-key-env": key_env, "--model-id": id_, "--model-price": price}
    is_endpoint = model is not None and model.startswith(("http://", "https://"))
    used = [option for option, value in for_endpoints.items() if value is not None]
    if used and not is_endpoint:
        raise UserError(f"{used[0]} is for an endpoint; give its URL as --model, or leave it out")
    if model is None:
        if temperature is not None or max_tokens != MAX_NEW_TOKENS:
            option = "--temperature" if temperature is not None else "--max-tokens"
            raise UserError(f"{option} is for a model that answers; give --model, or leave it out")
        return None
    common = {"temperature": temperature, "max_tokens": max_tokens}
    if not is_endpoint:
        return {"path": model, "batch_tokens": batch_tokens or default_batch_tokens(), **common}
    if name is None:
        raise UserError("an endpoint needs --model-name, the name it serves the model under")
    return {"url": model, "model": name, "api_key_env": key_env, "id": id_, "price": price_of(price), **common}


def _judge(
    judge: str | None, urls: list[str] | None, name: str | None, key_env: str | None, id_: str | None, price: str | None
) -> dict[str, Any] | str:
    options = {"--judge-base-url": urls, "--judge-model": name, "--judge-key-env": key_env, "--judge-id": id_}
    options |= {"--judge-price": price}
    if judge is not None:
        used = [option for option, value in options.items() if value]
        if judge != "rule":
            raise UserError(
                f"--judge takes rule, found {judge!r}; a model that judges is --judge-base-url, --judge-model"
            )
        if used:
            raise UserError(f"--judge rule asks no model; leave out {used[0]}, or leave out --judge")
        return "rule"
    if not urls or name is None:
        raise UserError("who judges? give --judge-base-url and --judge-model, or --judge rule for the rule parser")
    url = tuple(urls) if len(urls) > 1 else urls[0]
    return {"url": url, "model": name, "api_key_env": key_env, "id": id_, "price": price_of(price)}


def price_of(text: str | None) -> dict[str, str] | str | None:
    """Parse a price from the command line. Raises UserError."""
    if text is None or text == "table":
        return text
    prices = text.split(",")
    if len(prices) != 2:
        raise UserError(f"a price is input,output per million tokens, such as 0.5,1.5, or table; found {text!r}")
    return {"input": prices[0].strip(), "output": prices[1].strip()}


def budget_of(money: str | None, tokens: int | None) -> dict[str, Any] | None:
    """Parse a budget from the command line. Raises UserError if both forms are present."""
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
    """Download MixEval's questions and judge prompts from upstream, at one pinned commit, checked by SHA-256."""
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
    judge_template: Annotated[Path | None, typer.Option(help="A Jinja template of your own for the judge.")] = None,
    samples: Annotated[int, typer.Option(help="Answers of each side to each prompt.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Of answers, instead of the model's generation config.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 1024,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of local models' sampling.")] = 0,
    ledger: Annotated[Path | None, typer.Option(help="A ledger to share; absent: OUT/ledger.sqlite.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight for each role.")] = 100,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds without any answer of a server, after which the command ends.")
    ] = 120.0,
    budget: Annotated[str | None, typer.Option(help="The most that may be spent; needs prices.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="The same in tokens, of all roles.")] = None,
    judge_price: Annotated[str | None, typer.Option(help="Per million tokens in,out: `0.5,1.5`; `table`.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all and print the settings; write nothing.")
    ] = False,
) -> None:
    """Measure which of two models a judge prefers, in both orders; raw and at equal lengths, with intervals."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    from apo.evaluation.winrate.run import WinrateConfig, load_inputs
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
    inputs = load_inputs(config)
    if dry_run:
        _print_winrate(config, inputs)
        return
    _run_winrate(config, inputs)


def _side(side: str, who: str, name: str | None, key_env: str | None, answers: dict[str, Any]) -> dict[str, Any] | str:
    if who.startswith(("http://", "https://")):
        if name is None:
            raise UserError(f"--{side} is an endpoint and needs --{side}-name, the name it serves the model under")
        return {"url": who, "model": name, "api_key_env": key_env, **answers}
    if used := [option for option, value in (("name", name), ("key-env", key_env)) if value is not None]:
        raise UserError(f"--{side}-{used[0]} is for an endpoint; give its URL as --{side}, or leave it out")
    if Path(who).is_dir():
        return {"path": who, "batch_tokens": 65_536, **answers}
    if not Path(who).is_file():
        raise UserError(f"--{side} {who} is no folder, file or http(s) URL; give a model, its URL or its answers")
    return who


def _print_winrate(config: Any, inputs: Any) -> None:
    import yaml

    from apo.evaluation.config import redacted

    print(yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True), end="")
    pairs = len(inputs.prompts) * config.samples
    print(f"# {len(inputs.prompts):,} prompts, {pairs:,} pairs of answers, at most {2 * pairs:,} verdicts")


def _run_winrate(config: Any, inputs: Any) -> None:
    from apo.evaluation.tables import winrate_table
    from apo.evaluation.winrate.run import measure_win_rate
    from clair.core.console import show as print_
    from clair.terminal import client_progress

    total = len(inputs.prompts) * config.samples
    calls = {role: total * (2 if role == "judge" else 1) for role in config.models}
    with client_progress("evaluating", total, calls, closing=True) as on_progress:
        outcome = measure_win_rate(config, inputs=inputs, on_progress=on_progress)
    failed = (
        f"{outcome.failed} pairs got no reply ({outcome.first_failure}), so there is no win rate; everything else is "
        f"kept, run the same command again"
    )
    end_early(outcome.stopped, failed if outcome.result is None else None)
    assert outcome.result is not None, "an outcome without a result ends the command"
    print_(winrate_table(outcome.result))
    if outcome.result["distrust"]:
        print_(outcome.result["distrust"])
    if outcome.refused:
        tell(
            f"{outcome.result['unanswered']} comparisons were refused ({outcome.refused}), so there is no win rate, "
            "only its bracket: all of them lost, all won; run the same command again to ask for them again"
        )
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
def pairs(
    model: Annotated[Path, typer.Option(help="The trained model or adapter, such as the folder of a run.")],
    out: Annotated[Path, typer.Option(callback=local, help="Where pairs.json and pairs.jsonl go.")],
    dataset: Annotated[str | None, typer.Option(help="The pairs; absent: those of the run.")] = None,
    reference: Annotated[str | None, typer.Option(help="The model before training; absent: the run's model.")] = None,
    split: Annotated[
        str | None, typer.Option(help="The held-out split; absent: all of a single file, else test.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Beta of the rewards; absent: the run's, else 0.1.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N pairs.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Leave longer pairs out; absent: the model's context length.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch, padding included.")] = 4096,
) -> None:
    """Measure held-out pairs: reward accuracy, margin, displacement, length, KL to the reference, with intervals."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    from apo.console import quieten
    from apo.evaluation.pairs import evaluate_pairs, pairs_config
    from apo.evaluation.tables import pairs_table
    from clair.core.console import show as print_

    options = {"dataset": dataset, "reference": reference, "split": split, "beta": beta, "limit": limit}
    sizes = {"max_length": max_length, "dtype": dtype, "batch_tokens": batch_tokens, "out": str(out)}
    quieten()
    print_(pairs_table(evaluate_pairs(pairs_config(model, **options, **sizes), log=tell)))


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
