"""What training minimises. An objective takes a denoiser, data and conditions, and gives a `Loss`."""

from sfumato.objectives.denoising import Denoising, Loss, Objective

__all__ = ["Denoising", "Loss", "Objective"]
