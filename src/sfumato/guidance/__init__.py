"""Guidance is data with two pure functions: what to ask of the model at time t, and how to make one x0 of the answers.

Answered directly (`guided`) the branches of all pictures go through the network in one batch; under a server they
join everybody else's rows. Samplers never know. There is one public scale: 1 is off and gives the conditional answer,
bit for bit. Ho & Salimans' weight w, which LCM also uses, is scale - 1 and is converted by `from_weight`.
A configuration names a kind and its numbers; `given` fills in the conditions, `started` what belongs to one run.
"""

from sfumato.guidance.adjust import Rescaled, Thresholded, Within
from sfumato.guidance.classifier import Classifier, LogProb
from sfumato.guidance.classifier_free import APG, CFG, CFGPlusPlus, CFGZero, Weighted
from sfumato.guidance.core import (
    Branch,
    Forward,
    Guidance,
    Unguided,
    Variants,
    all_within,
    combined,
    from_weight,
    given,
    guided,
    log_snr_interval,
    started,
    varied,
)
from sfumato.guidance.distilled import Distilled
from sfumato.guidance.weaker import Autoguidance, PerturbedAttention, SkipLayers, models_of

__all__ = [
    "APG",
    "CFG",
    "Autoguidance",
    "Branch",
    "CFGPlusPlus",
    "CFGZero",
    "Classifier",
    "Distilled",
    "Forward",
    "Guidance",
    "LogProb",
    "PerturbedAttention",
    "Rescaled",
    "SkipLayers",
    "Thresholded",
    "Unguided",
    "Variants",
    "Weighted",
    "Within",
    "all_within",
    "combined",
    "from_weight",
    "given",
    "guided",
    "log_snr_interval",
    "models_of",
    "started",
    "varied",
]
