"""What `torch.distributed.checkpoint` wrote of sharded weights, read without running any code that it may hold.

Its reader unpickles the `.metadata` of a folder and what there is beside tensors (a learning rate, say) as they come.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_rwp.runs.deepspeed import engine_weights, is_engine_checkpoint

METADATA = ".metadata"
_SHARDS = "pytorch_model_fsdp_0"  # accelerate's folder
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"dict", "list", "set", "tuple", "int", "str"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath"},
}


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # Python 3.13's name of it
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def read_metadata(folder: Path) -> Any:
    """The `.metadata` of a folder. Raises pickle.UnpicklingError where it holds more than descriptions of tensors."""
    with (folder / METADATA).open("rb") as file:
        return _Metadata(file).load()


def refuse_code(folder: Path) -> None:
    """Raise pickle.UnpicklingError where a folder holds more than tensors and plain data."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = read_metadata(folder)
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether each process wrote its part of the model's weights to a checkpoint."""
    return (folder / _SHARDS).is_dir()


def load_weights(module: nn.Module, folder: Path, name: str = "model") -> None:
    """Load what a checkpoint holds of a model into a plain one. name: of its file; of an average of the weights, say.

    As one process does by itself, see `checkpoint_weights`.
    """
    if name == "model":
        module.load_state_dict(checkpoint_weights(folder))
        return
    weights = load_file(folder / f"{name}.safetensors")
    module.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})  # of timm's wrapper


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model in a folder that `accelerator.save_state` wrote, whole, on the CPU, however saved.

    Raises FileNotFoundError where there are none, pickle.UnpicklingError as `refuse_code` does.
    """
    if (file := folder / "model.safetensors").exists():
        return load_file(file)
    if (file := folder / "pytorch_model_fsdp.bin").exists():
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return weights
    if is_engine_checkpoint(folder):
        return engine_weights(folder)
    sharded = folder / _SHARDS
    if not is_sharded_checkpoint(folder):
        raise FileNotFoundError(f"{folder} holds no weights: no model.safetensors, nothing of FSDP2 or DeepSpeed")
    refuse_code(sharded)
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    described = read_metadata(sharded).state_dict_metadata
    found = {
        key.removeprefix("model."): torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in described.items()
        if hasattr(value, "size")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load({"model": found}, storage_reader=FileSystemReader(sharded), no_dist=True)
    return found
