"""SiDA, SiD with a discriminator in the critic, against specs/sid.md, by test number."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distillbench.paths import over
from tests.conftest import captured
from tests.test_sid import (
    FILE,
    SHAPE,
    SIDA,
    N,
    SiD,
    batch,
    images,
    made,
    method,
    settings,
    step,
    still,
)
from tests.toys import weights


def test_the_discriminator_is_the_critics_own_middle(monkeypatch):  # (b.5)
    m, _ = made(**SIDA)
    x, t, labels = torch.randn(5, *SHAPE), torch.rand(5), torch.arange(5) % 3
    v, logits = m.judged(x, t, labels)
    outputs = m.fake(x, t, labels, features=3)
    torch.testing.assert_close(v, m.fake(x, t, labels))
    torch.testing.assert_close(logits, outputs[1].mean(1))
    assert not torch.allclose(logits, outputs[0].mean(1), atol=1e-3) and not torch.allclose(
        logits, outputs[2].mean(1), atol=1e-3
    )
    plain, _ = made()

    def count(m):
        return sum(p.numel() for player in (m.student, m.critic) for p in player.parameters)

    assert count(m) == count(plain)  # no new parameters
    assert not [b for b in m.fake.blocks if b._forward_hooks]  # the hook does not stay


def test_losses_of_the_discriminator_and_of_its_opponent():  # (b.5), test 10
    real, fake = torch.randn(2, 6)

    def bce(logits, target):
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    torch.testing.assert_close(
        method.discriminator_loss(real, fake), 0.5 * (bce(real, 1.0) + bce(fake, 0.0))
    )
    # Planted
    assert abs(method.discriminator_loss(fake, real) - method.discriminator_loss(real, fake)) > 1e-2
    assert method.discriminator_loss(0 * real, 0 * fake).item() == pytest.approx(math.log(2))
    w = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1, 1.0]).reshape(6, 1, 1)
    torch.testing.assert_close(method.adversarial_loss(fake, w), bce(fake, 1.0) * (1 / w).mean())
    far = torch.tensor([-30.0, -9.0, 9.0, 30.0], requires_grad=True)
    loss = method.adversarial_loss(far, torch.ones(4, 1))
    assert loss.item() == pytest.approx(
        (F.softplus(torch.tensor([10.0, 9.0, -9.0, -10.0]))).mean().item(), rel=1e-6
    )
    (gradient,) = torch.autograd.grad(loss, far)
    # descent makes D larger
    assert gradient[0] == 0 and gradient[3] == 0 and (gradient[1:3] < 0).all()
    # Planted: without the clamp
    assert torch.autograd.grad(F.softplus(-far).mean(), far)[0][0] != 0


def test_critic_and_discriminator_move_together_under_the_same_noise(monkeypatch):  # test 10
    m, _ = made(**SIDA, law="edm", discriminator=0.3)
    calls = (
        captured(monkeypatch, method, "critic_loss"),
        captured(monkeypatch, method, "discriminator_loss"),
    )
    asked, compared = [], []
    m.fake.register_forward_hook(
        lambda _m, args, kwargs, _o: asked.append((args, kwargs)), with_kwargs=True
    )

    def update(loss: Tensor) -> None:
        critic, (logits, discriminator) = calls[0][0][1], calls[1][0]

        def gradient(value):
            found = torch.autograd.grad(value, m.critic.parameters, retain_graph=True)
            return torch.cat([g.flatten() for g in found])

        torch.testing.assert_close(gradient(loss), gradient(critic + 0.3 * discriminator))
        for planted in (critic, critic + discriminator):
            assert not torch.allclose(gradient(loss), gradient(planted), rtol=1e-2, atol=1e-6)
        for found, (args, _) in zip(logits, (asked[1], asked[0])):  # real, fake
            compared.append(m.fake(*args, features=3)[1].mean(1))
            torch.testing.assert_close(found, compared[-1])

    m.critic.update = update
    x0, data = images(), batch(x=images())
    m.train_step(data, step())
    (fake, _), (real, options) = asked[:2]
    _, x, e, weight = calls[0][0][0]
    t = over(fake[1], x)
    torch.testing.assert_close(weight, method.edm_weight(fake[1], m.config.data_std))  # of law: edm
    assert not torch.allclose(weight, torch.ones_like(weight), atol=0.1)  # planted: unit weight
    assert (
        torch.equal(real[1], fake[1])
        and torch.equal(real[2], fake[2])
        and options == {"features": 2}
    )
    torch.testing.assert_close(fake[0], (1 - t) * x + t * e)
    torch.testing.assert_close(real[0], (1 - t) * x0[:N] + t * e)  # the same e
    # Planted: images of other labels
    assert not torch.allclose(real[0], (1 - t) * x0[N:] + t * e, atol=0.1)
    assert torch.equal(real[2], data.cond.labels[:N]) and not torch.allclose(*compared, atol=1e-3)


def test_phases_of_sida(monkeypatch):  # test 10, in shares of the run
    m, _ = made(**SIDA)
    assert SIDA["parts"] == 20 == SiD.needs(m.config).cycle
    sid, gan, losses = (
        captured(monkeypatch, method, "projected_loss"),
        captured(monkeypatch, method, "adversarial_loss"),
        [],
    )
    original = m.student.update
    m.student.update = lambda loss: losses.append(loss.item()) or original(loss)
    for index in range(40):
        before = weights(m.net), weights(m.fake)
        m.train_step(batch(x=images()), step(index, 40))
        assert torch.equal(weights(m.net), before[0]) == (index < 2) and not torch.equal(
            weights(m.fake), before[1]
        )
    assert len(losses) == 38 == len(sid)
    for i, loss in enumerate(losses):
        first, second = sid[i][1].item(), m.config.adversarial * gan[i][1].item()
        assert loss == pytest.approx(
            first if i < 2 else 0.5 * first + 0.5 * second, rel=1e-5, abs=1e-7
        )
        assert second > 1e-4  # the two sums differ
        assert gan[i][0][1] is sid[i][0][3]  # one W for both
    fresh, _ = made(**SIDA)
    fresh.train_step(batch(x=images()), step(0, 1))
    # Planted: with a cycle of one step the meter would see no update of the student
    assert fresh.student.updates == 0
    # bounds of the parts are exact for every length that is whole cycles
    for total in (
        20,
        200,
        860,
    ):
        ends = [i for i in range(1, total) if i * 20 // total != (i - 1) * 20 // total]
        assert ends == [total // 20 * k for k in range(1, 20)]


def test_adversarial_gradient_reaches_the_generator_through_the_critics_input(monkeypatch):
    ends = []
    for weight in (1e-3, 10.0):
        m, _ = made(**(SIDA | {"adversarial": weight}))
        still(m.critic)
        m.train_step(batch(x=images()), step(10))
        ends.append(weights(m.net))
    assert not torch.allclose(*ends, atol=1e-4)


def test_only_sida_needs_data():
    for name, variant in FILE.variants.items():
        needs = SiD.needs(SiD.Config.model_validate(settings(**variant.config)))
        assert (
            needs.data == (name == "sida")
            and needs.teacher
            and needs.pairs is None
            and needs.features is None
        )
        assert needs.nfe == (1,) and needs.batch == 2 * N
