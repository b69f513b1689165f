"""A generation to measure."""

import pytest

from supernet.space import Allocation
from supernet.store import Supernet
from tests.search.evaluation.alone import Draw


@pytest.fixture
def generation(family_supernet: Supernet, random_allocations: Draw) -> list[Allocation]:
    """Allocations that share beginnings, some twice, with sub-blocks absent at either end and everywhere."""
    units = len(family_supernet.space.units)
    drawn = random_allocations(family_supernet.space, 4)
    related = [(*drawn[0][: units - 1], level) for level in range(4)]
    ends = [(3,) + (0,) * (units - 1), (0,) * (units - 1) + (3,), (3,) * units, (0,) * units]
    return [*drawn, *related, drawn[1], *ends, drawn[1]]
