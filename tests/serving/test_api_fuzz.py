from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from .example_site import make_site

OPERATIONS = [
    "GET /health",
    "GET /metrics",
    "GET /api/v1/search",
    "GET /api/v1/failures",
    "GET /api/v1/image",
    "POST /api/v1/image-search",
    "POST /api/v1/caption",
    "GET /thumbnail/{size}",
]
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Loads the OpenAPI schema of an application that stays open; schemathesis would open and close it per request."""
    app = make_site(tmp_path_factory.mktemp("fuzz"), 20)
    with TestClient(app):
        app.router.lifespan_context = _keep_open
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


@asynccontextmanager
async def _keep_open(_app: FastAPI) -> AsyncIterator[None]:
    yield


def test_all_operations_are_fuzzed(api: Any) -> None:
    assert [operation.ok().label for operation in api.get_all_operations()] == OPERATIONS


def test_every_operation_parameter_and_field_is_described(api: Any) -> None:
    schema = api.raw_schema
    for methods in schema["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert all(parameter["description"] for parameter in operation.get("parameters", []))
    models = {name: model for name, model in schema["components"]["schemas"].items() if name.endswith("Response")}
    assert len(models) == 7
    operations = [operation for methods in schema["paths"].values() for operation in methods.values()]
    parameters = [parameter for operation in operations for parameter in operation.get("parameters", [])]
    assert all(each["schema"]["examples"] for each in parameters)
    assert all(model["description"] for model in models.values())


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label in OPERATIONS
        for mode in MODES
        if label not in ("GET /health", "GET /metrics") or mode == MODES[0]
    ],
)
def test_api_conforms_to_its_schema(api: Any, label: str, mode: Any) -> None:
    (operation,) = (known.ok() for known in api.get_all_operations() if known.ok().label == label)

    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        # Valid requests may fail: random bytes are not an image, and a random id is not in the index.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
