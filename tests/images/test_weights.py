"""images/weights.py and images/models.py: trained weights as people name them, and models that cannot be."""

import json
import re

import pytest
import timm
import torch
from imagenet import load_recipe
from safetensors.torch import save_file
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, ViTConfig, ViTForImageClassification
from vit import TINY, load_vit_recipe

from hf_rwp.hub.export import save_model
from hf_rwp.images.models import create_model, refuse_single_images
from hf_rwp.images.weights import find_weights
from hf_rwp.runs.parsing import parse_arguments
from hf_rwp.trainer import models as trainer_models

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=3)


@pytest.fixture
def run(tmp_path, trained):
    """The folder of a run of imagenet_rwp.py: its model, and a checkpoint."""
    folder = tmp_path / "photos_rwp"
    config = timm.data.resolve_data_config({}, model=trained)
    save_model(trained, folder / "model", label_names=CLASSES, data_config=config)
    (folder / "checkpoints" / "step_3").mkdir(parents=True)
    save_file(trained.state_dict(), folder / "checkpoints" / "step_3" / "model.safetensors")
    (folder / "results.json").write_text("{}")
    return folder


@pytest.fixture
def vit(tmp_path):
    """The `model` of vit_rwp.py."""
    ViTForImageClassification(ViTConfig(**TINY, image_size=16, patch_size=8, num_labels=3)).save_pretrained(
        tmp_path / "vit" / "model"
    )
    return tmp_path / "vit"


def timm_model(*flags, new_head=True):
    args = parse_arguments(load_recipe().Arguments, list(map(str, flags)))
    return create_model(args, CLASSES, new_head=new_head)[0]


def vit_arguments(*flags):
    return parse_arguments(load_vit_recipe().Arguments, list(map(str, flags)))


def assert_same(model, trained, head=True):
    """head: whether the classifier is the trained one, too."""
    for name, value in trained.state_dict().items():
        same = torch.equal(model.state_dict()[name], value)
        assert same == (head or not name.startswith("fc.")), name


# For timm


@pytest.mark.parametrize("named", ["", "model", "model/model.safetensors"])
def test_a_run_its_model_and_the_file_in_it_are_the_same_weights(run, trained, named):
    assert_same(timm_model(f"--pretrained={run / named}", new_head=False), trained)


def test_a_file_needs_its_model_named_and_gets_a_new_head(run, trained, tmp_path, caplog):
    checkpoint = run / "checkpoints" / "step_3" / "model.safetensors"
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in trained.state_dict().items()}}, tmp_path / "w.pth"
    )
    for file in (checkpoint, tmp_path / "w.pth"):
        model = timm_model("--model=test_resnet", f"--pretrained={file}")
        assert_same(model, trained, head=False)
        assert model.fc.weight.shape[0] == 3
        assert str(tmp_path) not in str(model.pretrained_cfg)
        assert "does not name its classes" not in caplog.text
        assert_same(timm_model("--model=test_resnet", f"--pretrained={file}", new_head=False), trained)
        assert "does not name its classes" in caplog.text
        caplog.clear()
    with pytest.raises(
        ValueError, match=r"does not fit model='test_vit' .*set --model to the one that the weights are of"
    ):
        timm_model("--model=test_vit", f"--pretrained={checkpoint}")
    args = parse_arguments(load_recipe().Arguments, ["--model=test_resnet", f"--pretrained={checkpoint}"])
    assert create_model(args, ["a", "b"])[0].fc.weight.shape[0] == 2
    with pytest.raises(ValueError, match="has 3 classes, but the data has 2"):
        create_model(args, ["a", "b"], new_head=False)


def test_a_file_without_a_head_fits_its_model(trained, tmp_path):
    body = {name: value for name, value in trained.state_dict().items() if not name.startswith("fc.")}
    save_file(body, tmp_path / "body.safetensors")
    assert_same(timm_model("--model=test_resnet", f"--pretrained={tmp_path / 'body.safetensors'}"), trained, head=False)


def test_a_file_that_is_a_program_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "boom").touch, ()

    torch.save(Bomb(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no weights that can be read"):
        timm_model("--model=test_resnet", f"--pretrained={tmp_path / 'w.pth'}")
    assert not (tmp_path / "boom").exists()


def test_a_model_of_transformers_goes_to_the_other_recipe(vit):
    for named in (vit, vit / "model"):
        with pytest.raises(
            ValueError, match=r"a model of transformers \(ViTForImageClassification\).*vit_rwp\.py takes it"
        ):
            timm_model(f"--pretrained={named}")


@pytest.mark.parametrize("arguments", [None, {"num_classes": 3}])
def test_what_transformers_wrapper_of_timm_saved_is_a_model_of_timms(trained, tmp_path, arguments):
    names = dict(enumerate(CLASSES))
    config = TimmWrapperConfig(architecture="test_resnet", id2label=names, label2id={n: i for i, n in names.items()})
    wrapper = TimmWrapperForImageClassification(config)
    wrapper.timm_model.load_state_dict(trained.state_dict())
    wrapper.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_args": arguments}))
    for new_head in (True, False):
        assert_same(timm_model(f"--pretrained={tmp_path}", new_head=new_head), trained)
    args = parse_arguments(load_recipe().Arguments, [f"--pretrained={tmp_path}"])
    assert_same(create_model(args, ["owl", "dog", "cat"])[0], trained, head=False)
    with pytest.raises(ValueError, match="class 0 is 'cat' there and 'owl' here"):
        create_model(args, ["owl", "dog", "cat"], new_head=False)


# For transformers


def test_a_folder_of_timms_loads_in_transformers_with_its_number_of_classes(trained, run, tmp_path):
    """timm's own `save_for_hf` has the number of classes twice."""
    timm.models.save_for_hf(trained, tmp_path / "timms", model_args={"num_classes": 3})
    config = json.loads((tmp_path / "timms" / "config.json").read_text())
    assert config["model_args"]["num_classes"] == 3
    for folder in (tmp_path / "timms", run, run / "model"):
        args = vit_arguments(f"--model_name_or_path={folder}")
        model, model_args = trainer_models.create_model(args, CLASSES)
        assert_same(trainer_models.timm_model_of(model), trained)
        assert "num_classes" not in model_args


def test_a_run_of_vit_is_its_model(vit):
    assert vit_arguments(f"--model_name_or_path={vit}").weights == str(vit / "model")


def test_a_file_goes_to_the_other_recipe(run):
    file = run / "checkpoints" / "step_3" / "model.safetensors"
    with pytest.raises(
        ValueError, match=r"is a file of weights.*imagenet_rwp\.py loads it, as --model NAME --pretrained FILE"
    ):
        vit_arguments(f"--model_name_or_path={file}")


# What leads nowhere


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("outputs/photos", "does not exist"),
        ("./photos_rpw", r"does not exist: .* holds no 'photos_rpw' \(there are: photos_rwp"),
        ("photos_rwp/modle", r"does not exist: photos_rwp holds no 'modle' \(there are: model"),
        ("weights.pth", "does not exist"),
        ("photos_rwp/results.json", "is not a file of weights"),
        ("empty", "holds no model, .*: it holds nothing"),
        ("adapter", "is a LoRA adapter"),
        ("unfinished", "a run that has not finished: go on with --resume_from_checkpoint unfinished"),
        ("damaged", "config.json is damaged"),
    ],
)
def test_what_leads_to_no_weights_is_told(run, tmp_path, monkeypatch, named, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    for folder, file in (("adapter", "adapter_config.json"), ("damaged", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{")
    with pytest.raises(ValueError, match=said):
        find_weights(named, "pretrained")
    with pytest.raises(ValueError, match=said):
        timm_model(f"--pretrained={named}")
    if "/" in named or "." in named:
        with pytest.raises(ValueError, match=said):
            vit_arguments(f"--model_name_or_path={named}")


def test_an_id_on_the_hub_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm" / "models").mkdir(parents=True)  # a checkout of timm, say
    for named in ("timm/resnet50.a1_in1k", "google/vit-base-patch16-224", "gpt2"):
        assert find_weights(named, "pretrained").hub_id == named


# Models that cannot be


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_kwargs={in_chans: 1}"], "model_kwargs has in_chans=1: images are read in RGB"),
        (["--model_kwargs={num_classes: 7}"], "model_kwargs has num_classes=7: the classes are those of the data"),
        (["--model_kwargs={nothing: 1}"], "model_kwargs has 'nothing', which test_resnet does not take"),
        (["--model=resnet50.a1_in2k"], r"timm has no such weights of it\. It has resnet50\..*"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_a_line(flags, said):
    with pytest.raises(ValueError, match=said) as refused:
        timm_model(*flags)
    assert "\n" not in str(refused.value)
    assert timm_model("--model_kwargs={in_chans: 3}") is not None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_kwargs={num_channels: 1}"], "model_kwargs has num_channels=1: images are read in RGB"),
        (["--model_kwargs={num_labels: 7}"], "the classes are those of the data"),
        (["--model_kwargs={hiden_size: 48}"], "'hiden_size', which ViTConfig does not have: it has hidden_size"),
        (["--model_name_or_path=test_vit", "--model_kwargs={nothing: 1}"], "test_vit does not take"),
        (["--model_name_or_path=test_vit", "--model_kwargs={in_chans: 1}"], "images are read in RGB"),
        (["--model_name_or_path=resnet50.a1_in2k"], "timm has no such weights of it"),
    ],
)
def test_a_model_for_trainer_that_cannot_be_is_refused_in_a_line(flags, said):
    with pytest.raises(ValueError, match=said):
        trainer_models.create_model(vit_arguments(*flags), CLASSES)


def test_a_setting_that_the_weights_configuration_lacks_is_refused(vit):
    with pytest.raises(ValueError, match="'hiden_dropout_prob', which ViTConfig does not have") as refused:
        trainer_models.create_model(
            vit_arguments(f"--model_name_or_path={vit}", "--model_kwargs={hiden_dropout_prob: 0.1}"), CLASSES
        )
    assert "connection" not in str(refused.value)


def test_single_images_at_1x1_are_refused_ahead_of_training(trained):
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    for batch, parts, said in ((2, 2, "is halved"), (4, 4, "is cut into 4 parts"), (1, 1, "is only one image")):
        with pytest.raises(ValueError, match=re.escape(f"batch_size={batch} {said}") + r".*at least \d"):
            refuse_single_images(trained, (3, 16, 16), batch, parts)
        refuse_single_images(trained, (3, 16, 16), 2 * batch, parts)
        refuse_single_images(trained, (3, 96, 96), batch, parts)  # its features are larger
        refuse_single_images(timm.create_model("test_vit"), (3, 160, 160), batch, parts)
    assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())
