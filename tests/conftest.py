"""Settings of all tests: one thread, the same examples on every CI run, nothing left on disk."""
import os

import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)
common = dict(deadline=None, database=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow],
              phases=(Phase.explicit, Phase.generate, Phase.shrink))
settings.register_profile("dev", **common)
settings.register_profile("ci", derandomize=True, **common)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
