import distributed
import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from hf_rwp.images.metrics import MOST_CLASSES, Accuracy, label_rank, predicted_class
from hf_rwp.images.top_k import Top1, Top5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))


def combined():
    return evaluate.combine([Top1(), Top5()])


def sample(images, classes, levels=None, seed=0):
    """Logits and labels; with few `levels`, most logits are tied."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, classes)) if levels is None else rng.integers(levels, size=(images, classes))
    return logits.astype(np.float32), rng.integers(classes, size=images)


def scikit_learn(logits, labels):
    classes = range(logits.shape[1])
    return {f"top{k}": top_k_accuracy_score(labels, logits, k=k, labels=classes) for k in (1, 5)}


@pytest.mark.parametrize("levels", [None, 2, 4], ids=["distinct", "two_levels", "four_levels"])
@pytest.mark.parametrize("classes", [6, 10, 100])
def test_agrees_with_scikit_learn(classes, levels):
    logits, labels = sample(500, classes, levels)
    assert combined().compute(predictions=logits, references=labels) == pytest.approx(scikit_learn(logits, labels))


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, np.ndarray.tolist], ids=["array", "tensor", "list"])
def test_uneven_batches_count_by_image(convert):
    logits, labels = sample(103, 10)
    metric = combined()
    for start in range(0, 103, 20):
        piece = slice(start, start + 20)
        metric.add_batch(predictions=convert(logits[piece]), references=convert(labels[piece]))
    assert metric.compute() == pytest.approx(scikit_learn(logits, labels))


def test_images_one_by_one():
    logits, labels = sample(20, 10)
    metric = combined()
    for image, label in zip(logits, labels, strict=True):
        metric.add(prediction=image, reference=label)
    assert metric.compute() == pytest.approx(scikit_learn(logits, labels))


def test_a_metric_starts_anew_after_compute():
    metric = combined()
    for seed in range(2):
        logits, labels = sample(50, 10, seed=seed)
        assert metric.compute(predictions=logits, references=labels) == pytest.approx(scikit_learn(logits, labels))


def test_two_classes():
    assert combined().compute(predictions=[[0.0, 1.0], [2.0, 1.0]], references=[1, 1]) == {"top1": 0.5, "top5": 1.0}


def test_half_precision_logits():
    logits, labels = torch.eye(10, dtype=torch.bfloat16), torch.arange(10)
    assert combined().compute(predictions=logits, references=labels) == {"top1": 1.0, "top5": 1.0}


def test_nan_is_never_a_hit():
    logits = torch.full((10, 10), float("nan"))
    assert combined().compute(predictions=logits, references=torch.arange(10)) == {"top1": 0.0, "top5": 0.0}


def test_ranks_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [float("nan"), 5.0, 4.0]])
    ranks = [label_rank(logits, torch.full((3,), label)).tolist() for label in range(3)]
    assert ranks == [[0, 2, 3], [2, 1, 1], [1, 0, 2]]


def test_no_files_are_written(tmp_path):
    metric = combined()
    metric.add_batch(predictions=[[0.0, 1.0]], references=[1])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_metrics_in_use_together_stay_apart():
    samples = [sample(200, 10, seed=seed) for seed in range(2)]
    metrics = [combined(), combined()]
    for half in (slice(100), slice(100, None)):
        for metric, (logits, labels) in zip(metrics, samples, strict=True):
            metric.add_batch(predictions=logits[half], references=labels[half])
    for metric, drawn in zip(metrics, samples, strict=True):
        assert metric.compute() == pytest.approx(scikit_learn(*drawn))


def test_ranks_of_labels_can_come_in_place_of_logits():
    logits, labels = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 7
    figures = []
    for predictions in (logits, label_rank(logits, labels)):
        metrics = evaluate.combine([Top1(), Top5()])
        metrics.add_batch(predictions=predictions, references=labels)
        figures.append(metrics.compute())
    assert figures[0] == figures[1]


# Over a split


def of_split(logits, labels):
    """By scikit-learn and NumPy."""
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    return {**scikit_learn(logits, labels), "eval_loss": losses.mean()}


def test_a_split_counts_each_readable_image_once():
    logits, labels = sample(103, 10)
    shown = np.where(np.arange(103) % 7 == 0, -1, labels)
    accuracy = Accuracy()
    for piece in (slice(40), slice(40, 103)):
        accuracy.add(torch.as_tensor(logits[piece]), torch.as_tensor(shown[piece]))
    assert accuracy.compute() == pytest.approx(of_split(logits[shown >= 0], labels[shown >= 0]))


def test_a_split_begins_anew_after_compute():
    accuracy = Accuracy()
    for seed in range(2):
        logits, labels = sample(50, 10, seed=seed)
        accuracy.add(torch.as_tensor(logits), torch.as_tensor(labels))
        assert accuracy.compute() == pytest.approx(of_split(logits, labels))


def test_a_split_of_unreadable_images_is_refused():
    accuracy = Accuracy()
    accuracy.add(torch.zeros(2, 3), torch.tensor([-1, -1]))
    with pytest.raises(ValueError, match="no image for evaluation could be read"):
        accuracy.compute()


def uneven_on_rank(sizes):
    rank = distributed.rank()
    logits, labels = sample(sum(sizes), 10)
    start = sum(sizes[:rank])
    accuracy = Accuracy()
    for row in range(start, start + sizes[rank]):
        accuracy.add(torch.as_tensor(logits[row : row + 1]), torch.as_tensor(labels[row : row + 1]))
    return accuracy.compute()


def test_uneven_replicas_agree_on_the_whole_split():
    """Of 17, 4 and no images at all."""
    found = distributed.run(3, uneven_on_rank, [17, 4, 0])
    assert found == [found[0]] * 3
    assert found[0] == pytest.approx(of_split(*sample(21, 10)))


# By class

NAMES = [f"class {number}" for number in range(10)]


@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "tied"])
def test_images_by_their_class_and_what_they_are_taken_for_are_those_of_scikit_learn(levels):
    logits, labels = sample(500, 10, levels)
    shown = np.where(np.arange(500) % 7 == 0, -1, labels)
    accuracy = Accuracy(names=NAMES)
    for piece in (slice(0, 300), slice(300, 500)):
        accuracy.add(torch.as_tensor(logits[piece]), torch.as_tensor(shown[piece]))
    found = accuracy.compute()
    by_class = found.pop("by_class")
    read = shown >= 0
    predicted = 9 - logits[read][:, ::-1].argmax(1)
    assert by_class["confusion"] == confusion_matrix(labels[read], predicted, labels=range(10)).tolist()
    assert by_class["names"] == NAMES
    assert by_class["images"] == np.bincount(labels[read], minlength=10).tolist()
    hits = [by_class["confusion"][number][number] for number in range(10)]
    assert by_class["accuracy"] == [hit / images for hit, images in zip(hits, by_class["images"], strict=True)]
    assert sum(hits) / read.sum() == pytest.approx(found["top1"])  # of equal logits, too, they agree on one
    assert found == pytest.approx(of_split(logits[read], labels[read]))


def test_of_equal_logits_the_class_is_the_one_of_rank_0():
    logits = torch.randint(3, (200, 6), generator=torch.Generator().manual_seed(0)).float()
    assert label_rank(logits, predicted_class(logits)).tolist() == [0] * 200


def test_a_class_without_images_has_no_accuracy_and_counting_begins_anew():
    accuracy = Accuracy(names=["cat", "dog", "fox"])
    for _ in range(2):
        accuracy.add(torch.eye(3)[[0, 0, 2]], torch.tensor([0, 2, 2]))
        found = accuracy.compute()["by_class"]
        assert found["accuracy"] == [1.0, None, 0.5]
        assert found["images"] == [1, 0, 2]
        assert found["confusion"] == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("classes", [MOST_CLASSES, MOST_CLASSES + 1])
def test_very_many_classes_are_not_told_apart(classes):
    accuracy = Accuracy(names=list(map(str, range(classes))))
    accuracy.add(torch.eye(classes), torch.arange(classes))
    assert ("by_class" in accuracy.compute()) == (classes <= MOST_CLASSES)


def by_class_on_rank(sizes):
    rank, start = distributed.rank(), sum(sizes[: distributed.rank()])
    logits, labels = sample(sum(sizes), 10)
    labels[3] = -1  # unreadable
    accuracy = Accuracy(names=NAMES)
    for row in range(start, start + sizes[rank]):
        accuracy.add(torch.as_tensor(logits[row : row + 1]), torch.as_tensor(labels[row : row + 1]))
    with distributed.Collectives() as mode:
        found = accuracy.compute()
    return found, sum(mode.counts.values())


@pytest.mark.parametrize("sizes", [[29, 4], [33, 0]])
def test_uneven_replicas_count_each_image_of_each_class_once_and_meet_once(sizes):
    (found, calls), other = distributed.run(2, by_class_on_rank, sizes)
    assert other == (found, calls)
    assert calls == 1
    logits, labels = sample(33, 10)
    read = np.arange(33) != 3
    matrix = confusion_matrix(labels[read], logits[read].argmax(1), labels=range(10))
    assert found["by_class"]["confusion"] == matrix.tolist()
    assert sum(found["by_class"]["images"]) == 32
