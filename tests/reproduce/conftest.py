"""Plans for the tests of ``ttalight reproduce``."""

from __future__ import annotations

import pytest

from ttalight.reproduce.plan import Planner


@pytest.fixture(scope="session")
def plan_of():
    """Make the plan of a table."""

    def make(table, recipe="paper", data="cifar10", **kwargs):
        return Planner(recipe, data, "runs/x", **kwargs).plan(table)

    return make
