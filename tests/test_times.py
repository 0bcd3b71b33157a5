"""Laws of t and (t, s), and the streams they are drawn from.

specs/meanflow.md 3.3 and test 9, specs/conventions.md.
"""

import pytest
import torch

from distillbench import times
from distillbench.seeds import Rng, derive

N = 200_000


# 3.3: JMF's count is deterministic
@pytest.mark.parametrize(("diagonal", "expected"), [(0.75, 32), (0.25, 96), (0.0, 128), (0.5, 64)])
def test_the_diagonal_rows_are_a_fixed_count_and_come_last(diagonal, expected):
    for seed in range(3):
        t, s = times.sorted_pair(Rng(seed, "t, s"), 128, -0.4, 1.0, diagonal)
        m = times.off_diagonal(128, diagonal)
        assert m == expected
        assert (t[:m] > s[:m]).all() and torch.equal(t[m:], s[m:])


def test_pairs_are_sorted_and_inside_the_unit_interval():
    t, s = times.sorted_pair(Rng(0, "t, s"), N, -2.0, 2.0, 0.25)
    assert (t >= s).all() and s.min() > 0 and t.max() < 1


# 3.3 'consequence', test 9
@pytest.mark.parametrize(
    ("mean", "std", "largest", "single"), [(-0.4, 1.0, 0.535, 0.418), (-2.0, 2.0, 0.353, 0.225)]
)
def test_diagonal_rows_keep_the_larger_of_two_draws(mean, std, largest, single):
    t, _ = times.sorted_pair(Rng(0, "t, s"), N, mean, std, 0.5)
    m = times.off_diagonal(N, 0.5)
    assert abs(t[m:].mean() - largest) < 3e-3
    assert abs(times.logit_normal(Rng(0, "t"), N, mean, std).mean() - single) < 3e-3
    assert largest - single > 0.1  # planted: a single draw on the diagonal would be this far off


def test_mean_gap():  # test 9: .233 for LN(-.4, 1), .258 for LN(-2, 2)
    for mean, std, gap in ((-0.4, 1.0, 0.233), (-2.0, 2.0, 0.258)):
        t, s = times.sorted_pair(Rng(0, "t, s"), N, mean, std, 0.25)
        m = times.off_diagonal(N, 0.25)
        assert abs((t - s)[:m].mean() - gap) < 2e-3
        # Planted: the mean over all rows, diagonal included
        assert abs((t - s).mean() - gap) > 2e-2


def test_logit_normal_quantiles():  # conventions.md 'Noise-level distributions'
    for mean, std, median, below, share in (
        (-1.2, 1.2, 0.231, 0.5, 0.84),
        (1.0, 1.0, 0.731, 0.5, 0.16),
    ):
        t = times.logit_normal(Rng(0, "t"), N, mean, std)
        assert abs(t.median() - median) < 4e-3 and abs((t < below).float().mean() - share) < 5e-3


# dmd.md: t ~ U(0.02, 0.98) for the generator, the full range for the critic
def test_uniform_range():
    t = times.uniform(Rng(0, "t"), N, 0.02, 0.98)
    assert 0.02 <= t.min() < 0.0205 and 0.9795 < t.max() <= 0.98 and abs(t.mean() - 0.5) < 3e-3
    t = times.uniform(Rng(0, "t"), N)
    assert 0 <= t.min() < 5e-4 and 0.9995 < t.max() < 1


def share(condition: torch.Tensor) -> float:
    return float(condition.float().mean())


# specs/tvm.md test 8; its third digits differ from these,
# of 4 million draws of the official formula
def test_gap_law():
    t, s = times.gap_pair(Rng(0, "t, s"), N, -0.8, 1.0, -0.4, 1.0)
    gap = t - s
    assert s.min() >= 0 and t.max() <= 1 and (t > s).all() and t.dtype == s.dtype == torch.float32
    for value, mean, quantiles in (
        (t, 0.6866, (0.324, 0.709, 0.970)),
        (s, 0.3468, (0.096, 0.326, 0.668)),
    ):
        assert abs(value.mean() - mean) < 2e-3
        found = torch.quantile(value, torch.tensor([0.05, 0.5, 0.95]))
        assert (found - torch.tensor(quantiles)).abs().max() < 4e-3
    assert (
        abs(gap.mean() - 0.34) < 4e-3
        and abs(share(t > 0.9) - 0.171) < 4e-3
        and abs(share(gap > 0.9) - 0.0014) < 4e-4
    )
    # the gap is the first draw, s is truncated by it
    g = times.logit_normal(Rng(0, "t, s"), N, -0.8, 1.0)
    assert (gap - g).abs().max() < 1e-6 and (s <= 1 - g).all()
    free = times.logit_normal(Rng(0, "s"), N, -0.4, 1.0)
    # Planted: s without the truncation
    assert abs(free.mean() - 0.347) > 0.05 and share(free > 1 - g) > 0.1


def test_truncated_and_clamped_laws():  # specs/tvm.md, Table 3
    first = times.logit_normal(Rng(0, "t, s"), N, 1.0, 1.0)
    # P(N(1, 1) < N(-.4, 1)) = Phi(-1.4 / sqrt 2)
    for law, equal in (
        (times.truncated_pair, 0.0),
        (times.clamped_pair, 0.161),
    ):
        t, s = law(Rng(0, "t, s"), N, 1.0, 1.0, -0.4, 1.0)
        assert (
            torch.equal(t, first)
            and (s <= t).all()
            and s.min() >= 0
            and abs(share(s == t) - equal) < 4e-3
        )
    t, s = times.truncated_pair(Rng(0, "t, s"), N, 1.0, 1.0, -0.4, 1.0)
    rows = (t - 0.6).abs() < 0.02
    u = times.logit_normal(Rng(0, "u"), N, -0.4, 1.0)
    # what the inverse CDF must draw, and what it must not
    rejected, clamped = (
        u[u <= 0.6],
        u.clamp(max=0.6),
    )
    assert (
        abs(s[rows].mean() - rejected.mean()) < 6e-3 and abs(s[rows].mean() - clamped.mean()) > 2e-2
    )


@pytest.mark.parametrize("high", [0.0, 1e-6, 1.0])
def test_truncation_at_the_ends(high):
    s = times.truncated_logit_normal(Rng(0, "s"), 1000, -0.4, 1.0, torch.full((1000,), high))
    assert s.isfinite().all() and s.min() >= 0 and s.max() <= high


def draws(rng: Rng, n: int) -> list[torch.Tensor]:
    return [
        rng.normal(n, 2, 3),
        rng.uniform(n),
        rng.integers(n, 100),
        *times.sorted_pair(rng, n, -0.4, 1.0, 0.25),
    ]


def test_two_ranks_interleave_to_the_batch_of_one():  # design.md: drawn per global sample index
    whole = draws(Rng(0, "x"), 16)
    halves = [draws(Rng(0, "x", rank=r, world=2), 8) for r in (0, 1)]
    for i, (one, *two) in enumerate(zip(whole, *halves)):
        together = torch.stack(two, 1).flatten(0, 1)
        # What is drawn is equal; a law's exponential may round otherwise in a vector of
        # another length (by processor).
        torch.testing.assert_close(together, one, rtol=0 if i < 3 else 1e-6, atol=0)
    # Planted: blocks instead of strides
    assert not torch.equal(torch.cat([halves[0][0], halves[1][0]]), whole[0])
    assert not torch.equal(halves[0][0], halves[1][0])  # planted: every rank draws the same rows


def test_streams_differ_by_seed_name_and_step():  # design.md: never a sum of integers
    uses = [
        (seed, *names)
        for seed in (0, 1, 2)
        for names in (("step", 0, "t"), ("step", 1, "t"), ("step", 1, "e"), ("noise",))
    ]
    assert len({derive(*use) for use in uses}) == len(uses)
    # seed + step would make these equal
    assert derive(0, "step", 1, "t") != derive(1, "step", 0, "t")
    assert derive(1, 10) != derive(11, 0) and derive(1, "10") != derive(11, "0")
    assert not torch.equal(Rng(0, "step", 1, "t").normal(8), Rng(1, "step", 0, "t").normal(8))
    assert torch.equal(Rng(0, "step", 1, "t").normal(8), Rng(0, "step", 1, "t").normal(8))
