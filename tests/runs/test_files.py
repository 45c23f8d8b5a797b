"""runs/files.py: what is replaced is whole or as it was."""

import contextlib
import json
import math

from hf_rwp.runs.files import as_json, replacing, replacing_folder, write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_whoever_reads_it_goes_on_reading_it(tmp_path):
    file = tmp_path / "results.json"
    write(file, "first")
    with file.open() as reading:
        write(file, b"second")
        assert reading.read() == "first"
    assert file.read_text() == "second"
    assert names(tmp_path) == ["results.json"]


def test_a_failure_leaves_the_earlier_file(tmp_path):
    file = tmp_path / "results.json"
    write(file, "first")
    with contextlib.suppress(OSError), replacing(file) as partial:
        partial.write_text("sec")
        raise OSError(28, "No space left on device")
    assert file.read_text() == "first"
    assert names(tmp_path) == ["results.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "model"
    for name in ("model", "model.partial", "model.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("")
    with replacing_folder(folder) as partial:
        (partial / "new").write_text("")
        assert names(folder) == ["old"]
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["model"]


def test_a_failure_leaves_the_earlier_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("")
    with contextlib.suppress(OSError), replacing_folder(folder) as partial:
        (partial / "new").write_text("")
        raise OSError(28, "No space left on device")
    assert names(folder) == ["old"]


def test_a_list_of_numbers_is_a_line_and_text_stays_as_it_is():
    value = {
        "confusion": [[1, 20], [3, -4]],
        "accuracy": [0.5, math.nan, 1e-9],
        "names": ["[\n 1,\n 2]", "a\nb"],
        "empty": [],
        "text": "[1,\n2]",
    }
    text = as_json(value)
    assert json.loads(text) == value | {"accuracy": [0.5, None, 1e-9]}
    assert '"accuracy": [0.5, null, 1e-09]' in text
    assert "\n    [1, 20],\n    [3, -4]\n" in text
