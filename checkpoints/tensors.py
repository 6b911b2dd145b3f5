"""Tensors to and from a folder, with torch.distributed.checkpoint.

Each rank writes one file; `.metadata` says where every piece of every tensor is. torch keeps that
index as a pickle, which here is read by an unpickler that knows only the index's own classes; the
tensors themselves are read with `weights_only`. So nothing in a checkpoint can run code.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from checkpoints.errors import explain
from checkpoints.group import Group
from checkpoints.manifest import TensorRecord
from checkpoints.state import Piece, dtype_name

INDEX = ".metadata"


class _Planner(DefaultSavePlanner):
    """Plans a save of pieces, which know their place without a device mesh."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        every = ((name, piece) for name, held in self.state_dict.items() for piece in held)
        self.plan = SavePlan([_item(name, piece) for name, piece in every])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        held: list[Piece] = self.state_dict[index.fqn]
        return next(p.data for p in held if torch.Size(p.offsets) == index.offset)


def _item(name: str, piece: Piece) -> WriteItem:
    offsets, sizes = torch.Size(piece.offsets), piece.data.shape
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=piece.data.dtype),
            size=torch.Size(piece.shape),
        ),
    )


class _Writer(FileSystemWriter):
    """Leaves out of the index what differs from save to save: the path and a random id."""

    def storage_meta(self) -> StorageMeta | None:
        return None


def write(
    folder: Path, pieces: dict[str, list[Piece]], group: Group, doing: str
) -> dict[str, TensorRecord]:
    """Write every rank's pieces; a collective. Forcing them to the disk is left to the caller.

    Returns:
        What was written, on every rank.

    Raises:
        UserError, CheckpointError: on every rank.
    """
    writer = _Writer(folder, single_file_per_rank=True, sync_files=False, thread_count=1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            index = save(
                dict(pieces),
                storage_writer=writer,
                planner=_Planner(),
                process_group=group.handle,
                no_dist=group.handle is None,
            )
    except CheckpointException as error:
        raise _cause(error, doing, folder.parent) from None
    return {
        name: TensorRecord(shape=tuple(record.size), dtype=dtype_name(record.properties.dtype))
        for name, record in sorted(index.state_dict_metadata.items())
        if isinstance(record, TensorStorageMetadata)
    }


def own_files(folder: Path, group: Group) -> list[str]:
    """The names of the files that this rank wrote."""
    names = [path.name for path in folder.glob(f"__{group.rank}_*.distcp")]
    return [*names, INDEX] if group.first else names


def read(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill tensors and DTensors in place, each rank reading what it needs of any sharding.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(
                dict(tensors),
                storage_reader=_Reader(folder),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,  # reading needs nobody else
            )
    except CheckpointException as error:
        raise _cause(error, "reading tensors", folder) from None


class _Reader(FileSystemReader):
    """Reads the index without trusting it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        data = (Path(self.path) / INDEX).read_bytes()
        index = _IndexUnpickler(io.BytesIO(data)).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"{INDEX} is not an index")
        for place in index.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise pickle.UnpicklingError(f"{INDEX} points outside the checkpoint")
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes that an index of tensors is made of, and nothing else."""

    _known = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata",
                    "TensorProperties", "_MEM_FORMAT_ENCODING",
                )
            ),
        }
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which no index needs")


def _cause(error: CheckpointException, doing: str, folder: Path) -> Exception:
    """The first rank's failure, as one line."""
    rank = min(error.failures)
    cause, _ = error.failures[rank]
    told = explain(cause, doing, folder)
    return type(told)(f"rank {rank}: {told}") if rank else told
