"""What the service manager is told and what it hands over; the real one is in test_systemd."""

import manager


def test_a_notify_socket_that_is_gone_is_no_reason_to_stop(monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    assert not manager.notify("READY=1")
