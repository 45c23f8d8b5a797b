"""runs/configs.py: files of flags, and what timm's train.py leaves in args.yaml."""

import re
from pathlib import Path

import pytest
import yaml
from imagenet import RECIPES, load_recipe, results

from hf_rwp.runs.configs import COMPUTED, RENAMED, WITHOUT_MEANING, from_timm, read_config
from hf_rwp.runs.parsing import parse_arguments

# What timm 1.0's train.py writes of `--data-dir photos --model resnet18 --epochs 5 -b 32 --amp --grad-accum-steps 2`,
# where nothing else was given.
ARGS = """
amp: true
amp_dtype: float16
amp_impl: native
aa: null
aug_repeats: 0
aug_splits: 0
batch_size: 32
bce_loss: false
bce_pos_weight: null
bce_sum: false
bce_target_thresh: null
bn_eps: null
bn_momentum: null
channels_last: false
checkpoint_hist: 10
class_map: ''
clip_grad: null
clip_mode: norm
color_jitter: 0.4
color_jitter_prob: null
cooldown_epochs: 0
crop_pct: null
cutmix: 0.0
cutmix_minmax: null
data: null
data_dir: photos
dataset: ''
dataset_download: false
dataset_trust_remote_code: false
decay_epochs: 90
decay_milestones: [90, 180, 270]
decay_rate: 0.1
device: cuda
device_modules: null
dist_bn: reduce
drop: 0.0
drop_block: null
drop_connect: null
drop_path: null
epoch_repeats: 0.0
epochs: 5
eval_metric: top1
experiment: ''
fast_norm: false
fuser: ''
gaussian_blur_prob: null
gp: null
grad_accum_steps: 2
grad_checkpointing: false
grayscale_prob: null
head_init_bias: null
head_init_scale: null
hflip: 0.5
img_size: null
in_chans: null
initial_checkpoint: ''
input_img_mode: null
input_key: null
input_size: null
interpolation: ''
jsd_loss: false
layer_decay: null
local_rank: 0
log_interval: 50
log_wandb: false
lr: null
lr_base: 0.1
lr_base_scale: ''
lr_base_size: 256
lr_cycle_decay: 0.5
lr_cycle_limit: 1
lr_cycle_mul: 1.0
lr_k_decay: 1.0
lr_noise: null
lr_noise_pct: 0.67
lr_noise_std: 1.0
mean: null
min_lr: 0
mixup: 0.0
mixup_mode: batch
mixup_off_epoch: 0
mixup_prob: 1.0
mixup_switch_prob: 0.5
model: resnet18
model_dtype: null
model_ema: false
model_ema_decay: 0.9998
model_ema_force_cpu: false
model_ema_warmup: false
model_kwargs: {}
momentum: 0.9
no_aug: false
no_ddp_bb: false
no_prefetcher: false
no_resume_opt: false
num_classes: null
opt: sgd
opt_betas: null
opt_eps: null
opt_kwargs: {}
output: ''
patience_epochs: 10
pin_mem: false
pretrained: false
pretrained_path: null
ratio: [0.75, 1.3333333333333333]
recount: 1
recovery_interval: 0
remode: pixel
reprob: 0.0
resplit: false
resume: ''
save_images: false
scale: [0.08, 1.0]
sched: cosine
sched_on_updates: false
seed: 42
smoothing: 0.1
split_bn: false
start_epoch: null
std: null
sync_bn: false
synchronize_step: false
target_key: null
torchcompile: null
torchcompile_mode: null
torchscript: false
train_crop_mode: null
train_interpolation: random
train_num_samples: null
train_split: train
tta: 0
use_multi_epochs_loader: false
val_num_samples: null
val_split: validation
validation_batch_size: null
vflip: 0.0
wandb_project: null
wandb_resume_id: ''
wandb_tags: []
warmup_epochs: 5
warmup_lr: 1.0e-05
warmup_prefix: false
weight_decay: 2.0e-05
worker_seeding: all
workers: 4
"""
# The defaults among them that mean something to timm alone.
TOLD = {
    "amp_impl",
    "device",
    "dist_bn",
    "eval_metric",
    "lr_cycle_decay",
    "lr_cycle_limit",
    "lr_cycle_mul",
    "lr_k_decay",
}
TOLD |= {"lr_noise_pct", "lr_noise_std", "patience_epochs", "worker_seeding"}


@pytest.fixture
def args_yaml(tmp_path):
    file = tmp_path / "args.yaml"
    file.write_text(ARGS)
    return file


def parse(file, *flags, text=None):
    if text is not None:
        file.write_text(text)
    return parse_arguments(load_recipe().Arguments, [f"--config={file}", *flags])


def test_timms_file_is_read_once_what_means_nothing_is_passed_over(args_yaml, caplog):
    with pytest.raises(ValueError, match=r"names that mean nothing here: .*worker_seeding.*--config_ignore_unknown"):
        parse(args_yaml)
    args = parse(args_yaml, "--config_ignore_unknown")
    assert (args.data_dir, args.model, args.pretrained, args.epochs) == ("photos", "resnet18", None, 5)
    assert (args.batch_size, args.gradient_accumulation_steps) == (64, 2)
    assert args.lr == pytest.approx(0.1 * 64 / 256)
    assert (args.mixed_precision, args.aug_repeats, args.checkpointing_steps) == ("fp16", 1, None)
    assert (args.logging_steps, args.save_total_limit, args.interpolation) == (50, 10, None)
    assert (args.train_split, args.validation_split) == (None, None)  # found by name, as timm finds them
    assert (args.smoothing, args.weight_decay, args.seed) == (0.1, 2e-5, 42)
    (said,) = [record.message for record in caplog.records if "passed over" in record.message]
    assert set(re.findall(r"\w+", said.rpartition(": ")[2])) == TOLD


def test_flags_win_over_timms_file(args_yaml):
    args = parse(args_yaml, "--config_ignore_unknown", "--lr=0.5", "--pretrained", "--batch_size=8")
    assert (args.lr, args.pretrained, args.batch_size) == (0.5, "timm", 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pretrained: false", {"pretrained": None}),
        ("pretrained: true", {"pretrained": "timm"}),
        ("pretrained: timm/resnet18.a1_in1k", {"pretrained": "timm/resnet18.a1_in1k"}),
        ("initial_checkpoint: weights.pth", {"pretrained": "weights.pth"}),
        ("aa: ''\ninterpolation: ''", {"aa": None, "interpolation": None}),
        ("aug_repeats: 0", {"aug_repeats": 1}),
        ("aug_repeats: 2", {"aug_repeats": 2}),
        ("recovery_interval: 0\nlog_interval: 7", {"checkpointing_steps": None, "logging_steps": 7}),
        ("amp: true\namp_dtype: bfloat16", {"mixed_precision": "bf16"}),
        ("amp: false\namp_dtype: float16", {"mixed_precision": None}),
        ("native_amp: true", {"mixed_precision": "fp16"}),
        ("torchcompile: inductor", {"torch_compile": True}),
        ("input_size: [3, 160, 160]", {"img_size": 160}),
        ("output: out\nexperiment: first", {"output_dir": "out/first"}),
        ("experiment: first", {"output_dir": "outputs/first"}),
        ("dataset: hfds/uoft-cs/cifar10\ndata_dir: cache", {"dataset": "uoft-cs/cifar10", "data_dir": None}),
        ("dataset: hfids/a/b", {"dataset": "a/b", "streaming": True}),
        ("dataset: wds/x\ndata_dir: shards", {"dataset": None, "data_dir": "shards"}),
        ("opt: adamw\nlr: null\nlr_base: 0.001\nlr_base_size: 256\nbatch_size: 64", {"lr": 0.001 * 0.5}),
        ("opt: sgd\nlr_base: 0.1\nlr_base_size: 256\nlr_base_scale: sqrt\nbatch_size: 64", {"lr": 0.05}),
        ("lr: 0.3\nlr_base: 0.1\nlr_base_size: 256", {"lr": 0.3}),
        ("grad_accum_steps: 1\nbatch_size: 48", {"gradient_accumulation_steps": 1, "batch_size": 48}),
        ("val_split: test\ncheckpoint_hist: 3", {"validation_split": "test", "save_total_limit": 3}),
        ("log-interval: 9", {"logging_steps": 9}),
    ],
)
def test_names_and_values_of_timms_are_translated(tmp_path, text, expected):
    args = parse(tmp_path / "args.yaml", text=text)
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected)


def test_a_learning_rate_for_a_batch_is_that_of_all_replicas(tmp_path, monkeypatch):
    file = tmp_path / "args.yaml"
    file.write_text("lr_base: 0.1\nlr_base_size: 256\nbatch_size: 64")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read_config(str(file), {"lr", "batch_size"})["lr"] == ["0.1"]


def test_a_name_that_nobody_knows_is_refused_whatever_its_value(tmp_path):
    for value in ("0", "false", "3"):
        with pytest.raises(ValueError, match=r"args\.yaml, line 2: no flag mixpu; did you mean mixup\?$"):
            parse(tmp_path / "args.yaml", text=f"epochs: 3\nmixpu: {value}")
    with pytest.raises(ValueError, match=r"mean nothing here: zzz, qqq\. Take them out"):
        parse(tmp_path / "args.yaml", text="zzz: 0\nqqq: 1")
    args = parse(tmp_path / "args.yaml", "--config_ignore_unknown", text="mixpu: 3\nmixup: 0.5")
    assert args.mixup == 0.5


def test_what_is_a_flag_here_is_never_translated(tmp_path):
    """`data` and `resume` may be flags of another recipe."""
    assert from_timm({"data": 1, "amp": True}, {"data", "amp"}) == {"data": 1, "amp": True}


def test_every_name_of_timms_file_is_a_flag_or_known():
    flags = set(vars(load_recipe().Arguments()))
    assert set(yaml.safe_load(ARGS)) - flags - {*RENAMED, *COMPUTED} - WITHOUT_MEANING == set()
    assert set(RENAMED.values()) <= flags
    assert not (WITHOUT_MEANING | {*RENAMED} | {*COMPUTED}) & flags


def test_the_manual_has_the_table():
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, flags=re.MULTILINE))
    assert {name: rows.get(name) for name in RENAMED} == RENAMED
    for name in COMPUTED:
        assert f"`{name}`" in text, name


def test_timms_file_trains(tmp_path):
    recipe = load_recipe()
    file = tmp_path / "args.yaml"
    settings = yaml.safe_load(ARGS) | {"data_dir": None, "model": "test_resnet", "amp": False, "workers": 0}
    file.write_text(yaml.safe_dump(settings | {"img_size": 16, "epochs": 1}))
    flags = ["--report_to=none", f"--output_dir={tmp_path / 'out'}", "--cooldown_epochs=0"]
    recipe.main(parse_arguments(recipe.Arguments, [f"--config={file}", "--config_ignore_unknown", *flags]))
    assert results(tmp_path / "out")["arguments"]["batch_size"] == 64
    assert Path(tmp_path / "out" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("again", ["batch_size: 16", "batch-size: 16", "batch_size: 32"])
def test_a_flag_that_stands_twice_is_named_with_both_lines(tmp_path, again):
    """YAML takes the last without a word."""
    path = tmp_path / "flags.yaml"
    path.write_text(f"batch_size: 32\nepochs: 5\n{again}\n")
    with pytest.raises(ValueError, match=r"flags\.yaml, line 3: batch_size is set on line 1 already"):
        read_config(str(path), ["batch_size", "epochs"])


def test_no_config_of_the_recipes_sets_a_flag_twice():
    for path in (RECIPES / "configs").rglob("*.yaml"):
        names = {name.replace("-", "_") for name in yaml.safe_load(path.read_text())}
        assert read_config(str(path), names)
