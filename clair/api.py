"""`clair.build`, `clair.estimate` and `clair.report`: the commands of the same names as Python functions.

They also work inside a running event loop, as in a notebook. Ctrl-C (a notebook's interrupt) stops them as it stops the
command: the requests in flight are awaited and their replies are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clair.core.progress import print_line, progress
from clair.core.recipe import config_from
from clair.pipeline.build import BuildResult, check_recipe
from clair.pipeline.build import build as build_dataset
from clair.pipeline.config import BuildConfig
from clair.pipeline.estimate import MIN_PROBE, RoleEstimate, expected_replies
from clair.pipeline.estimate import estimate as estimate_build
from clair.pipeline.runner import template_warnings
from clair.reporting.dataset_report import report as write_report
from clair.storage.location import Location
from clair.terminal import build_progress, client_progress

RecipeSource = str | Path | Mapping[str, Any] | BuildConfig


def build(
    recipe: RecipeSource,
    *,
    out: str | Path | None = None,
    limit: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    update: bool = False,
    show_progress: bool = True,
) -> BuildResult:
    """Build a dataset folder of preference pairs from a recipe, or go on where an earlier run stopped.

    Args:
        recipe: the path of a YAML file, a mapping of its keys, or a `BuildConfig`.
        out: the dataset folder or URL, instead of the recipe's `out`.
        limit: only the first `limit` prompts.
        overrides: values by dotted key, such as `{"reviser.temperature": 0.3}`.
        update: rebuild a folder that holds the run of another recipe. Replies that still fit are reused.
        show_progress: show the progress on stderr.

    Returns the folder, its manifest and the number of failed rows. If the budget is used up, `stopped` says so and the
    same call goes on later.
    Raises UserError, in one line, for a mistake in the recipe or the prompts, and for an endpoint that refuses the run.
    Raises KeyboardInterrupt after Ctrl-C, when the replies in flight are in the ledger; the same call goes on.
    """
    config = config_from(BuildConfig, recipe, overrides, out=out, limit=limit)
    with progress("building", details=lambda: ["checking recipe and prompts"], shown=show_progress):
        prompt_scan = check_recipe(config)
    for warning in template_warnings(config):
        print_line(f"note: {warning}")
    total, calls = prompt_scan.held, expected_replies(config, prompt_scan)
    with build_progress(total, calls, shown=show_progress) as on_progress:
        result = build_dataset(config, prompt_scan=prompt_scan, update=update, on_progress=on_progress)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt("every reply so far is kept; the same call goes on")
    return result


def estimate(
    recipe: RecipeSource,
    *,
    probe: int = 0,
    out: str | Path | None = None,
    limit: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> dict[str, RoleEstimate]:
    """Estimate what a build costs, by role: the maximum of calls, and with `probe` tokens, money and time.

    `probe` rows are run and paid for first, at least 3; their replies are kept for the build. The other arguments and
    the errors are those of `build`.
    """
    config = config_from(BuildConfig, recipe, overrides, out=out, limit=limit)
    rows = max(MIN_PROBE, probe)
    title, calls = "probing" if probe else "counting", dict.fromkeys(config.models, rows)
    with client_progress(title, rows, calls, shown=show_progress) as on_progress:
        return estimate_build(config, probe, on_progress)


def report(folder: str | Path, *, out: str | Path | None = None, filters: Sequence[str] = ()) -> Path:
    """Write the HTML page of a dataset folder or URL, and return its path.

    The page is `report.html` in the folder, or `NAME-report.html` here for a URL, unless `out` names another file.
    `filters` choose the pairs whose full text it holds, such as `["kept<0.5", "split=test"]`.
    Raises UserError for a folder without a finished dataset and for a filter that cannot be read.
    """
    location = Location(folder)
    with location.local_copy() as local_folder:
        if out is None and location.is_url:
            out = Path(f"{local_folder.name}-report.html")
        return write_report(local_folder, out, filters)
