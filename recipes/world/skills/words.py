"""The people, things and letters that tasks are about."""

from __future__ import annotations

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gita",
    "Hugo",
    "Iris",
    "Jon",
    "Kira",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
)
ITEMS = (
    "apples",
    "beads",
    "cards",
    "coins",
    "eggs",
    "figs",
    "jars",
    "keys",
    "lamps",
    "nuts",
    "pears",
    "plums",
    "shells",
    "stamps",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
