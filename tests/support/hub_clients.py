"""Clients of hub_server.py in processes of their own, as huggingface_hub reads its address when it is imported.

`Clients(url, home)` starts one process that imports all libraries once, unmodified, and forks for every job. This file
is that process, too: it reads jobs from stdin, one JSON object a line.
"""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    status: int  # as of a process that ran the function alone
    value: Any  # what the function returned
    output: str  # stdout and stderr
    seconds: float


class Clients:
    def __init__(self, url: str, home: Path) -> None:
        drop = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        self.environment = {name: value for name, value in os.environ.items() if name not in drop}
        self.environment |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        self.environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=self.environment, stdin=subprocess.PIPE, text=True
        )

    def start(self, function: str, *arguments: Any, token: str | None = None, **settings: Any) -> Path:
        """Begin `function(*arguments)` of this file. settings: attributes of modules, `{"json.dumps": ...}`, JSON."""
        folder = Path(tempfile.mkdtemp())
        job = {"function": function, "arguments": [*map(_plain, arguments)], "token": token, "folder": str(folder)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job | {"settings": settings}) + "\n")
        self._process.stdin.flush()
        return folder

    def finish(self, folder: Path, seconds: float = 120) -> Outcome:
        deadline = time.monotonic() + seconds
        while not (folder / "outcome").exists():
            assert self._process.poll() is None, "the process of the clients died"
            assert time.monotonic() < deadline, f"no end in sight\n{(folder / 'output').read_text()}"
            time.sleep(0.02)
        status, value, took = pickle.loads((folder / "outcome").read_bytes())
        output = (folder / "output").read_text()
        shutil.rmtree(folder)
        return Outcome(status, value, output, took)

    def run(self, function: str, *arguments: Any, token: str | None = None, **settings: Any) -> Outcome:
        return self.finish(self.start(function, *arguments, token=token, **settings))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


# What clients do


def push(folder, repo_id, options=None):
    from hf_rwp.hub.push import push

    return push(folder, repo_id, **(options or {}))


def push_with_a_new_client(folder, repo_id):
    """A push in whose middle huggingface_hub closes its client, as it does when a connection fails."""
    from huggingface_hub import HfApi, close_session

    real = HfApi.list_repo_files

    def closes(self, *arguments, **options):
        close_session()
        return real(self, *arguments, **options)

    HfApi.list_repo_files = closes
    return push(folder, repo_id)


def push_with_a_client_of_the_users(folder, repo_id, seconds):
    """A push by a client that limits its own patience; returns that limit as it is afterwards, in a new client too."""
    from huggingface_hub import close_session, get_session, set_client_factory

    kind = type(get_session())
    set_client_factory(lambda: kind(timeout=seconds))
    push(folder, repo_id)
    first = get_session().timeout.read
    close_session()
    return first, get_session().timeout.read


def push_in_background(folder, copy, repo_id, second):
    """A push while the model's folder is written anew, and a second one that finds the first under way.

    second: a file that is written once that is so.
    """
    from hf_rwp.hub.card import add_card
    from hf_rwp.hub.push import BackgroundPush

    background = BackgroundPush(Path(copy), repo_id, revision=None, private=None)
    began = time.perf_counter()
    background.start(Path(folder), "Step 1")
    took = time.perf_counter() - began
    Path(folder, "curves.png").unlink()
    add_card(folder, {"arguments": {}}, name="second", library="timm")
    background.start(Path(folder), "Step 2")
    busy = background.busy
    Path(second).touch()
    background.finish()
    return took, busy, Path(copy).exists()


def train(folder, *flags, drawn=False):
    import imagenet

    recipe = imagenet.load_recipe()
    recipe.load_images = imagenet.few_digits
    imagenet.train(recipe, folder, *flags, drawn=drawn)


def train_and_draw(folder, *flags):
    train(folder, *flags, drawn=True)


def train_vit(folder, *flags):
    import vit

    vit.train(folder, *vit.SMALL, *flags)


def die_while_pushing(folder, *flags):
    """A run that is interrupted in its second epoch, once a file `uploading` says that a push is under way.

    Returns what was being pushed, and then whether that push goes on, and whether it left something.
    """
    import imagenet

    from hf_rwp.hub import publish

    recipe, made = imagenet.load_recipe(), []
    real, validate = publish.BackgroundPush, recipe.validate

    def note(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[0]

    def dies(*arguments, **options):
        if made[0].busy:
            while not Path(folder, "uploading").exists():
                time.sleep(1)
            made.append({file.name for file in Path(folder, "pushing").iterdir()})
            raise KeyboardInterrupt
        return validate(*arguments, **options)

    publish.BackgroundPush, recipe.validate = note, dies
    try:
        train(folder, *flags)
    except KeyboardInterrupt:
        return made[1], made[0].busy, Path(folder, "pushing").exists()


def notebook(folder, repo_id):
    """The loop of the README, and one call."""
    import timm
    import torch

    from hf_rwp import RWP, push_to_hub

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=0.3, alpha=0.25, accumulation_steps=2)
    for _ in range(2):
        for _ in range(2):
            images = torch.rand(2, 3, 32, 32)
            (torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1])) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return push_to_hub(
        model,
        repo_id,
        rwp=optimizer,
        metrics={"top1": 0.75},
        folder=folder,
        label_names=["bee", "crab", 'd"og'],
        license="mit",
        dataset="ada/beasts",
        data="Beasts",
        split="test",
        note="Made by hand.",
    )


def trainer(folder, repo_id, kind, token):
    """RWPTrainer with a timm model or one of transformers; Trainer's own pushes on the way."""
    import timm
    import torch
    from trainer_runs import images, make
    from transformers import ResNetConfig, ResNetForImageClassification, TimmWrapperConfig
    from transformers import TimmWrapperForImageClassification as TimmWrapper

    torch.manual_seed(0)
    labels = {"id2label": {0: "bee", 1: "crab", 2: "eel"}, "label2id": {"bee": 0, "crab": 1, "eel": 2}}
    if kind == "timm":
        config = timm.create_model("test_resnet").pretrained_cfg
        model = TimmWrapper(TimmWrapperConfig(architecture="test_resnet", pretrained_cfg={**config}, **labels))
    else:
        shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
        model = ResNetForImageClassification(ResNetConfig(**shape, **labels))
    options = {"rwp": True, "rwp_gamma": 0.02, "push_to_hub": True, "hub_model_id": repo_id, "hub_token": token}
    options |= {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "every_save", "hub_always_push": True}
    options |= {"eval_strategy": "epoch", "logging_steps": 1, "max_steps": 3, "report_to": []}
    made = make(
        model,
        folder,
        train_dataset=images(15),
        eval_dataset=images(6),
        compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
        **options,
    )
    made.train()
    return made.push_to_hub(dataset_tags="ada/beasts", dataset="Beasts", tag="v1")


def logits(repo_id, folder, options=None):
    """For one image by those who know nothing of this package: timm, transformers, its pipeline, and the folder."""
    import PIL.Image
    import timm
    import torch
    from timm.data import create_transform, resolve_data_config
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    revision = (options or {}).get("revision")
    names = {"hub": f"hf-hub:{repo_id}{'@' + revision if revision else ''}", "disk": f"local-dir:{folder}"}
    models = {name: timm.create_model(address, pretrained=True).eval() for name, address in names.items()}
    config = resolve_data_config({}, model=models["disk"], use_test_size=True)
    generator = torch.Generator().manual_seed(0)
    side = config["input_size"][-1]
    image = PIL.Image.fromarray(
        torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8).numpy(), "RGB"
    )
    pixels = create_transform(**config, is_training=False)(image)[None]
    transformer = AutoModelForImageClassification.from_pretrained(repo_id, revision=revision).eval()
    processor = AutoImageProcessor.from_pretrained(repo_id, revision=revision)
    with torch.no_grad():
        seen = {name: model(pixels)[0].tolist() for name, model in models.items()}
        seen["transformers"] = transformer(**processor(image, return_tensors="pt")).logits[0].tolist()
    answers = pipeline("image-classification", repo_id, revision=revision, device="cpu")(image, top_k=99)
    scores = {answer["label"]: answer["score"] for answer in answers}
    labels = list(transformer.config.id2label.values())
    return seen, [scores[label] for label in labels], labels


def load_transformers(repo_id):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(repo_id)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}, model.config.id2label


def download(repo_id, options=None):
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo_id, **(options or {})))
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


# The process that forks


def main() -> None:
    import timm  # noqa: F401
    import trainer_runs  # noqa: F401
    from imagenet import few_digits, load_recipe

    load_recipe()
    few_digits()
    for line in sys.stdin:
        job = json.loads(line)
        if os.fork() == 0:
            _do(**job)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _do(function, arguments, token, folder, settings):
    output = os.open(Path(folder, "output"), os.O_CREAT | os.O_WRONLY, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if token:
        os.environ["HF_TOKEN"] = token
    real = time.sleep
    time.sleep = lambda seconds: real(min(seconds, 0.02))  # between two attempts
    began, value, status = time.perf_counter(), None, 0
    try:
        for name, setting in settings.items():
            module, _, attribute = name.rpartition(".")
            setattr(__import__(module, fromlist=["_"]), attribute, setting)
        value = globals()[function](*arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        print(error.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        partial = Path(folder, "partial")
        partial.write_bytes(pickle.dumps((status, value, time.perf_counter() - began)))
        partial.rename(Path(folder, "outcome"))
        os._exit(0)


if __name__ == "__main__":
    main()
