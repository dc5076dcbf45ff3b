"""What the tests of the data stage share."""

from __future__ import annotations

from hypothesis import settings

# Machine code is made at the first call; the same examples each time keep CI quiet.
settings.register_profile("data", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("data")
