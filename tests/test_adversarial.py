"""Heads, losses and penalty of discriminators: specs/add.md (b) and tests 3, 6, 8.

The softplus pair is that of specs/dmd2.md.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillbench import adversarial
from distillbench.adversarial import VIRTUAL_BATCH, LocalBatchNorm, TokenHead, VectorHead, r1
from distillbench.meter import Meter
from distillbench.players import Player, PlayerConfig

PAIRS = {
    "softplus": (
        adversarial.softplus_generator,
        adversarial.softplus_discriminator,
        math.log(2),
        2 * math.log(2),
    ),
    "hinge": (adversarial.hinge_generator, adversarial.hinge_discriminator, 0.0, 2.0),
}


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Losses


# add.md test 3: 2 for each head at D = 0
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", [(6,), (6, 4)])  # [B] and [B, tokens]
def test_losses_of_a_head_that_knows_nothing(name, shape):
    generator, discriminator, g0, d0 = PAIRS[name]
    zero = torch.zeros(shape, dtype=torch.float64)
    assert generator(zero).item() == pytest.approx(g0, abs=1e-15) and discriminator(
        zero, zero
    ).item() == pytest.approx(d0)
    # Planted: half of it, as where the two terms are averaged
    assert abs(discriminator(zero, zero).item() - d0 / 2) > 0.5


@pytest.mark.parametrize("name", PAIRS)
def test_descent_goes_where_each_player_wants(name):
    """The generator raises D(fake); the discriminator raises D(real) and lowers D(fake).

    The hinge does so up to its margin.
    """
    generator, discriminator, *_ = PAIRS[name]
    real, fake = (0.3 * double(8, seed=s) for s in (1, 2))
    real.requires_grad_(), fake.requires_grad_()
    (g_fake,) = torch.autograd.grad(generator(fake), fake)
    d_real, d_fake = torch.autograd.grad(discriminator(real, fake), (real, fake))
    assert g_fake.max() < 0 and d_real.max() < 0 and d_fake.min() > 0
    # Planted: the arguments exchanged
    d_real, d_fake = torch.autograd.grad(discriminator(fake, real), (real, fake))
    assert d_real.min() > 0 and d_fake.max() < 0


def test_gradients_against_closed_forms():
    real, fake = 2 * double(50, seed=1), 2 * double(50, seed=2)
    real.requires_grad_(), fake.requires_grad_()

    def gradient(loss, *of):
        return torch.autograd.grad(loss, of)

    torch.testing.assert_close(
        gradient(adversarial.softplus_generator(fake), fake)[0], -torch.sigmoid(-fake) / 50
    )
    d_real, d_fake = gradient(adversarial.softplus_discriminator(real, fake), real, fake)
    torch.testing.assert_close(
        (d_real, d_fake), (-torch.sigmoid(-real) / 50, torch.sigmoid(fake) / 50)
    )
    torch.testing.assert_close(
        gradient(adversarial.hinge_generator(fake), fake)[0], torch.full_like(fake, -1 / 50)
    )
    d_real, d_fake = gradient(adversarial.hinge_discriminator(real, fake), real, fake)
    torch.testing.assert_close(
        (d_real, d_fake), (-(real < 1).double() / 50, (fake > -1).double() / 50)
    )
    assert (real > 1).any() and (fake < -1).any()  # both sides of the margins are there
    # Planted: -log(1 - sigmoid D) taken with the other sign
    saturating = gradient(-F.softplus(fake).mean(), fake)[0]
    assert not torch.allclose(
        saturating, gradient(adversarial.softplus_generator(fake), fake)[0], rtol=0.1
    )


def test_the_hinge_is_least_beyond_its_margins():  # add.md test 3: D(real) >= 1, D(fake) <= -1
    one = torch.ones(4)
    assert (
        adversarial.hinge_discriminator(one, -one) == 0
        and adversarial.hinge_discriminator(3 * one, -2 * one) == 0
    )
    assert (
        adversarial.hinge_discriminator(0.9 * one, -one) > 0
        and adversarial.hinge_discriminator(one, -0.9 * one) > 0
    )
    assert adversarial.hinge_discriminator(-one, one) == 4


@pytest.mark.parametrize("width", [0.2, 0.7])
def test_at_the_best_discriminator_the_student_descends_half_a_kl(width):
    """Samples a z, data N(0, width^2), D = log p - log q: sigmoid(-D) is 1/2 to first order."""
    z = double(200_000, seed=3)
    for a in (0.99 * width, 1.01 * width):
        scale = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        d = math.log(a / width) + 0.5 * (scale * z).square() * (1 / a**2 - 1 / width**2)
        slope, planted = (
            torch.autograd.grad(adversarial.softplus_generator(x), scale, retain_graph=True)[
                0
            ].item()
            for x in (d, -d)
        )
        half_kl = 0.5 * (a / width**2 - 1 / a)  # d/da KL(N(0, a^2) | N(0, width^2)) / 2
        assert slope == pytest.approx(half_kl, rel=0.03) and planted * half_kl < 0


# R1


def test_r1_against_closed_forms():
    weight, x = double(5, seed=1), double(7, 5, seed=2).requires_grad_()
    # a linear head: |w|^2, wherever
    torch.testing.assert_close(r1(x @ weight, x), weight.square().sum())
    torch.testing.assert_close(
        r1(0.5 * (x.square() @ weight.square()), x), (x * weight.square()).square().sum(1).mean()
    )
    tokens = double(7, 3, 5, seed=3).requires_grad_()
    # over all tokens of a row
    torch.testing.assert_close(r1(tokens @ weight, tokens), 3 * weight.square().sum())
    # the norm; of a mean over rows
    for planted in (
        r1(2 * x @ weight, x).sqrt(),
        r1((x @ weight) / len(x), x),
    ):
        assert abs(planted - weight.square().sum()) > 0.1


def test_r1_can_be_descended():
    head, x = nn.Linear(5, 1, dtype=torch.float64), double(7, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(r1(head(x)[:, 0], x), head.weight)
    torch.testing.assert_close(gradient, 2 * head.weight)


def test_r1_is_with_respect_to_the_heads_own_input():  # add.md test 6
    x = double(6, 4).requires_grad_()
    pixels_to_features = nn.Linear(4, 3, dtype=torch.float64)
    features, weight = pixels_to_features(x), double(3, seed=5)
    value = r1(features @ weight, features)
    # no trace of the path below the features
    torch.testing.assert_close(value, weight.square().sum())
    assert abs(r1(features @ weight, x) - value) > 1e-2  # planted: in pixels
    # ignores its input
    torch.testing.assert_close(
        r1((features @ weight) * 0 + 3.0, features), torch.zeros((), dtype=torch.float64)
    )


# Heads


def test_a_vector_head_is_a_hidden_layer_and_two_read_outs():
    head, x, labels = VectorHead(5, 8, 3).double(), double(6, 5), torch.arange(6) % 3
    h = F.silu(x @ head.hidden.weight.T + head.hidden.bias)
    common = h @ head.common.weight[0] + head.common.bias
    torch.testing.assert_close(head(x, labels), common + (h * head.label.weight[labels]).mean(1))
    # Planted: other labels
    assert not torch.allclose(head(x, labels), head(x, (labels + 1) % 3), atol=1e-3)
    # rows do not see each other
    torch.testing.assert_close(head(x[:1], labels[:1]), head(x, labels)[:1])
    plain = VectorHead(5, 8, 0).double()
    assert plain.label is None and plain(x, None).shape == (6,)
    torch.testing.assert_close(plain(x, None), plain(x, labels))


@pytest.mark.parametrize("rows", [16, 6])  # two groups of 8; all rows, as 8 does not divide them
def test_local_batch_norm_is_torchs_over_its_groups(rows):
    norm, x = LocalBatchNorm(4).double(), 3 * double(rows, 4, 5) + 1
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    groups = x.split(VIRTUAL_BATCH if rows % VIRTUAL_BATCH == 0 else rows)
    expected = torch.cat(
        [
            F.batch_norm(g, None, None, norm.weight, norm.bias, training=True, eps=1e-5)
            for g in groups
        ]
    )
    torch.testing.assert_close(norm(x), expected)
    if rows == 16:  # planted: statistics of the whole batch
        assert not torch.allclose(
            norm(x),
            F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=1e-5),
            atol=1e-2,
        )


def token_head(classes: int = 3, width: int = 6, hidden: int = 5, kernel: int = 3) -> TokenHead:
    head = TokenHead(width, hidden, kernel, classes).double()
    for _ in range(50):  # the power iteration settles
        head(double(8, 4, width), None if classes == 0 else torch.arange(8) % classes)
    return head.eval()


def test_real_and_generated_rows_come_in_calls_of_their_own():  # add.md test 8, ladd.md test 8
    head, labels = token_head(), torch.arange(4) % 3
    real, fake = double(4, 4, 6, seed=1), 2 * double(4, 4, 6, seed=2) + 1
    apart = torch.cat([head(real, labels), head(fake, labels)])
    together = head(torch.cat([real, fake]), torch.cat([labels, labels]))
    assert (apart - together).abs().max() > 0.05
    eight = [double(8, 4, 6, seed=s) for s in (1, 2)]  # whole groups do not mix
    labels = torch.arange(8) % 3
    torch.testing.assert_close(
        torch.cat([head(x, labels) for x in eight]),
        head(torch.cat(eight), torch.cat([labels, labels])),
    )


def test_spectral_norms_are_one():
    head = token_head()
    for layer in (head.enter, head.mix, head.leave):
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert largest.item() == pytest.approx(1, abs=1e-3)
        raw = torch.linalg.matrix_norm(layer.parametrizations.weight.original.flatten(1), 2)
        assert abs(raw.item() - 1) > 0.02  # planted: the weight as it is stored


def test_the_power_iteration_is_state_of_the_player():
    def made():
        return Player("d", [TokenHead(6, 5, 3, 0)], PlayerConfig(lr=1e-2), Meter())

    one, other, x = made(), made(), double(8, 4, 6).float()
    one.update(one.networks[0](x, None).mean())
    names = [k for k in one.state_dict() if k.endswith("._u") or k.endswith("._v")]
    assert len(names) == 6
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.networks[0](x, None), other.networks[0](x, None))
    missing = {k: made().state_dict()[k] if k in names else v for k, v in one.state_dict().items()}
    other.load_state_dict(missing)  # planted: vectors of another head
    assert not torch.equal(one.networks[0](x, None), other.networks[0](x, None))


def test_a_token_head_against_its_formula():
    head, x, labels = token_head(), double(8, 4, 6, seed=7), torch.arange(8) % 3

    def conv(layer: nn.Conv1d, h: Tensor) -> Tensor:
        """Circular over the tokens, [B, T, channels]."""
        k = layer.weight.shape[-1]
        return sum(h.roll(k // 2 - j, 1) @ layer.weight[:, :, j].T for j in range(k)) + layer.bias

    def norm(layer, h):
        return F.batch_norm(h.mT, None, None, layer.weight, layer.bias, training=True).mT

    h = F.leaky_relu(norm(head.norm_enter, conv(head.enter, x)), 0.2)
    h = (h + F.leaky_relu(norm(head.norm_mix, conv(head.mix, h)), 0.2)) / math.sqrt(2)
    expected = (conv(head.leave, h) * head.label.weight[labels][:, None]).sum(2) / math.sqrt(
        head.leave.out_channels
    )
    torch.testing.assert_close(head(x, labels), expected)
    assert (head(x, labels) - head(x, (labels + 1) % 3)).abs().max() > 0.05  # planted: other labels


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_shapes_of_token_heads(kernel, tokens):
    x, labels = double(8, tokens, 6).float(), torch.arange(8) % 3
    assert TokenHead(6, 5, kernel, 3)(x, labels).shape == (8, tokens)
    plain = TokenHead(6, 5, kernel, 0)
    assert plain.label is None and plain(x, None).shape == (8, tokens)


def test_tokens_turned_in_a_circle_are_judged_alike():
    head, x, labels = token_head(), double(8, 4, 6), torch.arange(8) % 3
    torch.testing.assert_close(head(x.roll(1, 1), labels), head(x, labels).roll(1, 1))
    swapped = x[:, [1, 0, 2, 3]]
    # Planted: neighbours do matter
    assert (head(swapped, labels) - head(x, labels)[:, [1, 0, 2, 3]]).abs().max() > 1e-3
