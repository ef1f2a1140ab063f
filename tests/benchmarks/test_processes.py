"""Commands that run side by side, and the file that a benchmark writes after each of them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import harness
from benchmarks.launching.processes import Ports, side_by_side


def test_jobs_run_side_by_side_and_come_as_they_end_to_the_callers_thread():
    ended = {job: threading.Event() for job in range(4)}

    def wait_for_the_next(job):
        if job < 3:
            assert ended[job + 1].wait(30)
        return threading.get_ident()

    found = []
    for job, thread in side_by_side(wait_for_the_next, range(4), 4):
        found.append(job)
        ended[job].set()
        assert thread != threading.get_ident()
    assert found == [3, 2, 1, 0]


def test_a_job_that_raises_raises_in_the_callers_thread():
    def run(job):
        raise ValueError(f"job {job}")

    with pytest.raises(ValueError, match="job 7"):
        list(side_by_side(run, [7], 2))


@pytest.mark.parametrize("who", ["a job", "the caller"])
def test_no_job_begins_after_one_that_raises(who):
    begun, may_end = [], threading.Event()

    def run(job):
        begun.append(job)
        if job == 0:
            if who == "a job":
                raise KeyError(job)
            return
        may_end.wait(30)

    threading.Timer(0.5, may_end.set).start()  # while the one that runs is waited for
    with pytest.raises(KeyError):
        for job, _ in side_by_side(run, range(5), 1):
            raise KeyError(job)
    assert begun in ([0], [0, 1])


def test_a_port_is_given_once():
    ports = Ports()
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: ports.take(), range(200)))
    assert len(set(taken)) == 200


def test_rows_that_cannot_be_written_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "rows.csv"
    harness.write_rows(path, [{"a": 1}])
    with pytest.raises(ValueError, match="b"):
        harness.write_rows(path, [{"a": 2}, {"b": 3}])
    assert harness.read_rows(path) == [{"a": "1"}]
