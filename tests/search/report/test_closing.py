"""What a run says last: the table's reading follows the figures, and continuations are shown as they are."""

import pytest

from search.report.closing import reading, tasted


@pytest.mark.parametrize(
    ("change", "error", "verdict"),
    [
        (-0.1, 0.04, "25% nearer"),
        (0.1, 0.04, "25% further away"),
        (-0.1, 0.06, "too close"),
        (0.1, 0.06, "too close"),
        (0.0, 0.0, "too close"),
        (-0.1, None, "too close"),
        (float("nan"), None, "too close"),
    ],
)
def test_a_difference_counts_beyond_two_standard_errors(change: float, error: float | None, verdict: str) -> None:
    gap = {"kl_divergence": change, "kl_divergence_error": error}
    assert verdict in reading({"uniform": {"kl_divergence": 0.4}, "searched_minus_uniform": gap})


def test_nothing_is_nearer_than_a_uniform_model_that_lost_nothing() -> None:
    gap = {"kl_divergence": 0.1, "kl_divergence_error": 0.01}
    assert "too close" in reading({"uniform": {"kl_divergence": 0.0}, "searched_minus_uniform": gap})


def test_each_continuation_has_its_line_and_long_ones_are_broken() -> None:
    shown = tasted({"prompt": "One two", "dense": " three\n\nfo\x1bur", "uniform": "", "searched": "word " * 60})
    assert shown.splitlines()[:3] == [
        'How each goes on with "One two":',
        "dense     three fo?ur",
        "uniform   (nothing)",
    ]
    assert max(map(len, shown.splitlines())) <= 118
    assert shown.count("word") == 60
