"""Runs that a person asks for: what is wrong with a request is told in words of the command line."""

import pytest
from pydantic import SecretStr

from inference.errors import InvalidRequest
from inference.on_modal import one_off
from inference.settings import Settings


@pytest.mark.parametrize(
    "asked, told",
    [
        ({"seconds": 0}, "--seconds: input should be greater than 0"),
        ({"seconds": 61}, "--seconds: input should be less than or equal to 60"),
        ({"seed": -1}, "--seed: input should be greater than or equal to 0"),
        (
            {"prompt": "x" * 4001, "seconds": 0},
            "--prompt: string should have at most 4000 characters; --seconds: input",
        ),
    ],
)
def test_what_no_engine_takes(asked, told):
    """Options are named as they were typed."""
    asked = {"prompt": "", "seconds": 5.0, "seed": None} | asked
    with pytest.raises(InvalidRequest) as caught:
        one_off.asked("photo.jpg", "", **asked, item_id="", saves=True)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    "engine, told",
    [("wan", "--seconds is 59; preset tiny makes 0.5 to 10 s"), ("runway", "--seconds is 59; gen4_turbo makes")],
)
def test_what_this_engine_does_not_take(engine, told):
    """The same for what only the engine knows."""
    settings = Settings.load(wan_preset="tiny", runway_key=SecretStr("key_0"))
    request = one_off.asked("photo.jpg", "", "", 59, None, item_id="", saves=True)
    with pytest.raises(InvalidRequest) as caught:
        one_off.refuse(settings, engine, request)
    assert str(caught.value).startswith(told)
