"""One process knows that it is alone, and more of them are refused until they can share the work."""

import logging

import pytest
import torch

from search.run.ranks import Ranks
from supernet.errors import InputError


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}], ids=["alone", "by torchrun"]
)
def test_one_process_is_the_first_and_has_all_values(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks.of_environment(environment)
    assert (ranks.rank, ranks.world, ranks.is_first) == (0, 1, True)
    assert ranks.gather("value") == ["value"]
    with caplog.at_level(logging.INFO):
        ranks.log_once(logging.getLogger("ranks"), "said %s", "once")
    assert caplog.messages == ["said once"]


def test_another_process_than_the_first_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Ranks(rank=1, world=2, local=1).log_once(logging.getLogger("ranks"), "said")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "WORLD_SIZE=2: .* one process; .* unset WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: .* unset WORLD_SIZE"),
        ({"RANK": "3"}, "^RANK=3 is not below WORLD_SIZE=1; unset RANK$"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "^RANK=1 is not below WORLD_SIZE=1; unset RANK$"),
        ({"LOCAL_RANK": "2"}, "^LOCAL_RANK=2 is not below WORLD_SIZE=1; unset LOCAL_RANK$"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many is no number"),
        ({"RANK": "-1"}, "RANK=-1 is no number"),
    ],
)
def test_what_cannot_be_served_is_refused(environment: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Ranks.of_environment(environment)


def test_a_device_is_found_or_refused() -> None:
    assert Ranks().device("cpu") == torch.device("cpu")
    assert Ranks().device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(InputError, match=f"device={name} cannot be used here .*; use device=cpu"):
            Ranks().device(name)
