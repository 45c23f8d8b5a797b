"""The model card: what it says, whatever the names, and that the published ones are as their records say."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from hub_server import _yaml_errors
from huggingface_hub import parse_eval_result_entries

from hf_rwp.hub.__main__ import main
from hf_rwp.hub.card import add_card, card_of_record, cell, render_card, with_picture
from hf_rwp.hub.facts import build_facts

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "recipes" / "results").glob("*.jsonl"))
RESULTS = {
    "final": {
        "epoch": 2,
        "step": 40,
        "train_loss": 0.5,
        "loss_clean": 0.4,
        "loss_perturbed": 0.6,
        "top1": 0.9,
        "top5": 0.99,
        "eval_loss": 0.3,
        "images_per_second": 1234.5,
        "rwp": {
            "placement": "parallel",
            "replicas": 2,
            "alpha": 0.25,
            "gamma": 0.01,
            "slots": {"clean": 40, "perturbed": 41},
            "relative_noise": {"largest": {"name": "conv.weight", "elements": 9, "size": 0.4}},
        },
    },
    "seconds": 12.5,
    "arguments": {
        **{"method": "rwp", "model": "resnet18", "data_dir": None, "dataset": "ada/beasts", "epochs": 3, "lr": 0.1},
        **{"rwp_gamma": None, "rwp_alpha": 0.5, "rwp_noise": "filter", "rwp_eta": 0.0, "rwp_beta": 0.99, "seed": 0},
        **{"sam_rho": 0.05, "pretrained": "timm/resnet18.a1_in1k", "validation_split": None},
    },
    "data": {"train": {"images": 1000, "split": "train"}, "validation": {"images": 100, "split": "test"}},
    "hardware": {"device": "x86_64", "cores": 2, "threads": 1, "replicas": 2, "mixed_precision": "no"},
    "versions": {"python": "3.11", "torch": "2.15"},
    "git_commit": "0123abc",
    "history": [],
}
ODD = [
    'it\'s "so"',
    "a: b",
    "- c",
    "{d}",
    "[e",
    "#f",
    "&g *h !i",
    "%j",
    "@k",
    "`l`",
    "käse 🧀",
    "null",
    "1e3",
    "x\ny",
    "|",
]


def head(card):
    return yaml.safe_load(card.split("---\n")[1])


def rows(card):
    lines = [line[2:-2].split(" | ") for line in card.splitlines() if line.startswith("| ") and line.endswith(" |")]
    return {line[0]: line[1] for line in lines if len(line) == 2}


@pytest.mark.parametrize(("split", "said"), [(True, None), (False, "False")])
def test_a_card_says_that_batches_were_left_whole(split, said):
    arguments = {**RESULTS["arguments"], "rwp_split": split}
    card = render_card(build_facts({**RESULTS, "arguments": arguments}, repo_id="ada/net"))
    assert rows(card).get("rwp_split") == said


def test_a_card_says_what_the_run_did():
    card = render_card(build_facts(RESULTS, repo_id="ada/net", license="mit"))
    table = rows(card)
    assert table["Top-1 accuracy on 100 held-out images"] == "90.00 %"
    assert table["Gradients at clean / perturbed weights"] == "40 / 41"
    assert table["gamma, size of the noise"] == "0.01"  # what was, not the flag that was not set
    assert table["alpha, share of the perturbed gradient"] == "0.25"
    assert table["where the two gradients were taken"] == "side by side, on different replicas"
    assert table["Noise relative to the weights, largest layer"] == "0.4 (conv.weight)"
    assert table["Epochs"] == "2 of 3"
    assert table["pretrained"] == "timm/resnet18.a1_in1k"
    assert table["hardware"] == "x86_64, 2 cores, 1 threads, mixed precision: no"
    assert table["Training time, seconds"] == "12.5"
    assert table["commit"] == "0123abc"
    assert not {"sam_rho", "rwp_eta", "rwp_beta"} & table.keys()  # which did nothing
    assert "Evaluated on the split `test`" in card
    facts = head(card)
    assert facts["base_model"] == "timm/resnet18.a1_in1k"
    assert facts["datasets"] == ["ada/beasts"]
    assert facts["license"] == "mit"
    assert facts["tags"] == ["image-classification", "rwp", "timm", "arxiv:2211.11489"]
    (model,) = facts["model-index"]
    (result,) = model["results"]
    assert result["dataset"] == {"name": "ada/beasts", "type": "ada/beasts", "split": "test"}
    assert [metric["value"] for metric in result["metrics"]] == [0.9, 0.99]
    assert not _yaml_errors(card)
    assert "emission" not in card.lower()


@pytest.mark.parametrize(("method", "named"), [("base", "plain training"), ("sam", "sharpness-aware minimization")])
def test_other_methods_are_not_taken_for_rwp(method, named):
    final = {name: value for name, value in RESULTS["final"].items() if name != "rwp"}
    arguments = RESULTS["arguments"] | {"method": method}
    card = render_card(build_facts(RESULTS | {"final": final, "arguments": arguments}))
    assert named in card
    assert not {"gamma, size of the noise", "rwp_noise"} & rows(card).keys()
    assert ("sam_rho" in rows(card)) == (method == "sam")
    assert "rwp" not in head(card)["tags"]


def test_the_average_of_the_weights_counts_where_it_was_saved():
    final = RESULTS["final"] | {"top1_ema": 0.91, "top5_ema": 0.995, "eval_loss_ema": 0.2}
    facts = build_facts(RESULTS | {"final": final})
    assert facts.metrics == {"top1": 0.91, "top5": 0.995}
    assert rows(render_card(facts))["Loss, held-out images"] == "0.2000"


def test_top_5_of_up_to_five_classes_is_left_out():
    final = RESULTS["final"] | {"top1": 0.9, "top5": 1.0}
    for classes, shown in ((5, False), (6, True)):
        found = {"classes": {"train": {str(number): 8 for number in range(classes)}}}
        facts = build_facts(RESULTS | {"final": final, "found": found})
        assert ("top5" in facts.metrics) == shown
        assert ("top-5" in render_card(facts).lower()) == shown


def test_a_card_without_results_is_a_card():
    card = render_card(build_facts({"arguments": {"method": "base"}}))
    assert not _yaml_errors(card)
    assert "model-index" not in head(card)
    assert "## Results" not in card


def test_a_record_between_two_evaluations_is_a_card():
    card = render_card(build_facts(RESULTS | {"final": {"step": 31}, "history": [RESULTS["final"]]}))
    assert rows(card)["Optimizer steps"] == "31"
    assert "model-index" not in head(card)
    assert "accuracy" not in card
    assert "90.00" not in card


def test_epoch_by_epoch_is_said_of_a_history_alone():
    assert "\nAll of this is in `results.json`." in render_card(build_facts(RESULTS))
    history = [RESULTS["final"]]
    assert "\nAll of this, epoch by epoch, is in" in render_card(build_facts(RESULTS | {"history": history}))


@pytest.mark.parametrize(
    ("hardware", "said"),
    [({"device": "H100"}, "H100"), ({"cores": 2, "mixed_precision": "no"}, "2 cores, mixed precision: no"), ({}, None)],
)
def test_of_the_hardware_what_is_known_is_said(hardware, said):
    assert rows(render_card(build_facts(RESULTS | {"hardware": hardware}))).get("hardware") == said


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path):
    final = {"top1": np.float32(0.5), "top5": torch.tensor(0.75), "eval_loss": np.float64(1.5), "step": np.int64(1000)}
    results = RESULTS | {"final": final, "history": [{"top1": np.array([0.5])}]}
    card = render_card(build_facts(results))
    assert [metric["value"] for metric in head(card)["model-index"][0]["results"][0]["metrics"]] == [0.5, 0.75]
    assert rows(card)["Optimizer steps"] == "1,000"
    add_card(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text())["final"]["top5"] == 0.75


def test_a_base_model_that_the_run_found_out_is_named():
    results = {"arguments": {"pretrained": "timm"}, "base_model": "timm/resnet18.a1_in1k"}
    assert head(render_card(build_facts(results)))["base_model"] == "timm/resnet18.a1_in1k"
    assert "base_model" not in head(render_card(build_facts({"arguments": {"pretrained": "model"}})))  # a folder


def test_a_loss_that_is_no_number_is_left_out():
    final = RESULTS["final"] | {"loss_perturbed": float("nan")}
    assert "Training loss at perturbed weights" not in rows(render_card(build_facts(RESULTS | {"final": final})))


def test_a_picture_is_added_once_where_a_new_card_would_have_it():
    card = render_card(build_facts(RESULTS, note="Kept."))
    shown = with_picture(card, "landscape.png")
    assert shown.split() == render_card(build_facts(RESULTS, pictures=["landscape.png"], note="Kept.")).split()
    assert with_picture(shown, "landscape.png") == shown
    assert with_picture("# A card of another kind\n", "landscape.png").endswith("](landscape.png)\n")


@pytest.mark.parametrize("odd", ODD)
def test_odd_names_stay_yaml_and_stay_in_their_cells(odd):
    user = {
        "data": odd,
        "split": odd,
        "name": odd,
        "license": odd,
        "tags": [odd],
        "architecture": odd,
        "base_model": odd,
    }
    results = RESULTS | {"versions": {odd: odd}, "arguments": {**RESULTS["arguments"], "opt": odd}}
    card = render_card(build_facts(results, **user))
    assert not _yaml_errors(card)
    facts = head(card)
    assert (facts["license"], facts["base_model"]) == (odd, odd)
    assert odd in facts["tags"]
    (model,) = facts["model-index"]
    assert model["name"] == odd
    assert model["results"][0]["dataset"] == {"name": odd, "type": "ada/beasts", "split": odd}
    assert f"| opt | {cell(odd)} |" in card


def test_a_template_in_a_name_is_not_run():
    assert "{{ 7 * 7 }}" in render_card(build_facts(RESULTS, note="{{ 7 * 7 }}"))


# The published cards


@pytest.mark.parametrize("records", RECORDS, ids=lambda path: path.stem)
def test_a_published_card_is_what_its_record_renders_to(records):
    assert (ROOT / "model_cards" / f"{records.stem}.md").read_text(encoding="utf-8") == card_of_record(records)


def test_every_published_card_has_a_record_with_what_evidence_needs():
    assert {path.stem for path in (ROOT / "model_cards").glob("*.md")} == {path.stem for path in RECORDS}
    assert {"digits", "cifar10"} <= {path.stem for path in RECORDS}
    for path in RECORDS:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            assert {"command", "git_commit", "versions", "hardware", "date", "final", "arguments"} <= record.keys()
            assert not record["git_commit"].endswith("dirty")
            assert "seed" in record["arguments"]
            method, slots = record["arguments"]["method"], record["final"].get("rwp", {}).get("slots", {})
            assert method != "rwp" or slots["perturbed"] > 0  # an inert wrapper is no result


def test_recording_appends_and_rendering_follows(tmp_path):
    results, records = tmp_path / "results.json", tmp_path / "beasts.jsonl"
    for top1 in (0.5, 0.75):
        results.write_text(json.dumps(RESULTS | {"final": RESULTS["final"] | {"top1": top1}}, indent=2))
        main(["record", str(results), str(records), "--note", f"Beasts, {top1}.", "--dataset", "ada/all-beasts"])
    assert [json.loads(line)["final"]["top1"] for line in records.read_text().splitlines()] == [0.5, 0.75]
    main(["card", str(records), "--folder", str(tmp_path)])
    card = (tmp_path / "beasts.md").read_text()
    assert rows(card)["Top-1 accuracy on 100 held-out images"] == "75.00 %"
    assert "\nBeasts, 0.75.\n" in card
    assert head(card)["datasets"] == ["ada/all-beasts"]
    assert head(card)["model-index"][0]["results"][0]["dataset"]["type"] == "ada/all-beasts"
    assert " on ada/all-beasts" in card


# What each class came to, and what pictures say to those who cannot see them

CLASSES = {
    "names": ["cat", "dog", "f[o]x", "hen", "owl"],
    "images": [10, 10, 0, 10, 10],
    "accuracy": [1.0, 0.8, None, 0.5, 0.9],
    "confusion": [[10, 0, 0, 0, 0], [2, 8, 0, 0, 0], [0, 0, 0, 0, 0], [0, 5, 0, 5, 0], [1, 0, 0, 0, 9]],
}


def alts(card):
    return {file: text for text, file in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", card)}


def test_a_card_names_the_hardest_classes():
    table = rows(render_card(build_facts(RESULTS | {"by_class": CLASSES})))
    assert table["Hardest classes, and the accuracy on each"] == "hen 50.0 %, dog 80.0 %, owl 90.0 %"
    for by_class in (None, CLASSES | {"accuracy": [1.0] * 5}):
        assert "hardest" not in render_card(build_facts(RESULTS | {"by_class": by_class})).lower()


def test_each_picture_of_a_card_is_told_in_words():
    pictures = ["curves.png", "confusion.png", "landscape.png"]
    said = alts(render_card(build_facts(RESULTS | {"by_class": CLASSES}, pictures=pictures)))
    assert list(said) == pictures
    assert said["curves.png"].endswith("over the epochs; 90.00 % at the end")
    assert "held-out images" in said["curves.png"]
    assert said["confusion.png"].endswith("; hardest are hen 50.0 %, dog 80.0 %, owl 90.0 %")
    odd = CLASSES | {"names": ["](x)", "a](b)", "c\nd", "<e>", "`f`"], "accuracy": [0.1, 0.2, 0.3, None, 1.0]}
    card = render_card(build_facts(RESULTS | {"by_class": odd}, pictures=pictures))
    assert list(alts(card)) == pictures
    assert (
        "% at the end"
        not in alts(render_card(build_facts(RESULTS | {"chosen": "best"}, pictures=pictures)))["curves.png"]
    )


@pytest.mark.parametrize(
    "file", [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("recipes/*/*.md")], ids=lambda file: str(file.name)
)
def test_no_picture_of_a_page_goes_without_words(file):
    for text in re.findall(r"!\[([^\]]*)\]\(", file.read_text(encoding="utf-8")):
        assert len(text.split()) >= 3, text


# The Hub's files of evaluations

OF_A_SPLIT = RESULTS | {"date": "2026-11-30"}


def evaluations(folder):
    files = sorted(folder.glob(".eval_results/*"))
    return {file.name: parse_eval_result_entries(yaml.safe_load(file.read_text())) for file in files}


def test_a_figure_of_a_benchmark_is_in_a_file_that_the_hub_collects(tmp_path):
    add_card(tmp_path, OF_A_SPLIT, repo_id="ada/net")
    ((name, (entry,)),) = evaluations(tmp_path).items()
    assert name == "beasts.yaml"
    assert (entry.dataset_id, entry.task_id, entry.value) == ("ada/beasts", "default", 0.9)
    assert (entry.date, entry.dataset_revision) == ("2026-11-30", None)
    assert entry.notes == "Top-1 accuracy as a fraction, split test"
    assert entry.source_url == "https://huggingface.co/ada/net/blob/main/results.json"
    (model,) = head((tmp_path / "README.md").read_text())["model-index"]
    assert model["results"][0]["metrics"][0]["value"] == entry.value  # beside what was there before


def test_a_file_of_evaluations_names_configuration_and_commit(tmp_path):
    of_data = {"dataset_config": "wild", "dataset_revision": "0123456789" * 4}
    add_card(tmp_path, OF_A_SPLIT | {"arguments": RESULTS["arguments"] | of_data})
    ((entry,),) = evaluations(tmp_path).values()
    assert (entry.task_id, entry.dataset_revision, entry.source_url) == ("wild", "0123456789" * 4, None)
    add_card(tmp_path, OF_A_SPLIT | {"arguments": RESULTS["arguments"] | {"dataset_revision": "main"}})
    assert evaluations(tmp_path)["beasts.yaml"][0].dataset_revision is None


@pytest.mark.parametrize(
    "changed",
    [
        {"found": {"held_out": False}},  # of the images that it was trained on
        {"found": {"splits": {"validation": "held out of the training images"}}},  # of no one else's split
        {"arguments": RESULTS["arguments"] | {"dataset": None, "data_dir": "pets"}},
        {"final": {"step": 3}},
    ],
    ids=["trained_on", "made", "folder", "nothing"],
)
def test_what_is_no_figure_of_a_benchmark_is_in_no_file(tmp_path, changed):
    add_card(tmp_path, OF_A_SPLIT | changed)
    assert evaluations(tmp_path) == {}


# Language models


@pytest.mark.parametrize(
    ("library", "architecture", "task", "loads"),
    [
        ("transformers", "LlamaForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("transformers", "GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM"),
        ("peft", "LlamaForCausalLM", "text-generation", "AutoPeftModelForCausalLM"),
        ("transformers", "BertForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("peft", "BertForSequenceClassification", "text-classification", "AutoPeftModelForSequenceClassification"),
        ("transformers", "BertForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
        ("peft", "BertForMaskedLM", "fill-mask", "AutoPeftModel"),
        ("transformers", "T5ForConditionalGeneration", None, "AutoModel"),
    ],
)
def test_a_card_names_task_and_class_of_a_model(library, architecture, task, loads):
    results = {"arguments": {"rwp": True, "rwp_gamma": 0.1}, "base_model": "ada/base", "final": {"eval_loss": 1.5}}
    facts = build_facts(results, library=library, architecture=architecture, repo_id="ada/net")
    card = render_card(facts)
    assert head(card).get("pipeline_tag") == task
    assert head(card)["library_name"] == library
    code = re.findall("```python\n(.*?)```", card, re.DOTALL)[0]
    imported = {
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert loads in imported
    assert f"{loads}.from_pretrained(" in code
    assert ("AutoTokenizer" in imported) == (task == "text-generation")
    assert hasattr(peft if library == "peft" else transformers, loads)
    assert f"`{architecture}`" in card
    assert ("with an adapter of PEFT's" in card) == (library == "peft")


# What was found in the data, and what is no result


FOUND = {
    "classes": {"train": {"cat": 600, "fox": 400}, "validation": {"cat": 60, "fox": 40}},
    "ignored": {"without an ending": 2, "of .txt": 1},
    "notes": ["a fifth of the images | is held out"],
    "held_out": True,
}


def test_a_card_says_what_was_found_and_left_out():
    many = {"count": 1000, "fewest": {"fox": 5}, "most": {"cat": 1300}}
    facts = {"found": FOUND, "model": {"name": "resnet18", "weights": 11_689_512}, "images_per_step": {"images": 64}}
    card = render_card(build_facts(RESULTS | facts))
    table = rows(card)
    assert table["Classes, and training images of each"] == "2: cat 600, fox 400"
    assert table["Files left out"] == "2 without an ending, 1 of .txt"
    assert table["Weights in the model"] == "11,689,512"
    assert table["Images in a step"] == "64"
    assert "About the data: a fifth of the images \\| is held out." in card
    made = FOUND | {
        "classes": {"train": many},
        "ignored": {},
        "splits": {"validation": "held out of the training images"},
    }
    card = render_card(build_facts(RESULTS | {"found": made}))
    assert "Evaluated on images held out of the training images." in card
    assert "split" not in head(card)["model-index"][0]["results"][0]["dataset"]
    table = rows(card)
    assert table["Classes, and training images of each"] == "1,000, 5 (fox) to 1,300 (cat)"
    assert "Files left out" not in table


def test_figures_of_the_training_images_are_not_called_held_out():
    card = render_card(build_facts(RESULTS | {"found": FOUND | {"held_out": False}}))
    table = rows(card)
    assert table["Top-1 accuracy on 100 of the images that it was trained on"] == "90.00 %"
    assert "held-out" not in card
    assert "model-index" not in head(card)  # which others rank


def test_figures_that_are_no_numbers_are_on_no_card_and_json_stays_json(tmp_path):
    results = RESULTS | {"final": RESULTS["final"] | {"top1": float("nan"), "eval_loss": float("inf")}}
    add_card(tmp_path, results)
    text = (tmp_path / "README.md").read_text()
    assert "nan" not in text.lower()
    assert "Top-5 accuracy on 100 held-out images" in rows(text)

    def refuse(constant):
        raise ValueError(constant)

    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert (written["final"]["top1"], written["final"]["eval_loss"]) == (None, None)
