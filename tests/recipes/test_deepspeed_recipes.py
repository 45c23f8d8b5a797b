"""recipes/accelerate/deepspeed_zero2.yaml, and the recipes under it: imagenet_rwp.py as it is under DDP, vit_rwp.py.

How to run the tests that need deepspeed on a CPU is in tests/engines/test_deepspeed.py.
"""

import importlib.util
import os
import pickle
import shutil
from types import SimpleNamespace

import imagenet
import pytest
import torch
import vit
import zero
from accelerate import DeepSpeedPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from distributed import run, run_each, stop
from imagenet import RECIPES, results, weights
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2

from hf_rwp.runs.checkpoints import checkpoints_in, load_checkpoint
from hf_rwp.runs.deepspeed import ELEMENTWISE, engine_weights, refuse_engine_code, set_up_engine
from hf_rwp.runs.run import Run

FILE = RECIPES / "accelerate" / "deepspeed_zero2.yaml"
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not INSTALLED, reason="deepspeed is not installed; see tests/engines/test_deepspeed.py"
)


@pytest.fixture(scope="module", autouse=True)
def own_processes():
    """Those that have had DeepSpeed in them serve nobody else."""
    yield
    if INSTALLED:
        stop()


def environment() -> dict[str, str]:
    """What Accelerate's launcher makes of the file for its processes."""
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(FILE), "--main_process_port", "0", "script.py"])
    )
    args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    return {name: value for name, value in prepare_deepspeed_cmd_env(args)[1].items() if name.startswith("ACCELERATE_")}


def test_the_launch_file_is_what_accelerate_reads(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 2
    assert plugin.deepspeed_config["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"  # Trainer's max_grad_norm


def engine_of(config=None, processes=2, stage=2, mixed_precision="no"):
    """An accelerator as far as imagenet_rwp.py asks for its engine's settings."""
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"gradient_clipping": "auto", **(config or {})})
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        num_processes=processes,
        mixed_precision=mixed_precision,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )


def flags_of(*flags):
    recipe = imagenet.load_recipe()
    return imagenet.parse_arguments(recipe.Arguments, ["--batch_size=8", "--report_to=none", *flags])


REFUSED = {  # flags, the accelerator, gradients to a step, what the error says
    "sam": (["--method=sam"], {}, 1, "--method sam does not work on DeepSpeed's engine"),
    "accumulation": (["--gradient_accumulation_steps=2"], {}, 2, "--gradient_accumulation_steps does not work"),
    "agc": (["--clip_grad=1", "--clip_mode=agc"], {}, 1, "--clip_mode agc does not work"),
    "damping": (["--rwp_eta=0.1"], {}, 1, "--rwp_eta does not work"),
    "channels_last": (["--channels_last"], {}, 1, "--channels_last does not work"),
    "sync_bn": (["--sync_bn"], {}, 1, "--sync_bn does not work"),
    "compile": (["--torch_compile"], {}, 1, "--torch_compile does not work"),
    "lamb": (["--opt=lamb"], {}, 1, "--opt lamb may depend on the shape of weights"),
    "halves": ([], {"processes": 1}, 2, "a step takes 2 on 1 process.*take two processes or more"),
    "pairs": (["--rwp_antithetic"], {}, 2, "four or more with --rwp_antithetic"),
    "alone": (["--method=base"], {"processes": 1}, 1, "take two processes or more"),
    "stage 3": ([], {"stage": 3}, 1, "take zero_stage 2 or less"),
    "bf16": ([], {"mixed_precision": "bf16"}, 1, "bf16 makes DeepSpeed's weights themselves of that type"),
    "fp16 in a file": ([], {"config": {"fp16": {"enabled": True}}}, 1, "fp16 makes DeepSpeed's weights"),
    "scheduler": ([], {"config": {"scheduler": {"type": "WarmupLR"}}}, 1, 'delete "scheduler"'),
    "clipping": ([], {"config": {"gradient_clipping": 1.0}}, 1, "gradient_clipping=1.0, and the flags come to 0.0"),
    "batch": ([], {"config": {"train_batch_size": 32}}, 1, "train_batch_size=32, and the flags come to 16"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_engine_cannot_do_is_refused_at_the_flags(what):
    flags, accelerator, micro_steps, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        set_up_engine(engine_of(**accelerator), flags_of(*flags), micro_steps)


@pytest.mark.parametrize(("flags", "clipping"), [([], 0.0), (["--clip_grad=0.5"], 0.5)])
def test_the_engine_is_told_batch_size_and_clipping(flags, clipping, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    accelerator = engine_of(DeepSpeedPlugin().deepspeed_config)
    set_up_engine(accelerator, flags_of(*flags), 1)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert (config["train_micro_batch_size_per_gpu"], config["train_batch_size"]) == (8, 16)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (1, clipping)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_optimizers_that_step_flat_partitions_treat_each_weight_by_itself(name):
    start, rows = torch.randn(6, 4), torch.randn(5, 6, 4)
    apart = [torch.nn.Parameter(part.clone()) for part in (start[:2], start[2:])]
    flat = torch.nn.Parameter(start.clone().flatten())
    for parameters in (apart, [flat]):
        optimizer = create_optimizer_v2(parameters, opt=name, lr=0.1, weight_decay=0.1, momentum=0.9)
        for row in rows:
            for parameter, part in zip(parameters, (row[:2], row[2:]) if len(parameters) == 2 else [row], strict=True):
                parameter.grad = part.reshape(parameter.shape).clone()
            optimizer.step()
    assert not torch.equal(flat.reshape(6, 4), start)
    torch.testing.assert_close(torch.cat(apart), flat.reshape(6, 4))


def checkpoint_of(folder, content):
    (folder / "pytorch_model").mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save(content, folder / "pytorch_model" / name)
    return folder


def test_an_engines_checkpoint_that_holds_code_is_refused(tmp_path):
    """Which the engine itself would run."""
    refuse_engine_code(checkpoint_of(tmp_path, {"module": {"a": torch.ones(2)}, "loss_scaler": None}))
    assert torch.equal(engine_weights(tmp_path)["a"], torch.ones(2))
    torch.save({"module": os.getcwd}, tmp_path / "pytorch_model" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(pickle.UnpicklingError, match="getcwd"):
        refuse_engine_code(tmp_path)
    with pytest.raises(ValueError, match="pytorch_model holds more than tensors and plain data"):
        load_checkpoint(engine_of(processes=1), tmp_path)


def test_an_engines_checkpoint_goes_on_only_as_it_was_written(tmp_path):
    folder = checkpoint_of(tmp_path, {"module": {}})
    plain = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    with pytest.raises(ValueError, match="its weights were in DeepSpeed's engine, and are whole here"):
        load_checkpoint(plain, folder)
    with pytest.raises(ValueError, match="in 1 partitions, and ZeRO-2 on 2 processes takes 2"):
        load_checkpoint(engine_of(processes=2), folder)


RUNS = {  # by the name of its folder: ZeRO's stage, and flags that change something of every kind
    "vit": (2, "--model=test_vit", "--clip_grad=0.1", "--model_ema", "--model_ema_decay=0.9", "--warmup_epochs=1"),
    "resnet": (1, "--opt=adamw", "--lr=0.001", "--mixup=0.2"),
    "lamb": (0, "--opt=lamb", "--lr=0.001", "--clip_grad=0.1", "--rwp_eta=0.1"),
    "base": (2, "--method=base"),
}
SHORT = ["--batch_size=8", "--checkpointing_steps=4", "--save_total_limit=9"]  # of six steps an epoch


class WithBest(Run):
    """A run that writes the weights of its best epoch as well, which those that push do.

    Its end is where the recipe has called `eval` of the optimizer: not even a training step finds noise then.
    """

    def finish(self):
        results = super().finish()
        before = [parameter.detach().clone() for parameter in self.module.parameters()]
        self.module.train()(torch.zeros(2, 3, 16, 16))  # the backward pass that would take noise away never comes
        assert all(torch.equal(*pair) for pair in zip(before, self.module.parameters(), strict=True))
        if results:
            self.write_best()
        return results


def train_under_ddp(folder: str, stage: int, *flags: str) -> str:
    """`imagenet.train_on_rank`, in a process group that outlives the run."""
    PartialState.destroy_process_group = lambda *_: None
    return imagenet.train_on_rank(folder, *flags)


def train_under_zero(folder: str, stage: int, *flags: str) -> str:
    """The same in a process that Accelerate's launcher started with the file."""
    os.environ.update(environment(), ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage))
    zero.accelerate_on_cpus()
    PartialState.destroy_process_group = lambda *_: None
    recipe = imagenet.load_recipe()
    recipe.load_images, recipe.Run = imagenet.few_digits, WithBest
    try:
        imagenet.train(recipe, folder, *flags)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def cut_back(whole, folder, step):
    """A copy of a finished run as if it had been cut after the checkpoint of `step`."""
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    for number, checkpoint in checkpoints_in(folder / "checkpoints").items():
        if number > step:
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each of `RUNS` on two processes: under ddp, under zero, and under zero from its fourth step on (again)."""
    folder = tmp_path_factory.mktemp("imagenet")

    def all_runs(function, kind, *flags):
        cases = [(str(folder / kind / name), *own, *SHORT, *flags) for name, own in RUNS.items()]
        assert run_each(2, function, cases, timeout=200, keep_group=True) == [["", ""]] * len(RUNS)

    all_runs(train_under_ddp, "ddp")
    stop()
    all_runs(train_under_zero, "zero")
    for name in RUNS:
        cut_back(folder / "zero" / name, folder / "again" / name, 4)
    all_runs(train_under_zero, "again", "--resume_from_checkpoint=latest")
    return folder


@needs_deepspeed
@pytest.mark.parametrize("name", RUNS)
def test_imagenet_rwp_under_zero_is_the_run_under_ddp(name, trained):
    """Losses, rates, accuracies, noise, weights and their average: up to the rounding of float32."""
    plain, engine = (results(trained / kind / name) for kind in ("ddp", "zero"))
    assert len(engine["replicas_sha256"]) == 1
    figures = ("train_loss", "eval_loss", "top1", "top5", "learning_rate", "loss_clean", "loss_perturbed", "top1_ema")
    for mine, its in zip(engine["history"], plain["history"], strict=True):
        assert {key: mine[key] for key in figures if key in its} == pytest.approx(
            {key: its[key] for key in figures if key in its}, rel=1e-4
        )
    if name != "base":
        mine, its = (run["final"]["rwp"] for run in (engine, plain))
        assert mine["slots"] == its["slots"] == {"clean": 12, "perturbed": 12}
        assert mine["placement"] == "parallel"
        for size, layer in its["relative_noise"].items():
            assert mine["relative_noise"][size]["size"] == pytest.approx(layer["size"], rel=1e-3)
    mine, its = (load_file(trained / kind / name / "model" / "model.safetensors") for kind in ("zero", "ddp"))
    assert mine.keys() == its.keys()
    for key, weight in its.items():
        torch.testing.assert_close(mine[key], weight, rtol=1e-3, atol=1e-5, msg=key)


@needs_deepspeed
@pytest.mark.parametrize("name", RUNS)
def test_imagenet_rwp_resumes_under_zero_to_the_bit(name, trained):
    whole, again = (results(trained / kind / name) for kind in ("zero", "again"))
    assert weights(again) == weights(whole)
    assert again["weights_sha256"] == whole["weights_sha256"]
    for mine, its in zip(again["history"], whole["history"], strict=True):
        assert {key for key in its if mine[key] != its[key]} <= {"seconds", "images_per_second"}


@needs_deepspeed
@pytest.mark.parametrize("name", RUNS)
def test_one_process_reads_what_the_engine_wrote(name, trained, tmp_path):
    """Without deepspeed's classes: the last checkpoint evaluated, and the weights of the best."""
    final = results(trained / "zero" / name)["final"]
    recipe = imagenet.load_recipe()
    recipe.load_images = imagenet.few_digits
    checkpoint = trained / "zero" / name / "checkpoints" / "step_12"
    model = "--model=test_vit" if name == "vit" else "--model=test_resnet"
    imagenet.train(recipe, tmp_path, model, "--eval_only", f"--resume_from_checkpoint={checkpoint}")
    found = imagenet.evaluated(tmp_path)
    assert found == pytest.approx({key: final[key] for key in found}, rel=1e-5)
    assert ("eval_loss_ema" in found) == (name == "vit")
    best = results(trained / "zero" / name / "best")["final"]["step"]
    if name != "vit":  # of which the average is written
        written = load_file(trained / "zero" / name / "best" / "model.safetensors")
        expected = engine_weights(checkpoint.with_name(f"step_{best}"))
        assert all(torch.equal(value, expected[key]) for key, value in written.items())


def train_vit(folder: str, *flags: str) -> None:
    os.environ.update(environment())
    zero.accelerate_on_cpus()
    vit.train(folder, *vit.SCRATCH, "--rwp_gamma=0.2", *flags)


@needs_deepspeed
def test_vit_rwp_trains_under_zero_2_and_resumes_to_the_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(2, train_vit, str(whole), timeout=100, keep_group=True)
    report = results(whole)["final"]["rwp"]
    assert (report["placement"], report["slots"]) == ("parallel", {"clean": 4, "perturbed": 4})
    vit.cut_back(whole, cut, 2)
    resumed = f"--resume_from_checkpoint={cut / 'checkpoint-2'}"
    run(2, train_vit, str(cut), resumed, timeout=100, keep_group=True)
    one, other = (
        torch.load(next((folder / "checkpoint-4").glob("*/mp_rank_00_model_states.pt")), weights_only=False)
        for folder in (whole, cut)
    )
    assert one["module"].keys() == other["module"].keys()
    assert all(torch.equal(other["module"][name], weight) for name, weight in one["module"].items())
