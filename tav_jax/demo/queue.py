"""Jobs that are done one after another, whose progress others follow."""

import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tav_jax.errors import UserError, is_machine_error
from tav_jax.stopping import Stopped
from tav_jax.text import shorten

MOST_JOBS = 20  # that wait; each holds one of the server's threads


@dataclass(frozen=True)
class Progress:
    """What there is to show of a job.

    Args:
        text: A line or two.
        losses: The steps so far, each with its loss.
        videos: The videos so far.
        result: What the job leaves: a run's folder, or a file.
    """

    text: str
    losses: tuple[tuple[int, float], ...] = ()
    videos: tuple[Path, ...] = ()
    result: Path | None = None


Work = Callable[[threading.Event], Iterator[Progress]]
"""Does a job and yields its progress. Ends early, having saved, when the event is set."""


class Job:
    """Work in the queue.

    Args:
        work: What is to be done.
    """

    def __init__(self, work: Work):
        self.work = work
        self.cancelled = threading.Event()
        self.progress = Progress("")
        self.is_over = False


class Queue:
    """Does one job at a time, in a thread of its own and in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []  # the first is being done
        self._changed = threading.Condition()
        self._stopped: Stopped | None = None
        threading.Thread(target=self._do_jobs, daemon=True).start()

    def add(self, work: Work) -> Job:
        """Return a new job at the queue's end.

        Raises:
            UserError: Too many are waiting.
        """
        job = Job(work)
        with self._changed:
            if len(self._jobs) > MOST_JOBS:
                raise UserError(f"{MOST_JOBS} jobs are waiting already; try again later")
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Let a job end as soon as it can, or never begin."""
        with self._changed:
            job.cancelled.set()
            if job in self._jobs[1:]:
                self._jobs.remove(job)
                self._finish(job, "cancelled before it began")
            self._changed.notify_all()

    def follow(self, job: Job) -> Iterator[Progress]:
        """Yield what changes about a job, until it is over."""
        seen: tuple[Progress, bool] | None = None
        while True:
            with self._changed:
                while (now := self._shown(job)) == seen:
                    self._changed.wait()
            seen = now
            yield seen[0]
            if seen[1]:
                return

    def wait_until_stopped(self) -> None:
        """Wait until a signal has stopped a job, which has saved what it had.

        Raises:
            Stopped: Always.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped is not None)
        assert self._stopped is not None
        raise self._stopped

    def _shown(self, job: Job) -> tuple[Progress, bool]:
        before = 0 if job.is_over else self._jobs.index(job)
        if before:
            jobs = "1 job is" if before == 1 else f"{before} jobs are"
            return Progress(f"waiting: {jobs} before this one"), False
        return job.progress, job.is_over

    def _finish(self, job: Job, text: str) -> None:
        """Say how a job ended that did not say it itself; what it had shown stays."""
        last = job.progress
        job.progress = Progress(text, last.losses, last.videos, last.result)
        job.is_over = True

    def _do_jobs(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs)
                job = self._jobs[0]
            failure = None
            try:
                for progress in job.work(job.cancelled):
                    with self._changed:
                        job.progress = progress
                        self._changed.notify_all()
            except Stopped as stopped:
                with self._changed:
                    self._stopped = stopped
                    self._changed.notify_all()
                return
            except Exception as error:
                failure = _explain(error)
            with self._changed:
                self._jobs.remove(job)
                job.is_over = True
                if failure is not None:
                    self._finish(job, failure)
                self._changed.notify_all()


def _explain(error: Exception) -> str:
    """Return what the page says about an error. A bug's traceback goes to the terminal."""
    if isinstance(error, UserError) or is_machine_error(error):
        return f"error: {error}"
    traceback.print_exception(error)
    return f"error: {type(error).__name__}: {shorten(str(error))} (the terminal has the traceback)"
