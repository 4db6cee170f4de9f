"""Tuning a sampler to a model: times by dynamic programming over a few exact trajectories, then times and multistep
weights by gradient, so that n calls end as near as they can to where very many would.
"""

from sfumato.tuning.learn import Tuned, tune
from sfumato.tuning.teacher import Problem, Trajectories, best_times, solved

__all__ = ["Problem", "Trajectories", "Tuned", "best_times", "solved", "tune"]
