"""Tables of images as people have them: what each file says by itself, and what an error says of which file."""

import errno
import functools
import io
import tarfile

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pytest
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError
from torchvision.transforms.functional import pil_to_tensor

from hf_rwp.images.data import load_images
from hf_rwp.images.loaders import build_loader


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # 5 s after each pass over parquet files, where `datasets` waits
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def encoded(level):
    file = io.BytesIO()
    PIL.Image.new("L", (4, 4), level).save(file, "PNG")
    return file.getvalue()


def write(root, name, labels, feature, image=True, **others):
    """A parquet file whose image i is of level i."""
    root.mkdir(parents=True, exist_ok=True)
    images = [{"path": None, "bytes": encoded(level)} for level in range(len(labels))]
    features = Features(image=Image(), label=feature) if image else Features(label=feature)
    columns = {"image": images, "label": labels} if image else {"label": labels}
    kinds = {key: Value("int64") for key in others}
    Dataset.from_dict(columns | others, features=Features(features | kinds)).to_parquet(root / f"{name}.parquet")
    return str(root)


def levels(split):
    label = split.features["label"]
    return [(int(np.asarray(Image().decode_example(row["image"])).max()), label.int2str(row["label"])) for row in split]


def classes(*names):
    return ClassLabel(names=list(names))


# What each file says of its classes.


def test_classes_in_another_order_are_matched_by_name(tmp_path):
    write(tmp_path / "data", "train", [0, 1, 2], classes("cat", "dog", "fox"))
    write(tmp_path / "data", "test", [0, 1, 2], classes("fox", "cat", "dog"))
    splits = load_images(str(tmp_path / "data"))
    assert levels(splits["train"]) == [(0, "cat"), (1, "dog"), (2, "fox")]
    assert levels(splits["validation"]) == [(0, "fox"), (1, "cat"), (2, "dog")]
    assert "train.parquet has the classes cat, dog, fox, test.parquet fox, cat, dog" in splits.found.notes[0]


def test_a_class_that_is_missing_in_test_shifts_no_other(tmp_path):
    write(tmp_path / "data", "train", [0, 1, 2], classes("cat", "dog", "fox"))
    write(tmp_path / "data", "test", [0, 1], classes("cat", "fox"))
    assert levels(load_images(str(tmp_path / "data"))["validation"]) == [(0, "cat"), (1, "fox")]


def test_shards_of_one_split_are_matched_by_name(tmp_path):
    write(tmp_path / "data", "train-0", [0, 1], classes("cat", "dog"))
    write(tmp_path / "data", "train-1", [0, 1, 2], classes("ape", "dog", "cat"))
    write(tmp_path / "data", "test", [1], classes("dog", "ape"))
    splits = load_images(str(tmp_path / "data"))
    assert splits["train"].features["label"].names == ["cat", "dog", "ape"]
    assert [name for _, name in levels(splits["train"])] == ["cat", "dog", "ape", "dog", "cat"]
    assert levels(splits["validation"]) == [(0, "ape")]


def test_labels_out_of_a_files_own_range_are_refused(tmp_path):
    write(tmp_path / "data", "train", [0, 1, -1], classes("cat", "dog"))
    write(tmp_path / "data", "test", [0, 1], classes("dog", "cat"))
    with pytest.raises(ValueError, match="'label' holds -1 in the train split"):
        load_images(str(tmp_path / "data"))


def test_a_stream_of_files_with_other_classes_is_refused(tmp_path):
    write(tmp_path / "data", "train", [0, 1], classes("cat", "dog"))
    write(tmp_path / "data", "test", [0, 1], classes("dog", "cat"))
    with pytest.raises(ValueError, match=r"train.parquet has the classes cat, dog, test.parquet dog, cat.*streaming"):
        load_images(str(tmp_path / "data"), streaming=True)


# Columns.


def test_text_labels_go_before_an_integer_column(tmp_path):
    for name in ("train", "test"):
        others = {"__index_level_0__": [7, 8, 9], "width": [640, 480, 640]}
        write(tmp_path / "data", name, ["fox", "c10", "c2"], Value("string"), **others)
    splits = load_images(str(tmp_path / "data"))
    assert splits["train"].features["label"].names == ["c2", "c10", "fox"]
    assert levels(splits["train"]) == [(0, "fox"), (1, "c10"), (2, "c2")]
    assert splits.found.columns == {"image": "image", "label": "label"}


@pytest.mark.parametrize("name", ["label", "Labels", "class", "target", "category"])
def test_a_column_called_label_goes_before_others(tmp_path, name):
    columns = {"image": [encoded(0), encoded(1)], "fold": [5, 6], name: ["a", "b"], "caption": ["x", "y"]}
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        pd.DataFrame(columns).to_parquet(tmp_path / f"data/{split}.parquet")
    splits = load_images(str(tmp_path / "data"))
    assert levels(splits["train"]) == [(0, "a"), (1, "b")]
    assert splits.found.columns == {"image": "image", "label": name}


def test_images_in_a_plain_struct_are_images(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        rows = [{"photo": {"bytes": encoded(level), "path": "x"}, "label": level} for level in range(3)]
        pd.DataFrame(rows).to_parquet(tmp_path / f"data/{split}.parquet")
    for streaming in (False, True):
        split = load_images(str(tmp_path / "data"), streaming=streaming, num_classes=3)["train"]
        assert levels(split) == [(0, "0"), (1, "1"), (2, "2")]


def test_text_labels_of_a_stream_and_empty_ones_are_refused(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / "data", name, ["fox", "dog"], Value("string"))
        write(tmp_path / "empty", name, ["fox", ""], Value("string"))
    with pytest.raises(ValueError, match="'label' holds text, and a stream does not tell"):
        load_images(str(tmp_path / "data"), streaming=True)
    with pytest.raises(ValueError, match="'label' holds '' in row 1 of the train split"):
        load_images(str(tmp_path / "empty"))


def test_text_labels_that_only_evaluation_has_are_refused(tmp_path):
    write(tmp_path / "data", "train", ["fox", "dog"], Value("string"))
    write(tmp_path / "data", "test", ["fox", "cat"], Value("string"))
    with pytest.raises(ValueError, match="validation has images of class cat, and train has none"):
        load_images(str(tmp_path / "data"))


def test_labels_of_different_kinds_are_refused(tmp_path):
    write(tmp_path / "data", "train", [0, 1], Value("int64"))
    (tmp_path / "saved").mkdir()
    splits = {
        name: Dataset.from_dict(
            {"image": [{"path": None, "bytes": encoded(0)}], "label": [label]},
            features=Features(image=Image(), label=kind),
        )
        for name, label, kind in (("train", 0, Value("int64")), ("test", "a", Value("string")))
    }
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="'label' of train holds integer, 'label' of validation holds text"):
        load_images(str(tmp_path / "saved"))


# Splits.


def test_splits_of_tables_are_found_in_any_case(tmp_path):
    for name in ("Train", "VAL"):
        write(tmp_path / "data", name, [0, 1, 1] if name == "Train" else [0], classes("cat", "dog"))
    splits = load_images(str(tmp_path / "data"))
    assert {role: len(split) for role, split in splits.items()} == {"train": 3, "validation": 1}


def test_a_part_of_a_table_is_held_out(tmp_path):
    write(tmp_path / "data", "photos", [0, 1] * 10, classes("cat", "dog"))
    with pytest.raises(ValueError, match=r"no validation split among train.*--validation_fraction 0.2"):
        load_images(str(tmp_path / "data"))
    splits = load_images(str(tmp_path / "data"), validation_fraction=0.3)
    assert {role: len(split) for role, split in splits.items()} == {"train": 14, "validation": 6}
    assert splits.found.classes["validation"] == {"cat": 3, "dog": 3}
    with pytest.raises(ValueError, match="a part of a stream cannot be held out"):
        load_images(str(tmp_path / "data"), validation_fraction=0.3, streaming=True)


def test_tables_that_are_not_used_are_counted_and_odd_ones_refused(tmp_path):
    for name in ("train", "validation", "test"):
        write(tmp_path / "data", name, [0, 1], classes("cat", "dog"))
    found = load_images(str(tmp_path / "data")).found
    assert found.ignored == {"tables of splits that are not used": 1}
    assert found.firsts == {"tables of splits that are not used": "test.parquet"}
    write(tmp_path / "data", "more", [0, 1], classes("cat", "dog"))
    with pytest.raises(ValueError, match=r"more.parquet is in no split by its name, beside test, train, validation"):
        load_images(str(tmp_path / "data"))


def test_evaluating_on_what_trains_is_refused(tmp_path):
    write(tmp_path / "data", "train", [0, 1], classes("cat", "dog"))
    with pytest.raises(ValueError, match=r"would both be train, .*--validation_fraction"):
        load_images(str(tmp_path / "data"), validation_split="train")


def test_images_in_class_folders_and_tables_in_one_folder_are_refused(tmp_path):
    root = write(tmp_path / "data", "train", [0, 1], classes("cat", "dog"))
    write(tmp_path / "data", "val", [0, 1], classes("cat", "dog"))
    (tmp_path / "data/assets").mkdir()
    PIL.Image.new("L", (4, 4)).save(tmp_path / "data/assets/preview.png")
    assert len(load_images(root)["train"]) == 2
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir()
        PIL.Image.new("L", (4, 4)).save(tmp_path / "data" / name / "0.png")
    with pytest.raises(ValueError, match=r"holds images, in .*, and 2 tables, such as train.parquet"):
        load_images(root)


# What save_to_disk wrote.


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk_is_read(tmp_path, streaming):
    table = Dataset.from_dict(
        {"image": [{"path": None, "bytes": encoded(level)} for level in range(4)], "label": [0, 1, 0, 1]},
        features=Features(image=Image(), label=classes("cat", "dog")),
    )
    DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "both")
    splits = load_images(str(tmp_path / "both"), streaming=streaming)
    assert levels(splits["train"]) == [(0, "cat"), (1, "dog"), (2, "cat"), (3, "dog")]
    assert levels(splits["validation"]) == [(1, "dog")]
    table.save_to_disk(tmp_path / "one")
    assert len(load_images(str(tmp_path / "one"), validation_fraction=0.5)["validation"]) == 2
    table.save_to_disk(tmp_path / "inner/all")
    assert len(load_images(str(tmp_path / "inner"), validation_fraction=0.5)["validation"]) == 2
    for name in ("train", "val"):
        table.save_to_disk(tmp_path / "each" / name)
    assert len(load_images(str(tmp_path / "each"))["validation"]) == 4


def test_a_file_of_save_to_disk_that_is_cut_off_is_named(tmp_path):
    table = Dataset.from_dict({"image": [{"path": None, "bytes": encoded(0)}], "label": [0]})
    DatasetDict(train=table, test=table).save_to_disk(tmp_path)
    (file,) = tmp_path.glob("train/*.arrow")
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match=rf"{file.name}' could not be loaded.*save_to_disk"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_arrow_files_are_read(tmp_path, streaming):
    table = Dataset.from_dict(
        {"image": [{"path": None, "bytes": encoded(level)} for level in range(2)], "label": [0, 1]},
        features=Features(image=Image(), label=classes("cat", "dog")),
    ).data.table
    (tmp_path / "data").mkdir()
    for name, writer in (("train", pa.ipc.new_stream), ("test", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / f"data/{name}.arrow"), "wb") as sink, writer(sink, table.schema) as file:
            file.write_table(table)
    splits = load_images(str(tmp_path / "data"), streaming=streaming)
    assert [levels(split) for split in splits.values()] == [[(0, "cat"), (1, "dog")]] * 2


# What cannot be read.


def write_shard(path, numbers):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for kind, data in ((".png", encoded(number)), (".cls", str(number % 2).encode())):
                entry = tarfile.TarInfo(f"{number:03d}{kind}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def cut_shards(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    write_shard(root / "train-0.tar", range(4))
    write_shard(root / "train-1.tar", range(4, 8))
    write_shard(root / "val-0.tar", range(2))
    data = (root / "train-0.tar").read_bytes()
    (root / "train-0.tar").write_bytes(data[: 2 * 2048 + 512 + 40])  # in the middle of the third image
    return str(root)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_rest_of_a_shard_that_is_cut_off_is_one_unreadable_image(cut_shards, streaming, caplog):
    split = load_images(cut_shards, streaming=streaming, num_classes=2)["train"]
    loader = build_loader(split, transform=pil_to_tensor, batch_size=1, training=False)
    seen = [int(images[0, 0, 0, 0]) for images, labels in loader if labels[0] >= 0]
    assert seen == [0, 1, 4, 5, 6, 7]
    assert len(loader.unreadable.slots) == 1
    assert "train-0.tar is cut off after 001" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("data", [b"<html>Not found</html>" * 100, b""])
def test_a_file_that_is_no_tar_is_named(tmp_path, data, streaming):
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data/val-0.tar", range(2))
    (tmp_path / "data/train-0.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"train-0.tar is not a tar file, or its first sample cannot be read"):
        load_images(str(tmp_path / "data"), streaming=streaming, num_classes=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_that_is_cut_off_is_named(tmp_path, streaming):
    write(tmp_path / "data", "train-0", [0, 1], classes("cat", "dog"))
    write(tmp_path / "data", "test", [0, 1], classes("cat", "dog"))
    data = (tmp_path / "data/train-0.parquet").read_bytes()
    (tmp_path / "data/train-1.parquet").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"train-1.parquet is not a whole parquet file: .*bytes\).*fetch it again"):
        load_images(str(tmp_path / "data"), streaming=streaming)


def test_a_file_of_other_columns_is_named(tmp_path):
    write(tmp_path / "data", "train-0", [0, 1], classes("cat", "dog"))
    write(tmp_path / "data", "train-1", [0, 1], classes("cat", "dog"), fold=[1, 2])
    write(tmp_path / "data", "test", [0, 1], classes("cat", "dog"))
    with pytest.raises(ValueError, match=r"train-1.parquet has the columns .*fold is int64 in one and absent"):
        load_images(str(tmp_path / "data"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, number):
    def full(*_, **__):
        try:
            raise OSError(number, "cannot be written")
        except OSError as error:
            raise DatasetGenerationError("An error occurred while generating the dataset") from error

    monkeypatch.setattr("hf_rwp.images.tables.load_dataset", full)
    for name in ("train", "test"):
        write(tmp_path / "data", name, [0, 1], classes("cat", "dog"))
    with pytest.raises(ValueError, match=r"cache of `datasets`, .*cache.*HF_DATASETS_CACHE to a folder"):
        load_images(str(tmp_path / "data"))


def test_a_zip_is_named_with_what_to_do(tmp_path):
    (tmp_path / "train.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"holds no images \(1 .zip files \(unpack them first\)\)"):
        load_images(str(tmp_path))


def write_tar(path, files):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_text_labels_of_shards_are_classes(tmp_path):
    for split in ("train", "val"):
        files = {f"{number}.png": encoded(number) for number in range(2)} | {
            "0.label.txt": b"fox",
            "1.label.txt": b"cat",
        }
        write_tar(tmp_path / f"data/{split}-0.tar", dict(sorted(files.items())))
    assert levels(load_images(str(tmp_path / "data"))["train"]) == [(0, "fox"), (1, "cat")]


@pytest.mark.parametrize("files", [{"train/cat/0.png": encoded(0)}, {"n01440764.tar": b"tar"}])
def test_a_tar_that_is_no_shard_is_refused_with_what_one_is(tmp_path, files):
    write_tar(tmp_path / "data/train-0.tar", files)
    with pytest.raises(ValueError, match=r"0001.jpg and 0001.cls; unpack one of class folders"):
        load_images(str(tmp_path / "data"))


@pytest.mark.parametrize(("labels", "kind"), [([0.0, 1.0], "float64"), ([[0, 1], [1]], "list")])
def test_a_label_of_another_kind_is_named(tmp_path, labels, kind):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        pd.DataFrame({"image": [encoded(0), encoded(1)], "label": labels}).to_parquet(
            tmp_path / f"data/{split}.parquet"
        )
    with pytest.raises(ValueError, match=f"column 'label' of the train split holds {kind}"):
        load_images(str(tmp_path / "data"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset of the Hub whose parquet files lie here: `datasets` takes the classes of the first split for both."""

    def load(train, test, streaming=False):
        write(tmp_path / "files", "train", list(range(len(train))), classes(*train))
        write(tmp_path / "files", "test", list(range(len(test))), classes(*test))
        files = {name: [str(tmp_path / f"files/{name}.parquet")] for name in ("train", "test")}
        local = functools.partial(load_dataset, "parquet", data_files=files)
        builder = functools.partial(load_dataset_builder, "parquet", data_files=files)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("hf_rwp.images.tables.load_dataset", lambda *_, streaming, **__: local(streaming=streaming))
        monkeypatch.setattr("hf_rwp.images.tables.load_dataset_builder", lambda *_, **__: builder())
        return load_images(dataset="user/name", streaming=streaming)

    return load


def test_classes_of_a_hub_dataset_are_those_of_its_files(hub):
    splits = hub(["cat", "dog", "fox"], ["fox", "cat"])
    assert levels(splits["validation"]) == [(0, "fox"), (1, "cat")]
    assert "test has the classes fox, cat in its files, cat, dog, fox in its description" in splits.found.notes[0]


def test_a_hub_dataset_whose_files_cannot_be_asked_is_taken_as_it_is(hub, monkeypatch):
    def fails(file):
        raise ConnectionError(file)

    monkeypatch.setattr("hf_rwp.images.tables.names_in", fails)
    splits = hub(["cat", "dog"], ["cat", "dog"])
    assert levels(splits["validation"]) == [(0, "cat"), (1, "dog")]
    assert splits.found.notes == ["the files of user/name could not be read for their classes: ConnectionError"]


def test_a_stream_of_a_hub_dataset_with_other_classes_is_refused(hub):
    with pytest.raises(ValueError, match=r"test has the classes fox, cat in its files.*leave out streaming"):
        hub(["cat", "dog", "fox"], ["fox", "cat"], streaming=True)
    assert levels(hub(["cat", "dog"], ["cat", "dog"], streaming=True)["validation"]) == [(0, "cat"), (1, "dog")]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_sample_of_a_shard_that_cannot_be_read_is_named(tmp_path, streaming):
    for split in ("train", "val"):
        files = {}
        for number in range(8):
            files |= {f"{number}.png": encoded(number), f"{number}.cls": b"0"}
            files[f"{number}.json"] = b"{" if (split, number) == ("train", 6) else b"{}"
        write_tar(tmp_path / f"data/{split}-0.tar", files)
    with pytest.raises(ValueError, match=r"train-0.tar after 5: Expecting"):
        [list(split) for split in load_images(str(tmp_path / "data"), streaming=streaming, num_classes=1).values()]
