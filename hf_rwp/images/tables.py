"""Images in tables: parquet files and tar shards in a folder, what `save_to_disk` wrote, and datasets of the Hub.

`datasets` reads them; here is which files make which split, what each file says of its classes, and what an error of
any of these libraries comes from.
"""

import errno
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hf_rwp.images.files import Tree
from hf_rwp.images.folders import ROLES, TRAIN, VALIDATION, words_of
from hf_rwp.images.found import Found, listed
from hf_rwp.images.numbering import labels_of, renumbered, with_column

_HUB_HINT = "Check the id, your access (`hf auth login`) and the connection, or set data_dir to a folder with a copy"
_KINDS = {".parquet": "parquet files", ".tar": "tar shards", ".arrow": "Arrow files"}
_FULL = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)


class BrokenFileError(ValueError):
    """A file that cannot be read, named."""


class TolerantWebDataset(WebDataset):
    """WebDataset shards of which one may be cut off: an image without bytes stands for what is missing."""

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        pipeline = super()._get_pipeline_from_tar(tar_path, tar_iterator)
        example: dict[str, Any] | None = None
        while True:
            try:
                example = next(pipeline)
            except StopIteration:
                return
            except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
                if example is not None and isinstance(error, ValueError):
                    raise BrokenFileError(f"{tar_path} after {example['__key__']}: {error}") from error
                if example is None:
                    raise BrokenFileError(
                        f"{tar_path} is not a tar file, or its first sample cannot be read: {error}. Fetch it again"
                    ) from error
                images = (key for key in example if key.rsplit(".", 1)[-1].lower() in cls.IMAGE_EXTENSIONS)
                cut = f"{Path(tar_path).name} is cut off after {example['__key__']}"
                yield example | dict.fromkeys(images, b"") | {"__key__": cut}
                return
            yield example


def load_tables(
    root: Tree, asked: Mapping[str, str | None], *, name: str | None, streaming: bool, found: Found
) -> dict[str, Any]:
    """The splits of the tables in a folder, by the names that their files or folders have.

    Raises ValueError that names the file that cannot be read.
    """
    files = [tree.path / table for tree in root.walk() for table in tree.tables]
    kinds = {file.suffix for file in files}
    found.source = " and ".join(_KINDS[kind] for kind in sorted(kinds))
    if len(kinds) > 1:
        raise ValueError(f"{root.path} holds {found.source}, {listed(files)}: keep those of one kind in it")
    if set("[]*?") & set("".join(map(str, files))):
        raise ValueError(f"{root.path}: `datasets` takes [ ] * ? in a path for a pattern, rename the folder or file")
    _refuse_broken(files, alike=False)
    options: dict[str, Any] = {"streaming": streaming}
    described = _described(root.path)
    if described:
        options["name"] = name
    else:
        parts = _chosen(_parts(files, root.path, asked), asked, root.path, found)
        _refuse_broken([file for some in parts.values() for file in some], alike=True)
        options["data_files"] = {word: list(map(str, some)) for word, some in parts.items()}
    try:
        if kinds == {".tar"} and not described:
            return _load_shards(root.path, options["data_files"], streaming)
        loaded: dict[str, Any] = load_dataset(str(root.path), **options)
    except Exception as error:
        raise _explained(str(root.path), error, "It needs images and labels for both splits") from error
    if kinds == {".parquet"} and not described:
        loaded = _with_own_classes(loaded, parts, found)
    return loaded


def _described(folder: Path) -> bool:
    """Whether a README, as datasets of the Hub have it, says which files are in which split."""
    if (folder / "dataset_infos.json").is_file():
        return True
    readme = folder / "README.md"
    return readme.is_file() and bool(re.search(r"^(configs|dataset_info):", readme.read_text(errors="replace"), re.M))


def load_saved(folder: Path, streaming: bool, found: Found) -> dict[str, Any]:
    """What `save_to_disk` wrote."""
    found.source = "a folder of save_to_disk"
    splits: dict[str, Any] = {}
    for place in [folder] if is_saved(folder) else sorted(filter(is_saved, folder.iterdir())):
        try:
            loaded = load_from_disk(str(place))
        except Exception as error:
            broken = next((file for file in sorted(place.rglob("*.arrow")) if not _is_arrow(file)), place)
            raise _explained(str(broken), error, "Save it again with save_to_disk") from error
        if isinstance(loaded, DatasetDict):
            splits |= loaded
        else:
            splits[str(loaded.split or "train") if place is folder else place.name] = loaded
    if len(splits) == 1 and not {*splits} & {*TRAIN, *VALIDATION}:
        splits = {"train": next(iter(splits.values()))}
    if streaming:
        return {split: table.to_iterable_dataset(min(64, len(table) or 1)) for split, table in splits.items()}
    return splits


def load_hub(path: str, *, name: str | None, revision: str | None, streaming: bool, found: Found) -> dict[str, Any]:
    """A dataset of the Hub."""
    found.source = f"{path} of the Hub"
    try:
        loaded: dict[str, Any] = load_dataset(path, name=name, revision=revision, streaming=streaming)
    except Exception as error:
        raise _explained(path, error, _HUB_HINT) from error
    if datasets.config.HF_HUB_OFFLINE:
        return loaded
    try:
        builder = load_dataset_builder(path, name=name, revision=revision)
        files = dict(builder.config.data_files or {}) if isinstance(builder, Parquet) else {}
        own = {split: (names_in(some[0]), names_in(some[-1])) for split, some in files.items() if split in loaded}
    except Exception as error:  # of the connection, in whatever form; the data are here
        found.note(f"the files of {path} could not be read for their classes: {type(error).__name__}")
        return loaded
    return _with_classes_of_splits(loaded, own, found)


def _is_arrow(file: Path) -> bool:
    try:
        with pa.memory_map(str(file)) as source:
            pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError):
        return False
    return True


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _parts(files: Sequence[Path], root: Path, asked: Mapping[str, str | None]) -> dict[str, list[Path]]:
    """The files by the split in their name, or else in the name of a folder; "train" where no file has one."""
    words = {*filter(None, asked.values()), *TRAIN, *VALIDATION}
    parts: dict[str, list[Path]] = {}
    nowhere: list[Path] = []
    for file in files:
        relative = file.relative_to(root)
        word = _word(relative.name, words) or next((w for w in map(str, relative.parts[:-1]) if _word(w, words)), None)
        word = _word(word, words) if word else None
        (parts.setdefault(word, []) if word else nowhere).append(file)
    if nowhere and not parts:
        return {"train": nowhere}
    if nowhere:
        raise ValueError(
            f"{nowhere[0].relative_to(root)} is in no split by its name, beside {', '.join(parts)}: rename it, "
            "or move it away"
        )
    return parts


def _chosen(
    parts: Mapping[str, list[Path]], asked: Mapping[str, str | None], root: Path, found: Found
) -> dict[str, list[Path]]:
    """The parts that are taken for training and evaluation."""
    chosen = {}
    for role, usual in zip(ROLES, (TRAIN, VALIDATION), strict=True):
        name = asked[role]
        wanted = usual if name is None else (name,)
        chosen.update({word: parts[word] for word in [word for word in wanted if word in parts][:1]})
    for word, files in parts.items():
        if word not in chosen and chosen:
            found.ignore("tables of splits that are not used", str(files[0].relative_to(root)), len(files))
    return chosen or dict(parts)


def _word(name: str, words: set[str]) -> str | None:
    """The split in a name like train-00000-of-00001.parquet; in lower case unless it was named as it is."""
    if name in words or name.split(".")[0] in words:
        return name.split(".")[0]
    return next((word for word in words_of(name) if word in words), None)


# What a file says by itself.


def _refuse_broken(files: Sequence[Path], alike: bool) -> None:
    """alike: whether they must have the same columns."""
    first: tuple[Path, dict[str, str]] | None = None
    for file in files:
        if file.suffix != ".parquet":
            continue
        try:
            schema = parquet.read_schema(file)
        except (pa.ArrowInvalid, OSError) as error:
            size = file.stat().st_size
            raise BrokenFileError(
                f"{file} is not a whole parquet file: {error} ({size:,} bytes). It is cut off, or something else: "
                "fetch it again, or move it away"
            ) from error
        columns = {field.name: str(field.type).replace("large_", "") for field in schema}
        first = first or (file, columns)
        if alike and columns != first[1]:
            odd = next(name for name in {**columns, **first[1]} if columns.get(name) != first[1].get(name))
            raise BrokenFileError(
                f"{file} has the columns {', '.join(columns)}, and {first[0].name} {', '.join(first[1])}: {odd} is "
                f"{columns.get(odd, 'absent')} in one and {first[1].get(odd, 'absent')} in the other. Write them alike"
            )


def names_in(file: Path | str) -> dict[str, list[str]]:
    """The names that a parquet file, here or on the Hub, has for the classes of each of its ClassLabel columns."""
    with fsspec.open(str(file), "rb") as source:
        features = Features.from_arrow_schema(parquet.read_schema(source))
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _with_own_classes(loaded: dict[str, Any], parts: Mapping[str, Sequence[Path]], found: Found) -> dict[str, Any]:
    """Labels as each file's own names say: `datasets` takes those of the first file for all of them."""
    words = sorted(parts, key=lambda word: word.lower() not in TRAIN)
    named = {file: names_in(file) for word in words for file in parts[word]}
    first = next(iter(named.values()))
    columns = [c for c in first if any(names.get(c, first[c]) != first[c] for names in named.values())]
    for column in columns:
        files = {file: names[column] for file, names in named.items() if column in names}
        other = next(file for file, names in files.items() if names != first[column])
        told = f"{next(iter(files)).name} has the classes {_few(first[column])}, {other.name} {_few(files[other])}"
        if not all(isinstance(split, Dataset) for split in loaded.values()):
            raise ValueError(
                f"the parquet files number the classes of column {column!r} differently: {told}. A stream cannot tell "
                "its files apart: leave out streaming, or cast them to one ClassLabel"
            )
        together = list(dict.fromkeys(name for names in files.values() for name in names))
        for split, some in parts.items():
            labels = labels_of(loaded[split], column)
            start = 0
            for file in some:
                rows = parquet.read_metadata(file).num_rows
                part = labels[start : start + rows]
                part[:] = renumbered(part, files.get(file, first[column]), together)
                start += rows
            loaded[split] = with_column(loaded[split], column, labels, ClassLabel(names=together))
        found.note(f"{told}: the labels were brought into one order by their names")
    return loaded


def _with_classes_of_splits(
    loaded: dict[str, Any], asked: Mapping[str, tuple[dict[str, list[str]], dict[str, list[str]]]], found: Found
) -> dict[str, Any]:
    """The same for the Hub, by what the first and the last file of each split say."""
    loaded = dict(loaded)
    for split, (first, last) in asked.items():
        features = loaded[split].features or {}
        for column in (name for name, feature in features.items() if isinstance(feature, ClassLabel)):
            own, assumed = first.get(column, features[column].names), features[column].names
            told = f"{split} has the classes {_few(own)} in its files, {_few(assumed)} in its description"
            if first != last:
                raise ValueError(
                    f"the first and the last file of {split} number the classes of column {column!r} differently "
                    f"({_few(own)}; {_few(last.get(column, []))}): download them, and set data_dir to their folder"
                )
            if own == assumed:
                continue
            if not isinstance(loaded[split], Dataset):
                raise ValueError(f"{told}: a stream cannot be renumbered: leave out streaming")
            values = loaded[split].with_format("numpy")[column][:]
            loaded[split] = with_column(loaded[split], column, values, ClassLabel(names=own))
            found.note(f"{told}: the files were believed")
    return loaded


def _few(names: Sequence[str]) -> str:
    return listed(names, 5) + (f" ({len(names)})" if len(names) > 5 else "")


# Reading and errors.


def _load_shards(folder: Path, files: Mapping[str, list[str]], streaming: bool) -> dict[str, Any]:
    builder = TolerantWebDataset(base_path=str(folder), data_files=dict(files), dataset_name=folder.name)
    if streaming:
        return dict(builder.as_streaming_dataset())
    builder.download_and_prepare()
    return dict(builder.as_dataset())


def _explained(path: str, error: Exception, hint: str) -> ValueError:
    """What the innermost error says, and what to do about it."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    broken = next((cause for cause in causes if isinstance(cause, BrokenFileError)), None)
    if broken is not None:
        return broken
    full = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in _FULL), None)
    if full is not None:
        return ValueError(
            f"{path!r} could not be written to the cache of `datasets`, {datasets.config.HF_DATASETS_CACHE}: {full}. "
            "Set the environment variable HF_DATASETS_CACHE to a folder that can be written to and has room"
        )
    told = causes[-1] if isinstance(error, DatasetGenerationError) else error
    if isinstance(error, DatasetNotFoundError) and not path.count("/"):
        hint = f"{hint}. No folder has this name either"
    return ValueError(f"{path!r} could not be loaded: {type(told).__name__}: {told}. {hint}")
