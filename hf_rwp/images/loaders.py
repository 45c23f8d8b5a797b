"""Batches of images that come again to the bit, from splits of `load_images`.

1. `BatchPlan` says which rows make which batch: a function of seed, epoch and position, for any number of replicas.
2. `ImageDataset` (rows in reach) and `ImageStream` (rows read once, in order) decode and augment them, in whatever
   process: the random numbers of a batch are a function of its place in training too.
3. `ImageLoader`, from `build_loader`, is what a training loop iterates over.
"""

import contextlib
import itertools
import logging
import random
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from hf_rwp.images.classes import with_plain_labels
from hf_rwp.images.pixels import decoded, why_unreadable

logger = logging.getLogger(__name__)

Transform: TypeAlias = Callable[[PIL.Image.Image], Any]  # from an RGB image to (3, H, W), a tensor or a numpy array
Batch: TypeAlias = tuple[Tensor, Tensor]
Key: TypeAlias = tuple[int, int, int]  # row, epoch, position in the epoch

_STREAM_SLOTS = 2**20
_GRACE = 30  # seconds that a worker outlives a SIGTERM, as long as launchers wait before they kill


class UnreadableImages:
    """The distinct images that could not be read, shared by a loader's worker processes and the main one.

    slots: how many there can be. An image's slot is its row in a split of known size, else a hash of what it is.
    """

    def __init__(self, slots: int) -> None:
        self._flags = torch.zeros(slots, dtype=torch.uint8).share_memory_()

    def add(self, slot: int, name: str, error: Exception | str) -> None:
        """Count the image; the first time, name it and the reason in the log."""
        if not self._flags[slot]:
            self._flags[slot] = 1
            reason = why_unreadable(error) if isinstance(error, Exception) else error
            logger.warning("unreadable image, %s: %s", name, reason)

    @property
    def slots(self) -> list[int]:
        """Those flagged so far, in order; alike on all replicas for the same image."""
        slots: list[int] = self._flags.nonzero().flatten().tolist()
        return slots

    def restore(self, slots: Sequence[int]) -> None:
        """Count those that an earlier session of the run met; they are not named again."""
        self._flags[list(slots)] = 1


class ImageDataset(torch.utils.data.Dataset[tuple[Any, int]]):
    """A split in memory or on disk, decoded, in RGB and transformed: (image, label) by row.

    A key is a row, or (row, epoch, position) from a `BatchPlan`; then a whole batch is transformed with random numbers
    that depend only on (seed, epoch, position of the first key), and the global generators stay as they were.
    A row that cannot be read is added to `unreadable`. In training the next readable row takes its place (a black
    image of class 0 once more than max_bad_images rows in a row have failed); else it is black, its label -1.
    """

    def __init__(
        self, split: Dataset, transform: Transform, *, training: bool, seed: int = 0, max_bad_images: int = 10
    ) -> None:
        self.split = split
        self.transform = transform
        self.training = training
        self.seed = seed
        self.max_bad_images = max_bad_images
        self.unreadable = UnreadableImages(len(split))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Key) -> tuple[Any, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | Key]) -> list[tuple[Any, int]]:
        if isinstance(keys[0], tuple):
            _, epoch, position = keys[0]
            with _seeded(self.seed, epoch, position):
                return self._items([key[0] for key in keys])  # type: ignore[index]
        return self._items(keys)  # type: ignore[arg-type]

    def _items(self, rows: Sequence[int]) -> list[tuple[Any, int]]:
        batch = self.split[rows]
        items = []
        for row, encoded, label in zip(rows, batch["image"], batch["label"], strict=True):
            image = self._decoded(row, encoded)
            if image is None:
                image, label = self._substitute(row)
            items.append((self.transform(image), label))
        return items

    def _decoded(self, row: int, encoded: Mapping[str, Any] | None) -> PIL.Image.Image | None:
        try:
            return decoded(encoded)
        except Exception as error:  # Pillow's decoders raise nearly anything
            path = encoded and encoded["path"]
            self.unreadable.add(row, f"row {row} ({path})" if path else f"row {row}", error)
            return None

    def _substitute(self, row: int) -> tuple[PIL.Image.Image, int]:
        for offset in range(1, self.max_bad_images + 1) if self.training else ():
            other = (row + offset) % len(self.split)
            found = self.split[other]
            image = self._decoded(other, found["image"])
            if image is not None:
                return image, found["label"]
        return PIL.Image.new("RGB", (256, 256)), 0 if self.training else -1


class ImageStream(torch.utils.data.IterableDataset[Batch]):
    """A streaming split's share of one replica, in whole batches: decoded, in RGB, transformed, collated.

    Training: shuffled by (seed, epoch) through a buffer of shuffle_buffer rows in each worker, each worker's short last
    batch dropped. Replicas and workers share the files; where replicas do not divide them, every replica reads all
    files and takes its part of the rows. Rows that cannot be read, or whose label is out of range, are added to
    `unreadable` and skipped. Random transforms depend only on (seed, epoch, replica, worker, number of the batch).
    """

    def __init__(
        self,
        split: IterableDataset,
        transform: Transform,
        *,
        batch_size: int,
        training: bool,
        seed: int = 0,
        replica: int = 0,
        replicas: int = 1,
        shuffle_buffer: int = 10_000,
    ) -> None:
        self.classes: int = split.features["label"].num_classes
        split = with_plain_labels(split, "label")
        if training:
            split = split.shuffle(seed, buffer_size=shuffle_buffer)
        self.split = split_dataset_by_node(split, replica, replicas)
        self.transform = transform
        self.batch_size = batch_size
        self.training = training
        self.seed = seed
        self.replica = replica
        self.replicas = replicas
        self.unreadable = UnreadableImages(_STREAM_SLOTS)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, passes: int = 0, discard: int = 0) -> None:
        """What the next iteration reads.

        passes: how often this epoch's share has been read before; then it is augmented differently. discard: batches
        that will not be used: they are read, for the same rows to make the same batches, but come as empty tensors.
        """
        self.split.set_epoch(epoch)
        self.epoch, self.passes, self.discard = epoch, passes, discard

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rows = self._readable(worker)
        # Workers take turns: batch k comes from worker k % workers, or earlier where another one has run out.
        discard = (self.discard + workers - 1 - worker) // workers
        for number in itertools.count():
            with _seeded(self.seed, self.epoch, self.passes, self.replica, worker, number):
                items = [
                    (None if number < discard else self.transform(image), label)
                    for image, label in itertools.islice(rows, self.batch_size)
                ]
            if not items or (self.training and len(items) < self.batch_size):
                return
            yield (torch.empty(0), torch.empty(0)) if number < discard else _collated(items)

    def _readable(self, worker: int) -> Iterator[tuple[PIL.Image.Image, int]]:
        for number, row in enumerate(self.split):
            encoded, label = row["image"], row["label"]
            try:
                if label is None or not 0 <= label < self.classes:
                    raise ValueError(f"label {label} is not one of the {self.classes} classes, 0 to {self.classes - 1}")
                image = decoded(encoded)
            except Exception as error:  # Pillow's decoders raise nearly anything
                path, content = (encoded["path"], encoded["bytes"]) if encoded else (None, None)
                # Rows change their number when shuffled; what they hold is the same in every epoch.
                slot = zlib.crc32(content or b"", zlib.crc32(f"{path} {label}".encode())) % _STREAM_SLOTS
                self.unreadable.add(slot, path or f"row {number} of replica {self.replica}, worker {worker}", error)
                continue
            yield image, label


class BatchPlan(torch.utils.data.Sampler[list[Key]]):
    """The batches of one replica, as lists of (row, epoch, position); positions run over all replicas.

    Training: the rows shuffled by (seed, epoch), each `repeats` times in a row, len(split) draws in all; what makes no
    whole batch for every replica is dropped. Else: every row once, in order; then replicas differ by up to a batch.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        training: bool,
        seed: int = 0,
        replica: int = 0,
        replicas: int = 1,
        repeats: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.training = training
        self.seed = seed
        self.replica = replica
        self.replicas = replicas
        self.repeats = repeats
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """start: images of this epoch, over all replicas, that have been used before."""
        self.epoch, self.start = epoch, start

    def batches(self, start: int = 0) -> int:
        """How many batches this replica has left once `start` images of an epoch have been used."""
        step = self.batch_size * self.replicas
        if self.training:
            return max(0, self.size - start) // step
        return len(range(start + self.replica * self.batch_size, self.size, step))

    def __len__(self) -> int:
        return self.batches(self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.arange(self.size)
        if self.training:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(_mixed(self.seed, self.epoch)))
            order = order.repeat_interleave(self.repeats)[: self.size]
        epoch, start = self.epoch, self.start
        for batch in range(self.batches(start)):
            first = start + (batch * self.replicas + self.replica) * self.batch_size
            rows = order[first : first + self.batch_size].tolist()
            yield [(row, epoch, first + place) for place, row in enumerate(rows)]


class ImageLoader:
    """One replica's batches: images (B, 3, H, W) as the transform makes them, labels (B,), int64; on the CPU, pinned
    if there is a GPU. `unreadable`: the images that could not be read so far. `label_names`: of the classes.

    Iterating gives the epoch last set, from its start on. It moves no global random generator.
    """

    def __init__(
        self, images: ImageDataset | ImageStream, plan: BatchPlan | None, batches: int | None, workers: int
    ) -> None:
        self.images = images
        self.plan = plan
        self.unreadable = images.unreadable
        self.label_names: list[str] = getattr((images.split.features or {}).get("label"), "names", [])
        self._batches = batches
        self._epoch = self._start = 0
        self._loader: DataLoader[Any] = DataLoader(
            images,
            batch_size=None if plan is None else 1,
            batch_sampler=plan,
            collate_fn=_unchanged if plan is None else _collated,
            num_workers=workers,
            persistent_workers=plan is not None and workers > 0,
            worker_init_fn=_outlive_sigterm,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each iterator's seed comes from the global one
        )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """What the next iteration gives. start: images of the epoch, over all replicas, that have been used before.

        A stream reads and discards up to there; it continues exactly only on the same number of replicas and workers.
        """
        self._epoch, self._start = epoch, start
        if self.plan is not None:
            self.plan.set_epoch(epoch, start)

    def __len__(self) -> int:
        """This replica's batches in a whole epoch. TypeError for a stream's evaluation: it ends where the data ends."""
        if self._batches is None:
            raise TypeError("how many batches a stream gives in evaluation is not known before it ends")
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader) if isinstance(self.images, ImageDataset) else self._stream(self.images)

    def _stream(self, stream: ImageStream) -> Iterator[Batch]:
        discard = self._start // (stream.batch_size * stream.replicas)
        if self._batches is not None and discard >= self._batches:
            return
        given, begin = 0, time.perf_counter()
        for passes in itertools.count():
            before = given
            stream.set_epoch(self._epoch, passes, max(0, discard - given))
            for batch in self._loader:
                given += 1
                if given > discard:
                    yield batch
                elif given == discard:
                    seconds = time.perf_counter() - begin
                    logger.info("read and discarded %d images in %.1f s", discard * stream.batch_size, seconds)
                if given == self._batches:
                    return
            if not stream.training:
                return
            if given == before:
                raise ValueError(
                    f"replica {stream.replica} finds no whole batch of {stream.batch_size} readable images in its "
                    "share of the stream: set fewer workers or replicas, or a smaller batch_size"
                )


def build_loader(
    split: Dataset | IterableDataset,
    *,
    transform: Transform,
    batch_size: int,
    training: bool,
    seed: int = 0,
    workers: int = 0,
    replica: int = 0,
    replicas: int = 1,
    repeats: int = 1,
    shuffle_buffer: int = 10_000,
    max_bad_images: int = 10,
    num_samples: int | None = None,
) -> ImageLoader:
    """Batches of batch_size images of a split from `load_images`, for one of `replicas` that share it.

    transform: from an RGB image to (3, H, W), as timm.data.create_transform makes; a tensor or a numpy array, of any
    dtype. seed: of shuffle and augmentation, at least 0, alike on all replicas. workers: processes, 0 is this one.
    repeats: repeated augmentation, how often each drawn image comes, in a row; not for a stream. num_samples: images
    in a stream's training epoch, over all replicas, where the split does not know. Raises ValueError where training
    would drop every image, or has no known length.
    """
    if isinstance(split, Dataset):
        images = ImageDataset(split, transform, training=training, seed=seed, max_bad_images=max_bad_images)
        options = {"seed": seed, "replica": replica, "replicas": replicas, "repeats": repeats}
        plan = BatchPlan(len(split), batch_size=batch_size, training=training, **options)
        _refuse_no_batch(len(split), batch_size, replicas, training)
        return ImageLoader(images, plan, plan.batches(), workers)
    if repeats != 1:
        raise ValueError(f"repeats={repeats} needs rows that can be drawn again, and a stream's cannot: set it to 1")
    batches = None
    if training:
        size = _known_size(split) if num_samples is None else num_samples
        if size is None:
            raise ValueError("the stream does not know how many images an epoch has: set it, --train_num_samples")
        _refuse_no_batch(size, batch_size, replicas, training)
        batches = size // (batch_size * replicas)
    shared = {"seed": seed, "replica": replica, "replicas": replicas, "shuffle_buffer": shuffle_buffer}
    stream = ImageStream(split, transform, batch_size=batch_size, training=training, **shared)
    return ImageLoader(stream, None, batches, workers)


def _known_size(split: IterableDataset) -> int | None:
    sizes = split.info.splits or {}
    known = next(iter(sizes.values()), None) if split.split is None else sizes.get(str(split.split))
    return known.num_examples or None if known else None


def _refuse_no_batch(size: int, batch_size: int, replicas: int, training: bool) -> None:
    if training and size < batch_size * replicas:
        raise ValueError(
            f"{size} images make no whole batch of {batch_size} for each of {replicas} replica(s): set a batch_size of "
            f"at most {size // replicas}"
        )


def _mixed(*place: int) -> int:
    """A 64-bit seed from some numbers, each at least 0."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def _seeded(*place: int) -> Iterator[None]:
    """The three generators that transforms draw from, a function of `place` inside, as they were before outside."""
    kept = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = _mixed(*place)
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would move CUDA's too
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.default_generator.set_state(kept[2])


def _collated(items: Sequence[tuple[Any, int]]) -> Batch:
    images, labels = zip(*items, strict=True)
    if isinstance(images[0], Tensor) and images[0].dtype != torch.uint8:
        stacked = torch.stack(images)
    else:
        # timm's images are views of (H, W, 3) memory: numpy reorders them faster than torch, and only with `out`.
        arrays = [np.asarray(image) for image in images]
        stacked = torch.from_numpy(np.stack(arrays, out=np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)))
    return stacked, torch.tensor(labels)


def _outlive_sigterm(_: int) -> None:
    """A cluster sends SIGTERM to workers too, and torch ends a process whose worker dies: it may be about to save.

    So does a terminal with Ctrl-C; what a worker does then is up to the process that it loads for, with which it ends.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch
