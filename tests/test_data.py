import pickle
import random
from functools import partial

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import timm.data
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from torchvision.transforms.functional import pil_to_tensor

from hf_rwp.data import build_loader, load_digits, load_images, to_rgb


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(level):
    """A gray image that says which one it is."""
    return PIL.Image.new("L", (4, 4), level)


def as_float(image):
    return pil_to_tensor(image).float()


def numbered(count):
    return Dataset.from_dict(
        {"image": [picture(index) for index in range(count)], "label": [index % 3 for index in range(count)]},
        features=Features(image=Image(), label=ClassLabel(names=["a", "b", "c"])),
    )


def read(loader):
    """The numbers of the images in each batch of a loader over `numbered`."""
    return [images[:, 0, 0, 0].int().tolist() for images, _ in loader]


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
    assert digits["train"].features == Features(image=Image(), label=ClassLabel(names=list("0123456789")))


# Folders.


def write_tree(root, files):
    for level, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(level).save(root / name)
    return str(root)


def levels(split):
    return [(np.asarray(row["image"]).max(), split.features["label"].int2str(row["label"])) for row in split]


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


def test_images_are_decoded_only_when_read(tmp_path):
    root = write_tree(tmp_path / "data", [*TRAIN, "val/cat/2.png", "val/dog/3.png"])
    (tmp_path / "data/val/dog/3.png").write_bytes(b"broken")
    split = load_images(root)["validation"]
    batches = iter(build_loader(split, transform=as_float, batch_size=1, training=False))
    assert next(batches)[0].max() == 2
    with pytest.raises(PIL.UnidentifiedImageError):
        next(batches)


# Parquet, and columns by type.


def write_parquet(root, columns, features, names=("train", "test")):
    root.mkdir()
    for name in names:
        Dataset.from_dict(columns, features=Features(features)).to_parquet(root / f"{name}-00000-of-00001.parquet")
    return str(root)


PICTURES = [picture(0), picture(1), picture(2)]


@pytest.mark.parametrize("order", [["img", "y", "note"], ["note", "y", "img"]])
def test_columns_are_found_by_type(tmp_path, order):
    columns = {"img": PICTURES, "y": [1, 0, 1], "note": ["", "", ""]}
    features = {"img": Image(), "y": ClassLabel(names=["no", "yes"]), "note": Value("string")}
    root = write_parquet(tmp_path / "data", {k: columns[k] for k in order}, {k: features[k] for k in order})
    splits = load_images(root)
    for split in splits.values():
        assert split.features == Features(image=Image(), label=ClassLabel(names=["no", "yes"]))
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
        assert split.features == Features(image=Image(), label=ClassLabel(names=["0", "1", "2"]))
        assert levels(split) == [(0, "2"), (1, "0"), (2, "1")]
    batches = read(build_loader(splits["train"], transform=as_float, batch_size=2, training=False))
    assert batches == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("label", "values", "named"),
    [
        (Value("int64"), [0, 1, -1], "'y' holds -1"),
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
        ({"y": Value("int64"), "z": Value("int64")}, r"one image column .* none \(of y, z\)"),
        ({"a": Image(), "b": Image(), "y": Value("int64")}, "one image column .*: a, b "),
        ({"a": Image(), "y": Value("string")}, r"label|integer column .* none \(of a, y\)"),
        ({"a": Image(), "y": Value("int64"), "z": Value("int8")}, "integer column .*: y, z "),
        ({"a": Image(), "y": ClassLabel(2), "z": ClassLabel(3)}, "ClassLabel .*: y, z "),
    ],
)
def test_ambiguous_or_missing_columns_are_named(tmp_path, features, named):
    def values(feature):
        return PICTURES if isinstance(feature, Image) else ["0"] * 3 if feature == Value("string") else [0] * 3

    root = write_parquet(tmp_path / "data", {name: values(kind) for name, kind in features.items()}, features)
    with pytest.raises(ValueError, match=named):
        load_images(root)


# What cannot be loaded.


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["train/cat/0.png", "train/dog/1.png"], "no validation split among train"),
        (["val/cat/0.png", "val/dog/1.png"], "no train split among val"),
        (["cat/0.png", "dog/1.png"], "no validation split among train"),
        ([*TRAIN, "val/2.png", "val/3.png"], r"integer column .* none \(of image\).*equal depth"),
    ],
)
def test_trees_without_splits_or_labels_are_refused(tmp_path, files, named):
    with pytest.raises(ValueError, match=named):
        load_images(write_tree(tmp_path / "data", files))


def test_an_empty_validation_folder_is_refused(tmp_path):
    root = write_tree(tmp_path / "data", TRAIN)
    (tmp_path / "data/val").mkdir()
    with pytest.raises(ValueError, match="images for both splits"):
        load_images(root)


def test_an_empty_split_is_refused(tmp_path):
    features = {"image": Image(), "label": ClassLabel(names=["a"])}
    root = write_parquet(tmp_path / "data", {"image": [], "label": []}, features, names=["validation"])
    Dataset.from_dict({"image": PICTURES, "label": [0] * 3}, features=Features(features)).to_parquet(
        tmp_path / "data/train.parquet"
    )
    with pytest.raises(ValueError, match=r"no data.* images for both splits"):
        load_images(root)


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.* is not a folder"):
        load_images(str(tmp_path / "absent"))
    for name in ("empty", "empty/train", "empty/val"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=r"could not be loaded.* images for both splits"):
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
    monkeypatch.setattr("hf_rwp.data.load_dataset", {"user/name": found}.__getitem__)
    splits = load_images(dataset="user/name")
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


# Loaders.


def test_training_batches_are_shuffled_by_the_seed():
    loader = partial(build_loader, numbered(50), transform=as_float, batch_size=8, training=True)
    first, again, other = loader(seed=3), loader(seed=3), loader(seed=4)
    epochs = [read(first), read(first)]
    assert [len(batch) for batch in epochs[0]] == [8] * 6
    assert len({number for batch in epochs[0] for number in batch}) == 48
    assert epochs[0] != epochs[1]
    torch.manual_seed(123)
    assert [read(again), read(again)] == epochs
    assert read(other) != epochs[0]


def test_evaluation_keeps_every_image_in_order():
    loader = build_loader(numbered(11), transform=as_float, batch_size=4, training=False)
    assert read(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert torch.cat([labels for _, labels in loader]).tolist() == [index % 3 for index in range(11)]


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="5 images make no whole batch of 8"):
        build_loader(numbered(5), transform=as_float, batch_size=8, training=True)
    assert len(build_loader(numbered(5), transform=as_float, batch_size=8, training=False)) == 1


def test_workers_change_nothing_but_time():
    loader = partial(build_loader, numbered(30), transform=as_float, batch_size=4, training=True, seed=1)
    assert read(loader(workers=2)) == read(loader())


def test_loaders_survive_pickling_with_timms_transform():
    transform = timm.data.create_transform(32, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.2)
    loader = build_loader(numbered(8), transform=transform, batch_size=4, training=True)
    images, labels = next(iter(pickle.loads(pickle.dumps(loader))))
    assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((4,), torch.int64)


def test_random_augmentation_is_repeated_by_the_global_seed():
    transform = timm.data.create_transform(32, is_training=True)

    def epoch(seed, workers):
        loader = build_loader(load_digits()["validation"], transform=transform, batch_size=90, training=True, **workers)
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return torch.cat([images for images, _ in loader])

    for workers in ({}, {"workers": 2}):
        assert torch.equal(epoch(0, workers), epoch(0, workers))
        assert not torch.equal(epoch(0, workers), epoch(1, workers))


@pytest.mark.parametrize("options", [{}, {"use_seedable_sampler": True, "data_seed": 5}])
def test_ranks_share_one_shuffle(options):
    def rank(index):
        torch.manual_seed(index)  # ranks that are seeded apart
        loader = build_loader(numbered(50), transform=as_float, batch_size=4, training=True, seed=2)
        return prepare_data_loader(loader, num_processes=2, process_index=index, put_on_device=False, **options)

    ranks = [rank(0), rank(1)]
    epochs = [[read(loader) for loader in ranks] for _ in range(2)]
    for shares in epochs:
        assert [len(share) for share in shares] == [6, 6]
        assert len({number for share in shares for batch in share for number in batch}) == 48
    assert epochs[0] != epochs[1]


def test_accelerate_prepares_the_loader():
    loader = build_loader(numbered(10), transform=as_float, batch_size=4, training=False)
    assert read(Accelerator(cpu=True).prepare(loader)) == read(loader)
