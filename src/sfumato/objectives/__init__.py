"""What training minimises. An objective takes what learns (a denoiser, or an autoencoder and its adversary), data and
conditions, and gives a `Loss`.
"""

from sfumato.objectives.adversarial import Adversarial
from sfumato.objectives.autoencoding import Autoencoding
from sfumato.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from sfumato.objectives.denoising import Denoising, Loss, Objective
from sfumato.objectives.distribution import DistributionMatching

__all__ = [
    "Adversarial",
    "Autoencoding",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "Denoising",
    "DistributionMatching",
    "Loss",
    "Objective",
]
