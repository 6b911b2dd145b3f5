"""Where a process stands in its job, and on what it computes."""

from __future__ import annotations

import pytest
import torch

from core.errors import UserError
from parallel.config import ParallelConfig
from parallel.native import NativeEngine
from parallel.start import Place, device_for, first_host, join, place

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
    "MASTER_ADDR": "node3", "MASTER_PORT": "1234",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-07,9]", "SLURM_JOB_ID": "123456",
}  # fmt: skip


def test_places() -> None:
    assert place({}) is None
    assert place(TORCHRUN) == Place(5, 8, 1, "node3", 1234)
    assert place(SRUN) == Place(5, 8, 1, "gpu03", 23456)
    assert place({**SRUN, **TORCHRUN}) == Place(5, 8, 1, "node3", 1234)


def test_a_batch_script_is_no_task() -> None:
    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) is None


def test_a_variable_that_is_no_number() -> None:
    with pytest.raises(UserError, match="the environment variable WORLD_SIZE is 'eight'"):
        place({**TORCHRUN, "WORLD_SIZE": "eight"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-07,9]", "gpu03"),
        ("gpu[9,12]-ib,login", "gpu9-ib"),
        ("login,gpu1", "login"),
        ("node-1.cluster", "node-1.cluster"),
    ],
)
def test_the_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(ParallelConfig(), 0) == torch.device("cpu")
    with pytest.raises(UserError, match="nccl needs NVIDIA GPUs"):
        device_for(ParallelConfig(backend="nccl"), 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_for(ParallelConfig(), 1) == torch.device("cuda", 1)
    assert device_for(ParallelConfig(backend="gloo"), 1) == torch.device("cpu")
    with pytest.raises(UserError, match="2 GPUs, too few for a process with local rank 2"):
        device_for(ParallelConfig(), 2)


def test_one_process_joins_nothing() -> None:
    engine = join(ParallelConfig(backend="gloo"), {})
    assert isinstance(engine, NativeEngine) and not torch.distributed.is_initialized()
    assert (engine.data_rank, engine.data_size, engine.any(True)) == (0, 1, True)


def test_a_layout_is_checked_before_anyone_is_waited_for() -> None:
    with pytest.raises(UserError, match="8 processes"):
        join(ParallelConfig(fsdp=2), TORCHRUN)
