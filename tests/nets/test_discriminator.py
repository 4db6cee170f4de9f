"""The discriminator of patches: how much it sees, that pictures do not meet, and its published size."""

import pytest
import torch

from sfumato.errors import ConfigError
from sfumato.nets.discriminator import PatchDiscriminator, PatchDiscriminatorConfig


@pytest.mark.parametrize(("layers", "seen"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_the_published_size(layers: int, seen: int) -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(PatchDiscriminatorConfig(channels=2, layers=layers, groups=1)).double()
    for stage in net.stages:
        stage.norm = torch.nn.Identity()  # which looks at the whole picture
    x = torch.rand(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    logits = net(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert x.grad is not None
    rows = x.grad.abs().amax((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == seen


def test_pictures_do_not_meet_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(PatchDiscriminatorConfig(channels=8, layers=2)).double()
    x = torch.rand(3, 3, 32, 48, dtype=torch.float64)
    y = net(x)
    assert y.shape == (3, 1, 6, 10)
    torch.testing.assert_close(y[1:2], net(x[1:2]))
    y.square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in net.parameters())


def test_the_size_of_the_published_one() -> None:
    """2,765,633 weights in pix2pix's own and in Stable Diffusion's, of which 2,688 are gains and biases of norms."""
    with torch.device("meta"):
        net = PatchDiscriminator(PatchDiscriminatorConfig())
    assert sum(p.numel() for p in net.parameters()) == 2_764_737 + 896


@pytest.mark.parametrize("name", ["channels", "layers", "groups"])
def test_impossible_shapes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="at least"):
        PatchDiscriminator(PatchDiscriminatorConfig(**{name: 0}))
