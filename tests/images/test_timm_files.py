"""What timm's files say of its models is what timm says."""

import pytest
import timm

from hf_rwp.images.names import similar_models
from hf_rwp.images.timm_files import similar_in_files


def test_no_model_of_timms_is_refused():
    names = [*timm.list_models(include_tags=True)[::97], "vit_base_resnet50d_224", "resnet50", "tv_resnet34"]
    assert [name for name in names if similar_in_files(name) is not None] == []


@pytest.mark.parametrize("name", ["vit_base", "resnet5O", "efficient_b0"])
def test_names_that_timm_lacks_have_the_similar_ones_that_timm_would_tell(name):
    assert not timm.is_model(name)
    assert similar_in_files(name)[:3] == similar_models(name)[:3]


def test_what_is_not_in_timm_is_left_to_timm():
    assert similar_in_files("hf-hub:timm/resnet18") is None
