"""What all tests share: Ray's settings and hypothesis's profile."""

import os

from hypothesis import settings

# Ray reads these when it is first imported, which no test module has done yet. Its processes inherit them.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

# Kernels are compiled where a test asks for it: for each rule it takes a second or two.
os.environ["STEPWELL_KERNEL"] = "eager"

# The first example of a test may compile a kernel; the time limit is each test's own, not each example's.
settings.register_profile("stepwell", deadline=None)
settings.load_profile("stepwell")
