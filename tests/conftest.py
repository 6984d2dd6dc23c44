"""What holds for all tests: how long an example of Hypothesis takes says nothing of the code."""

import hypothesis

# A busy machine has pauses of its own, and a deadline would take them for a defect.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")
