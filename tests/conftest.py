"""What all tests share: few threads (machines that run them have two cores), no draws that differ between runs."""

import os

import torch
from hypothesis import HealthCheck, settings

# One for each of pytest-xdist's workers: more threads than cores spend their time waiting for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
settings.register_profile(
    "kvferry", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kvferry")
