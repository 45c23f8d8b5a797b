import functools
import io
import logging
import multiprocessing
import pickle
import random
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import timm.data
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from hf_rwp.images.data import load_digits, load_images
from hf_rwp.images.loaders import BatchPlan, ImageDataset, UnreadableImages, build_loader
from hf_rwp.images.pixels import to_rgb


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(level):
    """A gray image that says which one it is."""
    return PIL.Image.new("L", (4, 4), level)


def as_float(image):
    return pil_to_tensor(image).float()


def noisy(image):
    """The image in the first channel, a draw of each of the three global generators in the second."""
    pixels = pil_to_tensor(image).double()
    pixels[1] = 0
    pixels[1, 0, :3] = torch.tensor(
        [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()], dtype=torch.float64
    )
    return pixels


def numbered(count):
    return Dataset.from_dict(
        {"image": [picture(index) for index in range(count)], "label": [index % 3 for index in range(count)]},
        features=Features(image=Image(), label=ClassLabel(names=["a", "b", "c"])),
    ).cast_column("image", Image(decode=False))


def opened(row):
    return Image().decode_example(row["image"])


def read(loader):
    """The numbers of the images in each batch of a loader over `numbered`."""
    return [images[:, 0, 0, 0].int().tolist() for images, _ in loader]


def flat(batches):
    return [number for batch in batches for number in batch]


def generators():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


ENCODED = Image(decode=False)


# The digits.


def test_digits_are_scikit_learns_split_once():
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    expected = sorted((label, *image) for image, label in zip(pixels.astype(int).tolist(), labels, strict=True))
    digits = load_digits()
    found = [
        (row["label"], *(np.asarray(row["image"], float).ravel() * 16 / 255).round().astype(int).tolist())
        for split in digits.values()
        for row in split
    ]
    assert sorted(found) == expected
    assert {name: len(split) for name, split in digits.items()} == {"train": 1437, "validation": 360}


def test_digits_use_the_whole_range_of_gray():
    levels = {value for row in load_digits()["validation"] for value in np.asarray(row["image"]).ravel().tolist()}
    assert levels == {round(level * 255 / 16) for level in range(17)}


def test_digits_are_stratified():
    digits = load_digits()
    train, validation = (np.bincount(digits[name]["label"][:], minlength=10) for name in ("train", "validation"))
    assert np.abs(validation - 0.2 * (train + validation)).max() <= 1


def test_digits_depend_on_the_seed_alone():
    first, again, other = load_digits(), load_digits(), load_digits(seed=1)
    assert first["validation"][:] == again["validation"][:]
    assert first["validation"]["label"][:] != other["validation"]["label"][:]


def test_digits_leave_no_files(tmp_path):
    digits = load_images()
    assert [split.cache_files for split in digits.values()] == [[], []]
    assert not (tmp_path / "cache").exists()
    assert digits["train"].features == Features(image=ENCODED, label=ClassLabel(names=list("0123456789")))


# Folders.


def write_tree(root, files):
    for level, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(level).save(root / name)
    return str(root)


def levels(split):
    return [(np.asarray(opened(row)).max(), split.features["label"].int2str(row["label"])) for row in split]


TRAIN = ["train/cat/0.png", "train/dog/1.png"]


@pytest.mark.parametrize("name", ["validation", "val", "valid", "test"])
def test_image_folder(tmp_path, name):
    splits = load_images(write_tree(tmp_path / "data", [*TRAIN, f"{name}/cat/2.png", f"{name}/dog/3.png"]))
    assert list(splits) == ["train", "validation"]
    assert levels(splits["train"]) == [(0, "cat"), (1, "dog")]
    assert levels(splits["validation"]) == [(2, "cat"), (3, "dog")]


def test_class_folders_named_like_splits_leak_nothing(tmp_path):
    files = ["train/train/0.png", "train/test/1.png", "val/train/2.png", "val/test/3.png"]
    splits = load_images(write_tree(tmp_path / "data", files))
    assert levels(splits["train"]) == [(1, "test"), (0, "train")]
    assert levels(splits["validation"]) == [(3, "test"), (2, "train")]


def test_an_unlabelled_test_folder_is_left_alone(tmp_path):
    files = [*TRAIN, "val/cat/2.png", "val/dog/3.png", "test/4.png"]
    assert len(load_images(write_tree(tmp_path / "data", files))["validation"]) == 2


def test_classes_of_validation_alone_are_refused(tmp_path):
    files = [*TRAIN, "val/cat/2.png", "val/fox/3.png"]
    with pytest.raises(ValueError, match="validation has images of class fox, and train has none"):
        load_images(write_tree(tmp_path / "data", files))
    files = ["train/cat/0.png", "train/fox/1.png", "val/cat/2.png"]
    assert len(load_images(write_tree(tmp_path / "fine", files))["validation"]) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_can_be_named(tmp_path, streaming):
    root = write_tree(
        tmp_path / "data",
        [*TRAIN, "val/cat/2.png", "val/dog/3.png", "held_out/cat/4.png", "mine/cat/5.png", "mine/dog/6.png"],
    )
    splits = load_images(root, train_split="mine", validation_split="held_out", streaming=streaming)
    assert levels(splits["train"]) == [(5, "cat"), (6, "dog")]
    assert levels(splits["validation"]) == [(4, "cat")]
    with pytest.raises(ValueError, match=r"no validation split among .*absent: set validation_split"):
        load_images(root, validation_split="absent", streaming=streaming)


# Parquet, and columns by type.


def write_parquet(root, columns, features, names=("train", "test")):
    root.mkdir()
    for name in names:
        file = root / f"{name}-00000-of-00001.parquet"
        Dataset.from_dict(columns, features=Features(features)).to_parquet(file, batch_size=100)  # as of an empty one
    return str(root)


PICTURES = [picture(0), picture(1), picture(2)]


@pytest.mark.parametrize("order", [["img", "y", "note"], ["note", "y", "img"]])
def test_columns_are_found_by_type(tmp_path, order):
    columns = {"img": PICTURES, "y": [1, 0, 1], "note": ["", "", ""]}
    features = {"img": Image(), "y": ClassLabel(names=["no", "yes"]), "note": Value("string")}
    root = write_parquet(tmp_path / "data", {k: columns[k] for k in order}, {k: features[k] for k in order})
    splits = load_images(root)
    for split in splits.values():
        assert split.features == Features(image=ENCODED, label=ClassLabel(names=["no", "yes"]))
        assert levels(split) == [(0, "yes"), (1, "no"), (2, "yes")]


def test_a_class_label_goes_before_integers(tmp_path):
    columns = {"image": PICTURES, "id": [7, 8, 9], "label": [0, 1, 0]}
    features = {"image": Image(), "id": Value("int64"), "label": ClassLabel(names=["a", "b"])}
    assert load_images(write_parquet(tmp_path / "data", columns, features))["train"]["label"][:] == [0, 1, 0]


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_integers_become_classes(tmp_path, dtype):
    features = {"image": Image(), "fine": Value(dtype)}
    splits = load_images(write_parquet(tmp_path / "data", {"image": PICTURES, "fine": [2, 0, 1]}, features))
    for split in splits.values():
        assert split.features == Features(image=ENCODED, label=ClassLabel(names=["0", "1", "2"]))
        assert levels(split) == [(0, "2"), (1, "0"), (2, "1")]
    batches = read(build_loader(splits["train"], transform=as_float, batch_size=2, training=False))
    assert batches == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("label", "values", "named"),
    [
        (Value("int64"), [0, 1, -1], "'y' holds -1 in the train split"),
        (Value("int64"), [1, 2, 3], "'y' holds 3"),
        (Value("int64"), [0, 1, None], "'y' holds None"),
        (ClassLabel(names=["a", "b"]), [0, 1, -1], "'y' holds -1"),
    ],
)
def test_labels_out_of_range_are_refused(tmp_path, label, values, named):
    root = write_parquet(tmp_path / "data", {"image": PICTURES, "y": values}, {"image": Image(), "y": label})
    with pytest.raises(ValueError, match=named):
        load_images(root)


@pytest.mark.parametrize(
    ("features", "named"),
    [
        ({"y": Value("int64"), "z": Value("int64")}, r"one image column .* none \(of y \(integer\), z \(integer\)\)"),
        ({"a": Image(), "b": Image(), "y": Value("int64")}, "one image column .*: a, b "),
        ({"a": Image(), "y": Value("string")}, r"not clear: the train split has the columns y \(text\).*label_column"),
        ({"a": Image(), "y": Value("int64"), "z": Value("int8")}, r"not clear.* y \(integer\), z \(integer\)"),
        ({"a": Image(), "y": ClassLabel(2), "z": ClassLabel(3)}, r"not clear.* y \(class\), z \(class\)"),
        ({"a": Image(), "y": Value("float32"), "z": Value("int8")}, None),
        ({"a": Image(), "y": Value("int64"), "z": Value("string")}, r"not clear.* y \(integer\), z \(text\)"),
        ({"a": Image(), "width": Value("int64")}, r"not clear.* width \(integer\)"),
        ({"a": Image(), "__index_level_0__": Value("int64"), "y": Value("string")}, r"not clear.* y \(text\)"),
    ],
)
def test_ambiguous_or_missing_columns_are_named(tmp_path, features, named):
    def values(feature):
        return PICTURES if isinstance(feature, Image) else ["0"] * 3 if feature == Value("string") else [0] * 3

    root = write_parquet(tmp_path / "data", {name: values(kind) for name, kind in features.items()}, features)
    if named is None:
        assert load_images(root).found.columns == {"image": "a", "label": "z"}
        return
    with pytest.raises(ValueError, match=named):
        load_images(root)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_can_be_named(tmp_path, streaming):
    columns = {"a": PICTURES, "b": PICTURES[::-1], "y": [0, 1, 0], "z": [2, 1, 0]}
    features = {"a": Image(), "b": Image(), "y": ClassLabel(names=["no", "yes"]), "z": Value("int64")}
    load = functools.partial(load_images, write_parquet(tmp_path / "data", columns, features), streaming=streaming)
    splits = load(image_column="b", label_column="z", num_classes=3)
    for split in splits.values():
        assert split.features == Features(image=ENCODED, label=ClassLabel(names=["0", "1", "2"]))
        assert levels(split) == [(2, "2"), (1, "1"), (0, "0")]
    with pytest.raises(ValueError, match=r"a, b .*: set image_column to the one to use"):
        load()
    with pytest.raises(ValueError, match=r"a, b .*: image_column='z' is not one"):
        load(image_column="z")
    with pytest.raises(ValueError, match="num_classes=3, but column 'y' has 2 classes"):
        load(image_column="a", num_classes=3)


def test_num_classes_bounds_plain_integers(tmp_path):
    features = {"image": Image(), "y": Value("int64")}
    root = write_parquet(tmp_path / "data", {"image": PICTURES, "y": [0, 5, 1]}, features)
    assert load_images(root, num_classes=7)["train"].features["label"].num_classes == 7
    with pytest.raises(ValueError, match="'y' holds 5 in the train split, but its 5 classes are 0 to 4"):
        load_images(root, num_classes=5)


def test_label_names_in_another_order_are_matched_by_name(monkeypatch):
    other = numbered(3).cast_column("label", ClassLabel(names=["a", "c", "b"]))
    monkeypatch.setattr(
        "hf_rwp.images.tables.load_dataset", lambda *_, **__: DatasetDict(train=numbered(3), test=other)
    )
    splits = load_images(dataset="user/name")
    assert levels(splits["validation"]) == [(0, "a"), (1, "c"), (2, "b")]
    assert splits["validation"].features["label"].names == ["a", "b", "c"]
    assert "where train (column 'label') has 'b', validation has 'c'" in splits.found.notes[0]


def test_label_names_of_streams_must_agree(monkeypatch):
    streams = {
        "train": numbered(3).to_iterable_dataset(),
        "test": numbered(3).cast_column("label", ClassLabel(names=["a", "c", "b"])).to_iterable_dataset(),
    }
    monkeypatch.setattr("hf_rwp.images.tables.load_dataset", lambda *_, **__: streams)
    with pytest.raises(ValueError, match=r"where train .*'label'.* has 'b', validation has 'c'.*leave out streaming"):
        load_images(dataset="user/name", streaming=True)


# What cannot be loaded.


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["train/cat/0.png", "train/dog/1.png"], "no validation split among train"),
        (["val/cat/0.png", "val/dog/1.png"], r"no train split among val.*validation_split='val'"),
        ([*TRAIN, "val/2.png", "val/3.png"], r"no validation split .*val holds images without class folders \(2.png"),
    ],
)
def test_trees_without_splits_or_labels_are_refused(tmp_path, files, named):
    with pytest.raises(ValueError, match=named):
        load_images(write_tree(tmp_path / "data", files))


def test_an_empty_validation_folder_is_refused(tmp_path):
    root = write_tree(tmp_path / "data", TRAIN)
    (tmp_path / "data/val").mkdir()
    with pytest.raises(ValueError, match=r"no validation split among train .*--validation_fraction 0.2"):
        load_images(root)


def test_an_empty_split_is_refused(tmp_path):
    features = {"image": Image(), "label": ClassLabel(names=["a"])}
    root = write_parquet(tmp_path / "data", {"image": [], "label": []}, features, names=["validation"])
    Dataset.from_dict({"image": PICTURES, "label": [0] * 3}, features=Features(features)).to_parquet(
        tmp_path / "data/train.parquet"
    )
    with pytest.raises(ValueError, match=r"could not be loaded.*validation.*no data"):
        load_images(root)


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.* is not a folder"):
        load_images(str(tmp_path / "absent"))
    for name in ("empty", "empty/train", "empty/val"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=r"holds no images \(no files\).* images for both splits"):
            load_images(str(tmp_path / "empty"))


def test_two_sources_are_refused():
    with pytest.raises(ValueError, match="set only one"):
        load_images("folder", "user/name")


def test_the_hub_offline_says_what_to_do():
    with pytest.raises(ValueError, match=r"'nobody/nothing' could not be loaded.*set data_dir") as raised:
        load_images(dataset="nobody/nothing")
    assert raised.value.__cause__ is not None


def test_a_hub_dataset_is_normalized_like_a_folder(monkeypatch):
    found = DatasetDict(test=numbered(3), valid=numbered(4), train=numbered(5)).rename_column("image", "jpg")
    asked = []
    monkeypatch.setattr("hf_rwp.images.tables.load_dataset", lambda *a, **k: asked.append((a, k)) or found)
    splits = load_images(dataset="user/name", dataset_config="small", dataset_revision="v2")
    assert asked == [(("user/name",), {"name": "small", "revision": "v2", "streaming": False})]
    assert {name: (len(split), split.column_names) for name, split in splits.items()} == {
        "train": (5, ["image", "label"]),
        "validation": (4, ["image", "label"]),
    }


# Conversion to RGB.


def palette():
    image = PIL.Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("image", "color"),
    [
        (PIL.Image.new("RGB", (2, 2), (10, 20, 30)), (10, 20, 30)),
        (PIL.Image.new("L", (2, 2), 77), (77, 77, 77)),
        (PIL.Image.new("1", (2, 2), 1), (255, 255, 255)),
        (PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0)), (10, 20, 30)),
        (PIL.Image.new("LA", (2, 2), (77, 0)), (77, 77, 77)),
        (PIL.Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (palette(), (10, 20, 30)),
        (PIL.Image.fromarray(np.full((2, 2), 0x4D12, np.uint16)), (0x4D, 0x4D, 0x4D)),
        (PIL.Image.fromarray(np.full((2, 2), 0x4D12, np.int32)), (0x4D, 0x4D, 0x4D)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_every_mode_reaches_the_transform_as_rgb(image, color):
    assert to_rgb(image).mode == "RGB"
    split = Dataset.from_dict({"image": [image], "label": [0]}, features=Features(image=Image(), label=ClassLabel(1)))
    split = split.cast_column("image", ENCODED)
    images, _ = next(iter(build_loader(split, transform=as_float, batch_size=1, training=False)))
    assert images.shape == (1, 3, 2, 2)
    assert (images == torch.tensor(color).view(1, 3, 1, 1)).all()


def test_exif_orientation_is_applied(tmp_path):
    root = write_tree(tmp_path / "data", [*TRAIN, "val/cat/2.png", "val/dog/3.png"])
    pixels = np.zeros((2, 6), np.uint8)
    pixels[:, :3] = 200
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    PIL.Image.fromarray(pixels).save(tmp_path / "data/val/cat/2.png", exif=exif)
    split = load_images(root)["validation"]
    images, _ = next(iter(build_loader(split, transform=as_float, batch_size=1, training=False)))
    np.testing.assert_array_equal(images[0, 0], np.rot90(pixels, k=-1))


# Images that cannot be read.


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb():
    """A PNG whose header promises 10^10 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def rotated():
    """Left half bright; by its EXIF tag to be shown turned clockwise, so with the top half bright."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 200
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encoded(PIL.Image.fromarray(pixels), "JPEG", exif=exif, quality=100)


NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
KINDS = {  # name: bytes, the color of the top left pixel (None: cannot be read)
    "00-plain.png": (encoded(PIL.Image.new("RGB", (8, 8), (10, 20, 30)), "PNG"), (10, 20, 30)),
    "01-corrupt.jpg": (b"this is no image", None),
    "02-cmyk.jpg": (encoded(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "03-truncated.jpg": (encoded(NOISE, "JPEG")[:600], None),
    "04-gray.png": (encoded(PIL.Image.new("L", (8, 8), 77), "PNG"), (77, 77, 77)),
    "05-empty.jpg": (b"", None),
    "06-bomb.png": (bomb(), None),
    "07-palette.png": (encoded(palette(), "PNG"), (10, 20, 30)),
    "08-rotated.jpg": (rotated(), (200, 200, 200)),
    "09-truncated.png": (encoded(NOISE, "PNG")[:600], None),
    "10-deep.png": (encoded(PIL.Image.fromarray(np.full((8, 8), 0x4D12, np.uint16)), "PNG"), (0x4D, 0x4D, 0x4D)),
    "11-alpha.png": (encoded(PIL.Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "PNG"), (10, 20, 30)),
}
BROKEN = [1, 3, 5, 6, 9]
COLORS = [color for _, color in KINDS.values()]


def write_kinds(root):
    """A tree of every kind of image in class a of both splits, after which one image is missing; and one in class b."""
    for split in ("train", "val"):
        for name, (data, _) in KINDS.items():
            (root / split / "a").mkdir(parents=True, exist_ok=True)
            (root / split / "a" / name).write_bytes(data)
        (root / split / "b").mkdir()
        picture(0).save(root / split / "b" / "12-gone.png")
    return str(root)


def small(image):
    return pil_to_tensor(image.resize((4, 4), PIL.Image.Resampling.NEAREST))


def corners(loader):
    """By position: color of the top left pixel, and label."""
    batches = list(loader)
    colors = torch.cat([images[:, :, 0, 0] for images, _ in batches]).tolist()
    return colors, torch.cat([labels for _, labels in batches]).tolist()


def close(color, expected):
    return max(abs(a - b) for a, b in zip(color, expected, strict=True)) <= 3


@pytest.fixture
def kinds(tmp_path):
    splits = load_images(write_kinds(tmp_path / "kinds"))
    for split in ("train", "val"):
        (tmp_path / "kinds" / split / "b" / "12-gone.png").unlink()
    return splits


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_black_and_unlabelled_in_evaluation(kinds, workers):
    loader = build_loader(kinds["validation"], transform=small, batch_size=4, training=False, workers=workers)
    colors, labels = corners(loader)
    assert labels == [0 if color else -1 for color in COLORS] + [-1]
    assert all(close(color, expected or (0, 0, 0)) for color, expected in zip(colors, [*COLORS, None], strict=True))
    assert loader.unreadable.slots == [*BROKEN, 12]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_image_stands_in_for_one_that_is_not(kinds, workers):
    split = kinds["train"]
    loader = build_loader(split, transform=small, batch_size=len(split), training=True, workers=workers)
    for epoch in range(3):
        loader.set_epoch(epoch)
        colors, labels = corners(loader)
        plan = BatchPlan(len(split), batch_size=len(split), training=True)
        plan.set_epoch(epoch)
        for color, label, (row, _, _) in zip(colors, labels, next(iter(plan)), strict=True):
            expected = next(c for offset in range(13) if (c := [*COLORS, None][(row + offset) % 13]))
            assert close(color, expected)
            assert label == 0
        assert loader.unreadable.slots == [*BROKEN, 12]  # in every epoch: each counts once


def test_unreadable_images_are_named_once_with_the_reason(kinds, caplog):
    loader = build_loader(kinds["train"], transform=small, batch_size=4, training=True)
    for epoch in range(3):
        loader.set_epoch(epoch)
        list(loader)
    messages = sorted(record.getMessage() for record in caplog.records if record.name == "hf_rwp.images.loaders")
    assert len(messages) == len(BROKEN) + 1
    for name in (*(list(KINDS)[row] for row in BROKEN), "12-gone.png"):
        assert sum(name in message for message in messages) == 1
    reasons = " ".join(messages)
    assert all(word in reasons for word in ("FileNotFoundError", "UnidentifiedImageError", "DecompressionBombError"))


def without_path(values):
    return Dataset.from_dict(
        {"image": [{"path": None, "bytes": value} for value in values], "label": list(range(len(values)))},
        features=Features(image=ENCODED, label=ClassLabel(len(values))),
    )


def test_rows_without_a_path_are_named_by_number(caplog):
    good = encoded(picture(9), "PNG")
    split = without_path([good, b"x", good])
    list(build_loader(split, transform=as_float, batch_size=3, training=True))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["unreadable image, row 1"]


@pytest.mark.parametrize("limit", [0, 2, 3])
def test_the_search_for_a_readable_image_ends(limit):
    split = without_path([b"x", b"x", b"x", encoded(picture(9), "PNG"), b""])
    loader = build_loader(split, transform=small, batch_size=5, training=True, max_bad_images=limit)
    reached = {0: (limit >= 3), 1: (limit >= 2), 2: (limit >= 1), 3: True, 4: False}
    (order,) = BatchPlan(5, batch_size=5, training=True)
    colors, labels = corners(loader)
    for (row, _, _), color, label in zip(order, colors, labels, strict=True):
        assert (color, label) == (([9, 9, 9], 3) if reached[row] else ([0, 0, 0], 0))


def test_a_row_without_an_image_is_unreadable():
    values = {"image": [None, picture(5)], "label": [0, 0]}
    split = Dataset.from_dict(values, features=Features(image=Image(), label=ClassLabel(1)))
    loader = build_loader(split.cast_column("image", ENCODED), transform=as_float, batch_size=2, training=True)
    assert read(loader) == [[5, 5]]
    assert loader.unreadable.slots == [0]


def fails(image):
    raise OSError("the transform's own")


def test_errors_of_the_transform_pass_through():
    with pytest.raises(OSError, match="own"):
        list(build_loader(numbered(4), transform=fails, batch_size=2, training=True))


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_share_what_could_not_be_read(method):
    split = without_path([b"", encoded(picture(9), "PNG"), b"x", encoded(picture(9), "PNG")])
    images = ImageDataset(split, as_float, training=True)
    plan = BatchPlan(4, batch_size=4, training=True)
    batches = DataLoader(images, batch_sampler=plan, num_workers=1, multiprocessing_context=method)
    assert [len(labels) for _, labels in batches] == [4]
    assert images.unreadable.slots == [0, 2]


def test_an_image_counts_and_is_named_once(caplog):
    unreadable = UnreadableImages(5)
    for slot in (3, 1, 3):
        unreadable.add(slot, f"row {slot}", OSError("broken"))
    assert unreadable.slots == [1, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "unreadable image, row 3: OSError: broken",
        "unreadable image, row 1: OSError: broken",
    ]
    assert caplog.records[0].levelno == logging.WARNING


# Plans: which rows make which batch.


def keys(plan):
    return [key for batch in plan for key in batch]


@pytest.mark.parametrize(
    ("size", "batch_size", "replicas"), [(24, 4, 2), (25, 4, 2), (31, 4, 2), (23, 5, 3), (7, 1, 4)]
)
def test_replicas_share_an_epoch_evenly(size, batch_size, replicas):
    shares = []
    for replica in range(replicas):
        plan = BatchPlan(size, batch_size=batch_size, training=True, replica=replica, replicas=replicas, seed=3)
        shares.append(list(plan))
        assert len(plan) == len(shares[-1]) == size // (batch_size * replicas)
    together = sorted(key for share in shares for batch in share for key in batch)
    used = size // (batch_size * replicas) * batch_size * replicas
    assert len({row for row, _, _ in together}) == used
    assert sorted(position for _, _, position in together) == list(range(used))
    # Step by step, all replicas together hold the next stretch of positions.
    for step, batches in enumerate(zip(*shares, strict=True)):
        positions = [position for batch in batches for _, _, position in batch]
        assert positions == list(range(step * batch_size * replicas, (step + 1) * batch_size * replicas))


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 8, 11])
def test_evaluation_has_every_row_once(size, replicas):
    plans = [BatchPlan(size, batch_size=4, training=False, replica=r, replicas=replicas) for r in range(replicas)]
    assert sorted(row for plan in plans for row, _, _ in keys(plan)) == list(range(size))
    assert [len(plan) for plan in plans] == [len(list(plan)) for plan in plans]
    assert all(row == position for plan in plans for row, _, position in keys(plan))


def test_the_order_is_of_seed_and_epoch_alone():
    def order(seed, epoch):
        plan = BatchPlan(50, batch_size=5, training=True, seed=seed)
        plan.set_epoch(epoch)
        return [row for row, _, _ in keys(plan)]

    torch.manual_seed(0)
    first = order(1, 2)
    torch.manual_seed(5)
    assert first == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert sorted(first) == list(range(50))


def test_repeated_augmentation_draws_each_image_so_often_in_a_row():
    plan = BatchPlan(10, batch_size=2, training=True, repeats=3)
    rows = [row for row, _, _ in keys(plan)]
    once = [row for row, _, _ in keys(BatchPlan(10, batch_size=2, training=True))]
    assert rows == [once[place // 3] for place in range(10)]


def test_repeats_are_augmented_apart():
    (images, _), *_ = build_loader(numbered(4), transform=noisy, batch_size=4, training=True, repeats=2)
    assert torch.equal(images[0, 0], images[1, 0])
    assert not torch.equal(images[0, 1], images[1, 1])


# Loaders.


def test_training_batches_are_shuffled_by_seed_and_epoch():
    loader = functools.partial(build_loader, numbered(50), transform=as_float, batch_size=8, training=True)
    first, again, other = loader(seed=3), loader(seed=3), loader(seed=4)
    epochs = {}
    for epoch in (0, 1):
        first.set_epoch(epoch)
        epochs[epoch] = read(first)
    assert [len(batch) for batch in epochs[0]] == [8] * 6 == [8] * len(first)
    assert len(set(flat(epochs[0]))) == 48
    assert epochs[0] != epochs[1]
    torch.manual_seed(123)
    again.set_epoch(1)
    assert read(again) == epochs[1]
    assert read(other) != epochs[0]


def test_evaluation_keeps_every_image_in_order():
    loader = build_loader(numbered(11), transform=as_float, batch_size=4, training=False)
    assert read(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert torch.cat([labels for _, labels in loader]).tolist() == [index % 3 for index in range(11)]


def test_too_few_images_for_a_batch_are_refused():
    load = functools.partial(build_loader, numbered(5), transform=as_float)
    with pytest.raises(ValueError, match="5 images make no whole batch of 8"):
        load(batch_size=8, training=True)
    with pytest.raises(ValueError, match=r"5 images make no whole batch of 3 for each of 2 .* at most 2"):
        load(batch_size=3, training=True, replicas=2)
    assert len(load(batch_size=3, training=True)) == 1
    assert len(load(batch_size=8, training=False)) == 1


def whole(loader, epoch, start=0):
    loader.set_epoch(epoch, start)
    return [torch.cat([images.flatten(1), labels[:, None]], dim=1) for images, labels in loader]


def test_workers_change_nothing_but_time():
    loader = functools.partial(build_loader, numbered(30), transform=noisy, batch_size=4, training=True, seed=1)
    alone, helped = loader(), loader(workers=2)
    for epoch in (0, 1):
        assert all(torch.equal(*pair) for pair in zip(whole(alone, epoch), whole(helped, epoch), strict=True))


def test_augmentation_is_of_the_place_in_training_alone():
    def draws(seed, epoch):
        loader = build_loader(numbered(8), transform=noisy, batch_size=4, training=True, seed=seed)
        loader.set_epoch(epoch)
        return torch.cat([images[:, 1, 0, :3] for images, _ in loader])

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    first = draws(0, 0)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(8)
    assert torch.equal(first, draws(0, 0))
    # Every draw of every generator differs: between images, batches, epochs and seeds.
    assert len(torch.cat([first, draws(1, 0), draws(0, 1)]).unique()) == 3 * 8 * 3


def test_plain_keys_draw_from_the_global_generators():
    images = ImageDataset(numbered(4), noisy, training=True)
    random.seed(0)
    expected = random.random()
    random.seed(0)
    assert images[2][0][1, 0, 0].item() == expected
    assert images[2][0][1, 0, 0].item() != expected
    assert images[(2, 0, 2)][0][1, 0, 0] == images[(2, 0, 2)][0][1, 0, 0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_global_generators_stay_where_they_are(training, workers, monkeypatch):
    monkeypatch.setattr("torch.cuda.manual_seed_all", None)
    loader = build_loader(numbered(12), transform=noisy, batch_size=4, training=training, workers=workers)
    before = generators()
    for _ in loader:
        assert generators() == before
    assert generators() == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_later_start_gives_exactly_the_rest_of_the_epoch(workers, repeats):
    options = {"transform": noisy, "batch_size": 4, "training": True, "replica": 1, "replicas": 2, "repeats": repeats}
    loader = build_loader(numbered(42), workers=workers, **options)
    full = whole(loader, 2)
    assert len(full) == len(loader) == 5
    for used in (0, 1, 4, 5):
        rest = whole(loader, 2, start=used * 8)
        assert len(rest) == 5 - used
        assert all(torch.equal(*pair) for pair in zip(rest, full[used:], strict=True))
        assert len(loader) == 5


def test_another_number_of_replicas_goes_on_with_the_images_left():
    load = functools.partial(build_loader, numbered(48), transform=as_float, training=True, seed=2)
    whole_epoch = flat(read(load(batch_size=8)))
    before = flat(read(load(batch_size=8))[:2])
    after = []
    for replica in range(4):
        loader = load(batch_size=4, replica=replica, replicas=4)
        loader.set_epoch(0, start=16)
        after += read(loader)
    assert sorted(before + flat(after)) == list(range(48))
    # In the same order too, step by step.
    assert [flat(after[step::2]) for step in range(2)] == [whole_epoch[16:32], whole_epoch[32:]]


def test_workers_outlive_an_epoch_left_early():
    loader = build_loader(numbered(40), transform=noisy, batch_size=4, training=True, workers=2)
    expected = whole(loader, 1)
    loader.set_epoch(0)
    next(iter(loader))
    assert all(torch.equal(*pair) for pair in zip(whole(loader, 1), expected, strict=True))


def test_workers_are_started_once():
    loader = build_loader(numbered(8), transform=noisy, batch_size=4, training=True, workers=1)
    before = {process.pid for process in multiprocessing.active_children()}
    started = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        list(loader)
        started.append({process.pid for process in multiprocessing.active_children()} - before)
    assert len(started[0]) == 1
    assert started[0] == started[1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.uint8), (False, torch.float32)])
def test_batches_keep_the_dtype_of_timms_transform(fast, dtype, workers):
    transform = timm.data.create_transform(24, is_training=True, auto_augment="rand-m9-mstd0.5", use_prefetcher=fast)
    split = load_images()["validation"]
    loader = build_loader(split, transform=transform, batch_size=4, training=True, workers=workers)
    images, labels = next(iter(pickle.loads(pickle.dumps(loader))))
    assert (images.shape, images.dtype, images.is_contiguous()) == ((4, 3, 24, 24), dtype, True)
    assert (labels.shape, labels.dtype) == ((4,), torch.int64)
    items = ImageDataset(split, transform, training=True).__getitems__(
        next(iter(BatchPlan(360, batch_size=4, training=True)))
    )
    for image, (expected, _) in zip(images, items, strict=True):
        np.testing.assert_array_equal(image.numpy(), np.asarray(expected))


class AsArray:
    """Old timm's form of an image: a numpy view (3, H, W) of (H, W, 3) memory."""

    def __call__(self, image):
        return np.rollaxis(np.array(image), 2)


@pytest.mark.parametrize("transform", [AsArray(), pil_to_tensor, as_float])
def test_batches_are_contiguous_whatever_the_images_are(transform):
    colors = np.arange(2 * 5 * 4 * 3, dtype=np.uint8).reshape(2, 5, 4, 3)
    split = without_path([encoded(PIL.Image.fromarray(image), "PNG") for image in colors])
    ((images, _),) = build_loader(split, transform=transform, batch_size=2, training=False)
    assert images.is_contiguous()
    assert images.dtype == (torch.float32 if transform is as_float else torch.uint8)
    assert images.tolist() == colors.transpose(0, 3, 1, 2).tolist()


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    features = {"image": Image(), "label": ClassLabel(names=["a", "b", "c"])}
    root = write_parquet(tmp_path / "pets[1]", {"image": PICTURES, "label": [0, 1, 2]}, features)
    with pytest.raises(ValueError, match=r"takes \[ \] \* \? in a path for a pattern, rename"):
        load_images(root)
    assert len(load_images(write_tree(tmp_path / "what*?", [*TRAIN, "val/cat/2.png"]))["train"]) == 2
