"""The server's own description against what it does: schemathesis makes up requests, good and bad."""

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from scripted_engine import ScriptedEngine

from tenfold.server.app import make_app
from tenfold.server.settings import ServeSettings

schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(ScriptedEngine(), ServeSettings()))


@schema.parametrize()
@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
def test_nothing_fails_the_server(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[not_a_server_error])
