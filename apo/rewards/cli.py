"""The commands of `apo reward`: select, fit, score and adapt. Heavy imports are inside the commands."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clair.core.errors import EXIT_INTERRUPTED, UserError
from clair.storage.object_store import local

if TYPE_CHECKING:
    from apo.analysis.features import Labelled

app = typer.Typer(
    help="Rewards from comparisons: one for all, several tastes (PAL), a latent taste (VPL).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Datasets = Annotated[list[str], typer.Argument(help="Pairs, with a column `user` where users matter; repeatable.")]
Model = Annotated[str, typer.Option(help="The model whose features are read; it is not trained.")]
Seed = Annotated[int, typer.Option(help="What random draws start from.")]
Folder = Annotated[Path, typer.Argument(help="A folder of `apo reward fit`.")]


@app.callback()
def _reward() -> None:
    """Rewards from comparisons: one for all, several tastes (PAL), a latent taste (VPL)."""
    # Read when torch is loaded: idle OpenMP threads sleep instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@app.command()
def select(
    datasets: Datasets,
    model: Model,
    most: Annotated[int, typer.Option(min=1, help="The most prototypes to try.")] = 4,
    by_prompt: Annotated[bool, typer.Option("--by-prompt", help="PAL-B: tastes that depend on the prompt.")] = False,
    out: Annotated[Path | None, typer.Option(callback=local, help="A JSON file for the evidence.")] = None,
    seed: Seed = 0,
) -> None:
    """Tell whether users' tastes differ enough for more than one reward, on held-out comparisons."""
    from rich.table import Table

    from apo.rewards.model_selection import select as select_tastes
    from apo.rewards.reward_dir import to_comparisons
    from clair.core.console import show as print_
    from clair.core.files import write_json

    pairs = _labelled(datasets, model)
    data = to_comparisons(_with_users(pairs))
    selection = select_tastes(data, max_tastes=most, by_prompt=by_prompt, seed=seed)
    table = Table("", "tastes", "nats, choosing", "nats, judging")
    for c in selection.candidates:
        table.add_row(c.name, str(c.tastes), f"{c.choosing:.3f} ± {c.choosing_se:.3f}", f"{c.judging:.3f}")
    print_(table)
    print_(selection.words)
    if out:
        write_json(out, selection.to_json())


@app.command()
def fit(
    datasets: Datasets,
    model: Model,
    out: Annotated[Path, typer.Option(callback=local, help="The folder to write.")],
    kind: Annotated[str, typer.Option(help="bradley_terry, pal or vpl.")] = "bradley_terry",
    prototypes: Annotated[int, typer.Option(min=1, help="pal: how many tastes.")] = 2,
    by_prompt: Annotated[bool, typer.Option("--by-prompt", help="pal: PAL-B, tastes depend on the prompt.")] = False,
    beta: Annotated[float, typer.Option(min=0, help="vpl: the weight of the KL term.")] = 1e-3,
    seed: Seed = 0,
) -> None:
    """Fit a reward on features of a frozen model. One comparison in ten of each user is held out."""
    from apo.console import print_line
    from apo.rewards.model_selection import KINDS, fit_best
    from apo.rewards.reward_dir import Reward, to_comparisons
    from apo.rewards.scorer import accuracy, nll, split
    from apo.rewards.vpl import VPL
    from clair.core.errors import near_miss

    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}{near_miss(kind, KINDS)}; allowed: {', '.join(KINDS)}")
    if (out / "reward.json").exists():
        raise UserError(f"{out} holds a reward already; choose another --out")
    pairs = _labelled(datasets, model)
    pairs = pairs if kind == "bradley_terry" else _with_users(pairs)
    data = to_comparisons(pairs)
    if kind != "bradley_terry" and len(data.users) == 1:
        raise UserError(f"all comparisons are of one user, {data.users[0]!r}: there is one taste; take bradley_terry")
    training, held_out = split(data, (0.9, 0.1), seed)
    scorer = fit_best(kind, data, training, held_out, prototypes=prototypes, by_prompt=by_prompt, beta=beta, seed=seed)
    measured: dict[str, Any] = {"comparisons": len(data), "held_out": len(held_out)}
    if len(held_out):
        measured |= {"accuracy": accuracy(scorer, held_out), "nll": float(nll(scorer, held_out).mean())}
        print_line(
            f"held out: {measured['accuracy']:.1%} right, {measured['nll']:.3f} nats, of {len(held_out)} comparisons"
        )
    warnings = []
    if kind == "vpl":
        assert isinstance(scorer, VPL)
        health = scorer.health(training)
        measured |= health._asdict()
        print_line(f"{health.active_units:.0%} of the latent's dimensions are active, swap cosine {health.swap:.2f}")
        if health.collapsed:
            warnings.append("the latent has collapsed, all users look alike: lower --beta, or take bradley_terry")
    for warning in warnings:
        print_line(f"warning: {warning}")
    Reward.from_fit(scorer, data, pairs, model, measured=measured, seed=seed, warnings=warnings).save(out)
    print_line(f"wrote {out}")


@app.command()
def score(
    datasets: Datasets,
    reward: Annotated[Path, typer.Option(help="A folder of `apo reward fit`.")],
    out: Annotated[
        Path, typer.Option(callback=local, help="A .jsonl file to write, or a folder that keeps train and test apart.")
    ],
    user: Annotated[str | None, typer.Option(help="Score for this user or group, not for each pair's own.")] = None,
    pad: Annotated[str | None, typer.Option(help="Also score chosen with this text behind it: score_padded.")] = None,
    by_group: Annotated[
        bool, typer.Option("--by-group", help="A row for each group, turned to what the group prefers.")
    ] = False,
    sure: Annotated[
        float, typer.Option(min=0.5, max=1, help="--by-group: leave out what it prefers less surely.")
    ] = 0.5,
    decisions: Annotated[Path | None, typer.Option(help="A decisions file to write, for `clair keep`.")] = None,
    least: Annotated[
        float, typer.Option(min=0, max=1, help="--decisions: keep where every group prefers chosen by this.")
    ] = 0.5,
) -> None:
    """Score pairs by win rate against reference answers, with each group's preference and the worst-off one's."""
    from apo.console import print_line
    from apo.rewards.judge import pad_chosen, rows_by_group, score_pairs, worst_group_filter
    from apo.rewards.reward_dir import Reward
    from clair.core.files import write_json
    from clair.data.dataset import read_manifest

    _check_out(out)
    if decisions and (len(datasets) != 1 or by_group):
        raise UserError("--decisions is about one dataset folder as it is; give one, without --by-group")
    manifest = read_manifest(datasets[0]) if decisions else None
    judge = Reward.load(reward)
    pairs = _labelled(datasets, judge.facts["model"])
    judge.check_features(pairs)
    states = judge.row_states(pairs, user)
    rows = score_pairs(judge, pairs, states)
    if pad is not None:
        again = _rows_labelled(pad_chosen(pairs.rows, pad), judge.facts["model"])
        for row, value in zip(rows, judge.win_rates(again, states)[0].tolist(), strict=True):
            row["score_padded"] = value
    if by_group:
        rows = rows_by_group(rows, sure)
    if not rows:
        raise UserError(f"no group prefers either answer of a pair with a probability of {sure:g}; lower --sure")
    _write_scored(rows, out)
    print_line(f"{len(rows):,} rows in {out}")
    if decisions and manifest is not None:
        filtered = worst_group_filter(rows, least)
        write_json(decisions, filtered.decisions(manifest))
        print_line(
            f"{filtered.words}: {len(filtered.kept):,} of {len(rows):,} kept; clair keep {datasets[0]} {decisions}"
        )


@app.command()
def adapt(
    reward: Folder,
    user: Annotated[str, typer.Option(help="The new user's name.")],
    comparisons: Annotated[list[str] | None, typer.Option(help="Pairs that the user compared; repeatable.")] = None,
    pool: Annotated[
        list[str] | None, typer.Option(help="Pairs to ask about, the most telling first; repeatable.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="--pool: how many to ask.")] = 4,
) -> None:
    """Add a user to a reward: from comparisons of theirs, or by asking a few that say most (vpl)."""
    from apo.console import print_line
    from apo.rewards.reward_dir import Reward, save_user, to_comparisons

    if bool(comparisons) == bool(pool):
        raise UserError("give either --comparisons (what the user preferred) or --pool (pairs to ask about)")
    judge = Reward.load(reward)
    if user in judge.facts["users"]:
        raise UserError(f"{user!r} is known already: the reward was fitted with them; choose another name")
    pairs = _labelled(comparisons or pool or [], judge.facts["model"])
    judge.check_features(pairs)
    data = to_comparisons(pairs)
    if comparisons:
        state = judge.scorer.adapt(data)
        save_user(judge, user, state, [{"id": row["id"], "chosen": True} for row in pairs.rows])
    else:
        from apo.rewards.active_queries import ask_user

        try:
            state = ask_user(judge, user, pairs, data, questions)
        except KeyboardInterrupt as stop:
            print_line("interrupted; every answer so far is kept, and the same command goes on")
            raise typer.Exit(EXIT_INTERRUPTED) from stop
    group = judge.groups()[user]
    print_line(f"{user} was added to {reward}" + (f", {group}" if len(judge.scorer.groups()) > 1 else ""))


_FILE = (".jsonl", ".json")


def _check_out(out: Path) -> None:
    """Raise UserError if `out` is a folder with a file's name, a file with a folder's, or a folder with other files."""
    is_file = out.suffix in _FILE
    if out.exists() and out.is_dir() == is_file:
        raise UserError(f"--out {out} is {'a folder' if is_file else 'a file'}; name a .jsonl file, or a folder")
    if not is_file and out.exists():
        others = sorted(file.name for file in out.iterdir() if file.name not in ("train.jsonl", "test.jsonl"))
        if others:
            raise UserError(f"--out {out} holds other files ({', '.join(others[:3])}); choose another folder")


def _write_scored(rows: list[dict[str, Any]], out: Path) -> None:
    """Write rows to a file, or to a folder with one file per split."""
    from clair.core.files import write_atomically

    files = {out: rows} if out.suffix in _FILE else {
        out / f"{split}.jsonl": [row for row in rows if row["split"] == split] for split in ("train", "test")
    }  # fmt: skip
    for file, split_rows in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if split_rows:
            write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows))
        else:
            file.unlink(missing_ok=True)  # written by an earlier run


def _labelled(datasets: list[str], model: str) -> Labelled:
    from apo.analysis.features import labelled
    from apo.console import print_line, quieten

    quieten()
    return labelled(datasets, model, print_line)


def _rows_labelled(rows: list[dict[str, Any]], model: str) -> Labelled:
    from apo.analysis.features import labelled_rows
    from apo.console import print_line

    pairs = labelled_rows(rows, model, print_line)
    if len(pairs.rows) != len(rows):
        raise UserError("with the padding some pairs are longer than the model's context; pad with less")
    return pairs


def _with_users(pairs: Labelled) -> Labelled:
    """Return the pairs that have a user, and print notes on them. Raises UserError if there are none."""
    from apo.console import print_line
    from apo.rewards.reward_dir import user_notes

    indices = [index for index, row in enumerate(pairs.rows) if row["user"] is not None]
    if not indices:
        raise UserError(
            "no pair has a user, so nobody's taste can be told apart; add a column user, or take bradley_terry"
        )
    if len(indices) < len(pairs.rows):
        print_line(
            f"note: {len(pairs.rows) - len(indices):,} of {len(pairs.rows):,} pairs have no user and are left out"
        )
    pairs = pairs.select(indices)
    for note in user_notes(pairs.rows):
        print_line(f"note: {note}")
    return pairs
