"""Another loss, another augmentation and another metric in imagenet_rwp.py: one function each, as its manual says."""

from imagenet import results_of
from torchvision.transforms import v2

from hf_rwp.images.metrics import Accuracy


def focal_loss(logits, labels):
    """arXiv 1708.02002, gamma 2."""
    log_p = logits.log_softmax(1).gather(1, labels[:, None])
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def test_another_loss_is_what_create_criterion_returns(recipe, monkeypatch, tmp_path):
    plain = results_of(recipe, tmp_path / "plain", "--epochs=1")["final"]
    monkeypatch.setattr(recipe, "create_criterion", lambda args, mixed: focal_loss)
    focal = results_of(recipe, tmp_path / "focal", "--epochs=1")["final"]
    assert 0 < focal["train_loss"] < plain["train_loss"]  # each term is cross-entropy's times (1 - p)^2
    assert focal["rwp"]["slots"] == plain["rwp"]["slots"]


def test_another_augmentation_goes_into_the_transform_of_create_loader(recipe, monkeypatch, tmp_path):
    seen, image_transforms = [], recipe.image_transforms

    def solarized(args, config):
        train, evaluation = image_transforms(args, config)
        watched = v2.Lambda(lambda image: seen.append(image) or image)
        return v2.Compose([v2.RandomSolarize(threshold=128, p=1.0), watched, train]), evaluation

    monkeypatch.setattr(recipe, "image_transforms", solarized)
    assert results_of(recipe, tmp_path, "--epochs=1")["final"]["rwp"]["slots"]["perturbed"] == 3
    assert len(seen) == 96  # three steps of 32, and no image of the evaluation


class Confident(Accuracy):
    """Also the mean probability of the class that a model is surest of."""

    def __init__(self, *given):
        super().__init__(*given)
        self.total = self.count = 0.0

    def add(self, logits, labels):
        super().add(logits, labels)
        self.total += float(logits.float().softmax(1).amax(1).sum())
        self.count += len(logits)

    def compute(self):
        return super().compute() | {"confidence": self.total / self.count}


def test_another_metric_is_a_figure_of_validate_and_reaches_the_results(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "Accuracy", Confident)
    results = results_of(recipe, tmp_path)
    assert 0.1 <= results["final"]["confidence"] <= 1.0
    assert [row["confidence"] for row in results["history"]][-1] == results["final"]["confidence"]
