"""The description holds: schemathesis sends what it allows and what it forbids, and looks at every answer.

It is imported where it is used: that takes a second of a core, in each of pytest's workers if they did it to collect.
"""

from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from pydantic import BaseModel

from inference.server import worker_api
from inference.server.api import create_app
from inference.server.client_api import GroupView, TaskView
from inference.server.events_api import EventsTokenRequest
from tests.server.harness import KEY, config, jpeg

PHOTOS = tuple(jpeg(width, 16) for width in (16, 17))

# What a description cannot say: that a form holds texts only, so that `true` is a fine prompt. (As a command,
# schemathesis knows.)
# Nor which tokens are signed: storage answers every other with 400, as Supabase does.
# Nor that a number may be written as a string, as the real server takes it, and a body have any media type.
# Nor which objects there are: where one is missing, presign answers 500, as the real server does.
ACCEPTED = ["2xx", "3xx", "401", "403", "404", "409", "5xx"]
CONFIG = {
    "headers": {"Authorization": f"Bearer {KEY}"},
    "operations": [
        {
            "include-path-regex": "^/storage/",
            "checks": {"positive_data_acceptance": {"expected-statuses": [*ACCEPTED, "400"]}},
        },
        {
            # Nor which characters people can read, of which a project's id is made.
            "include-path": "/api/events-token",
            "checks": {"positive_data_acceptance": {"expected-statuses": [*ACCEPTED, "400"]}},
        },
        {
            "include-path-regex": "^/api/worker/",
            "checks": {"negative_data_rejection": {"enabled": False}},
        },
        {
            # Nor which characters can be read.
            "include-path": "/api/events-token",
            "checks": {"positive_data_acceptance": {"expected-statuses": [*ACCEPTED, "400"]}},
        },
        {
            "include-path": "/api/worker/presign",
            "checks": {
                "negative_data_rejection": {"enabled": False},
                "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "500"]},
            },
        },
        {
            "include-path": "/api/tasks",
            "include-method": "POST",
            # Of an operation with a header of its own it takes our key for one that it made up.
            "checks": {"negative_data_rejection": {"enabled": False}, "ignored_auth": {"enabled": False}},
        },
    ],
}


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    """What the application says of itself, and what it cannot say: which bytes are a photo, or a video."""
    import schemathesis
    from schemathesis.config import SchemathesisConfig

    for media_type in ("image/jpeg", "image/png", "image/webp", "image/heic"):
        schemathesis.openapi.media_type(media_type, st.sampled_from(PHOTOS))
    schemathesis.openapi.media_type("video/mp4", st.binary(max_size=100))
    app = create_app(config(tmp_path_factory.mktemp("server")))
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=SchemathesisConfig.from_dict(CONFIG))


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_description_holds(description, mode):
    """No crash, no answer that is not described, nothing forbidden accepted, nothing allowed refused."""
    from schemathesis import GenerationMode

    operations = [found.ok() for found in description.get_all_operations()]
    assert len(operations) == 19
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
        @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def holds(case):
            case.call_and_validate()

        with suppress(Unsatisfiable):  # an operation without parameters has nothing to get wrong
            holds()


def test_every_operation_says_what_it_does(tmp_path):
    """A title that is a sentence, a description, a known group, and an example of each body and each refusal."""
    described = create_app(config(tmp_path)).openapi()
    schemas, known = described["components"]["schemas"], {tag["name"] for tag in described["tags"]}
    titles = []
    for path, operations in described["paths"].items():
        for operation in operations.values():
            titles.append(operation["summary"])
            assert len(operation["summary"].split()) > 1, path
            assert len(operation["description"]) > 20, path
            assert set(operation["tags"]) <= known, path
            for status, answer in operation["responses"].items():
                if status in {"400", "401", "404", "409", "413"} and not path.startswith("/storage/"):
                    assert answer["content"]["application/json"]["example"]["error"], (path, status)
            for media, body in operation.get("requestBody", {}).get("content", {}).items():
                if media == "application/json":
                    options = body["schema"].get("oneOf", [body["schema"]])
                    assert all("example" in schemas[option["$ref"].rpartition("/")[2]] for option in options), path
    assert len(set(titles)) == len(titles)


def test_examples_are_what_the_models_take(tmp_path):
    """Each is valid in its own model. FastAPI leaves out of them what is null."""
    schemas = create_app(config(tmp_path)).openapi()["components"]["schemas"]
    models = [each for each in vars(worker_api).values() if isinstance(each, type) and issubclass(each, BaseModel)]
    models += [TaskView, GroupView, EventsTokenRequest]
    shown = [model for model in models if "example" in schemas.get(model.__name__, {})]
    assert len(shown) == 11
    for model in shown:
        shown_fields = schemas[model.__name__]["example"]
        assert set(shown_fields) <= set(model.model_fields)
        model.model_validate(dict.fromkeys(model.model_fields) | shown_fields)
