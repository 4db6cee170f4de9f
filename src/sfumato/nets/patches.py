"""Pictures as sequences of patches, and back: what transformers over them share (Dosovitskiy et al. 2021)."""

from typing import Any

from torch import Tensor

from sfumato.errors import ConfigError


def folded(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to (B, H W / patch^2, C patch^2), channels first within a patch."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def unfolded(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `folded`."""
    h, w = grid
    x = tokens.reshape(len(tokens), h, w, -1, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, h * patch, w * patch)


def grid_of(x: Tensor, patch: int) -> tuple[int, int]:
    """Patches down and across a picture (B, C, H, W). ConfigError where they are no whole number."""
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        fix = f"sizes that are multiples of {patch}"
        raise ConfigError("a picture is not a whole number of patches", where="size", seen=f"{height}x{width}", fix=fix)
    return height // patch, width // patch


def check_patches(config: Any, *names: str) -> None:
    """That the numbers of a config by these names are at least 1, and its size a whole number of patches."""
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    where = "model.net"
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is at least 1", where=f"{where}.{name}", seen=str(getattr(config, name)))
    if height % config.patch or width % config.patch:
        raise ConfigError(
            "the size is not a whole number of patches",
            where=f"{where}.patch",
            seen=f"size {height}x{width}, patch {config.patch}",
            fix=f"{where}.patch=2",
        )
