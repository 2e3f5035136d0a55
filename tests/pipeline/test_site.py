"""A site: its linears are one matrix for each grid, and solved as if each were alone."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from llmq import registry
from llmq.algorithms.descent import Descent
from llmq.algorithms.gptq import Gptq
from llmq.algorithms.qep import Qep
from llmq.algorithms.rtn import Rtn
from llmq.errors import LlmqError
from llmq.grids.int import Int
from llmq.pipeline.site import Target, _stack, pieces, solve
from llmq.stats import Drift, Hessian, Stats
from llmq.types import QTensor


def method(solver, corrections=(), refiners=()):
    return SimpleNamespace(solver=solver, corrections=corrections, refiners=refiners, tuners=[None])


def weight(N, K=64, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def stats():
    g = torch.Generator().manual_seed(1)
    X = torch.randn(800, 64, generator=g) @ torch.randn(64, 64, generator=g) / 8
    hessian, drift = Hessian(800), Drift(800)
    hessian.update(X)
    drift.update(X, X + 0.1 * torch.randn(X.shape, generator=g))
    return Stats({Hessian: hessian, Drift: drift})


FOUR, EIGHT = Int(4, True, 32), Int(8, True, 32)


@pytest.mark.parametrize("steps", [((), ()), ((), (Descent(),)), ((Qep(alpha=0.5),), (Descent(rounds=1),))])
def test_stacked_linears_equal_linears_solved_alone(stats, steps):
    targets = {"q": Target(weight(32), FOUR), "v": Target(weight(16, seed=2), EIGHT), "k": Target(weight(16), FOUR)}
    together = solve(method(Gptq(), *steps), targets, Stats(stats))
    assert list(together) == ["q", "v", "k"]
    for name, target in targets.items():
        (alone,) = solve(method(Gptq(), *steps), {name: target}, Stats(stats)).values()
        ours = together[name].solved
        assert (alone.solved.q.codes != ours.q.codes).float().mean() < 0.01  # sums in another order may turn a tie
        assert ours.report.keys() == alone.solved.report.keys() and ours.q.grid == target.grid
        torch.testing.assert_close(alone.W_NK, together[name].W_NK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", ["int:bits=4:group=32:range=mse", "int:bits=3:group=channel:asym", "q4_0", "q5_1"])
def test_what_is_solved_in_pieces_is_what_the_whole_matrix_would_be(grid, stats):
    """Rounding to nearest does it row by row; 1100 rows are two pieces, which cut through the first linear."""
    targets = {
        "q": Target(weight(600), registry.load("grids", grid)),
        "k": Target(weight(500, seed=3), registry.load("grids", grid)),
    }
    assert [pieces(N) for N in (8, 1023, 1100, 10_000)] == [1, 1, 2, 8]
    for name, answer in solve(method(Rtn()), targets, Stats(stats)).items():
        want = QTensor.rounded(targets[name].W_NK, targets[name].grid)
        assert torch.equal(answer.solved.q.codes, want.codes)
        assert all(torch.equal(t, want.params.tensors()[n]) for n, t in answer.solved.q.params.tensors().items())


def test_pieces_lie_between_rows_that_share_no_scale(stats):
    targets = {"q": Target(weight(700), registry.load("grids", "fp8:group=128x32")), "k": Target(weight(1030), EIGHT)}
    stacks = [_stack(targets, [name], stats) for name in targets]
    assert [[len(p.W_NK) for p in stack.pieces()] for stack in stacks] == [[700], [515, 515]]
    tall = _stack({"q": Target(weight(1100), targets["q"].grid)}, ["q"], stats)
    assert [len(p.W_NK) for p in tall.pieces()] == [640, 460]
    for grid in ("fp8:group=128x32", "fp8:group=tensor"):
        (answer,) = solve(
            method(Rtn()), {"q": Target(weight(1100), registry.load("grids", grid))}, Stats(stats)
        ).values()
        want = QTensor.rounded(weight(1100), registry.load("grids", grid))
        assert torch.equal(answer.solved.q.codes, want.codes)
        assert torch.equal(answer.solved.q.params.scale, want.params.scale)


@pytest.mark.parametrize("grid", ["nvfp4", "fp8:group=tensor"])
def test_what_is_fused_shares_a_scale_that_covers_corrected_weights(grid, stats):
    """And ranges that differ share it too."""
    grids = [registry.load("grids", f"{grid}:range={r}") for r in ("mse", "minmax")]
    targets = {"q": Target(weight(32), grids[0]), "k": Target(3 * weight(16, seed=2), grids[1])}
    grown = SimpleNamespace(
        judge=lambda W_NK, stats: W_NK[:, :1], correct=lambda W_NK, *_: 4 * W_NK, line=lambda *_: {}
    )
    grown.needs = lambda grids: ()
    answers = solve(method(Rtn(), (grown,)), targets, Stats(stats))
    for name, answer in answers.items():
        error = answer.solved.q.dequantize() - 4 * targets[name].W_NK
        assert error.abs().max() < 0.2 * 12 * targets["k"].W_NK.abs().max() / 3
        stored = answer.solved.q.params.stored
        assert stored is None or int(stored.max()) <= 126
    ends = [getattr(a.solved.q.params, "divisor", None) for a in answers.values()]
    ends = [a.solved.q.params.scale for a in answers.values()] if ends[0] is None else ends
    assert len({float(x) for end in ends for x in end.flatten()}) == 1


def test_what_is_judged_of_rows_is_summed_over_all_pieces_of_a_linear(stats, monkeypatch):
    targets = {"q": Target(weight(600), FOUR), "k": Target(weight(500, seed=3), FOUR)}
    steps = method(Gptq(), (Qep(),), (Descent(rounds=1),))
    in_pieces = solve(steps, targets, Stats(stats))
    monkeypatch.setattr("llmq.pipeline.site._LEAST_ROWS", 2000)
    for name, whole in solve(steps, targets, Stats(stats)).items():
        ours = in_pieces[name]
        torch.testing.assert_close(ours.W_NK, whole.W_NK, rtol=1e-4, atol=1e-5)
        assert (ours.solved.q.codes != whole.solved.q.codes).float().mean() < 0.01
        assert ours.solved.report == pytest.approx(whole.solved.report, abs=1e-3)


def test_a_factor_is_made_once_for_all_grids_of_a_site(stats, monkeypatch):
    made, factor = [], Gptq.factor
    monkeypatch.setattr(Gptq, "factor", lambda *args: made.append(1) or factor(*args))
    targets = {"q": Target(weight(600), FOUR), "v": Target(weight(8), EIGHT)}
    solve(method(Gptq()), targets, stats)
    assert len(made) == 1


def test_a_scale_of_the_whole_tensor_is_not_shared_by_a_stack(stats):
    grid = Int(8, True, "tensor")
    found = solve(method(Rtn()), {"q": Target(weight(8), grid), "k": Target(10 * weight(600), grid)}, stats)
    assert found["k"].solved.q.params.scale[0, 0] > 5 * found["q"].solved.q.params.scale[0, 0]
    assert (found["k"].solved.q.params.scale == found["k"].solved.q.params.scale[0, 0]).all()


def test_linears_of_another_range_are_another_stack(stats):
    mse = dataclasses.replace(FOUR, range=registry.load("ranges", "mse"))
    found = solve(method(Rtn()), {"q": Target(weight(8), FOUR), "k": Target(weight(8), mse)}, stats)
    assert not torch.equal(found["q"].solved.q.params.scale, found["k"].solved.q.params.scale)


def test_importance_weighs_the_linear_that_it_was_given_for(stats):
    grid, W_NK = registry.load("grids", "q4_0"), weight(8)
    importance = torch.linspace(1e-3, 10, 64)
    found = solve(method(Rtn()), {"a": Target(W_NK, grid), "b": Target(W_NK, grid, importance)}, Stats())
    assert torch.equal(found["a"].solved.q.params.scale, grid.fit(W_NK).scale)
    assert torch.equal(found["b"].solved.q.params.scale, grid.fit(W_NK, importance).scale)
    assert not torch.equal(found["a"].solved.q.codes, found["b"].solved.q.codes)


class Bare(Rtn):
    """A user's solver that forgets to wrap its answer."""

    def solve(self, W_NK, grid, stats):
        return super().solve(W_NK, grid, stats).q


def test_a_step_that_gives_back_another_thing_is_named(stats):
    with pytest.raises(LlmqError, match="test_site gave back a QTensor, not a Solved"):
        solve(method(Bare()), {"q": Target(weight(8), FOUR)}, stats)


def test_what_corrections_alone_read_is_gone_when_the_solver_starts(stats):
    class Watching(Gptq):
        def solve(self, W_NK, grid, stats):
            seen.append(set(stats))
            return super().solve(W_NK, grid, stats)

    seen: list[set[type]] = []
    solve(method(Watching(), (Qep(),)), {"q": Target(weight(8), FOUR)}, stats)
    assert seen == [{Hessian}]
