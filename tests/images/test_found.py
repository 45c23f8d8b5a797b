import json

import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from hf_rwp.images.found import Found, found_in


def split(labels, names=("cat", "dog")):
    columns = {"image": [PIL.Image.new("L", (2, 2))] * len(labels), "label": labels}
    return Dataset.from_dict(columns, features=Features(image=Image(), label=ClassLabel(names=list(names))))


def test_splits_without_facts_of_their_own_are_counted():
    found = found_in(DatasetDict(train=split([0, 1, 1]), validation=split([1])))
    assert found.images == {"train": 3, "validation": 1}
    assert found.classes == {"train": {"cat": 1, "dog": 2}, "validation": {"cat": 0, "dog": 1}}


def test_facts_of_many_classes_are_the_fewest_and_the_most():
    names = [f"c{number}" for number in range(30)]
    found = found_in({"train": split([0, 0, *range(2, 30)], names)})
    facts = json.loads(json.dumps(found.facts()))
    assert facts["classes"]["train"] == {"count": 30, "fewest": {"c1": 0}, "most": {"c0": 2}}
    assert "30 classes of 0 (c1) to 2 (c0) images" in found.lines()[0]


def test_a_stream_is_not_counted():
    found = found_in({"train": split([0, 1]).to_iterable_dataset()})
    assert (found.images, found.classes) == ({"train": None}, {"train": {}})
    assert found.lines() == ["train: a stream"]


def test_ignored_files_are_counted_by_reason_with_one_of_them():
    found = Found()
    found.ignore(".txt files", "train/cat/0.txt")
    found.ignore(".txt files", "train/cat/1.txt", 2)
    found.ignore("hidden files", "x", 0)
    assert found.ignored == {".txt files": 3}
    assert found.lines() == ["ignored: 3 .txt files, train/cat/0.txt ..."]
