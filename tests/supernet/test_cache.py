"""Candidates are kept by use within a number of bytes, and come in advance without getting lost."""

import threading

import pytest
import torch

from supernet.cache import CandidateCache, candidate_bytes
from supernet.candidates import Candidate, Dropped, Members, Quantised, Weights
from supernet.errors import InputError

SIZE = 8 * 4  # of a candidate here


class Reader:
    """Gives a candidate of `SIZE` bytes that can be told from others, and notes who asked for what."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.threads: set[str] = set()

    def __call__(self, unit: int, level: int) -> Candidate:
        if unit < 0:
            raise InputError(f"unit {unit} is damaged")
        self.asked.append((unit, level))
        self.threads.add(threading.current_thread().name)
        return Members(torch.tensor([unit, level, 0, 0]), None)


@pytest.fixture
def reader() -> Reader:
    return Reader()


def check(cache: CandidateCache, unit: int, level: int) -> None:
    found = cache.get(unit, level)
    assert isinstance(found, Members)
    assert found.kept[:2].tolist() == [unit, level]


def test_what_was_used_last_is_kept(reader: Reader) -> None:
    cache = CandidateCache(reader, 2 * SIZE)
    for unit in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, as 0 was used since
        check(cache, unit, 3)
        assert cache.bytes <= cache.limit
    assert reader.asked == [(0, 3), (1, 3), (2, 3), (1, 3)]


def test_levels_of_a_unit_are_apart(reader: Reader) -> None:
    cache = CandidateCache(reader, 10 * SIZE)
    for level in (1, 2, 1, 2):
        check(cache, 0, level)
    assert reader.asked == [(0, 1), (0, 2)]


@pytest.mark.parametrize("limit", [0, SIZE - 1])
def test_nothing_larger_than_the_limit_is_kept(reader: Reader, limit: int) -> None:
    cache = CandidateCache(reader, limit)
    check(cache, 0, 1)
    check(cache, 0, 1)
    assert (len(reader.asked), cache.bytes) == (2, 0)


@pytest.mark.parametrize("limit", [0, 10 * SIZE])
def test_what_is_asked_for_in_advance_is_read_once_by_another_thread(reader: Reader, limit: int) -> None:
    cache = CandidateCache(reader, limit)
    cache.prefetch([(0, 1), (1, 1)])
    cache.prefetch([(1, 1), (0, 1)])
    check(cache, 1, 1)
    check(cache, 0, 1)
    assert sorted(reader.asked) == [(0, 1), (1, 1)]
    assert threading.current_thread().name not in reader.threads
    cache.prefetch([(0, 1)])
    check(cache, 0, 1)
    assert len(reader.asked) == (3 if limit == 0 else 2)


def test_an_error_is_raised_where_the_candidate_is_used(reader: Reader) -> None:
    cache = CandidateCache(reader, 10 * SIZE)
    cache.prefetch([(-1, 1), (0, 1)])
    check(cache, 0, 1)
    for _ in range(2):
        with pytest.raises(InputError, match="unit -1 is damaged"):
            cache.get(-1, 1)


def test_clearing_lets_go_of_everything(reader: Reader) -> None:
    cache = CandidateCache(reader, 10 * SIZE)
    check(cache, 0, 1)
    cache.prefetch([(1, 1)])
    cache.clear()
    assert cache.bytes == 0
    check(cache, 0, 1)
    check(cache, 1, 1)
    assert reader.asked.count((0, 1)) == 2


def test_a_candidates_bytes_are_those_of_its_tensors() -> None:
    mask = torch.eye(4, 6, dtype=torch.bool)
    assert candidate_bytes(Weights(mask, mask.bfloat16())) == 24 + 48
    assert candidate_bytes(Weights(mask, None)) == 24
    assert candidate_bytes(Members(torch.arange(3), torch.ones(2, 3), torch.ones(2))) == 24 + 24 + 8
    assert candidate_bytes(Quantised(mask.byte(), torch.ones(4, 2), torch.ones(4, 2).byte(), 3)) == 24 + 32 + 8
    assert candidate_bytes(Dropped()) == 0
