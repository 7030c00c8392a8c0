"""Threads that wait for work: each part is done once, errors come back, and none is left over."""

import signal
import threading
from queue import SimpleQueue

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


def gone(threads):
    """Whether they have ended, or do so when they are waited for."""
    for thread in threads:
        if thread.ident:
            thread.join(timeout=60)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_none_is_left_where_one_cannot_start(after, monkeypatch):
    start, threads = threading.Thread.start, []

    def fails(self):
        threads.append(self)
        if len(threads) > after:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(RuntimeError, match="can't start"), Team(4):
        pass
    assert gone(threads)


class Interrupted(SimpleQueue):
    """A queue in which Ctrl-C comes when the end is told for the first time."""

    told = 0

    def put(self, task):
        if task is None and threading.current_thread() is threading.main_thread():
            self.told += 1
            if self.told == 1:
                signal.raise_signal(signal.SIGINT)
        super().put(task)


def test_none_is_left_where_the_end_is_interrupted(monkeypatch):
    monkeypatch.setattr("mlsys.retrieval._team.SimpleQueue", Interrupted)
    threads = []

    def ends():
        with Team(3) as team:
            threads.extend(team._threads)

    with pytest.raises(KeyboardInterrupt):
        ends()
    assert gone(threads)


def test_none_is_left_of_a_team_that_is_dropped():
    team = Team(3).__enter__()
    threads = team._threads
    del team
    assert gone(threads)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_team_that_has_ended_refuses_work(parts):
    with Team(2) as team:
        if parts > 2:
            with pytest.raises(RuntimeError, match="a team of 2, ended: False, cannot do 3 parts"):
                team.spread(lambda part: None, parts)
    with pytest.raises(RuntimeError, match="ended: True"):
        team.spread(lambda part: None, parts)
