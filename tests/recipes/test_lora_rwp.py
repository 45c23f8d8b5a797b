"""recipes/lora_rwp.py: what it computes, writes and refuses."""

import ast
import contextlib
import getpass
import io
import json
import os
import re
import shlex
import signal
import socket
from pathlib import Path

import forked
import pytest
import torch
import yaml
from distributed import run as run_on_ranks
from distributed import stop
from huggingface_hub import ModelCard
from imagenet import RECIPES, load_recipe, results
from launched import under
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DefaultFlowCallback

from hf_rwp.runs.given import save_flags
from hf_rwp.runs.parsing import parse_arguments
from hf_rwp.runs.progress import Progress
from hf_rwp.runs.records import read_records
from hf_rwp.trainer import language
from hf_rwp.trainer.adapters import next_commands
from hf_rwp.trainer.texts import TextArguments, load_texts

CONFIGS = sorted((RECIPES / "configs" / "lora").glob("*.yaml"))
BLOCKS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
QUICK = ["--quick", "--train_samples=24", "--per_device_train_batch_size=8", "--use_cpu"]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPES / "lora_rwp.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The embedded base, after a few steps."""
    return language.make_base(tmp_path_factory.mktemp("base") / "base_3", 3, seed=0)


def train(recipe, folder, base, *flags):
    run_main(recipe, folder, base, *flags)
    return results(folder)


def run_main(recipe, folder, base, *flags):
    flags = [*QUICK, f"--base_dir={str(base).removesuffix('_3')}", "--base_steps=3", *flags]
    recipe.main(parse_arguments(recipe.Arguments, [*flags, f"--output_dir={folder}"]))


@pytest.fixture(scope="module")
def said(recipe, base, tmp_path_factory):
    """A run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = train(recipe, folder, base, f"--records={folder / 'own.jsonl'}", "--logging_strategy=steps")
    return folder, found, printed.getvalue()


@pytest.fixture(scope="module")
def run(said):
    return said[:2]


def test_figures_are_those_of_the_adapter_that_it_leaves(run, base):
    folder, found = run
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    _, held_out = language.sums_in_words(24, 16, seed=0)
    known, final = language.known_texts(16, seed=10_000), found["final"]
    assert final["known_loss"] == pytest.approx(language.mean_loss(model, tokenizer, known), rel=1e-4)
    assert final["known_loss_before"] == pytest.approx(language.mean_loss(plain, tokenizer, known), rel=1e-4)
    assert final["forgetting"] == pytest.approx(final["known_loss"] - final["known_loss_before"])
    assert final["accuracy"] == language.exact_match(model, tokenizer, held_out)
    answers = [
        (tokenizer(r["prompt"])["input_ids"], tokenizer(r["completion"] + "<eos>")["input_ids"]) for r in held_out
    ]
    losses = []
    for prompt, answer in answers:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    assert final["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-3)


def test_a_run_perturbs_the_base_and_says_what_it_did(run):
    found = run[1]
    assert found["final"]["rwp"]["slots"] == {"clean": 3, "perturbed": 3}
    assert "base_layer" in found["final"]["rwp"]["relative_noise"]["largest"]["name"]
    assert found["final"]["rwp"]["relative_noise"]["largest"]["size"] == pytest.approx(0.05, rel=0.1)
    assert found["final"]["peak_memory_bytes"] > 2**20
    assert {"trl", "peft", "transformers", "torch"} <= set(found["versions"])
    assert found["data"] == {"train": {"samples": 24}, "validation": {"samples": 16}}
    assert [row["step"] for row in found["history"]] == [3]


def test_progress_is_lines_in_a_pipe_and_the_end_has_figures_words_and_commands(said):
    folder, found, text = said
    lines = text.splitlines()
    final = found["final"]
    assert lines[0] == f"writes to: {folder}"
    assert lines[1] == (
        f"step 3/3: held-out loss {final['eval_loss']:.4f}, exact match {final['accuracy']:.2%}, "
        f"known text {final['known_loss']:.4f}"
    )
    assert lines[2].split() == ["held-out", "loss", f"{final['eval_loss']:.4f}"]
    assert "RWP took 3 of 6 gradients with noise in the weights." in lines
    assert "The noise was 5 % of the weights in the largest layer (base_model.model." in " ".join(text.split())
    assert max(len(line) for line in lines if str(folder.parent) not in line) <= 80
    assert f"Text that the base knew costs {abs(final['forgetting']):.2f} nats a token" in text
    assert list(commands(text)) == ["generate", "compare", "push"]
    assert "it/s" not in text


def commands(text):
    """What can be copied, by its comment, which stands behind it or, of one that is longer than a line, above it."""
    found, name, command = {}, "", ""
    for line in text.rpartition("\n\n")[2].replace("\\\n", "").splitlines():
        if not command and line.startswith("# "):
            name = line[2:]
            continue
        command += f"{line}\n"
        if command.count("'") % 2 == 0:
            found[line.rpartition("  # ")[2] if "  # " in line else name] = shlex.split(command, comments=True)
            command = ""
    return found


def test_the_next_commands_do_what_they_say(said, recipe):
    folder, _, text = said
    found = commands(text)
    generated = forked.run(*found["generate"][1:])
    assert re.match(r"\d+ plus \d+ is ", generated.stdout), generated.stderr
    assert found["compare"][:3] == ["hf-rwp", "lora", "--rwp=false"]
    other = parse_arguments(recipe.Arguments, found["compare"][2:])
    assert (other.method, other.train_samples, other.base_steps) == ("base", 24, 3)
    assert found["push"] == ["hf-rwp", "push", str(folder / "adapter"), "USER/NAME"]


def test_a_prompt_with_an_emoji_is_generated_from_as_it_is(run, base):
    folder, found = run
    code = next_commands(found, {}, folder / "adapter", str(base), "a \N{CAT FACE} is ")["generate"]
    (given,) = (line for line in shlex.split(code)[2].splitlines() if line.startswith("prompt = "))
    assert ast.literal_eval(given[len("prompt = tokenizer(") : given.index(", return")]) == "a \N{CAT FACE} is "


def test_a_known_file_in_the_home_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "known.txt").write_text("1+2=3\n")
    args = parse_arguments(recipe.Arguments, ["--known_file=~/known.txt", "--use_cpu"])
    assert recipe.measured(args, []).known == ["1+2=3"]


def test_a_damaged_line_is_numbered_by_line_feeds_alone(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a\u2028b\x85c"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: not JSON"):
        load_texts(TextArguments(data_file=str(file)), seed=0)


def test_a_run_keeps_its_flags_its_command_and_a_record(said, recipe):
    folder, found, _ = said
    assert found["command"].startswith("accelerate launch recipes/lora_rwp.py --quick --train_samples=24")
    assert str(folder) not in found["command"]
    record = read_records(folder / "own.jsonl")[0]  # those that go on add theirs
    assert (record["arm"], record["seed"], record["command"]) == ("frozen", 0, found["command"])
    assert record["history"] == found["history"]
    assert "arguments" not in record
    (folder / "results.json").rename(folder / "kept.json")  # as if it were cut
    again = parse_arguments(recipe.Arguments, [f"--resume_from_checkpoint={folder}"])
    (folder / "kept.json").rename(folder / "results.json")
    assert (again.train_samples, again.base_steps, again.output_dir) == (24, 3, str(folder))


def test_an_arm_is_what_is_perturbed(recipe):
    flags = {"plain": ["--rwp=false"], "adapters": ["--rwp_frozen=false"], "frozen": []}
    assert {arm: parse_arguments(recipe.Arguments, [*own, "--use_cpu"]).arm for arm, own in flags.items()} == {
        arm: arm for arm in flags
    }


def test_plain_lora_takes_no_noise(recipe, base, tmp_path, run):
    found = train(recipe, tmp_path, base, "--rwp=false")
    assert "rwp" not in found["final"]
    assert found["final"]["known_loss_before"] == run[1]["final"]["known_loss_before"]
    assert found["final"]["eval_loss"] != run[1]["final"]["eval_loss"]
    assert found["arguments"]["method"] == "base"


def test_what_it_leaves_says_nothing_of_the_machine(run):
    folder, _ = run
    texts = [folder / name for name in ("results.json", "arguments.json")] + [
        file for file in (folder / "adapter").iterdir() if file.suffix in (".json", ".md")
    ]
    assert len(texts) > 4
    assert not (folder / "adapter" / "training_args.bin").exists()
    for file in texts:
        for trace in (str(folder.parent), str(Path.cwd()), str(Path.home()), socket.gethostname(), getpass.getuser()):
            assert not re.search(rf"(?<!\w){re.escape(trace)}(?!\w)", file.read_text()), (file, trace)


def test_the_card_is_one_of_an_adapter(run):
    folder, found = run
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert "PeftModel.from_pretrained(AutoModelForCausalLM" in card.text
    assert f"went from {found['final']['known_loss_before']:.4f} to {found['final']['known_loss']:.4f}" in card.text
    assert "| lora_r | 8 |" in card.text
    assert "| rwp_frozen | True |" in card.text
    assert "max_steps" not in card.text
    assert (folder / "adapter" / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["prompts", "messages", "text"])
def test_own_data_and_an_own_model(recipe, base, tmp_path, kind):
    rows = {
        "prompts": [{"prompt": f"{i} plus 1 is ", "completion": str(i + 1)} for i in range(30)],
        "messages": [
            {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i}"}]}
            for i in range(30)
        ],
        "text": [{"text": f"{i}+1={i + 1}"} for i in range(30)],
    }[kind]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    model = tmp_path / "own"
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = template
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(model)
    tokenizer.save_pretrained(model)
    known = tmp_path / "known.txt"
    known.write_text("the red fox sees a small bird at night.\n\n1+2=3\n")
    flags = [f"--data_file={file}", f"--model_name_or_path={model}", f"--known_file={known}", "--lora_r=2"]
    found = train(recipe, tmp_path / "run", base, *flags, "--train_samples=8", "--use_dora")
    assert found["data"] == {"train": {"samples": 8}, "validation": {"samples": 16}}
    assert ("accuracy" in found["final"]) == (kind == "prompts")
    before = language.mean_loss(
        AutoModelForCausalLM.from_pretrained(base), tokenizer, [line for line in known.read_text().split("\n") if line]
    )
    assert found["final"]["known_loss_before"] == pytest.approx(before, rel=1e-4)
    assert any("lora_magnitude" in name for name in load_file(tmp_path / "run/adapter/adapter_model.safetensors"))
    assert found["arguments"]["data_file"] == "data.jsonl"


def test_columns_that_it_does_not_know_are_named(recipe, base, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"question": "1", "answer": "2"}) for _ in range(30)))
    with pytest.raises(ValueError, match=r"data.jsonl has the columns .*question.*: SFT needs `messages`"):
        train(recipe, tmp_path / "run", base, f"--data_file={file}")


def test_training_resumes_bit_exactly(recipe, base, tmp_path):
    flags = [
        "--save_strategy=steps",
        "--save_steps=1",
        "--save_total_limit=9",
        "--eval_strategy=steps",
        "--eval_steps=1",
    ]
    through = train(recipe, tmp_path / "whole", base, *flags)
    whole = load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    (tmp_path / "whole/results.json").unlink()
    again = [*flags, f"--resume_from_checkpoint={tmp_path / 'whole/checkpoint-2'}"]
    found = train(recipe, tmp_path / "again", base, *again)
    again = load_file(tmp_path / "again/adapter/adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert [row["step"] for row in found["history"]] == [1, 2, 3]
    assert found["history"] == through["history"]
    assert found["final"]["rwp"]["slots"] == {"clean": 3, "perturbed": 3}  # the two before the cut as well


def test_a_finished_run_that_is_resumed_keeps_what_it_did(run, recipe, base, capsys):
    folder, before = run
    found = train(recipe, folder, base, f"--resume_from_checkpoint={folder}")
    said = capsys.readouterr().out
    assert "nothing is left to train: 3 steps are behind this run. A larger --num_train_epochs goes on" in said
    assert "weights: from checkpoint-3" in said
    assert found["final"]["rwp"] == before["final"]["rwp"]
    assert found["history"] == before["history"]


def test_what_all_weights_forgot_is_known_after_resuming(recipe, base, tmp_path):
    flags = ["--use_peft=false", "--rwp_frozen=false", "--train_samples=8"]
    before = train(recipe, tmp_path, base, *flags)["final"]
    found = train(recipe, tmp_path, base, *flags, f"--resume_from_checkpoint={tmp_path}")["final"]
    assert found["known_loss_before"] == before["known_loss_before"]
    assert found["forgetting"] == pytest.approx(before["forgetting"])


def test_ctrl_c_saves_a_checkpoint_from_which_training_goes_on(run, recipe, base, tmp_path, monkeypatch, capsys):
    advance = Progress.advance

    def pressed(progress):
        advance(progress)
        if progress.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    ended = []  # by whoever writes logs
    monkeypatch.setattr(Progress, "advance", pressed)
    monkeypatch.setattr(DefaultFlowCallback, "on_train_end", lambda *_, **__: ended.append("log"))
    with pytest.raises(SystemExit) as stopped:
        train(recipe, tmp_path, base)
    assert stopped.value.code == 130
    assert ended == ["log"]
    assert f"Ctrl-C: saved step 2; --resume_from_checkpoint {tmp_path} goes on" in capsys.readouterr().err
    monkeypatch.undo()
    found = train(recipe, tmp_path, base, f"--resume_from_checkpoint={tmp_path}")
    assert found["final"]["rwp"]["slots"] == {"clean": 3, "perturbed": 3}
    whole, again = (load_file(place / "adapter/adapter_model.safetensors") for place in (run[0], tmp_path))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_each_run_without_a_folder_has_its_own(recipe, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [*QUICK, f"--base_dir={str(base).removesuffix('_3')}", "--base_steps=3", "--rwp=false"]
    for folder in ("outputs/sums_lora_base_seed0", "outputs/sums_lora_base_seed0/2"):
        recipe.main(parse_arguments(recipe.Arguments, args))
        assert results(Path(folder))["final"]["step"] == 3


@pytest.mark.parametrize("name", ["lora_rwp", "vit_rwp"])
def test_a_second_run_that_goes_on_is_pushed_by_the_name_of_its_row(name, tmp_path, monkeypatch):
    recipe, row, pushed = load_recipe(RECIPES / f"{name}.py"), tmp_path / "sums", []

    def settle(args):
        pushed.append(args.hub_model_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "settle_folder", settle)
    for folder in (row, row / "2"):
        folder.mkdir()
        save_flags(folder, {"seed": ["1"]})
        flags = [f"--resume_from_checkpoint={folder}", "--push_to_hub", "--use_cpu"]
        with pytest.raises(KeyboardInterrupt):
            recipe.main(parse_arguments(recipe.Arguments, flags))
    assert pushed == ["sums", "sums"]


def test_messages_without_a_chat_template_are_refused_by_name(recipe, base, tmp_path):
    file = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    file.write_text("\n".join([json.dumps({"messages": messages})] * 30))
    with pytest.raises(ValueError, match="has no chat template, which `messages` need: set --chat_template_path"):
        train(recipe, tmp_path / "run", base, f"--data_file={file}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--held_out=0"], "held_out must be at least 1, got 0"),
        (["--quick", "--held_out=0"], "held_out must be at least 1, got 0"),
        (["--quick", "--train_samples=0"], "train_samples must be at least 1, got 0"),
        (["--dataset=a/b", "--data_file=c.jsonl"], "data_file must be unset where dataset is set"),
        (["--num_train_epochs=0"], "num_train_epochs must be above 0, got 0.0"),
        (["--load_in_4bit"], "load_in_4bit and load_in_8bit are for a model that is given"),
        (["--rwp_alpha=2"], r"rwp_alpha must be in \[0, 1\], got 2.0"),
        (["--lora_rank=3"], r"no flag --lora_rank; did you mean --lora_r\?"),
    ],
)
def test_flags_that_cannot_work_are_refused(recipe, flags, said):
    with pytest.raises(ValueError, match=said):
        parse_arguments(recipe.Arguments, [*flags, "--use_cpu"])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_starts(recipe, base, config, tmp_path):
    """On a tiny model, a CPU and in full precision; what it says of the rest is taken as it is."""
    settings = yaml.safe_load(config.read_text())
    small = [f"--model_name_or_path={base}", "--bf16=false", "--dtype=float32", "--num_train_epochs=1"]
    if settings.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    args = parse_arguments(recipe.Arguments, [f"--config={config}", "--use_cpu", "--bf16=false"])
    for name, value in settings.items():
        assert name == "bf16" or getattr(args, name) == value, name
    found = train(recipe, tmp_path, base, f"--config={config}", *small)
    assert found["final"]["rwp"]["slots"]["perturbed"] > 0
    assert "lora_" not in found["final"]["rwp"]["relative_noise"]["largest"]["name"]


def test_the_base_is_made_once_and_leaves_the_random_state_alone(base, tmp_path):
    state, written = torch.get_rng_state(), (base / "model.safetensors").stat().st_mtime_ns
    assert language.make_base(base, 3, seed=0) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    assert torch.equal(torch.get_rng_state(), state)
    again = language.make_base(tmp_path / "again", 3, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    one, other = (load_file(folder / "model.safetensors") for folder in (base, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_sums_are_right_and_none_of_the_held_out_is_trained_on():
    train_rows, held_out = language.sums_in_words(300, 100, seed=3)
    assert (len(train_rows), len(held_out)) == (300, 100)
    prompts = {row["prompt"] for row in train_rows}
    assert len(prompts) == 300
    assert prompts.isdisjoint(row["prompt"] for row in held_out)
    for row in (*train_rows, *held_out):
        one, other = re.fullmatch(r"(\d+) plus (\d+) is ", row["prompt"]).groups()
        assert int(row["completion"]) == int(one) + int(other)
    for text in language.known_texts(50, seed=0):
        if "=" in text:
            one, other, total = map(int, re.split(r"[+=]", text))
            assert total == one + other


def train_on_rank(folder, base, *flags):
    with under("fsdp2_8", {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", **BLOCKS}):
        recipe = load_recipe(RECIPES / "lora_rwp.py")
        try:
            run_main(recipe, folder, base, *flags)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def test_two_processes_that_hold_the_weights_together_train_as_one_does(recipe, base, tmp_path):
    flags = [f"--config={RECIPES / 'configs' / 'lora' / 'fsdp2_7b.yaml'}", f"--model_name_or_path={base}"]
    flags += ["--bf16=false", "--dtype=float32", "--num_train_epochs=1", "--gradient_checkpointing=false"]
    flags += ["--per_device_train_batch_size=4"]
    stop(0)  # DTensor caches plans with the names of groups
    assert run_on_ranks(2, train_on_rank, tmp_path / "two", base, *flags, timeout=180) == ["", ""]
    two = results(tmp_path / "two")
    assert two["final"]["rwp"]["placement"] == "sequential"
    assert "base_layer" in two["final"]["rwp"]["relative_noise"]["largest"]["name"]
    adapter = load_file(tmp_path / "two/adapter/adapter_model.safetensors")
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "two/adapter")
    _, held_out = language.sums_in_words(24, 16, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert two["final"]["accuracy"] == language.exact_match(model, tokenizer, held_out)
