"""Threads that wait for work: each part is done once, errors come back, and none is left over."""

import threading

import pytest

from mlsys.retrieval._team import Team


@pytest.mark.parametrize(("threads", "parts"), [(1, 1), (2, 1), (2, 2), (4, 3), (4, 4)])
def test_each_part_is_done_once_by_a_thread_of_its_own(threads, parts):
    here = threading.get_ident()
    with Team(threads) as team:
        for _ in range(50):
            done = {}
            together = threading.Barrier(parts)  # which only as many threads at once get past

            def work(part, done=done, together=together):
                together.wait(timeout=60)
                done[part] = threading.get_ident()

            team.spread(work, parts)
            assert sorted(done) == list(range(parts))
            assert done[0] == here
            assert len(set(done.values())) == parts


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_a_part_raises_is_raised_when_all_have_ended(which):
    with Team(3) as team:
        ended = []

        def work(part):
            if part == which:
                raise KeyError(part)
            ended.append(part)

        with pytest.raises(KeyError, match=str(which)):
            team.spread(work, 3)
        assert sorted([*ended, which]) == [0, 1, 2]
        team.spread(ended.append, 3)  # and goes on working
        assert len(ended) == 5


def test_no_thread_is_left():
    before = threading.active_count()
    with Team(4) as team:
        assert threading.active_count() == before + 3
        team.spread(lambda part: None, 4)
    assert threading.active_count() == before


def test_threads_end_when_the_caller_fails():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), Team(3) as team:
        team.spread(lambda part: 1 // part, 3)
    assert threading.active_count() == before
