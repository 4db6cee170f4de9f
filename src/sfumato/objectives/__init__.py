"""What training minimises. An objective takes what learns (a denoiser, or an autoencoder and its adversary), data and
conditions, and gives a `Loss`.
"""

from sfumato.objectives.adversarial import Adversarial
from sfumato.objectives.autoencoding import Autoencoding
from sfumato.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from sfumato.objectives.continuous_consistency import ContinuousConsistency
from sfumato.objectives.denoising import Denoising, Loss, Objective
from sfumato.objectives.distribution import DistributionMatching
from sfumato.objectives.hybrid import Hybrid
from sfumato.objectives.improved_consistency import EasyConsistencyTraining, ImprovedConsistencyTraining

__all__ = [
    "Adversarial",
    "Autoencoding",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ContinuousConsistency",
    "Denoising",
    "DistributionMatching",
    "EasyConsistencyTraining",
    "Hybrid",
    "ImprovedConsistencyTraining",
    "Loss",
    "Objective",
]
