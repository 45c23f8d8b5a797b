"""What plans claim, and what records say of it; the commands beside claims are those of the records."""

import json
import shlex

import pytest
from imagenet import RECIPES, load_recipe

from hf_rwp.experiments import claims
from hf_rwp.experiments.claims import CLAIMS, COMMANDS, FIGURES, PLANS, Outcome, outcomes
from hf_rwp.runs.methods import METHODS
from hf_rwp.runs.parsing import parse_arguments

RESULTS = RECIPES / "results"
AT_40 = [claim for claim in CLAIMS if claim.file == "digits_wrong40" and claim.figure == "top1"]


def run(method, seed, top1, early=None, noisy=0.5, rise=0.1):
    robustness = {"as_they_are": top1, "noise": {"0.03": noisy}, "bits": {"3": 0.4}, "pruned": {"0.3": 0.25}}
    robustness |= {"rise": {"0.02": rise}, "train": {"loss": 0.5, "accuracy": 0.9}}
    record = {"kind": "run", "method": method, "seed": seed, "top1": top1, "robustness": robustness}
    return record | {"early": {"top1": top1 if early is None else early}, "peak": top1 + 0.01}


def runs(method, figures, **others):
    return [run(method, seed, top1, **others) for seed, top1 in enumerate(figures, start=1)]


def outcome(gains, figure="top1", p=0.01, corrected=0.04):
    return Outcome(claims.Claim("f", "s", "t", "x", figure=figure), 1.0, 2.0, gains, p, corrected)


def test_a_claim_is_better_by_corrected_p_and_size_in_its_own_direction():
    assert outcome([1.0] * 8).verdict == "better"
    assert outcome([-1.0] * 8).verdict == "worse"
    assert outcome([1.0] * 8, corrected=0.05).verdict == "no effect"
    assert outcome([0.4] * 8).verdict == "no effect"
    assert outcome([1.0] * 8, "noise").verdict == "worse"  # more is lost
    assert outcome([-0.01] * 8, "rise").verdict == "better"  # a loss has no least size
    assert outcome([1.0] * 8, p=None, corrected=None).verdict == "unfinished"


def test_claims_are_tested_by_seed_and_corrected_inside_their_family():
    base, rwp = [0.70, 0.72, 0.71, 0.73, 0.70, 0.74, 0.69, 0.75], [0.9, 0.91, 0.92, 0.93, 0.9, 0.94, 0.89, 0.95]
    records = runs("base", base, early=0.93) + runs("rwp", rwp[::-1])
    records += runs("sam", rwp[:3])
    found = outcomes({"digits_wrong40": records})
    plain, sam, early = (item for item in found if item.claim in AT_40)
    assert plain.gains == pytest.approx([100 * (a - b) for a, b in zip(rwp[::-1], base, strict=True)])
    assert (plain.ours, plain.theirs) == (pytest.approx(91.75), pytest.approx(71.75))
    assert plain.p == 2 / 256
    assert plain.corrected == pytest.approx(6 * 2 / 256)  # of six that were planned, however many have runs
    assert plain.verdict == "better"
    assert (len(sam.gains), sam.p, sam.verdict) == (3, None, "unfinished")
    assert early.theirs == pytest.approx(93)
    assert early.claim.rival == "plain, stopped early"
    assert early.gain == pytest.approx(91.75 - 93)
    lost = next(item for item in found if item.claim.figure == "noise")
    assert lost.ours == pytest.approx(91.75 - 50)


def test_a_sentence_has_every_figure_its_p_and_its_record():
    records = runs("base", [0.7] * 8) + runs("rwp", [0.9] * 8)
    found = outcomes({"digits_wrong40": records})
    assert claims.sentence("wrong", found) == (
        "**Wrong labels.** 40 % of labels random ([record](compare/digits_wrong40.jsonl)): RWP against plain: 90 "
        "against 70 %, +20.0 points, p 0.0078, 0.047 corrected: **better**; RWP against plain, stopped early: 90 "
        "against 70 %, +20.0 points, p 0.0078, 0.047 corrected: **better**."
    )
    assert claims.sentence("controls", found) == ""
    few = outcomes({"digits_wrong40": records[:2] + records[8:10]})
    assert "RWP against plain: 90 against 70 %, +20.0 points, 2 of 8 seeds, no claim" in claims.sentence("wrong", few)
    assert claims.in_short("wrong", found) == (
        "Wrong labels (40 % of labels random), points: RWP over plain **+20.0**, p 0.0078; RWP over plain, stopped "
        "early **+20.0**, p 0.0078."
    )
    assert claims.in_short("wrong", few) == ""
    assert claims.in_short("weights", found) == ""  # all of it is of less that is better
    assert claims.in_favour("weights", found)["40 % of labels random: RWP over plain\naccuracy lost at 3 bits"] == (
        pytest.approx([-20] * 8)
    )


def test_what_has_no_runs_yet_is_named():
    whole = outcomes({"digits_wrong40": [r for name in ("base", "sam", "rwp") for r in runs(name, [0.7] * 8)]})
    said = claims.without_runs(whole)
    assert "40 % of labels random (0 of 8 pairs)" in said  # smoothing and the controls
    assert "all labels right (0 of 8 pairs)" in said
    few = claims.without_runs(outcomes({"digits_wrong80": runs("base", [0.5] * 3) + runs("rwp", [0.5] * 4)}))
    assert "80 % random (3 of 8 pairs)" in few


def test_a_method_does_not_help_where_it_is_not_clearly_above_plain_training():
    records = runs("base", [0.7] * 8) + runs("rwp", [0.9] * 8) + runs("sam", [0.704] * 8) + runs("rwp_1x", [0.9] * 3)
    assert claims.no_help({"digits_wrong40": records}, {"digits_wrong40": "a task"}) == {
        "sam": ["a task (+0.4 points, p 0.0078)"],
        "rwp": [],
    }


def test_tables_have_a_row_a_method():
    records = runs("base", [0.7, 0.8], early=0.75) + runs("rwp", [0.9, 0.9])
    assert claims.stopped_table(records).splitlines()[2:] == [
        "| plain | 75.00 ± 7.07 | 75.00 ± 0.00 | 76.00 ± 7.07 |  |",
        "| RWP | 90.00 ± 0.00 | 90.00 ± 0.00 | 91.00 ± 0.00 | 0.5 |",
    ]
    assert claims.robustness_table(records).splitlines()[2:] == [
        "| plain | 75.0 | 50.0 | 40.0 | 25.0 | 0.100 | 0.500 |",
        "| RWP | 90.0 | 50.0 | 40.0 | 25.0 | 0.100 | 0.500 |",
    ]
    bare = [{key: value for key, value in record.items() if key not in ("early", "robustness")} for record in records]
    assert (claims.stopped_table(bare), claims.robustness_table(bare)) == ("", "")


def test_every_claim_is_of_methods_figures_and_a_plan_that_exist():
    for claim in CLAIMS:
        assert {claim.ours, claim.theirs} <= set(METHODS)
        assert {claim.figure, claim.rivals or claim.figure} <= set(FIGURES)
        assert claim.file in COMMANDS
        assert claim.sentence in claims.SENTENCES
        assert (RESULTS / "plans" / f"{PLANS[claim.family]}.md").exists()
    assert {family: sum(claim.family == family for claim in CLAIMS) for family in PLANS} == {
        "40 % of labels random": 6,
        "a wider grid": 5,
        "wrong labels on CIFAR-10": 4,
        "other shares": 5,
        "robust weights": 6,
        "small transformer": 3,
        "late noise": 6,
    }


@pytest.mark.parametrize("file", COMMANDS)
def test_the_command_beside_a_claim_makes_the_runs_of_its_record(file, monkeypatch):
    records = RESULTS / "compare" / f"{file}.jsonl"
    if not records.exists():
        pytest.skip("no records of it")
    compare = load_recipe(RECIPES / "compare.py")
    monkeypatch.chdir(RECIPES.parent)
    program, command, *flags = shlex.split(COMMANDS[file])
    assert (program, command) == ("hf-rwp", "compare")
    args = parse_arguments(compare.Arguments, flags)
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    record = lines[-1]
    ours, theirs = compare.task_of(args), record["task"]
    places = ("data_dir", "dataset")  # which copy of the data
    assert {k: v for k, v in ours.items() if k not in places} == {k: v for k, v in theirs.items() if k not in places}
    assert args.name == file
    assert sorted(args.seeds) == sorted({line["seed"] for line in lines if line["kind"] == "run"})
    assert len(args.seeds) == 8
    assert compare.options_of(args, record["method"]) == record["options"]
