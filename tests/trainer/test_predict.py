"""`hf-rwp predict`: the classes of images, for every kind of model and every way to name images."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from terminal import drawn_by
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from hf_rwp.cli import main as hf_rwp
from hf_rwp.hub.export import save_model
from hf_rwp.trainer.predict import find_images, line, printer

NAMES = ["a\tb", "cat", "dog, Canis familiaris", "fox"]
NO_NETWORK = """
import socket, sys
def refuse(*address, **_):
    raise SystemExit(f"the network was asked: {address}")
socket.socket.connect = socket.getaddrinfo = refuse
from hf_rwp.cli import main
*models, image = sys.argv[1:]
for model in models:
    main(["predict", model, image])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as imagenet_rwp.py leaves it: the model in `model`, with a transform of its own."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    data_config = resolve_data_config({"img_size": 24, "crop_pct": 0.6, "interpolation": "nearest"}, model=model)
    save_model(model, folder / "model", label_names=NAMES, data_config=data_config)
    (folder / "results.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder in transformers' layout, without a crop."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=16, patch_size=4, id2label=dict(enumerate(NAMES)))
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4] * 3, resample=3).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    """Pictures of any size and mode, one below in a folder, one turned by EXIF, and what is not one."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 30, 3)), ("b.jpg", (30, 50, 3)), ("below/c.png", (20, 20))):
        PIL.Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(folder / name)
    turned = PIL.Image.open(folder / "b.jpg")
    exif = turned.getexif()
    exif[274] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")
    return folder


def said(capsys, *arguments):
    """Exit status, what is on stdout and what on stderr."""
    try:
        hf_rwp(["predict", *map(str, arguments)])
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    return status, out, err


def expected(model, transform, path):
    image = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB")
    with torch.no_grad():
        out = model(transform(image)[None])
    return (out if isinstance(out, torch.Tensor) else out.logits).softmax(1)[0]


@pytest.mark.parametrize("place", ["", "model"], ids=["run", "exported"])
def test_a_timm_models_probabilities_are_those_of_its_own_transform(capsys, run, images, place):
    names = [images / "a.png", images / "b.jpg", images / "turned.jpg"]
    status, out, err = said(capsys, run / place, *names, "--json")
    assert (status, err) == (0, "")
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    rows = [json.loads(row) for row in out.splitlines()]
    assert [row["image"] for row in rows] == list(map(str, names))
    for row in rows:
        scores = expected(model, transform, row["image"])
        assert [found["label"] for found in row["predictions"]] == [NAMES[i] for i in scores.argsort(descending=True)]
        for found in row["predictions"]:
            assert found["score"] == pytest.approx(scores[NAMES.index(found["label"])].item(), abs=1e-5)
    assert rows[1]["predictions"] != rows[2]["predictions"]  # EXIF is heeded


def test_a_transformers_models_probabilities_are_those_of_its_processor(capsys, vit, images):
    status, out, err = said(capsys, vit, images / "a.png", "--json", "--top_k=2")
    assert (status, err) == (0, "")
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
    scores = expected(
        ViTForImageClassification.from_pretrained(vit).eval(),
        lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
        images / "a.png",
    )
    (row,) = map(json.loads, out.splitlines())
    best = scores.topk(2)
    assert [found["label"] for found in row["predictions"]] == [NAMES[i] for i in best.indices]
    assert [found["score"] for found in row["predictions"]] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_folders_and_patterns_stand_for_their_images_each_once(images):
    below = str(images / "below" / "c.png")
    every = [*(str(images / name) for name in ("a.png", "b.jpg", "broken.png", "turned.jpg")), below]
    assert find_images([str(images)]) == (every, {})
    assert find_images([f"{images}/*.jpg", str(images / "a.png"), f"{images}/**/*.png"])[0] == [
        *(str(images / name) for name in ("b.jpg", "turned.jpg", "a.png")),
        below,
        str(images / "broken.png"),
    ]
    assert sorted(find_images([f"{images}/*"])[0]) == sorted(every)  # not notes.txt
    odd = images / "odd[1].png"
    (images / "a.png").rename(odd)
    assert find_images([str(odd)]) == ([str(odd)], {})


def test_what_names_no_image_says_why(images):
    (images / "empty").mkdir()
    (images / "empty" / "list.csv").write_text("")
    named = [str(images / "empty"), str(images / "nothing.png"), f"{images}/*.gif", f"{images}/*.txt"]
    found, failed = find_images(named)
    assert found == []
    assert list(failed.values()) == [
        "no images in this folder, but 1 .csv files",
        "there is no such file or folder",
        "nothing matches",
        "no image matches, of 1 files that do",
    ]


def test_unreadable_images_are_named_and_the_others_predicted(capsys, run, images):
    named = [images / "broken.png", images / "a.png", images / "notes.txt", images / "gone.png"]
    status, out, err = said(capsys, run, *named, "--batch_size=1")
    assert status == 1
    assert [row.split("\t")[0] for row in out.splitlines()] == [str(images / "a.png")]
    errors = err.splitlines()
    assert len(errors) == 3
    assert errors[0] == f"error: {images / 'gone.png'}: there is no such file or folder"
    assert errors[1].startswith(f"error: {images / 'broken.png'}: ")
    assert errors[2].startswith(f"error: {images / 'notes.txt'}: UnidentifiedImageError")
    status, out, _ = said(capsys, run, *named, "--json")
    rows = {row["image"]: row for row in map(json.loads, out.splitlines())}
    assert status == 1
    assert {name: "error" in row for name, row in rows.items()} == {
        str(images / "broken.png"): True,
        str(images / "a.png"): False,
        str(images / "notes.txt"): True,
    }


def test_a_pipe_gets_tabs_and_whole_names(capsys, run, images):
    """A field never has a tab or a line end of its own."""
    (images / "a.png").rename(images / "a\nb.png")
    status, out, _ = said(capsys, run, images / "a\nb.png", images / "b.jpg")
    assert status == 0
    first, second = (row.split("\t") for row in out.splitlines())
    assert first[0] == f"{images}/a b.png"
    assert second[0] == str(images / "b.jpg")
    assert sorted(second[1::2]) == sorted(["a b", *NAMES[1:]])
    shares = list(map(float, second[2::2]))
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_gets_lines_that_fit_with_the_first_class_always_there(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    long = "a_very_long_folder/" * 6 + "image.jpg"
    show = printer(["a.jpg", long], out, as_json=False)
    show("a.jpg", [("cat", 0.9), ("dog", 0.09), ("fox", 0.01)])
    show(
        long,
        [("a class whose name is longer than any terminal is wide, and goes on and on, and on", 0.75), ("x", 0.25)],
    )
    first, second = out.getvalue().splitlines()
    assert max(len(first), len(second)) <= columns
    assert first.split() == ["a.jpg", "cat", "90.0", "%", "dog", "9.0", "%", "fox", "1.0", "%"][: len(first.split())]
    assert "cat 90.0 %" in first
    assert second.startswith("…")
    assert "image.jpg  " in second
    assert "… 75.0 %" in second
    assert first.index("cat") == second.index("a class")  # in columns


def test_on_a_real_terminal_no_line_is_wider_than_it_and_no_bar_is_drawn(run, images):
    status, text = drawn_by("-m", "hf_rwp.cli", "predict", run, images / "a.png", images / "b.jpg")
    assert status == 0, text
    lines = text.splitlines()
    assert lines.pop(0) == "hf-rwp predict: loading PyTorch and what else it needs"
    assert len(lines) == 2, lines
    for text in lines:
        assert len(text) <= 80
        assert "%" in text


def test_local_models_ask_nothing_of_the_network(run, vit, images):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", NO_NETWORK, str(run), str(vit), str(images / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


def test_whoever_reads_only_the_first_line_ends_it_quietly(capsys, monkeypatch, run, images):
    class Pipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Pipe())
    with pytest.raises(SystemExit) as stopped:
        hf_rwp(["predict", str(run), str(images / "a.png")])
    assert stopped.value.code == 141
    assert sys.stdout is None  # at its end Python has nothing to flush
    assert capsys.readouterr().err == ""


# What it refuses


@pytest.mark.parametrize("kind", ["nowhere", "file", "headless", "adapter", "unfinished", "damaged"])
def test_what_is_no_classifier_is_refused_in_one_line(capsys, run, vit, images, tmp_path, kind):
    place, text = {
        "nowhere": (tmp_path / "nowhere", "does not exist"),
        "file": (tmp_path / "weights.safetensors", "is a file of weights, which does not say what model"),
        "headless": (tmp_path / "headless", "an image classifier with its head is needed"),
        "adapter": (tmp_path / "adapter", "is a LoRA adapter"),
        "unfinished": (tmp_path / "unfinished", "is a run that has not finished"),
        "damaged": (tmp_path / "damaged", "could not be loaded"),
    }[kind]
    if kind == "file":
        save_file({"a": torch.zeros(1)}, place)
    elif kind == "headless":
        ViTModel(ViTForImageClassification.from_pretrained(vit).config).save_pretrained(place)
        ViTImageProcessor().save_pretrained(place)
    elif kind == "adapter":
        place.mkdir()
        (place / "adapter_config.json").write_text("{}")
    elif kind == "unfinished":
        (place / "checkpoints").mkdir(parents=True)
    elif kind == "damaged":
        place.mkdir()
        for file in (run / "model").iterdir():
            (place / file.name).write_bytes(file.read_bytes()[:2000])
    status, out, err = said(capsys, place, images / "a.png")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert text in err
    assert "Traceback" not in err


def test_damaged_weights_are_no_certainty(capsys, run, images, tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_bytes((run / "model" / "config.json").read_bytes())
    weights = {
        name: value.fill_(torch.nan) if value.is_floating_point() else value
        for name, value in load_file(run / "model" / "model.safetensors").items()
    }
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    status, out, err = said(capsys, place, images / "a.png")
    assert (status, out) == (1, "")
    assert "outputs are not finite numbers" in err


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--top_k=0", "--top_k must be at least 1, got 0"),
        ("--batch_size=two", "--batch_size must be a whole number, got 'two'"),
        ("--topk=3", "did you mean --top_k"),
        ("--device=gpu", "--device must be one of auto, cpu, got 'gpu'"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(capsys, images, flag, text):
    status, out, err = said(capsys, "a/model/that/is/not/there", images / "a.png", flag)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert text in err


def test_no_image_is_no_reason_to_load_a_model(capsys, tmp_path):
    status, out, err = said(capsys, "a/model/that/is/not/there", tmp_path / "gone.png")
    assert (status, out) == (1, "")
    assert "MODEL" not in err


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = said(capsys, "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "examples:" in out


def test_a_line_of_a_pipe_is_never_cut():
    assert line("x" * 300, [("y" * 300, 0.5)], width=0, column=0) == f"{'x' * 300}\t{'y' * 300}\t0.500000"
