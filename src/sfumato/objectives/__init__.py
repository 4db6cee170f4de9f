"""What training minimises. An objective takes what learns (a denoiser, or an autoencoder and its adversary), data and
conditions, and gives a `Loss`.
"""

from sfumato.objectives.autoencoding import Autoencoding
from sfumato.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from sfumato.objectives.continuous_consistency import ContinuousConsistency
from sfumato.objectives.denoising import Denoising, Loss, Objective
from sfumato.objectives.improved_consistency import EasyConsistencyTraining, ImprovedConsistencyTraining

__all__ = [
    "Autoencoding",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ContinuousConsistency",
    "Denoising",
    "EasyConsistencyTraining",
    "ImprovedConsistencyTraining",
    "Loss",
    "Objective",
]
