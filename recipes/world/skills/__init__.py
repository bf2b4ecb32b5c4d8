"""The five skills of the world, one file each. Their tasks are drawn, split and scored in `recipes.world.tasks`."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.world.skills.convert import CONVERT
from recipes.world.skills.edit import EDIT
from recipes.world.skills.lookup import LOOKUP
from recipes.world.skills.order import ORDER
from recipes.world.skills.skill import Skill
from recipes.world.skills.sums import SUMS

SKILLS: Mapping[str, Skill] = {skill.name: skill for skill in (SUMS, ORDER, CONVERT, LOOKUP, EDIT)}
