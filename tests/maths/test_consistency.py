"""Grids, boundary, teacher's walk and forward transitions of consistency methods."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import LCMScheduler

from fewstep.errors import UserError
from fewstep.maths.consistency import (
    below,
    boundary,
    doubled,
    karras_times,
    lcm_scalings,
    lognormal_shares,
    noised_further,
    ode_step,
    pick,
    walk,
)
from fewstep.maths.paths import EDMPath, FlowPath, VPPath, add_noise

F64 = torch.float64


@pytest.fixture
def table(sd) -> VPPath:
    """Stable Diffusion's table."""
    return VPPath.from_scheduler(sd)


def timesteps(path: VPPath, u) -> list[int]:
    return [round(path.timestep(path.time(level))) for level in u]


class TestGrid:
    def test_the_table_has_lcms_fifty_levels(self, table):
        """999, 979, ..., 19."""
        assert timesteps(table, table.grid(50)) == list(range(999, 0, -20))

    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
    def test_picked_levels_are_those_of_the_stock_scheduler(self, table, sd, steps):
        """LCMScheduler's own choice among 50 levels, e.g. 999, 759, 499, 259."""
        scheduler = LCMScheduler(**sd, original_inference_steps=50)
        scheduler.set_timesteps(steps)
        assert timesteps(table, pick(table.grid(50), steps)) == scheduler.timesteps.tolist()

    def test_the_target_is_twenty_entries_lower_and_never_below_the_first(self, table):
        """max(tau - 20, 0) for each of the fifty levels."""
        u = torch.tensor(table.grid(50), dtype=F64)
        lower = (below(u, table, 50) * 1000).round().long().tolist()
        assert lower == [max(k - 20, 0) for k in range(999, 0, -20)]

    def test_on_flow_paths_the_target_of_the_last_level_is_clean(self):
        u = torch.tensor(FlowPath().grid(4), dtype=F64)
        assert below(u, FlowPath(), 4).tolist() == [0.75, 0.5, 0.25, 0.0]
        assert below(u, FlowPath(), 4, skip=0.5).tolist() == [0.5, 0.25, 0.0, 0.0]


class TestBoundary:
    def test_values_at_the_lowest_level(self):
        """c_skip(19) = 6.925e-6; c_out there is 1 to the same order; (1, 0) at 0."""
        skip, out = lcm_scalings(torch.tensor([0.0, 19.0], dtype=F64))
        assert skip[1].item() == pytest.approx(6.925e-6, rel=1e-3)
        assert (skip[0].item(), out[0].item()) == (1.0, 0.0)
        torch.testing.assert_close(out[1] ** 2 + skip[1], torch.tensor(1.0, dtype=F64), atol=1e-12, rtol=0)

    def test_scalings_are_the_stock_schedulers(self, sd):
        """Equal to LCMScheduler's at every timestep."""
        scheduler = LCMScheduler(**sd)
        k = torch.arange(0, 1000, 37)
        theirs = [scheduler.get_scalings_for_boundary_condition_discrete(int(i)) for i in k]
        skip, out = lcm_scalings(k.double())
        torch.testing.assert_close(skip, torch.tensor([s for s, _ in theirs], dtype=F64), rtol=1e-6, atol=0)
        torch.testing.assert_close(out, torch.tensor([o for _, o in theirs], dtype=F64), rtol=1e-6, atol=0)

    def test_f_is_the_identity_at_the_first_entry_of_a_table(self, table, normal):
        """f(x, k = 0) is the native state itself, whatever the network says."""
        x, t = normal(5, 3), torch.full((5,), table.t_min, dtype=F64)
        torch.testing.assert_close(boundary(table, x, 100 * normal(5, 3), t), table.native(x, t), atol=1e-9, rtol=0)

    def test_on_flow_paths_f_is_the_clean_prediction(self, normal):
        x0 = normal(5, 3)
        assert boundary(FlowPath(), normal(5, 3), x0, torch.rand(5)) is x0


class TestWalk:
    def test_one_ode_step_is_ddim_in_the_table_convention(self, table, normal):
        """alpha' x0 + sigma' eps with eps = (x - alpha x0) / sigma on native states, abar' taken 20 entries lower."""
        k, abar = torch.tensor([999, 499, 39, 19]), torch.tensor(table.alphas_cumprod, dtype=F64)
        x, x0 = normal(4, 3), normal(4, 3)
        alpha, sigma = abar[k].sqrt()[:, None], (1 - abar[k]).sqrt()[:, None]
        lower = (k - 20).clamp(min=0)
        alpha_next, sigma_next = abar[lower].sqrt()[:, None], (1 - abar[lower]).sqrt()[:, None]
        expected = alpha_next * x0 + sigma_next * (x - alpha * x0) / sigma
        u = k.double() / 1000
        got = walk(x / (alpha + sigma), u, below(u, table, 50), table, lambda *_: x0, ode_step, 1)
        torch.testing.assert_close(got * (alpha_next + sigma_next), expected, atol=1e-9, rtol=0)

    def test_substeps_are_equal_parts_of_the_clock_and_converge_to_the_trajectory(self, oracle, normal):
        """First order: the error of h steps against the Gaussian's exact map halves as h doubles."""
        exact, x = oracle.Gaussian(), normal(6, 2)
        u, u_next = torch.full((6,), 0.9, dtype=F64), torch.full((6,), 0.3, dtype=F64)
        seen: list[float] = []

        def x0(y, t):
            seen.append(round(t[0].item(), 6))
            return exact.x0(y, t.double())

        errors = [
            (walk(x, u, u_next, FlowPath(), x0, ode_step, h) - exact.transport(x, 0.9, 0.3)).abs().max().item()
            for h in (3, 24, 48)
        ]
        assert seen[:3] == [0.9, 0.7, 0.5]
        assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


class TestKarrasTimes:
    def test_points_are_even_in_the_seventh_root(self):
        """sigma_i^(1/7) is linear from 80 to .002 where no level was put in; the top is noise, the end is clean."""
        t, sigma = karras_times(FlowPath(), 18, [1.0], 0.002, 80.0)
        assert len(t) == 19 and (t[0], t[-1], sigma[-1]) == (1.0, 0.0, 0.0)
        roots = sigma[:-1] ** (1 / 7)
        torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(17), atol=1e-12, rtol=0)
        assert sigma[0] == 80 and sigma[-2].item() == pytest.approx(0.002)
        torch.testing.assert_close(t[1:], sigma[1:] / (1 + sigma[1:]))

    def test_sampled_levels_take_the_place_of_their_neighbours(self):
        """They are on the grid exactly, and the grid does not grow."""
        sampled = [1.0, 0.75, 0.5, 0.25]
        t, _ = karras_times(FlowPath(), 40, sampled, 0.002, 80.0)
        assert len(t) == 41 and all((t - level).abs().min() < 1e-15 for level in sampled)
        assert (t.diff() < 0).all()

    def test_a_coarse_grid_keeps_every_sampled_level(self):
        """Two levels with one nearest point: the grid grows by one instead of losing a level."""
        sampled = [1 - i / 8 for i in range(8)]
        t, _ = karras_times(FlowPath(), 4, sampled, 0.002, 80.0)
        assert all((t - level).abs().min() < 1e-15 for level in sampled)
        assert len(t) > 5

    def test_tables_begin_and_end_where_their_schedule_does(self, table):
        """From k = 999 to k = 0, where f is the identity."""
        t, sigma = karras_times(table, 18, [table.time(u) for u in table.grid(4)], 0.002, 80.0)
        assert t[0] == table.t_max and t[-1] == table.t_min
        torch.testing.assert_close(sigma, t / (1 - t))

    def test_edm_paths_keep_their_own_range(self):
        path = EDMPath(sigma_max=40.0)
        t, _ = karras_times(path, 10, [path.t_max], 0.002, 80.0)
        assert t[0] == path.t_max and t[-1] == path.t_min

    def test_a_level_above_the_highest_sigma_is_refused(self):
        with pytest.raises(UserError, match="sigma_max=20 is below"):
            karras_times(FlowPath(), 18, [1.0, 0.99], 0.002, 20.0)


class TestImprovedTraining:
    def test_shares_are_the_normal_mass_of_each_interval_of_log_sigma(self):
        """erf differences = Phi differences over the grid's range."""
        sigma = torch.tensor([80.0, 5.0, 1.0, 0.1, 0.0], dtype=F64)
        law = torch.distributions.Normal(torch.tensor(-1.1, dtype=F64), torch.tensor(2.0, dtype=F64))
        mass = torch.cat([law.cdf(sigma[:-1].log()), torch.zeros(1, dtype=F64)])
        expected = (mass[:-1] - mass[1:]) / mass[0]
        torch.testing.assert_close(lognormal_shares(sigma, -1.1, 2.0), expected, atol=1e-12, rtol=0)

    def test_the_grid_doubles_from_ten_to_its_end(self):
        """Eight grids over a run: 10, 20, ..., 1280."""
        seen = [doubled(step, 10, 1280, 50) for step in range(0, 500, 50)]
        assert seen == [10, 20, 40, 80, 160, 320, 640, 1280, 1280, 1280]
        assert doubled(49, 10, 1280, 50) == 10 and doubled(2**30, 10, 1280, 1) == 1280


class TestNoisedFurther:
    def test_two_noisings_are_one(self, normal):
        """(1 - s) x0 + s eps diffused to t has mean (1 - t) x0 and std t."""
        s, t = torch.full((200_000,), 0.4, dtype=F64), torch.full((200_000,), 0.7, dtype=F64)
        x0 = torch.full((200_000, 1), 2.0, dtype=F64)
        x = noised_further(add_noise(x0, normal(200_000, 1), s), s, t, normal(200_000, 1))
        assert x.mean().item() == pytest.approx(0.3 * 2, abs=0.01)
        assert x.std().item() == pytest.approx(0.7, abs=0.01)

    def test_ends(self, normal):
        """Nothing happens at t = s; at t = 1 the state is forgotten."""
        x, noise, s = normal(4, 2), normal(4, 2), torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=F64)
        torch.testing.assert_close(noised_further(x, s, s, noise), x)
        torch.testing.assert_close(noised_further(x, s, torch.ones(4), noise), noise)

    def test_the_transition_composes(self):
        """c(s, t) c(r, s) = c(r, t), and the variances add up as a chain's do."""
        r, s, t = (torch.tensor([v], dtype=F64) for v in (0.2, 0.5, 0.8))
        one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
        keep = noised_further(noised_further(one, r, s, zero), s, t, zero)
        torch.testing.assert_close(keep, noised_further(one, r, t, zero))
        first = noised_further(noised_further(zero, r, s, one), s, t, zero)
        second = noised_further(zero, s, t, one)
        assert math.hypot(first.item(), second.item()) == pytest.approx(noised_further(zero, r, t, one).item())
