"""OpenAI's Realtime calls: what only this API promises. The rest is in test_signaling.py."""

import calls


def test_the_paths_that_its_clients_know() -> None:
    found = {(route.method, route.path) for route in calls.routes(None)}  # type: ignore[arg-type]
    assert ("POST", "/v1/realtime/calls") in found
    assert ("POST", "/v1/realtime/calls/{id}/hangup") in found
