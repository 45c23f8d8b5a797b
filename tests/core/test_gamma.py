import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_rwp.core.gamma import SCHEDULES, gamma_factor


@given(st.floats(0, 1), st.floats(0, 5), st.floats(0, 1))
def test_gamma_factor_is_its_closed_form(progress, growth, start):
    closed_forms = {
        "constant": 1.0,
        "linear": 1 + growth * progress,
        "cosine": 1 + growth * math.sin(math.pi * progress / 2) ** 2,
    }
    assert set(closed_forms) == set(SCHEDULES)
    for schedule, value in closed_forms.items():
        expected = 0.0 if progress < start else value
        assert gamma_factor(progress, schedule, growth, start) == pytest.approx(expected, abs=1e-12)


def test_gamma_factor_is_one_by_default_and_refuses_an_unknown_schedule():
    assert [gamma_factor(progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"'step'.*constant, linear, cosine"):
        gamma_factor(0.5, "step")
