"""The commands of `apo reward`: select, fit, score and adapt. Heavy imports are inside the commands."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apo.cli_recipe import EXTRA_ARGUMENTS, Out, Overrides, RecipeFile, read_recipe
from clair.core.errors import EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from apo.analysis.features import EncodedPairs
    from apo.rewards.config import FeatureConfig
    from apo.rewards.reward_dir import Reward

app = typer.Typer(
    help="Rewards from comparisons: one for all users, several tastes (PAL), a latent taste (VPL).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _reward() -> None:
    """Rewards from comparisons: one for all users, several tastes (PAL), a latent taste (VPL)."""
    # Read when torch is loaded: idle OpenMP threads sleep instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@app.command(context_settings=EXTRA_ARGUMENTS)
def select(context: typer.Context, recipe: RecipeFile = None, out: Out = None, set_: Overrides = None) -> None:
    """Test on held-out comparisons if the tastes of the users differ enough for more than one reward."""
    from apo.rewards.config import SelectConfig

    config = read_recipe(context, SelectConfig, recipe, set_, out)
    from rich.table import Table

    from apo.rewards.model_selection import select as select_tastes
    from apo.rewards.reward_dir import to_comparisons
    from clair.core.console import show as print_
    from clair.core.files import write_json

    data = to_comparisons(_with_users(_encode(config, prompt=config.by_prompt)))
    selection = select_tastes(data, max_tastes=config.max_tastes, by_prompt=config.by_prompt, seed=config.seed)
    table = Table("", "tastes", "nats, choosing", "nats, judging")
    for c in selection.candidates:
        table.add_row(c.name, str(c.tastes), f"{c.choosing:.3f} ± {c.choosing_se:.3f}", f"{c.judging:.3f}")
    print_(table)
    print_(selection.conclusion)
    if config.out:
        write_json(config.out, selection.to_json())


@app.command(context_settings=EXTRA_ARGUMENTS)
def fit(context: typer.Context, recipe: RecipeFile = None, out: Out = None, set_: Overrides = None) -> None:
    """Fit a reward on features of a frozen model. A tenth of each user's comparisons is held out."""
    from apo.rewards.config import FitConfig

    config = read_recipe(context, FitConfig, recipe, set_, out)
    from apo.console import print_line
    from apo.rewards.model_selection import fit_best
    from apo.rewards.reward_dir import Reward, to_comparisons
    from apo.rewards.scorer import accuracy, nll, split
    from apo.rewards.vpl import VPL

    if (config.out / "reward.json").exists():
        raise UserError(f"out {config.out} holds a reward already; choose another folder")
    pairs = _encode(config, prompt=config.by_prompt)
    pairs = pairs if config.kind == "bradley_terry" else _with_users(pairs)
    data = to_comparisons(pairs)
    if config.kind != "bradley_terry" and len(data.users) == 1:
        raise UserError(f"all comparisons are of one user, {data.users[0]!r}: there is one taste; use bradley_terry")
    training, held_out = split(data, (0.9, 0.1), config.seed)
    scorer = fit_best(config.kind, data, training, held_out, **config.fit_options())
    measured: dict[str, Any] = {"comparisons": len(data), "held_out": len(held_out)}
    if len(held_out):
        measured |= {"accuracy": accuracy(scorer, held_out), "nll": float(nll(scorer, held_out).mean())}
        print_line(
            f"held out: {measured['accuracy']:.1%} right, {measured['nll']:.3f} nats, of {len(held_out)} comparisons"
        )
    warnings = []
    if isinstance(scorer, VPL):
        health = scorer.health(training)
        measured |= health._asdict()
        print_line(f"{health.active_units:.0%} of the latent's dimensions are active, swap cosine {health.swap:.2f}")
        if health.collapsed:
            warnings.append("the latent has collapsed, all users are alike: lower beta, or use bradley_terry")
    for warning in warnings:
        print_line(f"warning: {warning}")
    extra = {"pooling": config.pooling, "measured": measured, "seed": config.seed, "warnings": warnings}
    reward = Reward.from_fit(scorer, data, pairs, config.model, **extra)
    reward.save(config.out)
    print_line(f"wrote {config.out}")


@app.command(context_settings=EXTRA_ARGUMENTS)
def curve(context: typer.Context, recipe: RecipeFile = None, out: Out = None, set_: Overrides = None) -> None:
    """Measure accuracy on users whom the fit has not seen, after a few of their comparisons, over random splits."""
    from apo.rewards.config import CurveConfig

    config = read_recipe(context, CurveConfig, recipe, set_, out)
    from rich.box import SIMPLE
    from rich.table import Table

    from apo.console import print_line
    from apo.monitoring.result_plots import draw_curve
    from apo.rewards.reward_dir import to_comparisons
    from apo.rewards.unseen_users import METHODS, check_folder, measure, summarise
    from clair.core.console import show as print_
    from clair.core.files import content_hash, write_json

    check_folder(config)
    pairs = _with_users(_encode(config, prompt=config.by_prompt))
    columns = ("id", "prompt", "chosen", "rejected", "user", "split")
    check_folder(config, content_hash([pairs.features.model, [[row[name] for name in columns] for row in pairs.rows]]))
    results = measure(config, to_comparisons(pairs), [row["split"] == "test" for row in pairs.rows], print_line)
    summary = summarise(results, config)
    write_json(config.out / "curve.json", summary)
    draw_curve(summary, config.out / "curve.png")
    table = Table("", "users", config.kind, "Bradley-Terry", "the user alone", box=SIMPLE)
    table.title = f"% right after so many comparisons of the user, {config.splits} splits"
    for point in summary["points"]:
        estimates = (point[name] for name in METHODS)
        cells = (f"{100 * e['mean']:.1f} [{100 * e['lo']:.0f}, {100 * e['hi']:.0f}]" for e in estimates)
        table.add_row(str(point["shots"]), str(point["users"]), *cells)
    print_(table)
    for note in summary["notes"]:
        print_line(f"note: {note}")
    print_line(f"wrote {config.out}/curve.json and curve.png")


@app.command(context_settings=EXTRA_ARGUMENTS)
def score(context: typer.Context, recipe: RecipeFile = None, out: Out = None, set_: Overrides = None) -> None:
    """Score pairs by win rates against reference answers, with the preference of each group and the lowest of them."""
    from apo.rewards.config import ScoreConfig

    config = read_recipe(context, ScoreConfig, recipe, set_, out)
    from apo.console import print_line
    from apo.data.pair_rows import read_pair_rows
    from apo.rewards.judge import pad_chosen, rows_by_group, score_by_group, score_pairs, worst_group_filter
    from apo.rewards.reward_dir import Reward
    from clair.core.files import write_json
    from clair.data.dataset import read_manifest

    _check_out(config.out)
    manifest = read_manifest(config.dataset[0]) if config.decisions else {}
    judge = Reward.load(config.reward)
    pairs = _encode_for(judge, config.dataset, config.features)
    if config.by_group:
        rows = rows_by_group(score_by_group(judge, pairs), config.min_preference)
        if not rows:
            raise UserError(
                f"no group prefers an answer of any pair with a probability of {config.min_preference:g}; lower "
                "min_preference"
            )
    else:
        states = judge.row_states(pairs, config.user)
        rows = score_pairs(judge, pairs, states)
        if config.padding is not None:
            padded = _encode_padded(pad_chosen(pairs.rows, config.padding), judge)
            for row, value in zip(rows, judge.win_rates(padded, states)[0].tolist(), strict=True):
                row["score_padded"] = value
    _write_scored(rows, config.out)
    print_line(f"{len(rows):,} rows in {config.out}")
    if config.decisions:
        ids = [row["id"] for row in read_pair_rows(config.dataset[0])]
        filter_ = worst_group_filter(rows, config.min_worst, ids)
        write_json(config.decisions, filter_.decisions(manifest))
        missing = f", {len(ids) - len(rows):,} dropped without a score" if len(ids) > len(rows) else ""
        print_line(
            f"{filter_.promise}: {len(filter_.accepted):,} of {len(ids):,} kept{missing}; next: "
            f"clair keep {config.dataset[0]} {config.decisions}"
        )


@app.command(context_settings=EXTRA_ARGUMENTS)
def adapt(
    context: typer.Context,
    recipe: RecipeFile = None,
    user: Annotated[str | None, typer.Option(help="The new user's name, instead of the recipe's.")] = None,
    set_: Overrides = None,
) -> None:
    """Add a user to a reward: from their comparisons, or by asking the most informative questions (vpl)."""
    from apo.rewards.config import AdaptConfig

    config = read_recipe(context, AdaptConfig, recipe, set_, user=user)
    from apo.console import print_line
    from apo.rewards.reward_dir import Reward, comparisons_of, save_user, to_comparisons

    judge = Reward.load(config.reward)
    if config.user in judge.facts["users"]:
        raise UserError(f"user {config.user!r} exists already: the reward was fitted with them; choose another name")
    pairs = _encode_for(judge, config.comparisons or config.pool or [], config.features)
    if config.comparisons:
        pairs, note = comparisons_of(pairs, config.user)
        if note:
            print_line(f"note: {note}")
        state = judge.scorer.adapt(to_comparisons(pairs))
        save_user(judge, config.user, state, [{"id": row["id"], "chosen": True} for row in pairs.rows])
    else:
        from apo.rewards.active_queries import ask_user

        try:
            state = ask_user(judge, config.user, pairs, to_comparisons(pairs), config.questions)
        except KeyboardInterrupt as stop:
            print_line("interrupted; every answer so far is stored, run the same command to continue")
            raise typer.Exit(EXIT_INTERRUPTED) from stop
    group = f", {judge.groups()[config.user]}" if len(judge.scorer.groups()) > 1 else ""
    print_line(f"{config.user} was added to {config.reward}{group}")


@app.command()
def serve(
    reward: Annotated[Path, typer.Argument(help="The folder of a fitted reward.")],
    user: Annotated[
        str | None, typer.Option(help="The user or group whose reward counts; the mean without it.")
    ] = None,
) -> None:
    """Score answers for `clair build` (scores.checker): JSON lines in, win rates against the reference answers out."""
    import sys

    from apo.console import quieten
    from apo.rewards.reward_dir import Reward
    from apo.rewards.serve import AnswerScorer, score_lines

    quieten()
    for line in score_lines(AnswerScorer(Reward.load(reward), user), sys.stdin):
        print(line, flush=True)


_FILE_SUFFIXES = (".jsonl", ".json")


def _check_out(out: Path) -> None:
    """Raise UserError if `out` is not of the kind that its suffix says, or is a folder with other files."""
    is_file = out.suffix in _FILE_SUFFIXES
    if out.exists() and out.is_dir() == is_file:
        raise UserError(f"out {out} is {'a folder' if is_file else 'a file'}; give a .jsonl file, or a folder")
    if not is_file and out.exists():
        others = sorted(file.name for file in out.iterdir() if file.name not in ("train.jsonl", "test.jsonl"))
        if others:
            raise UserError(f"out {out} holds other files ({', '.join(others[:3])}); choose another folder")


def _write_scored(rows: list[dict[str, Any]], out: Path) -> None:
    """Write rows to a file, or to a folder with one file per split."""
    from clair.core.files import write_atomically

    by_split = {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}
    files = (
        {out: rows}
        if out.suffix in _FILE_SUFFIXES
        else {out / f"{name}.jsonl": split_rows for name, split_rows in by_split.items()}
    )
    for file, split_rows in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if split_rows:
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in split_rows)
            write_atomically(file, "".join(lines))
        else:
            file.unlink(missing_ok=True)  # written by an earlier run


def _encode(config: FeatureConfig, *, prompt: bool = False) -> EncodedPairs:
    """Return the pairs with the features of a file or of a model; `prompt`: a file has to have those of prompts."""
    from apo.analysis.feature_files import file_features
    from apo.analysis.features import EncodedPairs, encode_rows, read_rows
    from apo.console import print_line, quieten

    quieten()
    rows = read_rows(config.dataset)
    if config.features is not None:
        return EncodedPairs(rows, file_features(config.features, rows, prompt=prompt))
    assert config.model is not None
    pairs = encode_rows(rows, config.model, print_line)
    return replace(pairs, features=pairs.features.pooled(config.pooling))


def _encode_for(judge: Reward, datasets: list[str], features: Path | None) -> EncodedPairs:
    """Return pairs with features like those that the reward was fitted on."""
    from apo.rewards.config import FeatureConfig

    model, pooling = (None, "last") if features else (judge.facts["model"], judge.pooling)
    if features is None and model is None:
        raise UserError("this reward was fitted on features of a file; give `features`, of the same encoder")
    config = FeatureConfig(dataset=datasets, model=model, features=features, pooling=pooling)
    pairs = _encode(config, prompt=bool(judge.scorer.options.get("by_prompt")))
    judge.check_features(pairs)
    return pairs


def _encode_padded(rows: list[dict[str, Any]], judge: Reward) -> EncodedPairs:
    from apo.analysis.features import encode_rows
    from apo.console import print_line

    pairs = encode_rows(rows, judge.facts["model"], print_line)
    pairs = replace(pairs, features=pairs.features.pooled(judge.pooling))
    if len(pairs.rows) != len(rows):
        raise UserError("some padded pairs are longer than the model's context; give a shorter padding")
    return pairs


def _with_users(pairs: EncodedPairs) -> EncodedPairs:
    """Return the pairs that have a user, and print notes on them. Raises UserError if there are none."""
    from apo.console import print_line
    from apo.rewards.reward_dir import user_notes

    indices = [index for index, row in enumerate(pairs.rows) if row["user"] is not None]
    if not indices:
        raise UserError(
            "no pair has a user, so tastes cannot be distinguished; add a column user, or use bradley_terry"
        )
    if len(indices) < len(pairs.rows):
        print_line(
            f"note: {len(pairs.rows) - len(indices):,} of {len(pairs.rows):,} pairs have no user and are left out"
        )
    pairs = pairs.select(indices)
    for note in user_notes(pairs.rows):
        print_line(f"note: {note}")
    return pairs
