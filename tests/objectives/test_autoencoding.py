"""The autoencoder's objective: its terms, the two gradients of its one value, and the adversary's weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from sfumato.errors import ConfigError
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from sfumato.nets.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from sfumato.objectives.autoencoding import Autoencoding, Opponents, adaptive_weight, hinge
from sfumato.objectives.distances import Laplacian

SHAPE = AutoencoderConfig(latent=3, channels=(8, 8), blocks=1, groups=4, attention=False)


@pytest.fixture
def coder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(SHAPE)


@pytest.fixture
def adversary() -> PatchDiscriminator:
    torch.manual_seed(1)
    return PatchDiscriminator(PatchDiscriminatorConfig(channels=4, layers=1))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=Generator().manual_seed(2)) * 2 - 1


def rng() -> Generator:
    return Generator().manual_seed(3)


@pytest.mark.parametrize("how", ["l1", "l2"])
def test_the_value_is_the_sum_of_its_terms(coder: Autoencoder, images: Tensor, how: str) -> None:
    objective = Autoencoding(reconstruction=how, distance_weight=0.7, kl=0.01)  # type: ignore[arg-type]
    loss = objective(Opponents(coder, None, 5), images, rng=rng())
    posterior = coder.encode(images)
    drawn = coder.decode(posterior.sample(torch.randn(2, 3, 8, 8, generator=rng())))
    pixels = (drawn - images).abs().mean() if how == "l1" else (drawn - images).square().mean()
    kl = posterior.kl().sum() / images.numel()  # in nats a number of the picture: the published sums, divided alike
    expected = pixels + 0.7 * Laplacian()(drawn, images).mean() + 0.01 * kl
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.each, (drawn - images).square().flatten(1).mean(1))
    assert loss.t is None and not loss.each.requires_grad
    psnr = sum(10 * torch.log10(4 / one) for one in loss.each) / 2
    torch.testing.assert_close(loss.parts["psnr"], psnr.detach())


def test_both_opponents_learn_from_one_value_each_from_its_own_loss(
    coder: Autoencoder, adversary: PatchDiscriminator, images: Tensor
) -> None:
    objective = Autoencoding(kl=0.01, adversarial_weight=0.5)
    loss = objective(Opponents(coder, adversary, 0), images, rng=rng())
    plain = objective(Opponents(coder, None, 0), images, rng=rng())
    assert loss.value.detach() == plain.value.detach()  # the number stays comparable
    loss.value.backward()
    found = {name: p.grad.clone() for name, p in [*coder.named_parameters(), *adversary.named_parameters()]}
    drawn = coder.decode(coder.encode(images).sample(torch.randn(2, 3, 8, 8, generator=rng())))
    weight = loss.parts["adversarial_weight"]
    coder.zero_grad()
    (objective(Opponents(coder, None, 0), images, rng=rng()).value - weight * adversary(drawn).mean()).backward()
    for name, p in coder.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-7)
    adversary.zero_grad()
    real, fake = adversary(images), adversary(drawn.detach())
    (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
    for name, p in adversary.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-7)


def test_the_adversary_begins_at_its_step_and_does_not_judge(
    coder: Autoencoder, adversary: PatchDiscriminator, images: Tensor
) -> None:
    objective = Autoencoding(start=10)
    for step, there in ((9, False), (10, True), (None, False)):
        loss = objective(Opponents(coder, adversary, step), images, rng=rng())
        assert ("discriminator" in loss.parts) is there


def test_at_the_last_layer_both_gradients_are_equally_large(coder: Autoencoder, images: Tensor) -> None:
    drawn = coder(images)
    said, fooled = (drawn - images).abs().mean(), 3 * drawn.square().mean()
    weight = adaptive_weight(said, fooled, coder.last)
    (one,) = torch.autograd.grad(said, coder.last, retain_graph=True)
    (other,) = torch.autograd.grad(weight * fooled, coder.last)
    assert float(other.norm() / one.norm()) == pytest.approx(1, rel=1e-3)
    coder.last.requires_grad_(False)
    assert float(adaptive_weight(said, fooled, coder.last)) == 0


def test_the_weight_is_bounded(coder: Autoencoder, images: Tensor) -> None:
    drawn = coder(images)
    assert float(adaptive_weight(drawn.mean() * 1e6, drawn.mean() * 1e-3, coder.last)) == 1e4


def test_hinge() -> None:
    assert float(hinge(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0]))) == pytest.approx((0.25 + 0.5) / 2)


def test_a_vanishing_divergence_is_that_of_the_standard_normal_distribution(images: Tensor) -> None:
    class Normal:
        last = torch.zeros(1)

        def encode(self, x: Tensor) -> Posterior:
            return Posterior(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))

        def decode(self, z: Tensor) -> Tensor:
            return images

    loss = Autoencoding(kl=1.0)(Opponents(Normal(), None, 0), images, rng=rng())
    assert float(loss.value) == 0 and float(loss.parts["kl"]) == 0


def test_it_does_not_depend_on_the_device_where_noise_comes_from(coder: Autoencoder, images: Tensor) -> None:
    first, again = (Autoencoding()(Opponents(coder, None, 0), images, rng=rng()).value for _ in range(2))
    other = Autoencoding()(Opponents(coder, None, 0), images, rng=Generator().manual_seed(4)).value
    assert first == again != other


@pytest.mark.parametrize("name", ["distance_weight", "kl", "start", "adversarial_weight"])
def test_negative_numbers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Autoencoding(**{name: -1})  # type: ignore[arg-type]
