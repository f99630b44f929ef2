"""Running the jobs of a sweep in forked worker processes.

A fork inherits all modules, prompt sets and calibrations that the check of the sweep has loaded,
so that a job costs its simulation and little else: joblib's workers would import it all again.
A worker that dies (out of memory, say) costs its own job, not the sweep.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from omegaconf import DictConfig, open_dict

from experiments.job import cores, job_weight
from experiments.progress import Progress

if TYPE_CHECKING:
    from hydra_plugins.ersim_sweep import ProcessLauncher


@dataclass
class Job:
    """One job: its number, composed config and what to call it."""

    number: int
    config: DictConfig
    overrides: list[str]

    @property
    def label(self) -> str:
        """Fleet and users, the way a reader thinks of it."""
        return f"{self.config.fleet.name} users={self.config.users}"


class JobFailed(Exception):
    """A job's error, carried across processes as text."""


@dataclass
class Worker:
    """A child process and the job that it runs."""

    process: BaseProcess
    pipe: Connection
    job: Job | None = field(default=None)


def launch(
    launcher: ProcessLauncher, job_overrides: Sequence[Sequence[str]], first_number: int
) -> list[JobReturn]:
    """Run the jobs, heaviest first, and return one `JobReturn` each in the order given."""
    setup_globals()
    assert launcher.config is not None
    configure_log(launcher.config.hydra.hydra_logging, launcher.config.hydra.verbose)
    Path(str(launcher.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    jobs = [_job(launcher, list(item), first_number + i) for i, item in enumerate(job_overrides)]
    count = min(launcher.workers or cores(), len(jobs)) if sys.platform == "linux" else 1
    weights = {job.number: job_weight(job.config) for job in jobs}
    queue = sorted(jobs, key=lambda job: weights[job.number])
    progress = Progress(weights)
    if count <= 1:
        errors = _run_here(launcher, queue, progress)
    else:
        errors = _run_in_processes(launcher, queue, count, progress)
    return [_job_return(job, errors.get(job.number)) for job in jobs]


def _job(launcher: ProcessLauncher, overrides: list[str], number: int) -> Job:
    """Compose one job, or take the config that the sweeper composed for its check."""
    assert launcher.hydra_context is not None and launcher.config is not None
    if number < len(launcher.composed):
        config = launcher.composed[number]
    else:
        config = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, overrides)
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
    return Job(number, config, overrides)


def _job_return(job: Job, error: str | None) -> JobReturn:
    result = JobReturn(overrides=job.overrides, cfg=job.config)
    result.status = JobStatus.COMPLETED if error is None else JobStatus.FAILED
    result.return_value = None if error is None else JobFailed(error)
    return result


def _execute(launcher: ProcessLauncher, job: Job) -> str | None:
    """Run one job through Hydra; its error as text, or None."""
    assert launcher.hydra_context is not None and launcher.task_function is not None
    result = run_job(
        hydra_context=launcher.hydra_context,
        task_function=launcher.task_function,
        config=job.config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    if result.status is JobStatus.COMPLETED:
        return None
    error = result._return_value
    return str(error) or type(error).__name__


def _run_here(launcher: ProcessLauncher, queue: list[Job], progress: Progress) -> dict[int, str]:
    errors: dict[int, str] = {}
    with progress:
        while queue:
            job = queue.pop()
            progress.started(job.number, job.label)
            error = _execute(launcher, job)
            if error is not None:
                errors[job.number] = error
            progress.ended(job.number, failed=error is not None)
    return errors


def _serve(launcher: ProcessLauncher, jobs: dict[int, Job], pipe: Connection) -> None:
    """A worker's life: take a job's number, run it, answer with its error or None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        if number is None:
            return
        pipe.send(_execute(launcher, jobs[number]))


class Pool:
    """A few worker processes; forked before the progress bar starts its thread."""

    def __init__(self, launcher: ProcessLauncher, jobs: dict[int, Job], count: int) -> None:
        self._launcher, self._jobs = launcher, jobs
        self._context: Any = multiprocessing.get_context("fork")
        self.workers = [self._start() for _ in range(count)]

    def _start(self) -> Worker:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._launcher, self._jobs, theirs), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, mine)

    def give(self, worker: Worker, job: Job) -> None:
        """Let an idle worker run `job`."""
        worker.job = job
        worker.pipe.send(job.number)

    def finished(self) -> list[tuple[Job, str | None]]:
        """Wait until at least one job has ended; the jobs that have, with their errors or None."""
        busy = {worker.pipe: i for i, worker in enumerate(self.workers) if worker.job}
        ended = []
        for pipe in wait(list(busy)):
            index = busy[pipe]  # type: ignore[index]
            worker = self.workers[index]
            assert worker.job is not None
            try:
                error = worker.pipe.recv()
            except EOFError:
                worker.process.join()
                error = f"the worker process died (exit code {worker.process.exitcode}; out of memory?)"
                self.workers[index] = self._start()
            ended.append((worker.job, error))
            worker.job = None
        return ended

    def close(self) -> None:
        """Stop all workers, those that still run a job at once."""
        for worker in self.workers:
            if worker.job:
                worker.process.terminate()
            else:
                worker.pipe.send(None)
        for worker in self.workers:
            worker.process.join(timeout=5)


def _run_in_processes(
    launcher: ProcessLauncher, queue: list[Job], count: int, progress: Progress
) -> dict[int, str]:
    """Keep `count` workers busy until the queue is empty; errors by job number."""
    pool = Pool(launcher, {job.number: job for job in queue}, count)
    errors: dict[int, str] = {}
    try:
        with progress:
            while queue or any(worker.job for worker in pool.workers):
                for worker in pool.workers:
                    if worker.job is None and queue:
                        job = queue.pop()
                        pool.give(worker, job)
                        progress.started(job.number, job.label)
                for job, error in pool.finished():
                    if error is not None:
                        errors[job.number] = error
                    progress.ended(job.number, failed=error is not None)
    finally:
        pool.close()
    return errors
