"""runs/files.py: what is replaced is whole or as it was."""

import contextlib

from hf_rwp.runs.files import replacing, replacing_folder, write


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
