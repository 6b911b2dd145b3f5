"""What four ranks do together in `test_parallel.py`: each function is run on all of them.

Every scenario gets its own folder; `<root>/alone` holds step 1, saved by one process beforehand.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from checkpoints.errors import CheckpointError
from checkpoints.rng import capture_rng
from checkpoints.state import Piece
from checkpoints.store import CheckpointStore
from core.errors import UserError
from tests.checkpoints.helpers import flip_byte

RANKS = 4
# (mesh shape, placements): what a tensor of FULL may be spread as.
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "replicated": ((4,), [Replicate()]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "both": ((2, 2), [Shard(0), Shard(1)]),
}


def full(name: str) -> torch.Tensor:
    """The whole value of a tensor; five rows do not divide by four ranks, nor two."""
    noise = torch.Generator().manual_seed(sum(name.encode()))
    kind = torch.bfloat16 if "moment" in name else torch.float32
    return torch.randn(5, 6, generator=noise).to(kind)


def whole_state() -> dict[str, Any]:
    """What one process holds."""
    return {
        "model": {name: full(name) for name in (*LAYOUTS, "plain")},
        "optimizer": {"moment": full("moment"), "lr": 0.1},
        "progress": {"consumed": 12345},
    }


def spread(layouts: dict[str, str], fill: bool) -> dict[str, Any]:
    """The same state with each tensor spread in the layout named for it."""

    def place(name: str, layout: str) -> torch.Tensor:
        value = full(name) if fill else torch.zeros_like(full(name))
        if layout == "plain":
            return value
        shape, placements = LAYOUTS[layout]
        return distribute_tensor(value, mesh(shape), placements)

    state = whole_state()
    state["model"] = {name: place(name, layouts.get(name, name)) for name in state["model"]}
    state["optimizer"]["moment"] = place("moment", layouts.get("moment", "both"))
    return state


_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh(shape: tuple[int, ...]) -> DeviceMesh:
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape)
    return _meshes[shape]


def assert_whole(state: dict[str, Any]) -> None:
    """Every tensor has its full value, every value is right."""
    for name, tensor in {**state["model"], "moment": state["optimizer"]["moment"]}.items():
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(value, full(name)), name
    assert state["optimizer"]["lr"] == 0.1 and state["progress"] == {"consumed": 12345}


def saved_spread_loaded_otherwise(rank: int, folder: Path) -> None:
    store = CheckpointStore(folder)
    store.save(1, spread({}, fill=True))
    sizes = [file.size for n, file in store.list()[0].manifest.files.items() if "distcp" in n]  # type: ignore[union-attr]
    assert len(sizes) == RANKS
    names = list(LAYOUTS)
    for turn in range(len(names)):  # every layout into every other
        layouts = {name: names[(i + turn) % len(names)] for i, name in enumerate(names)}
        state = spread({**layouts, "plain": names[turn], "moment": names[turn]}, fill=False)
        assert store.load(state).step == 1
        assert_whole(state)
    state = spread(dict.fromkeys([*names, "moment"], "plain"), fill=False)
    store.load(state)
    assert_whole(state)


def saved_alone_loaded_spread(rank: int, folder: Path) -> None:
    state = spread({}, fill=False)
    CheckpointStore(folder.parent / "alone").load(state)
    assert_whole(state)


def replicas_share_the_work(rank: int, folder: Path) -> None:
    store = CheckpointStore(folder)
    value = {
        f"w{i}": distribute_tensor(torch.ones(999), mesh((4,)), [Replicate()]) for i in range(40)
    }
    mine = [Piece.all_of(name, tensor, copy=True) for name, tensor in value.items()]
    writers = torch.tensor([len(pieces) for pieces in mine], dtype=torch.int64)
    dist.all_reduce(writers)
    assert writers.tolist() == [1] * 40, "one rank copies each tensor"
    store.save(1, {"model": value}, asynchronous=True)
    store.wait()
    manifest = store.list()[0].manifest
    assert manifest is not None
    sizes = [file.size for name, file in manifest.files.items() if name.endswith(".distcp")]
    assert sum(sizes) < 40 * 999 * 4 * 1.5, "each tensor once"
    assert min(sizes) > 999 * 4, "by more than one rank"


def fsdp_over_tensor_parallel(rank: int, folder: Path) -> None:
    """Both axes split the rows, which torch stores as a strided sharding."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))

    def build(value: torch.Tensor) -> nn.Linear:
        layer = nn.Linear(4, 8, bias=False)
        layer.weight = nn.Parameter(distribute_tensor(value, grid["tp"], [Shard(0)]))
        fully_shard(layer, mesh=grid["fsdp"])
        return layer

    value = torch.arange(32.0).view(8, 4)
    store = CheckpointStore(folder)
    store.save(1, {"model": {"w": build(value).weight}}, asynchronous=True)
    layer = build(torch.zeros(8, 4))
    store.load({"model": {"w": layer.weight}})
    assert torch.equal(layer.weight.full_tensor(), value)  # type: ignore[attr-defined]
    plain = torch.zeros(8, 4)
    store.load({"model": {"w": plain}})
    assert torch.equal(plain, value)


def stages_have_their_own_names(rank: int, folder: Path) -> None:
    """A pipeline: each rank has its own tensors and values, the checkpoint all of them."""
    store = CheckpointStore(folder)

    def stage(index: int, fill: float) -> dict[str, Any]:
        return {"model": {f"blocks.{index}": torch.full((3,), fill), f"scale.{index}": fill}}

    store.save(1, stage(rank, float(rank)))
    other = (rank + 1) % RANKS
    state = stage(other, -1.0)
    store.load(state)
    assert state["model"][f"blocks.{other}"].tolist() == [other] * 3
    assert state["model"][f"scale.{other}"] == other
    # When no rank asks for a name, all are told; so are they when one asks for too much.
    with pytest.raises(UserError, match=r"this run has no 'model/blocks.3', which the checkpoint"):
        store.load(stage(rank % 3, -1.0))
    with pytest.raises(UserError, match=r"rank 2: the checkpoint has no tensor 'model/blocks.7'"):
        store.load(stage(7 if rank == 2 else rank, -1.0))


def generators_belong_to_ranks(rank: int, folder: Path) -> None:
    store = CheckpointStore(folder)
    torch.manual_seed(100 + rank)
    expected = torch.get_rng_state()
    store.save(1, {"rng": capture_rng()})
    torch.rand(3)
    states = capture_rng()
    assert store.load({"rng": states}).rng
    assert torch.equal(states["torch"], expected)


def background_and_foreground_do_not_mix(rank: int, folder: Path) -> None:
    """The training's collectives go on while a save's are held up in the middle."""
    go = threading.Event()
    store = CheckpointStore(folder, phase=lambda name: go.wait(30) if name == "folder" else None)
    state = spread({}, fill=True)
    store.save(1, state, asynchronous=True)
    for step in range(20):
        value = torch.full((8,), float(rank + step))
        dist.all_reduce(value)
        assert value[0] == sum(range(RANKS)) + RANKS * step
    for tensor in state["model"].values():
        tensor.zero_()
    go.set()
    store.wait()
    back = spread({}, fill=False)
    store.load(back)
    assert_whole(back)


def one_rank_fails_and_all_are_told(rank: int, folder: Path) -> None:
    store = CheckpointStore(folder)
    store.save(1, spread({}, fill=True))
    real = Path.open

    def no_space(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name.startswith("__2_"):
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    for asynchronous in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", no_space)
            with pytest.raises(CheckpointError, match=r"rank 2: .*saving step 2: No space left"):
                store.save(2, spread({}, fill=True), asynchronous=asynchronous)
                store.wait()
        dist.barrier()
        assert not list(folder.glob(".tmp-*"))
    state = spread({}, fill=False)
    assert store.load(state).step == 1
    store.save(3, state)
    assert [found.step for found in store.list()] == [1, 3]


def any_rank_finds_damage(rank: int, folder: Path) -> None:
    """The bytes are read in shares, so each damaged file is some rank's to find."""
    store = CheckpointStore(folder, keep=0)
    for step in range(1, 2 + RANKS):
        store.save(step, spread({}, fill=True))
    if rank == 0:
        for shard in range(RANKS):
            flip_byte(folder / f"step-0000000{shard + 2}" / f"__{shard}_0.distcp")
    dist.barrier()
    loaded = store.load(spread({}, fill=False))
    assert loaded.step == 1
    assert [(s.step, s.reason.split()[0]) for s in loaded.skipped] == [
        (shard + 2, f"__{shard}_0.distcp") for shard in reversed(range(RANKS))
    ]


def a_missing_folder_is_one_message(rank: int, folder: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no checkpoint there"):
        CheckpointStore(folder / "nowhere").load(spread({}, fill=False))


SCENARIOS: dict[str, Callable[[int, Path], None]] = {
    function.__name__: function
    for function in (
        saved_spread_loaded_otherwise,
        saved_alone_loaded_spread,
        replicas_share_the_work,
        fsdp_over_tensor_parallel,
        stages_have_their_own_names,
        generators_belong_to_ranks,
        background_and_foreground_do_not_mix,
        one_rank_fails_and_all_are_told,
        any_rank_finds_damage,
        a_missing_folder_is_one_message,
    )
}


def join(rank: int, ranks: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=ranks
    )


def run_all(rank: int, root: Path) -> None:
    """One rank: every scenario in turn, its outcome in `<name>.<rank>`; stops at a failure."""
    join(rank, RANKS, root)
    for name, scenario in SCENARIOS.items():
        try:
            scenario(rank, root / name)
            outcome = "passed"
        except BaseException:
            outcome = traceback.format_exc()
        (root / f"{name}.{rank}").write_text(outcome)
        if outcome != "passed":
            os._exit(1)
    dist.destroy_process_group()


def die_while_saving(rank: int, root: Path) -> None:
    """Rank 1 vanishes in the middle of the second save; rank 0 tells and keeps the first."""
    join(rank, 2, root)

    def vanish(name: str) -> None:
        if name == "folder" and rank == 1 and armed:
            os._exit(9)

    armed: list[int] = []
    store = CheckpointStore(root / "run", phase=vanish)
    state = {"model": {"w": distribute_tensor(torch.ones(4), mesh((2,)), [Shard(0)])}}
    store.save(1, state)
    armed.append(1)
    try:
        store.save(2, state)
        outcome = "saved"
    except CheckpointError as error:
        outcome = str(error)
    (root / "outcome").write_text(outcome)
    os._exit(0)
