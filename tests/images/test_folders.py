"""Folders of images as people have them: what becomes of each layout, and what an error says."""

import os
import unicodedata

import numpy as np
import PIL.Image
import pytest
import scipy.io
from datasets import Image

from hf_rwp.images.data import load_images
from hf_rwp.images.loaders import build_loader
from hf_rwp.images.pixels import image_endings

MEMBERS = ("cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png")


def write(root, files):
    """Gray pictures that say which ones they are by their level; other files hold their name."""
    for level, name in enumerate(files):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() in image_endings():
            PIL.Image.new("L", (4, 4), level).save(file)
        else:
            file.write_text(name)
    return root


def inside(split, files=MEMBERS):
    return [f"{split}/{name}" for name in files]


def levels(split):
    return [
        (int(np.asarray(Image().decode_example(row["image"])).max()), split.features["label"].int2str(row["label"]))
        for row in split
    ]


def names(splits):
    return splits["train"].features["label"].names


# A folder of classes without splits.


def flat(root, counts):
    return write(root, [f"{name}/{number}.png" for name, count in counts.items() for number in range(count)])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_fifth_of_a_flat_folder_of_classes_is_held_out(tmp_path, streaming):
    flat(tmp_path, {"cat": 10, "dog": 20})
    splits = load_images(str(tmp_path), streaming=streaming)
    kept, held = (
        {(row["label"], row["image"]["path"]) for row in splits[role].cast_column("image", Image(decode=False))}
        for role in ("train", "validation")
    )
    assert [len(kept), len(held), len(kept & held)] == [24, 6, 0]
    assert sorted(label for label, _ in held) == [0, 0, 1, 1, 1, 1]
    assert splits.found.images == {"train": 24, "validation": 6}
    assert "20% of each class or one of it, were held out for evaluation" in " ".join(splits.found.notes)
    assert splits.found.held_out


def test_the_images_held_out_are_always_the_same_ones(tmp_path):
    flat(tmp_path, {"cat": 10, "dog": 20})
    first, again, more = (
        load_images(str(tmp_path), validation_fraction=part)["validation"]["image"][:] for part in (0.2, 0.2, 0.5)
    )
    assert first == again
    assert len(more) == 15


def test_a_part_of_train_is_held_out_where_it_was_asked_for(tmp_path):
    write(tmp_path, inside("train", [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(8)]))
    with pytest.raises(ValueError, match=r"no validation split among train in .*--validation_fraction 0.2 holds out"):
        load_images(str(tmp_path))
    splits = load_images(str(tmp_path), validation_fraction=0.25)
    assert {role: len(split) for role, split in splits.items()} == {"train": 12, "validation": 4}


def test_validation_fraction_goes_before_a_split_that_is_there(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val")])
    splits = load_images(str(tmp_path), validation_fraction=0.5)
    assert {role: len(split) for role, split in splits.items()} == {"train": 2, "validation": 2}
    assert all("/train/" in image["path"] for split in splits.values() for image in split["image"])
    assert splits.found.ignored == {"images outside of the splits": 4}


def test_a_class_of_one_image_is_trained_on(tmp_path):
    flat(tmp_path, {"cat": 5, "dog": 1})
    splits = load_images(str(tmp_path))
    assert splits.found.classes == {"train": {"cat": 4, "dog": 1}, "validation": {"cat": 1, "dog": 0}}
    assert "1 class of one image only to train on" in " ".join(splits.found.notes)


def test_evaluating_on_what_trains_is_refused_or_named(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val")])
    with pytest.raises(ValueError, match=r"both be train.*--validation_fraction"):
        load_images(str(tmp_path), validation_split="train")
    splits = load_images(str(tmp_path), train_split="val", validation_split="val")  # as --eval_only asks
    assert not splits.found.held_out
    assert "both splits are the same images" in " ".join(splits.found.notes)
    everything = load_images(
        str(flat(tmp_path / "flat", {"a": 3, "b": 3})), train_split="train", validation_split="train"
    )
    assert (len(everything["validation"]), everything.found.held_out) == (6, False)


# Names of splits and classes.


@pytest.mark.parametrize(("train", "held_out"), [("Train", "Val"), ("TRAIN", "TEST"), ("Training", "Testing")])
def test_splits_are_found_in_any_case(tmp_path, train, held_out):
    write(tmp_path, [*inside(train), *inside(held_out)])
    splits = load_images(str(tmp_path))
    assert [level for level, _ in levels(splits["validation"])] == [4, 5, 6, 7]


def test_classes_called_like_splits_are_classes(tmp_path):
    write(tmp_path, [f"{name}/{number}.png" for name in ("bus", "test", "train") for number in range(5)])
    splits = load_images(str(tmp_path))
    assert names(splits) == ["bus", "test", "train"]
    assert len(splits["train"]) == 12


def test_unlabelled_train_and_test_are_no_classes(tmp_path):
    write(tmp_path, ["train/0.png", "train/1.png", "test/2.png"])
    with pytest.raises(
        ValueError, match=r"no train split .*train holds images without class folders \(0.png\).*metadata"
    ):
        load_images(str(tmp_path))


def test_classes_are_in_natural_order(tmp_path):
    flat(tmp_path, {str(number): 2 for number in (10, 2, 0, 1)})
    assert names(load_images(str(tmp_path))) == ["0", "1", "2", "10"]


def test_classes_that_differ_in_case_are_refused(tmp_path):
    write(tmp_path / "one", ["dog/0.png", "Dog/1.png", "cat/2.png"])
    with pytest.raises(ValueError, match="the classes Dog and dog of train differ only in case"):
        load_images(str(tmp_path / "one"))
    write(tmp_path / "two", [*inside("train"), *inside("val", ["cat/0.png", "Dog/1.png"])])
    with pytest.raises(ValueError, match="the classes Dog and dog of train and validation differ only in case"):
        load_images(str(tmp_path / "two"), streaming=True)


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path):
    composed, taken_apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path, [f"train/{composed}/0.png", "train/dog/1.png", f"val/{taken_apart}/2.png", "val/dog/3.png"])
    splits = load_images(str(tmp_path), streaming=True)
    assert names(splits) == [composed, "dog"]
    assert [row["label"] for row in splits["validation"]] == [0, 1]


# Classes that would vanish.


def test_links_to_class_folders_and_images_are_followed(tmp_path):
    write(tmp_path, ["data/train/cat/0.png", "data/val/cat/1.png", "elsewhere/2.png", "elsewhere/3.png"])
    for split in ("train", "val"):
        (tmp_path / f"data/{split}/dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / f"data/{split}/cat/link.png").symlink_to(tmp_path / "elsewhere/3.png")
    splits = load_images(str(tmp_path / "data"))
    assert levels(splits["train"]) == [(0, "cat"), (3, "cat"), (2, "dog"), (3, "dog")]


def test_links_that_lead_round_and_broken_ones_are_counted(tmp_path):
    write(tmp_path, ["cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png"])
    (tmp_path / "cat/again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    found = load_images(str(tmp_path)).found
    assert found.ignored == {"links to a folder around them": 1, "broken links": 1}
    assert found.firsts["broken links"] == "dog/gone.png"


AVIF = pytest.param(".avif", marks=pytest.mark.skipif(".avif" not in image_endings(), reason="an older Pillow"))


@pytest.mark.parametrize("ending", [AVIF, ".webp", ".PNG", ".JPG", ".bmp"])
def test_all_endings_of_pillow_are_read(tmp_path, ending):
    write(tmp_path, [f"{name}/{number}{ending}" for name in ("cat", "dog") for number in range(3)])
    splits = load_images(str(tmp_path))
    assert sum(splits.found.images.values()) == 6


@pytest.mark.parametrize("name", ["{}", "{}.jpg?w=300", "photo.{}"])
def test_images_without_an_ending_are_read(tmp_path, name):
    for number in range(6):
        file = tmp_path / ("cat", "dog")[number % 2] / name.format(number)
        file.parent.mkdir(exist_ok=True)
        PIL.Image.new("L", (4, 4), number).save(file, "JPEG")
    (tmp_path / "cat/LICENSE").write_text("MIT")
    splits = load_images(str(tmp_path))
    assert sum(splits.found.images.values()) == 6
    assert splits.found.ignored == {"files without an ending that are not images": 1}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["fox/0.heic", "fox/1.heic"], r"class folder train/fox holds no image .*2 \.heic files .*pillow-heif"),
        (["fox/0.avif"], r"1 \.avif files .*pillow>=11.3"),
        (["fox/0.nef"], r"class folder train/fox holds no image .*1 \.nef files, which Pillow does not read"),
        (["fox/0.svg", "fox/note.txt"], r"1 \.txt files"),
    ],
)
def test_a_class_folder_without_readable_images_stops_by_name(tmp_path, files, words, monkeypatch):
    monkeypatch.setattr("hf_rwp.images.files.image_endings", lambda: frozenset({".png"}))
    write(tmp_path, [*inside("train"), *inside("val"), *inside("train", files)])
    with pytest.raises(ValueError, match=words):
        load_images(str(tmp_path))


def test_an_empty_class_folder_stops_by_name(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val")])
    (tmp_path / "val/fox").mkdir()
    assert "the class folder val/fox is empty" in load_images(str(tmp_path)).found.notes
    (tmp_path / "train/fox").mkdir()
    with pytest.raises(ValueError, match=r"class folder train/fox holds no image that can be read \(no files\)"):
        load_images(str(tmp_path))


def test_hidden_files_and_folders_are_left_alone_and_counted(tmp_path):
    write(tmp_path, [*MEMBERS, "cat/._0.png", ".ipynb_checkpoints/9.png", "__MACOSX/cat/8.png", "dog/Thumbs.db"])
    found = load_images(str(tmp_path)).found
    assert (sum(found.images.values()), found.ignored) == (4, {"hidden files": 4})


# Files beside the images.


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".txt", ".xml", ".json", ".csv", ".jsonl"])
def test_where_there_are_images_images_are_read(tmp_path, ending, streaming):
    write(tmp_path, [*inside("train"), *inside("val"), *(name.replace(".png", ending) for name in inside("train"))])
    splits = load_images(str(tmp_path), streaming=streaming)
    assert names(splits) == ["cat", "dog"]
    assert len(list(splits["train"])) == 4
    assert splits.found.ignored == {f"{ending} files": 4}


def test_a_stray_picture_is_left_out_and_counted(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val"), "train/stray.png", "logo.png"])
    splits = load_images(str(tmp_path))
    assert len(splits["train"]) == 4
    assert splits.found.ignored == {"images outside of the splits": 1, "images beside the class folders": 1}
    assert splits.found.firsts["images beside the class folders"] == "train/stray.png"


def test_many_stray_pictures_are_refused(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val"), *(f"train/{number}.png" for number in range(3))])
    with pytest.raises(
        ValueError, match=r"3 images lie directly in train of .*0.png, ...\), beside class folders with 4"
    ):
        load_images(str(tmp_path))


def test_splits_that_are_not_used_are_counted(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val"), *inside("test", ["0.png", "1.png"])])
    found = load_images(str(tmp_path)).found
    assert (found.ignored, found.firsts) == (
        {"images outside of the splits": 2},
        {"images outside of the splits": "test/0.png"},
    )


# What is found and refused by name.


def test_a_single_class_is_refused(tmp_path):
    write(tmp_path, ["train/cat/0.png", "val/cat/1.png"])
    with pytest.raises(ValueError, match=r"train of .* holds a single class folder, cat"):
        load_images(str(tmp_path))
    write(tmp_path / "cats", ["cat/0.png"])
    with pytest.raises(ValueError, match="holds a single class folder, cat"):
        load_images(str(tmp_path / "cats"))


def test_images_in_no_folder_are_refused_with_the_table_beside_them(tmp_path):
    write(tmp_path, ["0.png", "1.png", "labels.csv"])
    with pytest.raises(ValueError, match=r"2 images lie directly in .*metadata.csv.*from labels.csv"):
        load_images(str(tmp_path))


def test_a_flat_validation_folder_is_refused_by_its_first_image(tmp_path):
    write(tmp_path, [*inside("train"), "val/8.png", "val/9.png"])
    with pytest.raises(ValueError, match=r"val holds images without class folders \(8.png\)"):
        load_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"2 images lie directly in val of .*8.png"):
        load_images(str(tmp_path), validation_split="val")


@pytest.mark.parametrize(
    "files",
    [
        [*inside("flat"), *inside("split/train"), *inside("split/val")],
        [*inside("first"), *inside("second")],
        [*inside("pets"), *inside("cars", ["audi/0.png", "bmw/1.png"])],
    ],
)
def test_a_folder_one_level_too_high_is_refused_by_what_it_holds(tmp_path, files):
    write(tmp_path, files)
    outer = sorted({name.split("/")[0] for name in files})
    with pytest.raises(ValueError, match=f"folders of folders: {outer[0]} holds .*{outer[1]} holds .*Set data_dir to"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("files", [[*MEMBERS], [*inside("train"), *inside("val")]])
def test_the_only_folder_with_images_is_taken_and_named(tmp_path, files):
    write(tmp_path, [*(f"photos/photos/{name}" for name in files), "photos/docs/readme.md", "LICENSE.txt"])
    splits = load_images(str(tmp_path))
    assert names(splits) == ["cat", "dog"]
    assert "all images are in photos/photos, which was taken for the folder" in splits.found.notes


def test_class_folders_of_unequal_depth_are_refused_by_the_first_odd_path(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val"), "train/cat/kittens/9.png"])
    with pytest.raises(ValueError, match=r"two depths, train/cat/0.png and train/cat/kittens/9.png"):
        load_images(str(tmp_path))


def test_the_classes_of_a_taxonomy_are_its_inner_folders(tmp_path):
    files = ["animals/cat/0.png", "animals/dog/1.png", "plants/rose/2.png"]
    write(tmp_path, [*inside("train", files), *inside("val", files)])
    splits = load_images(str(tmp_path))
    assert names(splits) == ["cat", "dog", "rose"]
    assert "the classes are the inner folders (cat, dog, rose), not those around them (animals, plants)" in " ".join(
        splits.found.notes
    )


def test_a_file_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"photos.zip' is a file and not a folder.*Unpack it"):
        load_images(str(tmp_path / "photos.zip"))
    with pytest.raises(ValueError, match=r"holds no images \(1 .zip files \(unpack them first\)\)"):
        load_images(str(tmp_path))


# Labels in files.


def metadata(root, text, name="metadata.csv"):
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_a_text_label_of_metadata_goes_before_an_integer(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, [f"{split}/0.png", f"{split}/1.png"])
        metadata(tmp_path / split, "file_name,width,label\n0.png,640,fox\n1.png,480,dog\n")
    splits = load_images(str(tmp_path))
    assert levels(splits["train"]) == [(0, "fox"), (1, "dog")]
    assert splits.found.columns == {"image": "file_name", "label": "label"}


def test_metadata_above_the_splits_tells_both(tmp_path):
    write(tmp_path, ["train/0.png", "train/1.png", "val/2.png", "val/3.png"])
    rows = "".join(
        f'{{"file_name": "{name}", "class": {number}}}\n'
        for name, number in (("train/0.png", 3), ("train/1.png", 10), ("val/2.png", 10))
    )
    metadata(tmp_path, rows, "metadata.jsonl")
    splits = load_images(str(tmp_path))
    assert names(splits) == ["3", "10"]
    assert levels(splits["validation"]) == [(2, "10")]
    assert splits.found.ignored == {"images without a label": 1}


def test_class_folders_go_before_metadata_without_labels(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val")])
    metadata(tmp_path / "train", "file_name,width\ncat/0.png,640\ndog/2.png,480\n")
    splits = load_images(str(tmp_path))
    assert (names(splits), len(splits["train"])) == (["cat", "dog"], 4)
    assert splits.found.notes == ["metadata.csv gives no labels that could be taken: they are the class folders"]


def test_metadata_that_contradicts_the_class_folders_is_refused(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val")])
    metadata(tmp_path / "train", "file_name,label\ncat/0.png,0\ncat/1.png,1\ndog/2.png,1\ndog/3.png,0\n")
    with pytest.raises(ValueError, match=r"contradict each other: cat/0.png and cat/1.png.*label_column='label'"):
        load_images(str(tmp_path))
    metadata(tmp_path / "train", "file_name,label\ncat/0.png,0\ncat/1.png,0\ndog/2.png,1\ndog/3.png,1\n")
    assert names(load_images(str(tmp_path))) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,width\n0.png,1\n1.png,2\n", r"not clear.* width \(integer\).*label_column"),
        ("image_id,label\n0,cat\n1,dog\n", "has the columns image_id, label, and needs file_name"),
        ("file_name,label\n0.png,cat\n7.png,dog\n", "name 1 images that are not there, such as 7.png"),
        ("file_name,label\n0.png,cat\n1.png,\n", "without a file_name or label"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, text, words):
    write(tmp_path, ["0.png", "1.png"])
    metadata(tmp_path, text)
    with pytest.raises(ValueError, match=words):
        load_images(str(tmp_path))


def test_tiny_imagenet_is_read_as_it_is_downloaded(tmp_path):
    for wnid in ("n02", "n01"):
        write(tmp_path, [f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{number}.JPEG" for number in range(2)])
        (tmp_path / f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt").write_text("")
    write(tmp_path, ["tiny-imagenet-200/wnids.txt", *(f"tiny-imagenet-200/test/images/{n}.JPEG" for n in range(2))])
    write(tmp_path, [f"tiny-imagenet-200/val/images/val_{number}.JPEG" for number in range(3)])
    (tmp_path / "tiny-imagenet-200/val/val_annotations.txt").write_text(
        "".join(f"val_{number}.JPEG\tn0{2 - number % 2}\t0\t0\t62\t62\n" for number in range(3))
    )
    for root in (tmp_path, tmp_path / "tiny-imagenet-200"):
        splits = load_images(str(root))
        assert names(splits) == ["n01", "n02"]
        assert levels(splits["validation"]) == [(0, "n02"), (1, "n01"), (2, "n02")]
        assert splits.found.images == {"train": 4, "validation": 3}


VAL = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)]
WNIDS = ["n02", "n01", "n02"]


def ilsvrc(root, data):
    write(root, [f"{data}/train/{wnid}/{wnid}_{number}.JPEG" for wnid in ("n01", "n02") for number in range(2)])
    write(root, [f"{data}/val/{name}" for name in VAL])
    return root


def is_ilsvrc(splits):
    assert names(splits) == ["n01", "n02"]
    assert levels(splits["validation"]) == [(0, "n02"), (1, "n01"), (2, "n02")]


def test_ilsvrc_is_read_as_kaggle_ships_it(tmp_path):
    ilsvrc(tmp_path, "ILSVRC/Data/CLS-LOC")
    write(tmp_path, ["ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG", "LOC_synset_mapping.txt"])
    rows = (f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in zip(VAL, WNIDS, strict=True))
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows))
    for root in (tmp_path, tmp_path / "ILSVRC", tmp_path / "ILSVRC/Data/CLS-LOC"):
        is_ilsvrc(load_images(str(root)))


def test_ilsvrc_is_read_by_its_annotations(tmp_path):
    ilsvrc(tmp_path, "ILSVRC/Data/CLS-LOC")
    folder = tmp_path / "ILSVRC/Annotations/CLS-LOC/val"
    folder.mkdir(parents=True)
    for name, wnid in zip(VAL, WNIDS, strict=True):
        text = f"<annotation><object><name>{wnid}</name></object></annotation>"
        (folder / name).with_suffix(".xml").write_text(text)
    is_ilsvrc(load_images(str(tmp_path / "ILSVRC/Data/CLS-LOC")))


def test_ilsvrc_is_read_by_its_development_kit(tmp_path):
    kit = ilsvrc(tmp_path, ".") / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    synsets = np.array([(1, "n02"), (2, "n01")], dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    scipy.io.savemat(kit / "meta.mat", {"synsets": synsets})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n1\n")
    is_ilsvrc(load_images(str(tmp_path)))


def test_a_flat_imagenet_val_without_labels_names_the_file_it_needs(tmp_path):
    ilsvrc(tmp_path, ".")
    with pytest.raises(ValueError, match=r"3 images lie directly in val of .*LOC_val_solution.csv"):
        load_images(str(tmp_path))


# What comes of it.


def test_nothing_is_written_for_a_folder_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "data", [*inside("train"), *inside("val")])
    before = sorted(os.walk(tmp_path))
    splits = load_images(str(tmp_path / "data"))
    assert [split.cache_files for split in splits.values()] == [[], []]
    assert sorted(os.walk(tmp_path)) == before


def test_a_stream_of_class_folders_knows_its_length(tmp_path):
    write(tmp_path, [*inside("train"), *inside("val")])
    split = load_images(str(tmp_path), streaming=True)["train"]
    assert len(build_loader(split, transform=np.asarray, batch_size=2, training=True)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_that_is_a_folder_is_read_as_data_dir(tmp_path, streaming):
    write(tmp_path, [*inside("train"), *inside("val"), "test/4.png"])
    splits = load_images(dataset=str(tmp_path), streaming=streaming)
    assert [row["label"] for row in splits["validation"]] == [0, 0, 1, 1]


@pytest.mark.parametrize("inner", ["", "/training_set"])
def test_folders_that_are_splits_by_a_part_of_their_name_are_named_with_the_flags(tmp_path, inner):
    write(tmp_path, [*inside(f"training_set{inner}"), *inside("test_set"), "pred_set/x/0.png"])
    with pytest.raises(ValueError, match="Set train_split='training_set' and validation_split='test_set'"):
        load_images(str(tmp_path))
    splits = load_images(str(tmp_path), train_split="training_set", validation_split="test_set")
    assert (names(splits), splits.found.images) == (["cat", "dog"], {"train": 4, "validation": 4})


def test_two_folders_of_one_name_in_two_cases_are_refused(tmp_path):
    write(tmp_path, [*inside("train"), *inside("Train"), *inside("val")])
    with pytest.raises(ValueError, match="holds Train and train: set train_split to one of them"):
        load_images(str(tmp_path))
    assert len(load_images(str(tmp_path), train_split="train")["train"]) == 4


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_metadata_of_a_spreadsheet_is_read(tmp_path, mark):
    write(tmp_path, [f"{number}.png" for number in range(4)])
    rows = "".join(f"{number}.png{mark}{'NA' if number % 2 else 'fox'}\n" for number in range(4))
    (tmp_path / "metadata.csv").write_text(f"\ufefffile_name{mark}label\n{rows}", encoding="utf-8")
    assert names(load_images(str(tmp_path))) == ["fox", "NA"]


def test_images_of_all_classes_in_one_folder_are_refused_with_the_table_that_may_help(tmp_path):
    write(tmp_path, ["train/0.png", "train/1.png", "train.csv"])
    with pytest.raises(ValueError, match=r"train holds images without class folders \(0.png\).*from train.csv"):
        load_images(str(tmp_path))
    write(tmp_path / "pets", ["images/abyssinian_1.png", "annotations/list.txt"])
    with pytest.raises(ValueError, match=r"holds a single class folder, images.*metadata.csv"):
        load_images(str(tmp_path / "pets"))
