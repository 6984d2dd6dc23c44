"""The transceiver's catalogue: every histogram says what it is, and its text is Prometheus'."""

import pytest

import ledger
import metrics
from metrics import Timing


@pytest.mark.parametrize("kind", list(Timing), ids=lambda kind: kind.name)
def test_each_says_what_it_is(kind):
    assert kind.unit in {"seconds", "ratio"}
    assert kind.help.endswith(".") and kind.meaning.endswith(".")
    assert list(kind.steps) == sorted(set(kind.steps))


def test_exposition_is_prometheus_text():
    found = ledger.Histograms(Timing)
    for value in (0.004, 0.005, 0.3):
        found.observe(Timing.PACER, value)
    text = metrics.histograms("earshot_transceiver", found).decode()
    lines = text.splitlines()
    name = "earshot_transceiver_pacer_seconds"
    assert f"# TYPE {name} histogram" in lines
    assert f'{name}_bucket{{le="0.002"}} 0.0' in lines
    assert f'{name}_bucket{{le="0.005"}} 2.0' in lines  # a bound belongs to its step
    assert f'{name}_bucket{{le="+Inf"}} 3.0' in lines
    assert f"{name}_count 3.0" in lines
    assert f"{name}_sum 0.309" in lines
    assert "# TYPE earshot_transceiver_loss_in_ratio histogram" in lines
    assert text.count("# TYPE") == len(Timing)
