"""Whether a job fits a device, which passes make it fit, and the lines that say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from apo.cost.memory import Job, peak_memory, run_flops
from apo.cost.sizes import GIB, Device
from clair.core.errors import UserError
from clair.core.progress import duration

PASS_TOKENS = tuple(range(16_384, 0, -2048))
"""Limits of a pass that a GPU is offered, in this order. ASSUMPTION: 2,048 tokens keep a GPU busy with a model of
billions of parameters, and above 16,384 nothing is gained."""
SPARE = 0.2
"""Share of a GPU's memory that a chosen job leaves free: as much as the estimate may be wrong."""


def choose_passes(
    build: Callable[[bool, int | None], Job], device: Device, checkpointing: bool | None, limits: Sequence[int | None]
) -> Job:
    """Return the fastest job that fits a device: without activation checkpointing if possible, and in long passes.

    `build(checkpointing, pack_tokens)` makes a job; `checkpointing` None and several `limits` leave the choice. A
    checkpointed job computes each layer twice, which costs more than shorter passes do. If no job fits, the last one,
    which needs the least, is returned.
    """
    choices = [(on, limit) for on in ((False, True) if checkpointing is None else (checkpointing,)) for limit in limits]
    for choice in choices:
        job = build(*choice)
        if required_memory(job, device) <= (1 - SPARE) * device.memory:
            return job
    return build(*choices[-1])


def describe_passes(job: Job) -> str:
    """Describe how the passes of a job are limited, in the words of a recipe."""
    limit = f"pack_tokens {job.pack_tokens:,}, " if job.packed and job.pack_tokens else ""
    return f"{limit}{'' if job.checkpointing else 'no '}activation checkpointing"


def required_memory(job: Job, device: Device) -> float:
    """Return the bytes at the peak on a device."""
    return sum(peak_memory(job).values()) + device.reserved


def describe_tokens(job: Job) -> str:
    """Describe the tokens of an epoch, and their share of those in TRL's padded batch."""
    tokens = sum(row.tokens for row in job.rows)
    count, share = tokens * job.stands_for, tokens / job.padded_tokens
    about = "about " if job.stands_for > 1 else ""
    return f"{about}{count:,} an epoch, {share:.0%} of the {job.padded_tokens * job.stands_for:,} of TRL's padded batch"


def table(jobs: dict[Device, Job]) -> list[str]:
    """Return one line per device: memory, whether it fits, time, and the limits of a pass.

    The memory is the sum of the rounded parts in the line.
    """
    lines = []
    for device, job in jobs.items():
        memory = required_memory(job, device)
        fits = "fits" if memory <= device.memory else "does NOT fit"
        sizes = {**peak_memory(job), "libraries": device.reserved}
        shown = {name: round(size / GIB, 2) for name, size in sizes.items() if round(size / GIB, 2)}
        items = ", ".join(f"{name} {size:.2f}" for name, size in shown.items())
        time = f"about {duration(run_flops(job)[0] / device.flops)}" if memory <= device.memory else "-"
        lines.append(
            f"{device.name}: {_gib(sum(shown.values()) * GIB)} of {_gib(device.memory)} GiB, {fits}, {time}, "
            f"{describe_passes(job)} ({items})"
        )
    return lines


def check_fits(job: Job, device: Device) -> None:
    """Raise UserError if the peak exceeds the device's memory; it names the changes that make the run fit."""
    if required_memory(job, device) <= device.memory:
        return
    smallest = replace(job, rows=(min(job.rows, key=lambda row: row.tokens),))
    changed = {
        "trainer.pack_tokens (a row of a few thousand tokens at most)": smallest,
        "trainer.gradient_checkpointing: true": replace(job, checkpointing=True),
        "reference: cached": replace(job, copies=False),
        "trainer.fsdp: true": replace(job, sharded=job.processes > 1 and not job.zero),
        "lora: {r: 16}": replace(job, copies=False, sizes=replace(job.sizes, adapter=max(1, job.sizes.linear // 200))),
        "trainer.model_init_kwargs: {dtype: bfloat16}": replace(job, weight=2, compute=2),
    }
    memory = {name: required_memory(changed_job, device) for name, changed_job in changed.items()}
    helps = [name for name, size in memory.items() if size < 0.97 * required_memory(job, device)]
    enough = [name for name in helps if memory[name] <= device.memory]
    change = " or ".join(enough) if enough else f"several of {', '.join(helps)}; or take a smaller model"
    raise UserError(
        f"the run needs about {_gib(required_memory(job, device))} GiB and {device.name} has {_gib(device.memory)}; "
        f"set {change}"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.1 * GIB else f"{size / GIB:.2f}"
