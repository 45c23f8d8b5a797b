import getpass
import json
import socket
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from distributed import rank, run

from hf_rwp.runs.records import (
    append_record,
    command_of,
    environment,
    hub_id,
    read_records,
    scrub_paths,
    weights_digest,
    with_by_class,
)


def test_the_environment_names_versions_and_nobody():
    facts = environment(Accelerator(cpu=True))
    assert facts["versions"]["torch"] == torch.__version__
    assert (facts["hardware"]["replicas"], facts["hardware"]["mixed_precision"]) == (1, "no")
    text = json.dumps(facts)
    assert str(Path.home()) not in text
    for private in (socket.gethostname(), getpass.getuser()):
        assert f'"{private}"' not in text


def test_digests_are_equal_for_equal_bits_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    digest = weights_digest(model)
    assert weights_digest(model.to(memory_format=torch.channels_last)) == digest
    model[1].running_mean[0] += 2**-7
    assert weights_digest(model) != digest


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/someone/data/pets", "pets"),
        ("../someone/pets", "pets"),
        ("~/data/pets", "pets"),
        ("here/pets", "pets"),  # a folder that there is
        ("here/pe*", "pe*"),
        ("here/{a..z}ets", "{a..z}ets"),
        ("/home/some one/*.parquet", "*.parquet"),
        ("file:///home/someone/pets", "pets"),
        ("s3://someone/pets/?X-Amz-Signature=1", "pets"),
        ("http://user:word@10.0.0.1:8000/pets", "pets"),
        ("http://10.0.0.1:8000", ""),
        ("hf://datasets/ada/pets", "hf://datasets/ada/pets"),
        ("local-dir:/home/someone/model", "local-dir:model"),
        ("{img: '/home/someone/a.png', scale: 1/2}", "{img: 'a.png', scale: 1/2}"),
        ("--in=/home/someone/a --out=~/someone/b", "--in=a --out=b"),
        (["/home/someone/a", {"b": ("~/c", 1)}], ["a", {"b": ("c", 1)}]),
        ({"vllm_server_host": "gpu7", "base_url": "gpu7", "nested": {"token": "hf_x", "lr": 1}}, {"nested": {"lr": 1}}),
        ("</s>", "</s>"),
        (".*/attn", ".*/attn"),
        ("hf-hub:timm/resnet50", "hf-hub:timm/resnet50"),
        ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        (0.1, 0.1),
        (None, None),
    ],
)
def test_places_on_this_machine_are_left_out(value, kept, tmp_path, monkeypatch):
    (tmp_path / "here" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert scrub_paths(value) == kept


@pytest.mark.parametrize("name", ["timm/resnet50.a1_in1k", "gpt2"])
def test_what_is_no_path_here_is_an_id_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id(name) == name
    (tmp_path / name).mkdir(parents=True)
    assert hub_id(name) is None
    for path in ("", None, "./ada/net", "../net", "/ada/net", "~/net", "a/b/c"):
        assert hub_id(path) is None


def test_a_command_says_what_differs_from_the_defaults():
    defaults = {"lr": 0.1, "scale": [0.1, 1.0], "model": "resnet18", "ratio": None}
    arguments = {"lr": 0.2, "scale": [0.5, 1.0], "model": "resnet18", "ratio": None}
    assert (
        command_of("accelerate launch train.py", arguments, defaults)
        == "accelerate launch train.py --lr 0.2 --scale 0.5 1.0"
    )


CLASSES = {"names": ["a", "b"], "images": [1, 2], "accuracy": [1.0, 0.5], "confusion": [[1, 0], [1, 1]]}


def test_figures_by_class_are_those_of_the_weights_that_are_described():
    rows = [{"step": 1, "by_class": CLASSES}, {"step": 2, "by_class": {}, "by_class_ema": CLASSES | {"images": [3]}}]
    results = {"final": rows[1], "history": rows, "seconds": 1.0}
    found = with_by_class(results)
    assert found == {
        "final": {"step": 2},
        "history": [{"step": 1}, {"step": 2}],
        "seconds": 1.0,
        "by_class": CLASSES | {"images": [3]},
    }
    assert with_by_class(found | {"final": rows[0]})["by_class"] == CLASSES
    assert "by_class" not in with_by_class(found | {"final": {"step": 1}})  # whose classes nobody counted
    assert "by_class" in rows[0]  # a run that goes on has it still


def test_records_are_appended_and_come_back(tmp_path):
    file = tmp_path / "results" / "runs.jsonl"
    assert read_records(file) == []
    append_record(file, {"top1": 0.5})
    first = file.read_bytes()
    append_record(file, {"top1": 0.6, "name": "é"})
    assert file.read_bytes().startswith(first)
    assert read_records(file) == [{"top1": 0.5}, {"top1": 0.6, "name": "é"}]


def test_a_record_that_a_kill_cut_short_is_left_out_and_cut_off(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text('{"top1": 0.5}\n{"top1": 0.6, "na')
    assert read_records(file) == [{"top1": 0.5}]
    append_record(file, {"top1": 0.7})
    assert file.read_text() == '{"top1": 0.5}\n{"top1": 0.7}\n'


def append_many(path):
    for index in range(50):
        append_record(path, {"process": rank(), "index": index})


def test_two_processes_may_append_to_one_file(tmp_path):
    file = tmp_path / "runs.jsonl"
    run(2, append_many, file)
    assert len(read_records(file)) == 100


def test_a_last_line_without_its_end_is_kept(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text('{"top1": 0.5}')
    append_record(file, {"top1": 0.7})
    assert file.read_text() == '{"top1": 0.5}\n{"top1": 0.7}\n'


def test_what_is_no_record_is_named_and_kept(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text('{"top1": 0.5}\nhello\n{"top1": 0.7}\n')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        append_record(file, {"top1": 0.8})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_record(tmp_path / "other.jsonl", {"loss": float("nan")})
    assert "hello" in file.read_text()
    assert not (tmp_path / "other.jsonl").exists()
