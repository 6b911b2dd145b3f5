"""Running a config, in this process or in workers: everything between the check and the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import torch

from checkpoints.errors import CheckpointError
from checkpoints.files import step_folders
from checkpoints.group import Group
from core.config import Source, read_yaml
from core.errors import UserError
from core.log import configure, get_logger
from data_pipeline.data import Data
from data_pipeline.open import open_data
from launcher.checks import check, check_batch, resolve
from launcher.config import RunConfig, parse_run, write_run
from launcher.exits import OK, say
from launcher.finish import finish
from launcher.trained import TOKENIZER
from model.zoo import build_model
from parallel import watchdog
from parallel.check import check_model
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.launch import launch_local
from parallel.layout import AXES, Layout
from parallel.stages import cut
from parallel.start import join, place
from training import RunFailure
from training.trainer import Trainer


@dataclass(frozen=True)
class Job:
    """A config that was checked against everything this machine can tell before the start."""

    config: RunConfig
    data: Data
    layout: Layout
    joined: bool
    """This process is one of a job that torchrun or srun started."""

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.layout.rank == 0


def plan(config: RunConfig, source: Source, nproc: int | None) -> Job:
    """Check a config, open its data and fill in what the data decides.

    Raises:
        UserError: for the first thing that cannot work.
    """
    check(config, source)
    here = place()
    world = here.world if here else nproc or processes(config.parallel)
    layout = Layout.of(config.parallel, world, here.rank if here else 0)
    check_batch(config, source, layout.data_size)
    data = open_data(config.data, config.model.kind, config.run.seed)
    config = resolve(config, source, data)
    with torch.device("meta"):
        model = build_model(config.model)
    train = config.train
    check_model(layout, model, recompute=train.recompute, compile=train.compile)
    if layout.pp > 1:
        cut(model, config.parallel)
    return Job(config, data, layout, here is not None)


def processes(config: ParallelConfig) -> int:
    """How many workers to start when nobody says: what the layout needs, or one for each GPU."""
    sizes = [getattr(config, axis) for axis in AXES]
    needed = 1
    for size in sizes:
        needed *= max(size, 1)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if -1 in sizes and gpus and config.backend != "gloo":
        return max(gpus // needed, 1) * needed
    return needed


def run(job: Job, prepare: Callable[[Job], None], resume: bool) -> int:
    """Train in this process, or in workers; the exit code.

    Args:
        prepare: readies the run's folder; called on the one process that writes.
    """
    folder = job.config.folder
    if job.joined:
        # Ranks that share a folder wait until the first has judged it.
        engine = join(job.config.parallel)
        Group().from_first(lambda: prepare(job), "preparing the run", folder)
        code = _train(job, engine, resume)
    else:
        prepare(job)
        try:
            if job.layout.world == 1:
                code = _train(job, join(job.config.parallel), resume)
            else:
                configure(file=folder / "log.txt")  # for the traceback of a worker that fails
                code = launch_local(job.layout.world, _work, str(folder), resume)
        except (UserError, KeyboardInterrupt):
            _discard(folder)  # the next command is not to be met by this folder
            raise
    if code == OK and job.first:
        finish(folder, job.config, job.data)
    return code


def _work(folder: str, resume: bool) -> int:
    """What a worker does: read the run's config, as it was written, and train."""
    path = Path(folder) / "config.yaml"
    data, source = read_yaml(path)
    data["run"]["dir"] = folder  # the folder may have been moved since
    job = plan(parse_run(data, source, path), source, None)
    return _train(job, join(job.config.parallel), resume)


def _train(job: Job, engine: Engine, resume: bool) -> int:
    """Train on this rank."""
    config, folder = job.config, job.config.folder
    configure(file=folder / "log.txt")
    trainer: Trainer | None = None
    try:
        with torch.device("meta"):
            model = build_model(config.model)
        trainer = Trainer(
            config.train,
            engine,
            model,
            job.data,
            seed=config.run.seed,
            folder=folder,
            checkpoint=config.checkpoint,
        )
        if job.first:
            _announce(job, trainer)
        outcome = trainer.run(resume=resume)
    except (UserError, RunFailure, CheckpointError, KeyboardInterrupt) as error:
        watchdog.failed(error)
        raise
    except Exception as error:
        watchdog.failed(error)
        step = trainer.step + 1 if trainer is not None else 0
        cause = str(error).strip().split("\n")[0] or "no message"
        raise RunFailure(
            f"rank {job.layout.rank}, step {step}: {type(error).__name__}: {cause}; the traceback "
            f"is in {folder / 'log.txt'}"
        ) from error
    watchdog.stop()
    engine.close()
    if outcome.stopped and job.first:
        say(
            f"stopped by {outcome.stopped} after step {outcome.step} and saved; go on with: "
            f"manyforms resume {quote(str(folder))}"
        )
    return int(outcome.code)


def _announce(job: Job, trainer: Trainer) -> None:
    """What is about to happen, on a line each."""
    layout, data = job.layout, job.data
    count = trainer.counts["parameters"]
    where = "1 process" if layout.world == 1 else f"{layout.world} processes ({layout})"
    get_logger().info(
        "%s: %s parameters, %s, %s",
        job.config.run.name,
        f"{count:,}",
        where,
        trainer.engine.device.type,
    )
    get_logger().info(
        "%s samples to train on, %s held out; writing %s",
        f"{len(data.train):,}",
        f"{len(data.validation):,}",
        job.config.folder,
    )


def open_folder(job: Job) -> None:
    """Make a new run's folder and write its config, on the one process that writes.

    Raises:
        UserError: there is a run already, or the folder cannot be written.
    """
    folder = job.config.folder
    if (folder / "config.yaml").exists() or (folder.is_dir() and any(folder.iterdir())):
        if step_folders(folder / "checkpoints"):
            raise UserError(
                f"{folder}: holds a run already; continue it with 'manyforms resume "
                f"{quote(str(folder))}', or name another folder: run.dir=…"
            )
        raise UserError(f"{folder}: is not empty; remove it, or name another folder: run.dir=…")
    write_folder(job)


def write_folder(job: Job) -> None:
    """Write the config, and the tokenizer for those who read the checkpoints.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = job.config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
        write_run(job.config, folder)
        if job.data.tokenizer is not None:
            job.data.tokenizer.save(folder / TOKENIZER)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror or error}; name another folder: "
            f"run.dir=…"
        ) from None


def _discard(folder: Path) -> None:
    """Remove the folder of a run that ended before its first step."""
    metrics = folder / "metrics.jsonl"
    begun = metrics.exists() and metrics.stat().st_size
    if not (begun or step_folders(folder / "checkpoints")):
        configure()  # closes log.txt
        shutil.rmtree(folder, ignore_errors=True)
