"""Pushing to a loopback Hub, and downloading from it with unmodified clients; what goes wrong on the way."""

import getpass
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed
import pytest
import timm
import torch
import yaml
from hub_clients import Clients
from hub_server import OTHER, READ, WRITE, HubServer, cut, silent, slow, status
from imagenet import train, train_on_rank
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from timm.data import resolve_data_config

from hf_rwp.hub.card import add_card
from hf_rwp.hub.export import save_model
from hf_rwp.runs.records import weights_digest

MODEL = {"README.md", "config.json", "model.safetensors", "results.json", "curves.png", "confusion.png"}
FOLDER = MODEL - {"confusion.png"}  # of the fixture
PUSH = ("--push_to_hub", "--hub_model_id=ada/digits")
ALWAYS = 999


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def shared_clients(server, tmp_path_factory):
    clients = Clients(server.url, tmp_path_factory.mktemp("home"))
    yield clients
    clients.close()


@pytest.fixture
def hub(server):
    server.repos, server.blobs, server.log, server.faults, server.commit_seconds = {}, {}, [], [], 0
    return server


@pytest.fixture
def clients(hub, shared_clients, tmp_path, monkeypatch):
    """And after the test: the token went where it belongs, and nowhere else."""
    outputs, finish = [], shared_clients.finish

    def watched(*arguments, **options):
        outcome = finish(*arguments, **options)
        outputs.append(outcome.output + repr(outcome.value))
        return outcome

    monkeypatch.setattr(shared_clients, "finish", watched)
    yield shared_clients
    spoken = [request.path.encode() + request.body for request in hub.log]
    stored = [content for repo in hub.repos for content in hub.head(repo).files.values()]
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    for place, texts in {"requests": spoken, "the Hub": stored, "files": written, "output": outputs}.items():
        for text in texts:
            for token in (WRITE, READ, OTHER):
                assert (token.encode() if isinstance(text, bytes) else token) not in text, place


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as a run leaves it."""
    folder = tmp_path_factory.mktemp("made") / "model"
    model = timm.create_model("test_vit", num_classes=3)
    data_config = resolve_data_config({}, model=model)
    save_model(model, folder, label_names=["bee", "crab", "eel"], data_config=data_config)
    picture = folder.parent / "curves.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(5000))
    add_card(folder, {"arguments": {"method": "base"}, "final": {"top1": 0.5}}, pictures=[picture], repo_id="ada/model")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "model"))


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def head(hub, repo_id, revision="main"):
    return yaml.safe_load(hub.files(repo_id, revision)["README.md"].decode().split("---\n")[1])


def of_folder(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def digest_of(weights):
    model = timm.create_model("test_resnet", num_classes=10)
    model.load_state_dict(weights)
    return weights_digest(model)


def sent(hub):
    """Names of the LFS files that went over the wire."""
    return len(hub.requests("PUT", "/lfs-store/"))


def assert_same_logits(outcome, names):
    assert outcome.status == 0, outcome.output
    seen, scores, labels = outcome.value
    expected = torch.tensor(seen["disk"])
    for other in ("hub", "transformers"):
        torch.testing.assert_close(torch.tensor(seen[other]), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(scores), expected.softmax(0), rtol=0, atol=1e-6)
    assert labels == names


# Who pushes


def test_the_recipe_pushes_and_anyone_downloads(hub, clients, tmp_path):
    run = tmp_path / "run"
    flags = ["--hub_tag=v1.0", "--hub_logs", "--report_to=tensorboard", "--model_ema", "--model_ema_decay=0.5"]
    outcome = clients.run("train_and_draw", run, *PUSH, *flags, token=WRITE)
    assert outcome.status == 0, outcome.output
    assert hub.commits("ada/digits") == ["End of training"]
    files = hub.files("ada/digits")
    logs = {name for name in files if name.startswith("logs/")}
    assert set(files) - logs == MODEL
    assert logs
    assert not [name for name in files if socket.gethostname() in name]
    assert files["curves.png"].startswith(b"\x89PNG")
    assert hub.repos["ada/digits"].tags == {"v1.0": hub.head("ada/digits").oid}

    results = json.loads(files["results.json"])
    assert len(results["history"]) == 2
    assert results["weights_sha256"] == weights_digest(of_folder(run / "model"))  # the average's
    assert [results["weights_sha256"]] != results["replicas_sha256"]
    facts = head(hub, "ada/digits")
    assert {"rwp", "timm", "arxiv:2211.11489"} <= set(facts["tags"])
    assert facts["library_name"] == "timm"
    (model,) = facts["model-index"]
    values = {metric["name"]: metric["value"] for metric in model["results"][0]["metrics"]}
    assert values["Top-1 accuracy"] == results["final"]["top1_ema"]  # whose weights these are
    card = files["README.md"].decode()
    assert 'timm.create_model("hf-hub:ada/digits", pretrained=True)' in card
    assert "(curves.png)" in card
    for text in (card, files["results.json"].decode()):
        assert str(tmp_path) not in text
        assert socket.gethostname() not in text
        assert not re.search(rf"\b{getpass.getuser()}\b", text)
    assert_same_logits(clients.run("logits", "ada/digits", run / "model"), [*"0123456789"])


def test_nothing_is_pushed_unless_asked(hub, clients, tmp_path):
    outcome = clients.run("train", tmp_path, "--hub_model_id=ada/digits", "--hub_private", "--epochs=1", token=WRITE)
    assert outcome.status == 0, outcome.output
    assert not hub.log
    assert {file.name for file in (tmp_path / "model").iterdir()} == MODEL  # for `hf upload`, any time


def test_a_notebook_pushes_with_one_call(hub, clients, tmp_path):
    outcome = clients.run("notebook", tmp_path / "out", "ada/beasts-net", token=WRITE)
    assert outcome.status == 0, outcome.output
    assert outcome.value == f"{hub.url}/ada/beasts-net/commit/{hub.head('ada/beasts-net').oid}"
    facts, card = head(hub, "ada/beasts-net"), hub.files("ada/beasts-net")["README.md"].decode()
    assert (facts["license"], facts["datasets"]) == ("mit", ["ada/beasts"])
    (result,) = facts["model-index"][0]["results"]
    assert result["dataset"] == {"name": "Beasts", "type": "ada/beasts", "split": "test"}
    for row in ("gamma, size of the noise | 0.3 |", "share of the perturbed gradient | 0.25 |", "| 2 / 2 |"):
        assert row in card
    assert "Made by hand." in card
    (entry,) = yaml.safe_load(hub.files("ada/beasts-net")[".eval_results/beasts.yaml"])
    assert entry["dataset"] == {"id": "ada/beasts", "task_id": "default"}
    assert entry["value"] == result["metrics"][0]["value"]  # beside model-index
    assert entry["source"]["url"] == "https://huggingface.co/ada/beasts-net/blob/main/results.json"
    assert_same_logits(clients.run("logits", "ada/beasts-net", tmp_path / "out"), ["bee", "crab", 'd"og'])


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_the_trainer_pushes_with_the_same_card(hub, clients, tmp_path, kind):
    outcome = clients.run("trainer", tmp_path, "ada/net", kind, WRITE)
    assert outcome.status == 0, outcome.output
    assert hub.commits("ada/net") == ["Training in progress, step 2", "Training in progress, step 3", "End of training"]
    for commit in hub.repos["ada/net"].branches["main"]:  # no pickle, no log that names the machine
        assert {Path(name).suffix for name in commit.files} <= {"", ".md", ".json", ".safetensors", ".yaml"}
    pushed = contents(tmp_path / "hub")
    files = hub.files("ada/net")
    assert {name: files[name] for name in pushed} == pushed
    (entry,) = yaml.safe_load(files[".eval_results/beasts.yaml"])
    assert entry["dataset"]["id"] == "ada/beasts"
    assert {"README.md", "config.json", "model.safetensors", "results.json"} <= set(pushed)
    facts, results = head(hub, "ada/net"), json.loads(files["results.json"])
    assert facts["datasets"] == ["ada/beasts"]
    assert facts["library_name"] == kind
    assert "rwp" in facts["tags"]
    (metric,) = facts["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == results["final"]["accuracy"]
    assert results["final"]["rwp"]["slots"] == {"clean": 3, "perturbed": 3}
    assert {"train_loss", "loss_clean", "loss_perturbed"} <= set(results["history"][0])
    assert "gamma, size of the noise | 0.02 |" in files["README.md"].decode()
    assert hub.repos["ada/net"].tags == {"v1": hub.head("ada/net").oid}
    if kind == "timm":
        assert_same_logits(clients.run("logits", "ada/net", tmp_path / "hub"), ["bee", "crab", "eel"])
    else:
        outcome = clients.run("load_transformers", "ada/net")
        assert outcome.status == 0, outcome.output
        assert outcome.value[1] == {0: "bee", 1: "crab", 2: "eel"}


def test_the_recipe_on_trainer_pushes_with_the_same_card(hub, clients, tmp_path, made):
    hub.make("ada/base", **{file.name: file.read_bytes() for file in made.iterdir()})
    flags = ["--model_name_or_path=ada/base", "--num_train_epochs=1", "--push_to_hub", "--hub_model_id=ada/vit"]
    outcome = clients.run("train_vit", tmp_path, *flags, token=WRITE)
    assert outcome.status == 0, outcome.output
    files, facts = hub.files("ada/vit"), head(hub, "ada/vit")
    assert set(files) == MODEL
    assert len(hub.commits("ada/vit")) == 1
    assert (facts["base_model"], facts["library_name"]) == ("ada/base", "timm")
    (result,) = facts["model-index"][0]["results"]
    assert result["dataset"]["name"] == "Handwritten digits (scikit-learn)"
    results = json.loads(files["results.json"])
    assert [metric["value"] for metric in result["metrics"]] == [results["final"]["top1"], results["final"]["top5"]]
    assert results["data"]["validation"]["images"] == 41
    assert results["weights_sha256"] == weights_digest(of_folder(tmp_path / "model"))
    card = files["README.md"].decode()
    for text in ("(curves.png)", "| model_name_or_path | ada/base |", "gamma, size of the noise | 0.01 |"):
        assert text in card
    assert_same_logits(clients.run("logits", "ada/vit", tmp_path / "model"), [*"0123456789"])


def test_a_failed_push_of_the_recipe_on_trainer_ends_in_the_command_that_finishes_it(hub, clients, tmp_path):
    hub.fail("POST", "/commit/", status(403, message="Storage limit reached"), times=ALWAYS)
    flags = ["--load_best_model_at_end", "--push_to_hub", "--hub_model_id=ada/vit", "--rwp=false"]
    outcome = clients.run("train_vit", tmp_path, *flags, token=WRITE)
    assert outcome.status == 1
    assert "Storage limit reached" in outcome.output
    assert "Traceback" not in outcome.output
    assert f"hf upload ada/vit {tmp_path / 'model'} ." in outcome.output
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    best = json.loads((tmp_path / "results.json").read_text())["best"]
    assert results["chosen"] == "best"
    assert f"checkpoint-{results['final']['step']}" == best["checkpoint"]
    assert results["final"]["top1"] == best["top1"]


# What is there afterwards


def test_pushing_again_sends_what_changed_alone(hub, clients, folder):
    for expected in (2, 2):  # weights and picture, once
        outcome = clients.run("push", folder, "ada/model", token=WRITE)
        assert outcome.status == 0, outcome.output
        assert sent(hub) == expected
        assert len(hub.commits("ada/model")) == 1
    (folder / "README.md").write_text("---\ntags: [rwp]\n---\nBetter.\n")
    outcome = clients.run("push", folder, "ada/model", {"message": "Second"}, token=WRITE)
    assert outcome.status == 0, outcome.output
    assert sent(hub) == 2
    assert hub.commits("ada/model") == ["Upload model", "Second"]
    assert hub.files("ada/model") == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_runs_folder_stands_for_its_model(hub, clients, folder):
    assert clients.run("push", folder.parent, "ada/model", token=WRITE).status == 0
    assert hub.files("ada/model") == contents(folder)


def test_there_is_one_set_of_weights(hub, clients, folder):
    earlier = {"pytorch_model.bin": b"pickle", "model-00001-of-00002.safetensors": b"half", "notes.md": b"mine"}
    hub.make("ada/model", **earlier)
    assert clients.run("push", folder, "ada/model", token=WRITE).status == 0
    assert set(hub.files("ada/model")) == FOLDER | {"notes.md"}
    assert len(hub.commits("ada/model")) == 2


def test_a_revision_is_a_branch_that_others_do_not_see(hub, clients, folder):
    for tag in ("a", "b"):
        options = {"revision": "trial/1", "tag": tag}
        assert clients.run("push", folder, "ada/model", options, token=WRITE).status == 0
    assert hub.files("ada/model") == {}
    assert set(hub.files("ada/model", "trial/1")) == FOLDER
    commit = hub.head("ada/model", "trial/1").oid
    assert hub.repos["ada/model"].tags == {"a": commit, "b": commit}
    assert_same_logits(clients.run("logits", "ada/model", folder, {"revision": "a"}), ["bee", "crab", "eel"])


def test_a_tag_that_is_taken_stays_where_it_is(hub, clients, folder):
    assert clients.run("push", folder, "ada/model", {"tag": "v1"}, token=WRITE).status == 0
    first = hub.head("ada/model").oid
    (folder / "README.md").write_text("Other.\n")
    outcome = clients.run("push", folder, "ada/model", {"tag": "v1"}, token=WRITE)
    assert outcome.status == 1
    assert "tag v1 was taken by an earlier commit" in outcome.output
    assert hub.repos["ada/model"].tags == {"v1": first}


def test_a_private_repository_is_for_those_with_a_token(hub, clients, folder):
    assert clients.run("push", folder, "ada/model", {"private": True}, token=WRITE).status == 0
    assert hub.repos["ada/model"].private
    for token in (None, OTHER):
        refused = clients.run("download", "ada/model", token=token)
        assert refused.status == 1
        assert "RepositoryNotFoundError" in refused.output
    assert clients.run("download", "ada/model", token=READ).value == sorted({*FOLDER, ".gitattributes"})
    assert_same_logits(clients.run("logits", "ada/model", folder, token=READ), ["bee", "crab", "eel"])


def test_a_public_repository_gets_nothing_private(hub, clients, folder):
    hub.make("ada/model")
    outcome = clients.run("push", folder, "ada/model", {"private": True}, token=WRITE)
    assert outcome.status == 1
    assert "exists and is public, and a private one is set" in outcome.output
    assert not hub.files("ada/model")


def test_two_pushes_at_once_both_arrive(hub, clients, folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "README.md").write_text("Other.\n")
    hub.commit_seconds = 60
    hub.make("ada/model")
    begun = [
        clients.start("push", place, "ada/model", {"message": place.name}, token=WRITE) for place in (folder, other)
    ]
    for job in begun:
        outcome = clients.finish(job)
        assert outcome.status == 0, outcome.output
    assert hub.repos["ada/model"].refused.is_set()
    assert sorted(hub.commits("ada/model")) == ["model", "other"]
    last = folder if hub.commits("ada/model")[-1] == "model" else other
    assert hub.files("ada/model") == {file.name: file.read_bytes() for file in last.iterdir()}


# What goes wrong


PLACES = {
    "create": ("POST", "/api/repos/create"),
    "list": ("GET", "/tree/"),
    "card": ("POST", "/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/lfs-store/"),
    "commit": ("POST", "/commit/"),
}


PASSING = [(place, [status(500), cut, slow(0.1)]) for place in PLACES] + [("upload", [status(503), status(429)])]


@pytest.mark.parametrize(("place", "faults"), PASSING, ids=[*PLACES, "upload-busy"])
def test_what_passes_is_waited_for(hub, clients, folder, place, faults):
    """An error of the server, then a connection that breaks off, and then an answer that takes its time."""
    for fault in faults:
        hub.fail(*PLACES[place], fault)
    outcome = clients.run("push", folder, "ada/model", token=WRITE)
    assert outcome.status == 0, outcome.output
    assert [fault.times for fault in hub.faults] == [0] * len(faults)
    assert set(hub.files("ada/model")) == FOLDER
    assert len(hub.commits("ada/model")) == 1


@pytest.mark.parametrize("place", ["create", "upload", "commit"])
def test_a_silent_server_is_given_up_and_asked_again(hub, clients, folder, place):
    hub.fail(*PLACES[place], silent(3))
    outcome = clients.run("push", folder, "ada/model", token=WRITE, **{"hf_rwp.hub.push.TIMEOUT": 0.5})
    assert outcome.status == 0, outcome.output
    assert set(hub.files("ada/model")) == FOLDER
    assert outcome.seconds < 3


def test_a_silent_server_is_given_up_by_a_client_made_on_the_way_too(hub, clients, folder):
    hub.fail("POST", "/commit/", silent(3))
    outcome = clients.run(
        "push_with_a_new_client", folder, "ada/model", token=WRITE, **{"hf_rwp.hub.push.TIMEOUT": 0.5}
    )
    assert outcome.status == 0, outcome.output
    assert set(hub.files("ada/model")) == FOLDER
    assert outcome.seconds < 3


def test_the_users_own_client_keeps_its_own_limit(hub, clients, folder):
    outcome = clients.run("push_with_a_client_of_the_users", folder, "ada/model", 7.0, token=WRITE)
    assert outcome.status == 0, outcome.output
    assert outcome.value == (7.0, 7.0)
    assert set(hub.files("ada/model")) == FOLDER


@pytest.mark.parametrize("number", [409, 412])
def test_a_commit_that_others_came_before_is_made_again(hub, clients, folder, number):
    hub.fail("POST", "/commit/", status(number, message="A commit has happened since"), times=3)
    assert clients.run("push", folder, "ada/model", token=WRITE).status == 0
    assert len(hub.commits("ada/model")) == 1


def test_what_does_not_pass_ends_in_the_command_that_finishes_it(hub, clients, folder):
    """Half of the upload is there by then, and is not sent again; other weights go, but for those in folders."""
    earlier = {"pytorch_model.bin": b"pickle", "model-00001-of-00002.safetensors": b"half", "onnx/model.bin": b"mine"}
    hub.make("ada/model", private=True, **earlier)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.fail("PUT", f"/lfs-store/{weights}", cut, times=ALWAYS)
    outcome = clients.run("push", folder, "ada/model", {"private": True, "revision": "v2", "tag": "x"}, token=WRITE)
    assert outcome.status == 1
    assert hub.commits("ada/model", "v2") == []
    assert len(hub.blobs) == 1  # the picture
    assert f"{folder} holds all of it. This finishes the push:" in outcome.output
    hub.faults.clear()
    hub.log.clear()
    command = re.search(r"^    (hf upload .*)$", outcome.output, re.MULTILINE)[1]
    folder_of_hf = Path(sys.executable).parent
    environment = {**clients.environment, "HF_TOKEN": WRITE, "PATH": f"{folder_of_hf}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert shlex.split(command)[:4] == ["hf", "upload", "ada/model", str(folder)]
    assert hub.repos["ada/model"].private
    expected = {file.name: file.read_bytes() for file in folder.iterdir()} | {"onnx/model.bin": b"mine"}
    assert hub.files("ada/model", "v2") == expected
    assert hub.repos["ada/model"].tags == {"x": hub.head("ada/model", "v2").oid}
    assert sent(hub) == 1


@pytest.mark.parametrize(
    ("repo_id", "token", "hint"),
    [
        ("ada/model", None, "log in with `hf auth login`"),
        ("ada/model", "hf_expired", "log in with `hf auth login`"),
        ("ada/model", READ, "it needs write access"),
        ("ada/there", READ, "it needs write access"),
        ("bob/model", WRITE, "must be yours"),
        ("bob/there", WRITE, "must be yours"),
    ],
)
def test_who_may_not_write_learns_why_at_once(hub, clients, folder, repo_id, token, hint):
    hub.make("bob/there", **{"README.md": b"Bob's."})
    hub.make("ada/there")
    outcome = clients.run("push", folder, repo_id, token=token)
    assert outcome.status == 1
    assert hint in outcome.output
    assert "Trying again" not in outcome.output
    assert "hf_expired" not in outcome.output
    assert f"hf upload {repo_id}" in outcome.output
    assert hub.files("bob/there") == {"README.md": b"Bob's."}


def test_offline_is_said_at_once(hub, clients, folder):
    outcome = clients.run("push", folder, "ada/model", **{"huggingface_hub.constants.HF_HUB_OFFLINE": True})
    assert outcome.status == 1
    assert "unset HF_HUB_OFFLINE" in outcome.output
    assert "Trying again" not in outcome.output


def test_a_card_that_the_hub_refuses_is_no_reason_to_try_again(hub, clients, folder):
    (folder / "README.md").write_text("---\ntags: [1, 2\n---\n")
    outcome = clients.run("push", folder, "ada/model", token=WRITE)
    assert outcome.status == 1
    assert "Trying again" not in outcome.output
    assert "no YAML" in outcome.output


# A recipe whose push fails, and its pushes in the background


def test_a_failed_push_costs_no_weights(hub, clients, tmp_path):
    hub.fail("POST", "/commit/", status(403, message="Storage limit reached"), times=ALWAYS)
    outcome = clients.run("train", tmp_path, *PUSH, token=WRITE)
    assert outcome.status == 1
    assert "Storage limit reached" in outcome.output
    assert "Traceback" not in outcome.output
    assert f"hf upload ada/digits {tmp_path / 'model'} ." in outcome.output
    assert {file.name for file in (tmp_path / "model").iterdir()} == MODEL
    assert (tmp_path / "results.json").exists()
    assert timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).num_classes == 10
    hub.faults.clear()
    assert clients.run("push", tmp_path / "model", "ada/digits", token=WRITE).status == 0
    assert set(hub.files("ada/digits")) == MODEL


def test_a_push_that_cannot_work_ends_a_run_before_it_begins(hub, clients, tmp_path):
    outcome = clients.run("train", tmp_path, *PUSH, token=READ)
    assert outcome.status == 1
    assert "ada/digits cannot be pushed to" in outcome.output
    assert not (tmp_path / "checkpoints").exists()


def test_a_hub_that_is_away_when_training_begins_may_be_back_when_it_ends(hub, clients, tmp_path):
    hub.fail("POST", "/api/repos/create", status(503))
    outcome = clients.run("train", tmp_path, *PUSH, "--epochs=1", token=WRITE)
    assert outcome.status == 0, outcome.output
    assert "training goes on" in outcome.output
    assert set(hub.files("ada/digits")) == MODEL


@pytest.mark.parametrize("strategy", ["best", "every_save"])
def test_pushes_in_the_background_come_before_the_last(hub, clients, tmp_path, strategy):
    flags = [f"--hub_strategy={strategy}", "--epochs=3", "--checkpointing_steps=2"]
    outcome = clients.run("train", tmp_path, *PUSH, *flags, token=WRITE)
    assert outcome.status == 0, outcome.output
    *during, last = hub.commits("ada/digits")
    assert during
    assert all(re.fullmatch(r"Step \d+", message) for message in during)
    assert last == "End of training" or strategy == "best"  # whose weights and card may be there already
    results = json.loads(hub.files("ada/digits")["results.json"])
    rows = results["history"]
    expected = max(rows, key=lambda row: row["top1"]) if strategy == "best" else rows[-1]
    assert results["final"] == expected
    pushed = tmp_path / ("best" if strategy == "best" else "model")
    assert hub.files("ada/digits") == {file.name: file.read_bytes() for file in pushed.iterdir()}
    assert not (tmp_path / "pushing").exists()


def test_a_push_in_the_background_takes_no_time_and_sends_what_was_there(hub, clients, folder, tmp_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    second = tmp_path / "second"

    def until_the_second(handler):
        while not second.exists():
            time.sleep(0.01)
        handler.serve()

    hub.fail("PUT", "/lfs-store/", until_the_second)
    outcome = clients.run("push_in_background", folder, tmp_path / "pushing", "ada/model", second, token=WRITE)
    assert outcome.status == 0, outcome.output
    took, busy, left = outcome.value
    assert took < 0.5
    assert busy  # the second one was left out
    assert not left
    assert hub.commits("ada/model") == ["Step 1"]
    assert hub.files("ada/model") == before


def test_a_push_in_the_background_that_fails_is_told_and_survived(hub, clients, tmp_path):
    hub.fail("POST", "/commit/", status(403, message="Not now"))
    outcome = clients.run("train", tmp_path, *PUSH, "--hub_strategy=every_save", token=WRITE)
    assert outcome.status == 0, outcome.output
    assert "Not now" in outcome.output
    assert hub.commits("ada/digits")[-1] == "End of training"


def test_a_run_that_dies_takes_its_push_in_the_background_with_it(hub, clients, tmp_path):
    """And what an earlier one left of its own is not pushed."""
    (tmp_path / "pushing").mkdir()
    (tmp_path / "pushing" / "old.bin").write_text("of a run that was killed")

    def tell(handler):
        (tmp_path / "uploading").touch()
        slow(1)(handler)

    hub.fail("PUT", "/lfs-store/", tell, times=ALWAYS)
    outcome = clients.run("die_while_pushing", tmp_path, *PUSH, "--hub_strategy=every_save", token=WRITE)
    assert outcome.status == 0, outcome.output
    pushing, busy, left = outcome.value
    assert pushing == MODEL
    assert not busy
    assert not left
    assert hub.requests("PUT", "/lfs-store/")
    assert hub.commits("ada/digits") == []


def test_of_two_replicas_one_pushes(tmp_path):
    """Offline, as the ranks of these tests are: what it says tells which of them tried."""
    first, second = distributed.run(2, train_on_rank, tmp_path, *PUSH, "--epochs=1", "--batch_size=12")
    assert first.startswith("SystemExit: error: the push to ada/digits failed: huggingface_hub is offline")
    assert second == ""
    assert {file.name for file in (tmp_path / "model").iterdir()} == MODEL


@pytest.fixture
def unheard(recipe, monkeypatch):
    """The recipe without a Hub; gives the folders that it pushed in the background, as they were, and then at last."""
    pushed = []

    def note(folder, *_, **__):
        pushed.append({file.name: file.read_bytes() for file in Path(folder).iterdir()})

    monkeypatch.setattr("hf_rwp.hub.publish.reserve", lambda *_, **__: None)
    monkeypatch.setattr("hf_rwp.hub.publish.push", note)
    monkeypatch.setattr("hf_rwp.hub.push.BackgroundPush.start", lambda _, folder, message: note(folder))
    return pushed


def test_between_two_epochs_the_card_has_no_accuracy_of_other_weights(recipe, tmp_path, unheard):
    train(recipe, tmp_path, *PUSH, "--hub_strategy=every_save", "--checkpointing_steps=2")
    finals = [json.loads(files["results.json"])["final"] for files in unheard]
    assert [final["step"] for final in finals] == [2, 3, 4, 6, 6]
    for files, final in zip(unheard, finals, strict=True):
        whole = final["step"] % 3 == 0
        assert (b"Top-1 accuracy" in files["README.md"]) == ("top1" in final) == whole
        weights = load(files["model.safetensors"])
        assert json.loads(files["results.json"])["weights_sha256"] == digest_of(weights)


@pytest.mark.parametrize("flags", [[], ["--model_ema", "--model_ema_decay=0.5"]], ids=["weights", "average"])
def test_the_best_weights_are_pushed_whatever_became_of_their_folder(recipe, tmp_path, unheard, monkeypatch, flags):
    """The first epoch's, which another disk was too full for at the time."""
    real = recipe.save_model

    def full(_, folder, **__):
        monkeypatch.setattr(recipe, "save_model", real)
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(recipe, "save_model", full)
    monkeypatch.setattr("hf_rwp.runs.run.accuracy_of", lambda row: -row["step"])
    train(recipe, tmp_path, *PUSH, "--hub_strategy=best", *flags)
    (files,) = unheard
    name = "ema" if flags else "model"
    expected = load_file(tmp_path / "checkpoints" / "step_3" / f"{name}.safetensors")
    expected = {name.removeprefix("module."): tensor for name, tensor in expected.items()}
    weights = load(files["model.safetensors"])
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    best, last = json.loads(files["results.json"]), json.loads((tmp_path / "results.json").read_text())
    assert (best["final"]["step"], best["chosen"], last["final"]["step"]) == (3, "best", 6)
    assert best["weights_sha256"] == digest_of(weights) != last["weights_sha256"]
    assert "replicas_sha256" not in best  # which is of the last weights


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_disk_that_is_full_at_last_leaves_the_command_that_pushes(recipe, tmp_path, unheard, monkeypatch, error):
    real = recipe.save_model

    def full(model, folder, **options):
        if folder.name == "best":
            raise error
        real(model, folder, **options)

    monkeypatch.setattr(recipe, "save_model", full)
    with pytest.raises(SystemExit, match=r"No space left[\s\S]*\n    hf upload ada/digits .*/model "):
        train(recipe, tmp_path, *PUSH, "--hub_strategy=best", "--epochs=1")
    assert not unheard
    assert of_folder(tmp_path / "model").num_classes == 10


def test_weights_of_timm_are_named_as_the_base_model(recipe, tmp_path, monkeypatch):
    real = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, pretrained, **options: real(name, **options))
    train(recipe, tmp_path, "--pretrained", "--epochs=1")
    card = (tmp_path / "model" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "timm/test_resnet.r160_in1k"
    assert "| pretrained | timm |" in card


def test_weights_of_a_folder_are_no_base_model(recipe, tmp_path, made):
    train(recipe, tmp_path, f"--pretrained={made}", "--epochs=1", "--img_size=160")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "base_model" not in card
    assert "| pretrained | model |" in card
    assert str(made.parent) not in card


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_disk_that_fills_up_stops_the_push_and_not_the_training(recipe, tmp_path, monkeypatch, capsys, error):
    real, calls = recipe.save_model, []

    def full_at_first(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(recipe, "save_model", full_at_first)
    monkeypatch.setattr("hf_rwp.hub.publish.reserve", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="unset HF_HUB_OFFLINE"):
        train(recipe, tmp_path, *PUSH, "--hub_strategy=every_save")
    assert re.search(r"nothing is pushed at step 3: .*No space left", capsys.readouterr().err)
    assert len(calls) == 3
    assert {file.name for file in (tmp_path / "model").iterdir()} == MODEL


def best_on_rank(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_rwp.hub.publish.reserve", lambda *_, **__: None)
        patch.setattr("hf_rwp.hub.publish.push", lambda folder, *_, **__: folder)
        patch.setattr("hf_rwp.hub.push.BackgroundPush.start", lambda *_: None)
        patch.setattr("hf_rwp.runs.run.accuracy_of", lambda row: -row["step"])
        return train_on_rank(folder, *PUSH, "--hub_strategy=best", "--model_ema")


def test_two_replicas_push_the_best_weights(tmp_path):
    assert distributed.run(2, best_on_rank, tmp_path) == ["", ""]
    expected = load_file(tmp_path / "checkpoints" / "step_1" / "ema.safetensors")
    weights = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(weights[name.removeprefix("module.")], tensor) for name, tensor in expected.items())
