"""Names that timm does not have: what was probably meant comes first."""

import pytest
import timm

from hf_rwp.images.arguments import TimmArguments
from hf_rwp.images.names import SCHEDULES, check_model, check_schedule, similar, similar_models


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("vit_base", "vit_base_patch16_224"),
        ("ViT_Small", "vit_small_patch16_224"),
        ("resnet", "resnet50"),
        ("resnet_50", "resnet50"),
        ("convnext", "convnext_base"),
        ("vit_bse_patch16_224", "vit_base_patch16_224"),
        ("vit_base.augreg_in1k", "vit_base_patch16_224"),
    ],
)
def test_a_model_that_timm_does_not_have(name, first):
    found = similar_models(name)
    assert (found[0], len(found)) == (first, 5)
    assert all(timm.is_model(one) for one in found)
    with pytest.raises(ValueError, match=rf"model must be one of .*, got '{name}'\. Similar names: {first}, "):
        check_model("model", name)


def test_weights_that_timm_does_not_have_are_told_ahead_of_data():
    with pytest.raises(ValueError, match=r"timm has no such weights of it\. It has .*a1_in1k"):
        TimmArguments(model="resnet50.a1_in2k").look_up()


def test_a_beginning_is_looked_up_before_spelling():
    assert similar("adam", ["madam", "adamw", "sgd"]) == ["adamw"]
    assert similar("admw", ["madam", "adamw", "sgd"])[0] == "adamw"


@pytest.mark.parametrize(
    ("name", "said"), [("cosin", "; did you mean cosine[?]"), ("poly2", "; did you mean poly[?]"), ("zz", "")]
)
def test_a_schedule_that_timm_does_not_have(name, said):
    with pytest.raises(ValueError, match=rf"sched must be one of cosine, .*, got '{name}'{said}$"):
        TimmArguments(sched=name).look_up()


def test_every_schedule_that_is_named_is_one_of_timms():
    for name in SCHEDULES:
        check_schedule(name)


def test_what_timm_refuses_of_a_schedule_is_told_ahead_of_data():
    with pytest.raises(ValueError, match="sched='wsd' cannot be with these flags: wsd schedule requires"):
        TimmArguments(sched="wsd", epochs=2, warmup_epochs=0, decay_epochs=5).look_up()
