import copy
import dataclasses
import inspect
import pickle

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_rwp import RWP, RWPArguments, RWPTrainingArguments
from hf_rwp.core.gamma import gamma_factor
from hf_rwp.hub.arguments import HubArguments
from hf_rwp.images.arguments import ImageArguments
from hf_rwp.images.data import load_images
from hf_rwp.runs.parsing import parse_arguments


@dataclasses.dataclass
class Recipe(RWPArguments):
    lr: float = dataclasses.field(default=0.1, metadata={"help": "Learning rate."})


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_options_are_those_of_the_wrapper_with_its_defaults():
    parameters = inspect.signature(RWP).parameters
    for name, value in RWPArguments().rwp_options.items():
        assert parameters[name].default == value, name
    keywords = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords - set(RWPArguments().rwp_options) == {"accumulation_steps", "process_group"}


def test_gamma_factor_is_the_schedule_of_the_flags():
    arguments = RWPArguments(rwp_schedule="cosine", rwp_growth=10.0, rwp_start=0.25)
    assert arguments.rwp_gamma_factor(0.2) == 0
    assert arguments.rwp_gamma_factor(0.5) == gamma_factor(0.5, "cosine", 10.0)
    assert arguments.rwp_gamma_factor(1.0) == pytest.approx(11)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "rwp_gamma": [-0.1, float("inf"), float("nan")],
        "rwp_alpha": [-0.1, 1.1, float("nan")],
        "rwp_noise": ["layer"],
        "rwp_eta": [-1.0, float("inf")],
        "rwp_beta": [-0.1, 1.0],
        "rwp_schedule": ["step"],
        "rwp_growth": [-1.0],
        "rwp_start": [-0.1, 1.1],
    }.items(),
)
def test_a_value_out_of_range_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
            RWPArguments(**{name: value})


def test_growth_without_a_growing_schedule_is_refused():
    with pytest.raises(ValueError, match="rwp_schedule is constant"):
        RWPArguments(rwp_growth=1.0)


def test_every_flag_has_one_sentence_of_help():
    for field in dataclasses.fields(RWPArguments):
        text = field.metadata["help"]
        assert text.endswith(".")
        assert ". " not in text, field.name


def test_flags_reach_their_fields():
    flags = [
        "--rwp",
        "--rwp_gamma",
        "0.3",
        "--rwp_noise",
        "filter_normalized",
        "--no_rwp_noise_1d",
        "--rwp_seed",
        "7",
        "--lr",
        "1e-3",
    ]
    parsed = parse_arguments(Recipe, flags)
    assert parsed == Recipe(
        rwp=True, rwp_gamma=0.3, rwp_noise="filter_normalized", rwp_noise_1d=False, rwp_seed=7, lr=1e-3
    )
    assert parse_arguments(Recipe, ["--rwp", "false"]) == Recipe()


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path):
    config = write(tmp_path, "rwp: true\nrwp_gamma: 1e-2\nrwp_noise_1d: false\nrwp_alpha: 1\nlr: 0.5\n")
    for argv in ([config, "--lr", "0.2"], ["--lr", "0.2", config]):
        parsed = parse_arguments(Recipe, argv)
        assert parsed == Recipe(rwp=True, rwp_gamma=0.01, rwp_noise_1d=False, rwp_alpha=1.0, lr=0.2)


@pytest.mark.parametrize("text", ["", "# nothing\n", "rwp_gamma: null\n"])
def test_an_empty_file_changes_nothing(tmp_path, text):
    assert parse_arguments(Recipe, [write(tmp_path, text)]) == Recipe()


def test_an_unknown_name_in_the_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rwp_gama"):
        parse_arguments(Recipe, [write(tmp_path, "rwp_gama: 0.1\n")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: fast\n", "lr must be a number, got 'fast'"),
        ("rwp_noise: filter_normalised\n", "rwp_noise must be one of .*; did you mean filter_normalized[?]"),
        ("rwp: perhaps\n", "rwp must be true or false, got 'perhaps'"),
        ("rwp-seed: 0.5\n", "rwp_seed must be a whole number, got '0.5'"),
    ],
)
def test_a_wrong_value_in_the_file_is_refused_with_its_line(tmp_path, text, said):
    with pytest.raises(ValueError, match=rf"config\.yaml, line 2: {said}$"):
        parse_arguments(Recipe, [write(tmp_path, "# settings\n" + text)])


def test_flags_are_not_abbreviated():
    with pytest.raises(ValueError, match="--rwp_gam"):
        parse_arguments(Recipe, ["--rwp_gam", "0.1"])


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no flags"):
        parse_arguments(Recipe, [write(tmp_path, "- rwp\n")])


# Images


def test_defaults_of_images_follow_the_data():
    digits = ImageArguments()
    assert (digits.img_size, digits.crop_pct, digits.scale, digits.hflip) == (32, 1.0, [0.7, 1.0], 0.0)
    other = ImageArguments(data_dir="pets", hflip=0.1)
    assert (other.img_size, other.scale, other.hflip, other.color_jitter) == (None, [0.08, 1.0], 0.1, 0.4)


def test_data_options_are_those_of_load_images():
    assert set(ImageArguments().data_options) == set(inspect.signature(load_images).parameters)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data_dir": "a", "dataset": "b"}, "data_dir must .* got 'a'"),
        ({"streaming": True}, "streaming must .* got True"),
        ({"data_dir": "a", "shuffle_buffer": 0}, "shuffle_buffer must .* got 0"),
        ({"max_bad_images": -1}, "max_bad_images must .* got -1"),
        ({"workers": -1}, "workers must .* got -1"),
        ({"img_size": 0}, "img_size must .* got 0"),
        ({"crop_pct": 1.5}, "crop_pct must .* got 1.5"),
        ({"scale": [1.0, 0.5]}, "scale must .* got "),
        ({"scale": [0.5]}, "scale must .* got "),
        ({"ratio": [0.0, 1.0]}, "ratio must .* got "),
        ({"hflip": 2.0}, "hflip must .* got 2.0"),
        ({"vflip": -1.0}, "vflip must .* got -1.0"),
        ({"reprob": 1.1}, "reprob must .* got 1.1"),
        ({"recount": 0}, "recount must .* got 0"),
        ({"cutout": 0}, "cutout must .* got 0"),
        ({"crop_padding": -1}, "crop_padding must .* got -1"),
    ],
)
def test_image_flags_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        ImageArguments(**settings)


def test_lists_and_mappings_in_a_file(tmp_path):
    @dataclasses.dataclass
    class Images(ImageArguments):
        model_kwargs: str = "{}"

    config = write(tmp_path, "scale: [0.2, 0.9]\nmodel_kwargs: {depth: 2, act: relu}\nworkers: 3\n")
    parsed = parse_arguments(Images, [config])
    assert (parsed.scale, parsed.workers) == ([0.2, 0.9], 3)
    assert parsed.model_kwargs == '{"depth": 2, "act": "relu"}'
    assert parse_arguments(Images, [config, "--scale", "0.5", "1"]).scale == [0.5, 1.0]


def test_training_arguments_have_the_flags_of_both(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--rwp", "--rwp_gamma", "0.3", "--rwp_frozen", "--learning_rate", "0.1"]
    (parsed,) = HfArgumentParser(RWPTrainingArguments).parse_args_into_dataclasses(argv)
    assert parsed.rwp_options["gamma"] == 0.3
    assert parsed.rwp_options["frozen"]
    assert (parsed.rwp, parsed.learning_rate, parsed.output_dir) == (True, 0.1, str(tmp_path))
    names = {field.name for field in dataclasses.fields(RWPTrainingArguments)}
    assert names == {field.name for kind in (RWPArguments, TrainingArguments) for field in dataclasses.fields(kind)}


def test_training_arguments_check_both_kinds_of_flags(tmp_path):
    with pytest.raises(ValueError, match=r"^rwp_alpha must be in \[0, 1\], got 2.0"):
        RWPTrainingArguments(str(tmp_path), rwp_alpha=2.0)
    with pytest.raises(ValueError, match="warmup_steps"):
        RWPTrainingArguments(str(tmp_path), warmup_steps=-1)


def test_the_default_is_plain_training(tmp_path):
    assert not RWPTrainingArguments(str(tmp_path)).rwp


@pytest.mark.parametrize("name", [None, "digits", "ada/di gits", "ada/digits/x", "../digits", "ada/dig--its"])
def test_a_push_needs_a_place(name):
    with pytest.raises(ValueError, match="must be USER/NAME"):
        HubArguments(push_to_hub=True, hub_model_id=name)
    assert not HubArguments(hub_model_id=name).push_to_hub  # which nobody asked for


def test_a_push_has_a_strategy_that_there_is():
    with pytest.raises(ValueError, match="hub_strategy must be one of end, best, every_save, got 'checkpoint'"):
        HubArguments(push_to_hub=True, hub_model_id="ada/digits", hub_strategy="checkpoint")


def test_pickled_arguments_hold_no_token(tmp_path):
    """Trainer pickles them beside the weights, and pushes them."""
    arguments = RWPTrainingArguments(str(tmp_path), use_cpu=True, hub_token="hf_secret", rwp_gamma=0.5)
    pickled = pickle.dumps(arguments)
    assert b"hf_secret" not in pickled
    again = pickle.loads(pickled)
    assert (again.rwp_gamma, again.hub_token, again.output_dir) == (0.5, None, str(tmp_path))
    assert copy.deepcopy(arguments).rwp_gamma == 0.5
    assert arguments.hub_token == "hf_secret"


def test_a_dataset_that_is_a_folder_is_a_data_dir(tmp_path):
    args = ImageArguments(dataset=str(tmp_path))
    assert (args.data_dir, args.dataset) == (str(tmp_path), None)
    assert args.scale == [0.08, 1.0]


@pytest.mark.parametrize("builder", ["imagefolder", "webdataset", "parquet"])
def test_a_builder_of_datasets_with_a_folder_is_the_folder(tmp_path, builder):
    args = ImageArguments(dataset=builder, data_dir=str(tmp_path))
    assert (args.data_dir, args.dataset) == (str(tmp_path), None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data_dir": "a", "validation_fraction": 1.0}, r"validation_fraction must be in \(0, 1\)"),
        ({"validation_fraction": 0.2}, "validation_fraction must be unset without data_dir"),
        ({"data_dir": "a", "validation_fraction": 0.2, "validation_split": "val"}, "where validation_split is set"),
        ({"data_dir": "a", "train_split": "train", "validation_split": "train"}, "another split than train_split"),
        ({"data_dir": "a", "dataset_revision": "main"}, "dataset_revision must be unset without dataset"),
    ],
)
def test_splits_that_contradict_each_other_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        ImageArguments(**settings)
