"""trainer/texts.py: what files of texts are read as, and what is held out of them."""

import json

import pytest

from hf_rwp.trainer.texts import TextArguments, load_texts


def written(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    return str(file)


def test_each_line_of_a_text_file_is_a_text(tmp_path):
    file = written(tmp_path, "lines.txt", "".join(f"line {number}\n\n" for number in range(10)))
    train, held_out = load_texts(TextArguments(data_file=file), seed=0)
    assert sorted(row["text"] for row in train + held_out) == [f"line {number}" for number in range(10)]


@pytest.mark.parametrize(("samples", "held_out"), [(2, 1), (120, 24), (1500, 200)])
def test_a_fifth_is_held_out_and_200_of_many(tmp_path, samples, held_out):
    file = written(tmp_path, "data.jsonl", "\n".join(json.dumps({"text": str(n)}) for n in range(samples)))
    train, rest = load_texts(TextArguments(data_file=file), seed=0)
    assert (len(train), len(rest)) == (samples - held_out, held_out)


def test_more_held_out_than_there_are_is_refused_with_the_flag(tmp_path):
    file = written(tmp_path, "data.jsonl", "\n".join([json.dumps({"text": "1"})] * 5))
    with pytest.raises(ValueError, match="has 5 samples, of which --held_out 5 leaves none to train on: lower it"):
        load_texts(TextArguments(data_file=file, held_out=5), seed=0)


def test_a_damaged_line_is_named(tmp_path):
    file = written(tmp_path, "data.jsonl", '{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: not JSON .* Each line is an object, such as"):
        load_texts(TextArguments(data_file=file), seed=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [("nowhere.jsonl", "is not there"), ("", "is a folder: name a file in it"), ("data.docx", "must end in one of")],
)
def test_a_file_that_cannot_be_one_is_refused_with_the_flags(tmp_path, name, said):
    written(tmp_path, "data.docx", "text")
    with pytest.raises(ValueError, match=f"^data_file='{tmp_path / name}.*{said}"):
        TextArguments(data_file=f"{tmp_path / name}")
