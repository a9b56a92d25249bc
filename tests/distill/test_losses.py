"""The equations of the method, each against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill import losses
from distill.distillation import NFSD_SCALE, guided, nfsd_target, rediffuse, teacher_target
from distill.schedule import Schedule, scheduler_config
from distill.shapes import draw, parse_caption
from distill.stages.student import pull
from distill.stages.tiny_autoencoder import object_loss

SCHEDULE = Schedule.from_config(scheduler_config(0.00085, 0.012))
SHAPE = (3, 4, 8, 8)
T = torch.tensor([100, 500, 900])


def random(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predict(noisy: Tensor, t: Tensor, which: str) -> Tensor:
    """A teacher by formula, different for every caption."""
    factor = {"given": 0.7, "empty": 0.3, "negative": -0.4}[which]
    return torch.tanh(noisy * factor) + t.view(-1, 1, 1, 1) / 2000


def test_hinge_generator_is_minus_the_sum_of_means() -> None:
    heads = [torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[-4.0]]])]
    assert losses.hinge_generator(heads) == -(2.0 - 4.0)


def test_hinge_discriminator_wants_real_above_one_and_fake_below_minus_one() -> None:
    good, bad = [torch.tensor([[[1.5]]])], [torch.tensor([[[-1.5]]])]
    assert losses.hinge_discriminator(good, bad) == 0
    assert losses.hinge_discriminator(bad, good) == 2.5 + 2.5
    assert losses.hinge_discriminator([torch.tensor([[[0.25]]])], bad) == 0.75


def test_hinge_gradients_have_opposite_signs() -> None:
    logits = torch.zeros(2, 1, 1, requires_grad=True)
    (up,) = torch.autograd.grad(losses.hinge_generator([logits]), logits)
    (down,) = torch.autograd.grad(losses.hinge_discriminator([logits + 9], [logits]), logits)
    assert (up < 0).all()  # the generator raises the verdict on its pictures
    assert (down > 0).all()  # the discriminator lowers it


def test_r1_is_the_squared_gradient_on_the_heads_inputs() -> None:
    head = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 1, 1)).double()
    feature = random(0).requires_grad_()
    penalty = losses.r1_penalty([head(feature)[:, 0]], [feature])
    by_hand = 0.0
    for index in range(3):
        one = feature.detach()[index : index + 1].requires_grad_()
        (gradient,) = torch.autograd.grad(head(one).sum(), one)
        by_hand += float(gradient.square().sum()) / 3
    assert float(penalty.detach()) == pytest.approx(by_hand, rel=1e-9)
    penalty.backward()
    assert all(p.grad is not None for p in list(head.parameters())[:1])
    # Against finite differences of the penalty in one weight.
    weight = head[0].weight
    gradient = float(weight.grad[0, 0, 0, 0])
    values = []
    for change in (1e-4, -2e-4):
        with torch.no_grad():
            weight[0, 0, 0, 0] += change
        values.append(float(losses.r1_penalty([head(feature)[:, 0]], [feature]).detach()))
    assert gradient == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-3)


def test_r1_of_two_heads_is_their_sum() -> None:
    features = [random(i).requires_grad_() for i in range(2)]
    logits = [2 * features[0].sum(1), 3 * features[1].sum(1)]
    # d/dx of 2x is 2 everywhere: 4 x elements.
    elements = 4 * 8 * 8
    assert float(losses.r1_penalty(logits, features)) == pytest.approx((4 + 9) * elements)


def test_rediffusion_and_that_it_is_no_function_of_the_student() -> None:
    sample, noise = random(1).requires_grad_(), random(2)
    noisy = rediffuse(sample, noise, SCHEDULE, T)
    alpha, sigma = SCHEDULE.at(T)
    assert torch.allclose(noisy, alpha * sample + sigma * noise)
    assert not noisy.requires_grad


def test_sds_weighting_has_the_score_distillation_gradient_in_latent_space() -> None:
    sample, noise = random(3).requires_grad_(), random(4)
    noisy = rediffuse(sample, noise, SCHEDULE, T)
    target = teacher_target(predict, noisy, SCHEDULE, T, steps=1, guidance=3.0)
    c = losses.weight("sds", SCHEDULE, T)
    loss = losses.distillation_loss(sample, target, c, "sum") * len(sample)
    (gradient,) = torch.autograd.grad(loss, sample)
    guess = SCHEDULE.noise(guided(predict, noisy, T, 3.0), noisy, T)
    w = SCHEDULE.sigma[T].view(-1, 1, 1, 1) ** 2
    assert torch.allclose(gradient, w * (guess - noise), atol=1e-5)


def test_nfsd_weighting_has_the_noise_free_gradient_in_latent_space() -> None:
    sample, noise = random(3).requires_grad_(), random(4)
    noisy = rediffuse(sample, noise, SCHEDULE, T)
    target = nfsd_target(predict, sample, noisy, SCHEDULE, T)
    c = losses.weight("nfsd", SCHEDULE, T)
    loss = losses.distillation_loss(sample, target, c, "sum") * len(sample)
    (gradient,) = torch.autograd.grad(loss, sample)
    given, empty, negative = (
        SCHEDULE.noise(predict(noisy, T, which), noisy, T)
        for which in ("given", "empty", "negative")
    )
    residual = empty - negative
    residual[0] = empty[0]  # t = 100 is below 200
    w = SCHEDULE.sigma[T].view(-1, 1, 1, 1) ** 2
    assert torch.allclose(gradient, w * (residual + NFSD_SCALE * (given - empty)), atol=1e-5)


def test_exponential_weighting_is_alpha() -> None:
    assert torch.equal(losses.weight("exp", SCHEDULE, T), SCHEDULE.alpha[T])


def test_scale_of_the_distance() -> None:
    student, target = torch.full((2, 3, 4, 4), 2.0), torch.zeros(2, 3, 4, 4)
    c = torch.tensor([1.0, 0.5])
    assert losses.distillation_loss(student, target, c, "mean") == 4 * 0.75
    assert losses.distillation_loss(student, target, c, "sum") == 4 * 48 * 0.75


def test_no_gradient_reaches_the_teacher_or_its_target() -> None:
    teacher = nn.Conv2d(4, 4, 1).double()

    def network(noisy: Tensor, t: Tensor, which: str) -> Tensor:
        return teacher(noisy)

    sample = random(5).requires_grad_()
    noisy = rediffuse(sample, random(6), SCHEDULE, T)
    for target in (
        teacher_target(network, noisy, SCHEDULE, T, steps=4, guidance=2.0),
        nfsd_target(network, sample, noisy, SCHEDULE, T),
    ):
        loss = losses.distillation_loss(sample, target, SCHEDULE.alpha[T], "mean")
        (gradient,) = torch.autograd.grad(loss, sample)
        # As if the target were a constant.
        constant = 2 * SCHEDULE.alpha[T].view(-1, 1, 1, 1) * (sample - target) / sample.numel()
        assert torch.allclose(gradient, constant)
        assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_perfect_teacher_returns_the_picture_whatever_the_steps() -> None:
    clean = random(7)

    def knows(noisy: Tensor, t: Tensor, which: str) -> Tensor:
        alpha, sigma = SCHEDULE.at(t)
        return SCHEDULE.target(clean, (noisy - alpha * clean) / sigma, t)

    noisy = rediffuse(clean, random(8), SCHEDULE, T)
    for steps in (1, 2, 4):
        target = teacher_target(knows, noisy, SCHEDULE, T, steps=steps, guidance=1.0)
        assert torch.allclose(target, clean, atol=1e-5)


def test_more_teacher_steps_evaluate_at_lower_noise() -> None:
    seen: list[list[int]] = []

    def watch(noisy: Tensor, t: Tensor, which: str) -> Tensor:
        seen.append(t.tolist())
        return predict(noisy, t, which)

    teacher_target(watch, random(1), SCHEDULE, T, steps=4, guidance=1.0)
    assert seen == [[100, 500, 900], [75, 375, 675], [50, 250, 450], [25, 125, 225]]


def test_guidance() -> None:
    noisy = random(1)
    given, empty = predict(noisy, T, "given"), predict(noisy, T, "empty")
    assert torch.equal(guided(predict, noisy, T, 1.0), given)
    assert torch.allclose(guided(predict, noisy, T, 3.0), empty + 3 * (given - empty))


def test_the_pull_of_a_loss_is_the_norm_of_its_gradient_at_a_picture() -> None:
    sample = torch.randn(3, 4, 2, 2, requires_grad=True)
    wanted = torch.randn(3, 4, 2, 2)
    loss = (sample - wanted).square().flatten(1).sum(1).mean()
    expected = 2 * (sample - wanted).flatten(1).norm(dim=1).mean()
    assert torch.allclose(pull(loss, sample), expected)
    assert torch.allclose(pull(5 * loss, sample), 5 * expected)
    loss.backward()  # the graph is still there


def picture(caption: str) -> Tensor:
    drawn = torch.from_numpy(draw([parse_caption(caption)], 0))
    return drawn.permute(0, 3, 1, 2).float() / 127.5 - 1


def test_the_object_loss_sees_an_object_s_colour_and_no_background() -> None:
    wanted = picture("a small white star on the left of a black background")
    pink = picture("a small purple star on the left of a black background")
    gone = torch.full_like(wanted, -1.0)
    assert object_loss(wanted, wanted) == 0
    assert object_loss(pink, wanted) > 0.2
    assert object_loss(gone, wanted) > object_loss(pink, wanted)
    # A shift of the background alone costs nothing here; the other losses see it.
    shifted = torch.where(wanted < -0.99, wanted + 0.5, wanted)
    assert object_loss(shifted, wanted) < 0.01
    # A small object's colour counts as much as a large one's.
    large, its_pink = (
        picture(f"a large {colour} star on the left of a black background")
        for colour in ("white", "purple")
    )
    small = float(object_loss(pink, wanted))
    assert float(object_loss(its_pink, large)) == pytest.approx(small, rel=0.05)


def test_the_object_loss_of_a_blank_picture_is_finite() -> None:
    blank = torch.zeros(2, 3, 64, 64, requires_grad=True)
    loss = object_loss(blank, torch.zeros(2, 3, 64, 64))
    loss.backward()
    assert loss == 0
    assert blank.grad is not None
    assert torch.isfinite(blank.grad).all()
