"""Networks small enough for tests, weights that do something, and conditions that fit them."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.flux import Flux, FluxConfig
from sfumato.nets.mmdit import MMDiT, MMDiTConfig
from sfumato.nets.unet import UNet, UNetConfig

SIZE = (8, 12)
DIT = DiTConfig(size=SIZE, patch=4, dim=16, depth=2, heads=2)
UNET = UNetConfig(size=SIZE, channels=(8, 16), blocks=1, attention=(0, 1), head=8)
MMDIT = MMDiTConfig(size=SIZE, patch=4, dim=16, depth=3, heads=2, in_channels=3, dual=(0,), table=6)
FLUX = FluxConfig(size=SIZE, patch=4, dim=16, double=2, single=2, heads=2, in_channels=3)
AnyConfig = DiTConfig | UNetConfig | MMDiTConfig | FluxConfig
AnyNet = DiT | UNet | MMDiT | Flux
CONFIGS: dict[str, AnyConfig] = {"dit": DIT, "unet": UNET, "mmdit": MMDIT, "flux": FLUX}
NETS = {DiTConfig: DiT, UNetConfig: UNet, MMDiTConfig: MMDiT, FluxConfig: Flux}
Net = TypeVar("Net", bound=nn.Module)


def made(kind: str, **changes: object) -> AnyNet:
    """A float64 network in evaluation mode, every branch of it open; its weights follow from its shape alone."""
    config = replace(CONFIGS[kind], **changes)  # type: ignore[arg-type]
    net: AnyNet = NETS[type(config)](config)  # type: ignore[arg-type, assignment]
    return stirred(net.double()).eval()


def stirred(net: Net, by: float = 0.2, seed: int = 0) -> Net:
    """Noise on every weight: gates and last layers start at zero, and hide what stands before them."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by * torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.dtype))
    return net


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures and times."""
    return normal(n, 3, *size, seed=seed), torch.linspace(50, 900, n, dtype=torch.float64)


def conditions(config: AnyConfig, n: int = 2, length: int = 5, seed: int = 1) -> dict[str, Tensor]:
    """A condition of every kind that a network takes, without a mask."""
    said: dict[str, Tensor] = {}
    if config.classes:
        said["label"] = torch.arange(n) % config.classes
    if config.context_dim:
        said["context"] = normal(n, length, config.context_dim, seed=seed)
    if config.pooled_dim:
        said["pooled"] = normal(n, config.pooled_dim, seed=seed + 1)
    if getattr(config, "guidance", False):
        said["guidance"] = torch.linspace(1.5, 4, n, dtype=torch.float64)
    return said
