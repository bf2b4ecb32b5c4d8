"""A toy world of vectors: users whose tastes, scores whose errors and behaviours whose order are known exactly.

The tests and examples of docs/neighbours.md use it. An answer is a point. The users' preferences, the errors of scores
and the speed of learning are set here, so that a method can be compared with the truth. All draws are by seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ToyComparisons:
    """Comparisons of users: user[i] prefers chosen[i] to rejected[i], both [n, D]; prompt is [n, C] or None.

    `group` [U] is the true group of each user, which no method may read.
    """

    chosen: Array
    rejected: Array
    user: Indices
    group: Indices
    prompt: Array | None = None


def _sphere(rng: np.random.Generator, *shape: int) -> Array:
    points = rng.standard_normal(shape)
    return points / np.linalg.norm(points, axis=-1, keepdims=True)


def _compared(
    rng: np.random.Generator, items: Array, utility: Array, user: Indices, group: Indices, noise: float
) -> ToyComparisons:
    """Pairs of `items` [n, 2, D]: the item of larger `utility` [n, 2] is chosen, except in a share `noise` of pairs."""
    left = (utility[:, 0] > utility[:, 1]) != (rng.random(len(items)) < noise)
    chosen = np.where(left[:, None], items[:, 0], items[:, 1])
    rejected = np.where(left[:, None], items[:, 1], items[:, 0])
    return ToyComparisons(chosen, rejected, user, group)


def ideal_points(points: Array, users: int, pairs: int, seed: int, *, noise: float = 0.0) -> ToyComparisons:
    """Users who prefer the item nearer to their ideal point, points[u mod K]; items are uniform on the unit sphere."""
    rng = np.random.default_rng(seed)
    group = np.arange(users) % len(points)
    user = np.repeat(np.arange(users), pairs)
    items = _sphere(rng, users * pairs, 2, points.shape[1])
    distance = np.linalg.norm(items - points[group[user]][:, None], axis=-1)
    return _compared(rng, items, -distance, user, group, noise)


def bimodal(
    users: int = 60, pairs: int = 50, seed: int = 0, *, noise: float = 0.0, dimensions: int = 8
) -> ToyComparisons:
    """Two groups with opposite ideal points, a and -a.

    On a sphere |x - a|^2 = 2 - 2 x.a, so one group's labels are the exact negation of the other's and the best that a
    reward shared by all can do is a coin.
    """
    a = _sphere(np.random.default_rng(20_000), dimensions)
    return ideal_points(np.stack([a, -a]), users, pairs, seed, noise=noise)


def shared_taste(users: int = 60, pairs: int = 50, seed: int = 0, *, noise: float = 0.0) -> ToyComparisons:
    """The control: all users share the ideal point of one half of `bimodal`."""
    a = _sphere(np.random.default_rng(20_000), 8)
    return ideal_points(a[None], users, pairs, seed, noise=noise)


def by_prompt(users: int = 60, pairs: int = 50, seed: int = 0) -> ToyComparisons:
    """Ideal points that depend on the prompt: Q c for one group and -Q c for the other, Q a fixed rotation."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.random.default_rng(20_001).standard_normal((8, 8)))[0]
    group = np.arange(users) % 2
    user = np.repeat(np.arange(users), pairs)
    prompt = _sphere(rng, users * pairs, 8)
    items = _sphere(rng, users * pairs, 2, 8)
    ideal = (prompt @ rotation.T) * np.where(group[user] == 0, 1.0, -1.0)[:, None]
    comparisons = _compared(rng, items, (items * ideal[:, None]).sum(-1), user, group, 0.0)
    return ToyComparisons(comparisons.chosen, comparisons.rejected, user, group, prompt)


def four_types(users: int, pairs: int, seed: int = 0) -> ToyComparisons:
    """Four types of user, each preferring a high value of one coordinate; items are N(0, I) in 8 dimensions."""
    rng = np.random.default_rng(seed)
    group = np.arange(users) % 4
    user = np.repeat(np.arange(users), pairs)
    items = rng.standard_normal((users * pairs, 2, 8))
    utility = np.take_along_axis(items, group[user][:, None, None], axis=-1)[..., 0]
    return _compared(rng, items, utility, user, group, 0.0)


def dip(x: Array) -> Array:
    """A score of points [n, 1] in the unit interval. It should rise with x, but has a dip at 0.6."""
    return x[:, 0] - 0.5 * np.exp(-(((x[:, 0] - 0.6) / 0.1) ** 2))


@dataclass(frozen=True)
class Audited:
    """Pairs with a noisy judge's score gap [n] (whole numbers, many ties), and whether each pair is bad [n]."""

    gap: Array
    bad: NDArray[np.bool_]


def audited(n: int, seed: int = 0) -> Audited:
    """Three in ten pairs are bad; the judge's gap is 2 points higher for good ones, with a standard error of 2."""
    rng = np.random.default_rng(seed)
    bad = rng.random(n) < 0.3
    gap = np.round(rng.normal(np.where(bad, 0.5, 2.5), 2.0))
    return Audited(gap, bad)


@dataclass(frozen=True)
class Behaviour:
    """Last hidden states [n, D] of prompts whose answer is Yes or No, and +1 if Yes is preferred, -1 if No is."""

    hidden: Array
    sign: NDArray[np.int64]


def behaviours(separations: list[float], n: int = 200, seed: int = 0, *, dimensions: int = 32) -> list[Behaviour]:
    """Behaviours whose positive and negative prompts lie this far apart along a direction of their own, in N(0, I)."""
    rng = np.random.default_rng(seed)
    result = []
    for separation in separations:
        sign = np.where(np.arange(n) % 2 == 0, 1, -1)
        middle = sign[:, None] * separation / 2 * _sphere(rng, dimensions)
        result.append(Behaviour(middle + rng.standard_normal((n, dimensions)), sign))
    return result


def token_behaviours(
    informative: list[float], n: int = 64, seed: int = 0, *, length: int = 16, vocabulary: int = 64
) -> list[tuple[list[list[int]], list[bool]]]:
    """Prompts of token ids for a tiny language model, and whether Yes is preferred; one list per behaviour.

    Each behaviour has its own first token and two tokens that distinguish its classes. A share `informative` of the
    tokens of a prompt are these; the others are noise that all behaviours share.
    """
    rng = np.random.default_rng(seed)
    result = []
    for number, share in enumerate(informative):
        first_token = 4 + 3 * number
        yes = np.arange(n) % 2 == 0
        ids = rng.integers(4 + 3 * len(informative), vocabulary, (n, length))
        is_informative = rng.random((n, length)) < share
        ids = np.where(is_informative, np.where(yes, first_token + 1, first_token + 2)[:, None], ids)
        ids[:, 0] = first_token
        result.append((ids.tolist(), yes.tolist()))
    return result
