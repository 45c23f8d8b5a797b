import functools
import io
import logging
import random
import tarfile

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, IterableDatasetDict, Value
from distributed import night
from torchvision.transforms.functional import pil_to_tensor

from hf_rwp.images.data import load_images
from hf_rwp.images.loaders import ImageStream, build_loader

ENCODED = Image(decode=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # 5 s after each pass over parquet files, where `datasets` waits
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def noisy(image):
    """The image in the first channel, a draw of each of the three global generators in the second."""
    pixels = pil_to_tensor(image).double()
    pixels[1] = 0
    pixels[1, 0, :3] = torch.tensor(
        [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()], dtype=torch.float64
    )
    return pixels


def encoded(level):
    file = io.BytesIO()
    PIL.Image.new("L", (4, 4), level).save(file, "PNG")
    return file.getvalue()


def write_shard(path, levels, broken=(), strays=()):
    """A WebDataset shard of gray images; image i has the label i % 3, or 3 where it is one of the strays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for level in levels:
            label = 3 if level in strays else level % 3
            for kind, data in ((".png", b"" if level in broken else encoded(level)), (".cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{level:03d}{kind}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def shards(root, sizes, validation=5, **options):
    first = 0
    for number, size in enumerate(sizes):
        write_shard(root / f"train-{number:03d}.tar", range(first, first + size), **options)
        first += size
    write_shard(root / "val-000.tar", range(validation))
    return str(root)


def stream(root, split="train"):
    return load_images(root, streaming=True, num_classes=3)[split]


def read(loader):
    """The numbers of the images in each batch."""
    return [images[:, 0, 0, 0].int().tolist() for images, _ in loader]


def flat(batches):
    return [number for batch in batches for number in batch]


def whole(loader, epoch=0, start=0):
    loader.set_epoch(epoch, start)
    return [torch.cat([images.flatten(1), labels[:, None]], dim=1) for images, labels in loader]


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def generators():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


# Loading.


@pytest.mark.parametrize(
    "names", [("train-000.tar", "train-001.tar", "val-000.tar"), ("train/0.tar", "train/1.tar", "val/0.tar")]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_tar_shards(tmp_path, names, streaming):
    for first, name in zip((0, 4, 0), names, strict=True):
        write_shard(tmp_path / "tars" / name, range(first, first + 4))
    splits = load_images(str(tmp_path / "tars"), streaming=streaming, num_classes=3 if streaming else None)
    assert isinstance(splits, IterableDatasetDict) == streaming
    for split, size in zip(splits.values(), (8, 4), strict=True):
        assert split.features == Features(image=ENCODED, label=ClassLabel(names=["0", "1", "2"]))
        rows = list(split)
        assert [row["label"] for row in rows] == [level % 3 for level in range(size)]
        assert [np.asarray(Image().decode_example(row["image"])).max() for row in rows] == list(range(size))
        assert isinstance(rows[0]["image"]["bytes"], bytes)


def write_parquet(root, name, levels, labels, kind):
    root.mkdir(exist_ok=True)
    columns = {
        "img": [{"path": None, "bytes": level if isinstance(level, bytes) else encoded(level)} for level in levels]
    }
    Dataset.from_dict({**columns, "y": labels}, features=Features(img=Image(), y=Value("int64"))).cast_column(
        "y", kind
    ).to_parquet(root / f"{name}-00000-of-00001.parquet", batch_size=100)  # datasets 4.7 finds none for an empty one


@pytest.mark.parametrize(("kind", "classes"), [(ClassLabel(names=["a", "b", "c"]), None), (Value("uint8"), 3)])
def test_a_parquet_stream_is_normalized_like_a_table(tmp_path, kind, classes):
    for name in ("train", "test"):
        write_parquet(tmp_path / "data", name, [4, 5, 6], [2, 0, 1], kind)
    found = {s: load_images(str(tmp_path / "data"), streaming=s, num_classes=classes) for s in (False, True)}
    for name in ("train", "validation"):
        assert found[True][name].features == found[False][name].features
        assert list(found[True][name]) == list(found[False][name])


def test_a_stream_of_class_folders(tmp_path):
    for name in ("train/cat/0", "train/dog/1", "val/cat/2", "val/dog/3"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{name}.png").write_bytes(encoded(int(name[-1])))
    split = load_images(str(tmp_path / "data"), streaming=True)["train"]
    assert split.features["label"].names == ["cat", "dog"]
    ((images, labels),) = build_loader(split, transform=noisy, batch_size=4, training=False)
    assert (images[:, 0, 0, 0].tolist(), labels.tolist()) == ([0, 1], [0, 1])


def test_the_digits_stream():
    splits = load_images(streaming=True)
    assert isinstance(splits["train"], IterableDataset)
    assert sum(1 for _ in splits["validation"]) == 360
    assert next(iter(splits["train"]))["image"]["bytes"]


def test_a_stream_of_plain_integers_needs_the_number_of_classes(tmp_path):
    with pytest.raises(ValueError, match=r"'cls' holds plain integers.*set num_classes"):
        load_images(shards(tmp_path / "tars", [3]), streaming=True)


@pytest.mark.parametrize("empty", ["train", "test"])
def test_an_empty_split_of_a_stream_is_named(tmp_path, empty):
    for name in ("train", "test"):
        levels = [] if name == empty else [0, 1, 2]
        write_parquet(tmp_path / "data", name, levels, levels, ClassLabel(names=["a", "b", "c"]))
    role = {"train": "train", "test": "validation"}[empty]
    with pytest.raises(ValueError, match=f"the {role} split holds no rows.*{role}_split"):
        load_images(str(tmp_path / "data"), streaming=True)


def test_the_length_of_a_training_epoch_must_be_known(tmp_path):
    split = stream(shards(tmp_path / "tars", [6, 6]))
    load = functools.partial(build_loader, split, transform=noisy, batch_size=2, training=True)
    with pytest.raises(ValueError, match="--train_num_samples"):
        load()
    assert len(load(num_samples=11)) == 5
    assert len(load(num_samples=11, replicas=2)) == 2
    with pytest.raises(ValueError, match="3 images make no whole batch of 2 for each of 2"):
        load(num_samples=3, replicas=2)
    with pytest.raises(ValueError, match="repeats=2"):
        load(num_samples=11, repeats=2)
    with pytest.raises(TypeError, match="not known"):
        len(build_loader(split, transform=noisy, batch_size=2, training=False))


def test_a_dataset_that_knows_its_size_tells_it(tmp_path):
    for name in ("train", "test"):
        write_parquet(tmp_path / "data", name, [0, 1, 2], [0, 1, 2], ClassLabel(names=["a", "b", "c"]))
    sizes = "\n".join(f"  - name: {name}\n    num_bytes: 9\n    num_examples: 3" for name in ("train", "test"))
    (tmp_path / "data" / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{sizes}\n---\n")
    split = load_images(str(tmp_path / "data"), streaming=True)["train"]
    assert len(build_loader(split, transform=noisy, batch_size=1, training=True)) == 3
    assert len(build_loader(split, transform=noisy, batch_size=1, training=True, num_samples=2)) == 2


# The same images as in memory.

LAYOUTS = pytest.mark.parametrize(
    ("sizes", "replicas", "workers"),
    [([6, 6], 1, 0), ([6, 6], 2, 0), ([4, 5, 3], 2, 0), ([12], 1, 2), ([3, 3, 3, 3], 2, 2), ([6, 4, 2], 2, 2)],
)


@LAYOUTS
def test_evaluation_sees_every_image_once(tmp_path, sizes, replicas, workers):
    root = shards(tmp_path / "tars", sizes)
    table = build_loader(load_images(root)["train"], transform=noisy, batch_size=4, training=False)
    expected = {(n, n % 3) for n in flat(read(table))}
    seen = []
    for replica in range(replicas):
        loader = build_loader(
            stream(root),
            transform=noisy,
            batch_size=4,
            training=False,
            workers=workers,
            replica=replica,
            replicas=replicas,
        )
        for images, labels in loader:
            seen += zip(images[:, 0, 0, 0].int().tolist(), labels.tolist(), strict=True)
    assert len(seen) == 12
    assert set(seen) == expected == {(n, n % 3) for n in range(12)}


@LAYOUTS
def test_a_training_epoch_sees_every_image_once(tmp_path, sizes, replicas, workers):
    root = shards(tmp_path / "tars", sizes)
    loaders = [
        build_loader(
            stream(root),
            transform=noisy,
            batch_size=1,
            training=True,
            workers=workers,
            replica=replica,
            replicas=replicas,
            num_samples=12,
        )
        for replica in range(replicas)
    ]
    orders = []
    for epoch in range(2):
        orders.append([flat(read(loader)) for loader in loaders if not loader.set_epoch(epoch)])
        assert {len(order) for order in orders[-1]} == {12 // replicas}
        assert sorted(flat(orders[-1])) == list(range(12))
        assert flat(orders[-1]) != list(range(12))
    assert orders[0] != orders[1]


def test_the_shuffle_is_of_seed_and_epoch_alone(tmp_path):
    root = shards(tmp_path / "tars", [6, 6])
    load = functools.partial(build_loader, stream(root), transform=noisy, batch_size=3, training=True, num_samples=12)
    first = whole(load(seed=1), epoch=2)
    np.random.seed(9)
    torch.manual_seed(9)
    again = load(seed=1)
    assert equal(whole(again, epoch=2), first)
    assert equal(whole(again, epoch=2), first)
    images = [[batch[:, 0].tolist() for batch in whole(load(seed=seed), epoch=2)] for seed in (1, 2)]
    assert images[0] != images[1]


def test_the_shuffle_buffer_is_as_large_as_asked(tmp_path):
    load = functools.partial(
        build_loader,
        stream(shards(tmp_path / "tars", [12])),
        transform=noisy,
        batch_size=12,
        training=True,
        num_samples=12,
    )
    assert flat(read(load(shuffle_buffer=1))) == list(range(12))
    (order,) = read(load(shuffle_buffer=4))
    assert order != list(range(12))
    assert max(order[:2]) < 4
    assert max(read(load())[0][:2]) >= 4


# Epochs of one length on all replicas.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_replica_that_runs_out_begins_its_share_again(tmp_path, workers):
    root = shards(tmp_path / "tars", [9, 2])
    load = functools.partial(
        build_loader, transform=noisy, batch_size=2, training=True, num_samples=12, replicas=2, workers=workers
    )
    loaders = [load(stream(root), replica=replica) for replica in range(2)]
    assert [len(loader) for loader in loaders] == [3, 3]
    shares = [whole(loader) for loader in loaders]
    assert [len(share) for share in shares] == [3, 3]
    levels = [[sorted(batch[:, 0].int().tolist()) for batch in share] for share in shares]
    assert [[9, 10]] * 3 in levels
    # The images come again, augmented anew.
    small = torch.cat(shares[levels.index([[9, 10]] * 3)])
    assert len(small[:, 16:19].unique()) == 6 * 3


def test_a_replica_without_a_single_batch_is_told(tmp_path):
    root = shards(tmp_path / "tars", [8, 1])
    raised = 0
    for replica in range(2):
        loader = build_loader(
            stream(root),
            transform=noisy,
            batch_size=2,
            training=True,
            num_samples=8,
            replica=replica,
            replicas=2,
        )
        if len(read_or_none(loader)) == 0:
            raised += 1
            with pytest.raises(ValueError, match=f"replica {replica} finds no whole batch of 2"):
                list(loader)
    assert raised == 1


def read_or_none(loader):
    try:
        return read(loader)
    except ValueError:
        return []


# Resuming.


STARTS = (0, 1, 4, 6, 11, 15)


@pytest.mark.parametrize(("workers", "starts"), night([(0, STARTS), (2, (1, 6)), (2, STARTS)], [(2, STARTS)]))
def test_a_later_start_gives_exactly_the_rest_of_the_epoch(tmp_path, workers, starts, caplog):
    caplog.set_level(logging.INFO, "hf_rwp.images.loaders")
    root = shards(tmp_path / "tars", [5, 7, 4], broken=[3, 8])
    load = functools.partial(
        build_loader, transform=noisy, batch_size=2, training=True, num_samples=30, workers=workers, shuffle_buffer=4
    )
    loader = load(stream(root))
    full = whole(loader, epoch=1)
    assert len(full) == len(loader) == 15  # more than one pass over the 14 readable images
    for used in starts:
        assert equal(whole(load(stream(root)), epoch=1, start=2 * used), full[used:])
        assert equal(whole(loader, epoch=1, start=2 * used), full[used:])
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [message.split(" in ")[0] for message in messages] == [
        f"read and discarded {2 * used} images" for used in starts if 0 < used < 15 for _ in range(2)
    ]


def test_each_replica_discards_its_part(tmp_path):
    root = shards(tmp_path / "tars", [8, 8])
    loader = build_loader(
        stream(root), transform=noisy, batch_size=2, training=True, num_samples=16, replica=1, replicas=2
    )
    full = whole(loader)
    assert len(full) == 4
    assert equal(whole(loader, start=8), full[2:])


def test_discarded_images_are_not_augmented(tmp_path):
    calls = []
    loader = build_loader(
        stream(shards(tmp_path / "tars", [8])),
        transform=lambda image: calls.append(image) or noisy(image),
        batch_size=2,
        training=True,
        num_samples=8,
    )
    loader.set_epoch(0, start=4)
    assert len(list(loader)) == 2
    assert len(calls) == 4


# What is to be skipped.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_bad_rows_are_counted_once_and_skipped(tmp_path, training, workers):
    root = shards(tmp_path / "tars", [6, 6], broken=[2, 7], strays=[4])
    options = {"transform": noisy, "training": training, "batch_size": 1, "num_samples": 9, "workers": workers}
    loader = build_loader(stream(root), **options)
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert sorted(flat(read(loader))) == [0, 1, 3, 5, 6, 8, 9, 10, 11]
        assert len(loader.unreadable.slots) == 3


def test_bad_rows_are_named_with_the_reason(tmp_path, caplog):
    root = shards(tmp_path / "tars", [6, 6], broken=[2, 7], strays=[4])
    loader = build_loader(stream(root), transform=noisy, training=False, batch_size=4)
    for _ in range(2):
        list(loader)
    messages = [record.getMessage() for record in caplog.records if record.name == "hf_rwp.images.loaders"]
    assert [message.split(": ")[0] for message in messages] == [f"unreadable image, {n:03d}.png" for n in (2, 4, 7)]
    assert "UnidentifiedImageError" in messages[0]
    assert "label 3 is not one of the 3 classes, 0 to 2" in messages[1]


def test_rows_without_a_path_count_once_however_shuffled(tmp_path, caplog):
    kind = ClassLabel(names=["a", "b", "c"])
    write_parquet(tmp_path / "data", "test", [0], [0], kind)
    write_parquet(tmp_path / "data", "train", [0, 1, b"x", 3, b"", 5, 6], [0, 1, 2, -1, 0, 1, 2], kind)
    loader = build_loader(stream_of(tmp_path / "data"), transform=noisy, training=True, batch_size=2, num_samples=4)
    for epoch in range(4):
        loader.set_epoch(epoch)
        assert set(flat(read(loader))) <= {0, 1, 5, 6}
    assert len(loader.unreadable.slots) == 3
    names = [record.getMessage() for record in caplog.records if record.name == "hf_rwp.images.loaders"]
    assert len(names) == 3
    assert all("row " in name for name in names)


def stream_of(folder):
    return load_images(str(folder), streaming=True)["train"]


def test_a_missing_image_is_skipped():
    rows = {
        "image": [None, {"path": None, "bytes": encoded(5)}, {"path": "gone.png", "bytes": None}],
        "label": [0, 1, 1],
    }
    table = Dataset.from_dict(rows, features=Features(image=ENCODED, label=ClassLabel(2)))
    loader = build_loader(table.to_iterable_dataset(), transform=noisy, training=False, batch_size=4)
    assert read(loader) == [[5]]
    assert len(loader.unreadable.slots) == 2


# Random numbers.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_global_generators_stay_where_they_are(tmp_path, training, workers):
    root = shards(tmp_path / "tars", [6, 6])
    options = {"transform": noisy, "training": training, "batch_size": 2, "num_samples": 12, "workers": workers}
    loader = build_loader(stream(root), **options)
    before = generators()
    for _ in loader:
        assert generators() == before
    assert generators() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_augmented_apart(tmp_path, workers):
    root = shards(tmp_path / "tars", [2, 2, 2, 2])
    draws = []
    for seed in range(2):
        for replica in range(2):
            options = {"replica": replica, "replicas": 2, "num_samples": 8, "workers": workers, "seed": seed}
            loader = build_loader(stream(root), transform=noisy, training=True, batch_size=1, **options)
            for epoch in range(2):
                draws += [batch[:, 16:19] for batch in whole(loader, epoch)]
    assert len(torch.cat(draws).unique()) == 2 * 2 * 8 * 3


def test_a_stream_alone_iterates_over_whole_batches(tmp_path):
    images = ImageStream(stream(shards(tmp_path / "tars", [5])), noisy, batch_size=2, training=True)
    assert [len(labels) for _, labels in images] == [2, 2]
