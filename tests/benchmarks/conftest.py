"""The benchmarks as modules, found as they find one another: beside themselves."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
