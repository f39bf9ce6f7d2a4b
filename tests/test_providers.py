"""The table of providers: who serves which hint, and for whose money."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference import providers
from inference.build.engines import ENGINES
from inference.engines.runway.models import MODELS
from inference.engines.wan.presets import PRESETS
from inference.server.wire import Provider as HintOfTheContract
from inference.settings import RUNWAY_MODELS, WAN_PRESETS


@pytest.mark.parametrize(
    "hint, worker_type",
    [
        (None, "wan"),
        ("", "wan"),
        ("wan_local", "wan"),
        ("veo3.1", "runway"),
        ("gen4_turbo", "runway"),
        ("runway_veo3.1", "runway"),
        ("comfyui", "wan"),
        ("WAN_LOCAL", "wan"),
        ("runway_", "wan"),
    ],
)
def test_a_hint_is_served_by_one_provider(hint, worker_type):
    """No hint, Wan's own, and one that nobody knows are Wan's; Runway's are Runway's, in either spelling."""
    assert providers.provider_of(hint).worker_type == worker_type


@given(st.text())
def test_nobody_pays_for_a_hint_that_is_not_known(hint):
    """Whatever a queue thinks of: money is taken only for what is in the table."""
    assert providers.is_known(hint) or not providers.provider_of(hint).is_paid


def test_the_table_is_whole():
    """Each name once, the default one free; every word of the types has its row."""
    rows = providers.PROVIDERS
    assert [row.worker_type for row in rows] == list(get_args(providers.WorkerType))
    assert {row.pool for row in rows} == set(get_args(providers.PoolName))
    hints = [hint for row in rows for hint in row.models]
    assert len(hints) == len(set(hints))
    assert not providers.DEFAULT.is_paid
    assert providers.PAID.is_paid
    assert [engine for engine in get_args(providers.EngineName) if providers.is_paid(engine)] == ["runway"]
    assert not providers.is_paid(None)


def test_every_hint_of_the_contract_is_in_the_table():
    """What the embedded server lets people ask for is known to whoever serves it."""
    assert all(providers.is_known(hint) for hint in get_args(HintOfTheContract))


def test_names_that_stand_above_the_engines_are_theirs():
    """Settings and the table name what engines have, without a look at them."""
    assert set(ENGINES) == set(get_args(providers.EngineName))
    assert tuple(PRESETS) == WAN_PRESETS
    assert tuple(MODELS) == RUNWAY_MODELS
