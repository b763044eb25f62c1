"""Vector and scalar quantisation, against loops over vectors and codes."""

import itertools
import math

import pytest
import torch

import functorch_gen as fg
from functorch_gen import vae

F64 = torch.float64
KEY = fg.random.key(0)


def state_of(codebook, counts):
    return {"codebook": codebook, "sums": codebook * counts[:, None], "counts": counts}


def vq_and_vectors(**options):
    """Five codes for twelve vectors in a (3, 4) batch, in general position."""
    keys = fg.random.split(KEY, 3)
    codebook, x = fg.random.normal(keys[0], (5, 2), F64), fg.random.normal(keys[1], (3, 4, 2), F64)
    state = state_of(codebook, 0.5 + fg.random.uniform(keys[2], (5,), F64))
    return vae.VQ(5, 2, **options), state, x


def nearest_by_loop(codebook, x):
    return [min(range(len(codebook)), key=lambda k: float(((v - codebook[k]) ** 2).sum())) for v in x.reshape(-1, 2)]


def test_vq_finds_the_nearest_code_of_a_loop():
    vq, state, x = vq_and_vectors()
    y, same = vq({}, state, x, train=False)
    codes = nearest_by_loop(state["codebook"], x)
    assert y.codes.flatten().tolist() == codes
    assert y.codes.dtype == torch.int64
    values = torch.stack([state["codebook"][k] for k in codes]).reshape(3, 4, 2)
    torch.testing.assert_close(y.values, values)
    torch.testing.assert_close(y.commitment, ((x - values) ** 2).mean(-1))
    assert same is state


def test_vq_finds_the_nearest_code_far_from_0_and_of_bfloat16():
    """Squares of thousands leave float32 no digits for the differences of the codes, nor 8 bits for those near 0."""
    vq, x = vae.VQ(64, 8), fg.random.normal(KEY, (500, 8))
    state = vq.init_state()
    codes = torch.cdist(x.double(), state["codebook"].double()).argmin(1)
    away = {**state, "codebook": state["codebook"] + 1024}
    exact = torch.cdist((x + 1024).double(), away["codebook"].double()).argmin(1)
    assert torch.equal(vq.nearest(away, x + 1024), exact)
    assert (exact == codes).double().mean() > 0.99
    short = torch.cdist(x.bfloat16().double(), state["codebook"].double()).argmin(1)
    assert torch.equal(vq.nearest(state, x.bfloat16()), short)


def test_vq_values_are_those_of_the_codebook_to_the_last_bit():
    """Also where z is large and short: z + (value - z) is not value in floating point."""
    vq = vae.VQ(16, 4)
    state = vq.init_state()
    for z in (1000 * fg.random.normal(KEY, (50, 4)), (100 * fg.random.normal(KEY, (50, 4))).bfloat16()):
        y, _ = vq({}, state, z, train=False)
        assert torch.equal(y.values, state["codebook"][y.codes].to(z.dtype))


def test_vq_of_no_vectors_keeps_its_codes():
    vq = vae.VQ(3, 2, eps=1e-9)
    y, state = vq({}, vq.init_state(), torch.zeros(0, 2), train=True, key=KEY)
    assert y.codes.shape == (0,)
    torch.testing.assert_close(state["codebook"], vq.init_state()["codebook"])


def test_vq_takes_the_first_of_equal_distances():
    vq = vae.VQ(3, 1)
    state = state_of(torch.tensor([[1.0], [1.0], [-1.0]]), torch.ones(3))
    assert vq.nearest(state, torch.tensor([[0.0], [5.0]])).tolist() == [0, 0]


def test_vq_moves_codes_to_the_running_means_of_a_loop():
    vq, state, x = vq_and_vectors(decay=0.9, eps=1e-3)
    sums, counts = state["sums"].clone(), state["counts"].clone()
    new = state
    for step in range(3):
        codes = nearest_by_loop(new["codebook"], x + step)
        _, new = vq({}, new, x + step, train=True)
        for k in range(5):
            chosen = [v for v, code in zip((x + step).reshape(-1, 2), codes, strict=True) if code == k]
            counts[k] = 0.9 * counts[k] + 0.1 * len(chosen)
            sums[k] = 0.9 * sums[k] + 0.1 * sum(chosen, torch.zeros(2, dtype=F64))
        smooth = (counts + 1e-3) / (counts.sum() + 5 * 1e-3) * counts.sum()
        torch.testing.assert_close(new["counts"], counts)
        torch.testing.assert_close(new["sums"], sums)
        torch.testing.assert_close(new["codebook"], sums / smooth[:, None])


def test_vq_finds_the_centres_of_clusters():
    """With a long memory and vectors in heaps, each code ends in the middle of its heap, as k-means does."""
    centres = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    vq, x = vae.VQ(3, 2, decay=0.5), centres.repeat(20, 1) + 0.1 * fg.random.normal(KEY, (60, 2))
    state = vq.init_state()
    for n in range(30):
        y, state = vq({}, state, x, train=True, key=fg.random.fold_in(KEY, n))
    for heap in range(3):
        mean = x[heap::3].mean(0)
        assert float((state["codebook"] - mean).norm(dim=1).min()) < 1e-3
    assert float(vae.perplexity(y.codes, 3)) == pytest.approx(3)


def test_vq_gradient_is_straight_through_and_that_of_the_commitment():
    vq, state, x = vq_and_vectors()
    g = fg.random.normal(fg.random.key(7), x.shape, F64)
    through = fg.grad(lambda x: (vq({}, state, x, train=True)[0].values * g).sum())(x)
    torch.testing.assert_close(through, g)
    values = vq({}, state, x, train=False)[0].values
    commit = fg.grad(lambda x: vq({}, state, x, train=True)[0].commitment.sum())(x)
    torch.testing.assert_close(commit, x - values)  # 2 (x - values) / 2 features


def test_vq_codebook_has_no_gradient():
    vq, state, x = vq_and_vectors()

    def loss(codebook):
        y, _ = vq({}, {**state, "codebook": codebook}, x, train=True)
        return y.values.sum() + y.commitment.sum() + 0 * codebook.sum()

    assert not fg.grad(loss)(state["codebook"]).any()


def test_vq_revives_dead_codes_on_vectors_of_the_batch():
    vq, state, x = vq_and_vectors(threshold=0.1)
    far = torch.full((2, 2), 100.0, dtype=F64)
    state = state_of(torch.cat([state["codebook"][:3], far]), torch.tensor([1.0, 1, 1, 1e-3, 1e-3], dtype=F64))
    _, kept = vq({}, state, x, train=True)
    _, revived = vq({}, state, x, train=True, key=KEY)
    assert (kept["counts"][3:] < 0.1).all()
    assert torch.equal(revived["counts"][3:], torch.ones(2, dtype=F64))
    torch.testing.assert_close(revived["counts"][:3], kept["counts"][:3])
    torch.testing.assert_close(revived["sums"][:3], kept["sums"][:3])
    for code in revived["sums"][3:]:
        assert any(torch.equal(code, v) for v in x.reshape(-1, 2))
    torch.testing.assert_close(revived["codebook"][3:], revived["sums"][3:], rtol=1e-4, atol=0)  # eps = 1e-5


def test_vq_revival_ends_collapse():
    """Codes that start far away are never chosen, unless they are put among the data."""
    vq = vae.VQ(8, 2, decay=0.8)
    x = fg.random.normal(KEY, (256, 2))
    state = {"codebook": 50 + torch.arange(16.0).reshape(8, 2), "counts": torch.ones(8)}
    state["sums"] = state["codebook"]
    used = {}
    for revive in (False, True):
        new = state
        for n in range(60):
            y, new = vq({}, new, x, train=True, key=fg.random.fold_in(KEY, n) if revive else None)
        used[revive] = float(vae.perplexity(y.codes, 8))
    assert used[False] == 1.0
    assert used[True] > 6.0


def test_vq_trains_in_one_donated_step():
    """The codebook is state of make_step: one trace, and the codes come to lie among the encoder's outputs."""
    vq, encode = vae.VQ(4, 2, decay=0.8), fg.nn.Linear(3, 2)
    decode = fg.nn.Linear(2, 3)

    def loss_fn(params, state, key, batch):
        y, state = vq({}, state, encode(params["encoder"], batch), train=True, key=key)
        error = (decode(params["decoder"], y.values) - batch).square().mean()
        return error + 0.25 * y.commitment.mean(), state

    tx = fg.optim.adam(0.03)
    step = fg.jit(fg.step.make_step(loss_fn, tx, stateful=True), donate_argnums=0, backend="aten")
    params = {"encoder": encode.init(KEY), "decoder": decode.init(fg.random.key(1))}
    state = fg.step.init_state(params, tx, KEY, vq.init_state())
    data = torch.eye(3).repeat(4, 1)
    losses = []
    for _ in range(150):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    assert step.traces == 1
    assert losses[-1] < 0.03 < losses[0]  # three points for four codes: nothing is lost in the end


def test_vq_has_a_codebook_for_each_position_by_vmap():
    vq, _, x = vq_and_vectors()
    states = fg.tree.stack(
        [state_of(fg.random.normal(fg.random.key(i), (5, 2), F64), torch.ones(5).double()) for i in range(4)]
    )
    y, new = fg.vmap(lambda s, x: vq({}, s, x, train=True), in_dims=(0, 1), out_dims=(1, 0))(states, x)
    for i, own in enumerate(fg.tree.unstack(states)):
        one, state = vq({}, own, x[:, i], train=True)
        torch.testing.assert_close(y.codes[:, i], one.codes)
        torch.testing.assert_close(new["codebook"][i], state["codebook"])


def test_perplexity_is_that_of_scipy_by_hand():
    codes = torch.tensor([0, 0, 1, 3])
    assert float(vae.perplexity(codes, 5)) == pytest.approx(math.exp(-(0.5 * math.log(0.5) + 0.5 * math.log(0.25))))


# FSQ.


@pytest.mark.parametrize("levels", [(2,), (3,), (2, 2, 2), (8, 5, 5, 5), (7, 4, 3, 2), (16,)], ids=str)
def test_fsq_codes_are_a_bijection_with_the_grid(levels):
    fsq = vae.FSQ(levels)
    codes = torch.arange(fsq.num_codes)
    values = fsq.look_up(codes, F64)
    grid = {tuple((d - n // 2) / (n // 2) for d, n in zip(digits, levels, strict=True)) for digits in digits_of(levels)}
    assert {tuple(v) for v in values.tolist()} == grid
    assert len(grid) == fsq.num_codes == math.prod(levels)


def digits_of(levels):
    return itertools.product(*[range(n) for n in levels])


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 5, 5, 5), (7, 4)], ids=str)
def test_fsq_reaches_every_code_and_looks_up_what_it_gave(levels):
    fsq = vae.FSQ(levels)
    line = torch.linspace(-6, 6, 200, dtype=F64)
    y = fsq({}, fg.random.permutation(KEY, line.repeat(20, 1), 1, independent=True).T.repeat(1, 4)[:, : len(levels)])
    torch.testing.assert_close(fsq.look_up(y.codes, F64), y.values, rtol=0, atol=1e-15)
    each = fsq({}, line[:, None].expand(-1, len(levels)))
    for i, n in enumerate(levels):
        assert sorted(set(each.values[:, i].tolist())) == [(d - n // 2) / (n // 2) for d in range(n)]


def test_fsq_is_the_formula_of_the_paper():
    """Appendix A.1, by Python's numbers."""
    levels, x = (8, 5), torch.tensor([[0.3, -1.2], [2.0, 0.1]], dtype=F64)
    y = vae.FSQ(levels)({}, x)
    for row, values, code in zip(x.tolist(), y.values.tolist(), y.codes.tolist(), strict=True):
        digits = []
        for z, n in zip(row, levels, strict=True):
            half = (n - 1) * (1 - 1e-3) / 2
            offset = 0.0 if n % 2 else 0.5
            digits.append(round(math.tanh(z + math.tan(offset / half)) * half - offset))
        assert values == pytest.approx([d / (n // 2) for d, n in zip(digits, levels, strict=True)])
        assert code == sum((d + n // 2) * basis for d, n, basis in zip(digits, levels, (1, 8), strict=True))


def test_fsq_of_bfloat16_has_the_codes_of_its_numbers_and_reaches_all():
    fsq, x = vae.FSQ((500, 8)), torch.linspace(-9, 9, 20_001, dtype=torch.bfloat16)[:, None].expand(-1, 2)
    y = fsq({}, x)
    assert torch.equal(y.codes, fsq({}, x.float()).codes)
    assert y.values.dtype == torch.bfloat16
    assert torch.equal(y.values, fsq.look_up(y.codes, torch.bfloat16))
    assert (int(y.codes.min()), int(y.codes.max())) == (0, 3999)


def test_fsq_gradient_is_that_of_the_bound():
    fsq, x = vae.FSQ((5,)), torch.tensor([[0.3]], dtype=F64)
    slope = fg.grad(lambda x: fsq({}, x).values.sum())(x)
    torch.testing.assert_close(slope, (1 - torch.tanh(x) ** 2) * 0.999)  # half = 2 * 0.999, over n // 2 = 2


def test_errors_name_what_was_expected():
    vq = vae.VQ(5, 2)
    with pytest.raises(ValueError, match=r"VQ: x: expected shape \(..., d=2\), got \(4, 3\)"):
        vq({}, vq.init_state(), torch.ones(4, 3), train=False)
    with pytest.raises(ValueError, match=r"VQ: state 'codebook': expected shape \(k=5, d=2\), got \(4, 2\)"):
        vq({}, vae.VQ(4, 2).init_state(), torch.ones(4, 2), train=False)
    with pytest.raises(ValueError, match="VQ: expected 0 <= decay < 1, got 1"):
        vae.VQ(5, 2, decay=1.0)
    with pytest.raises(ValueError, match="VQ: expected num_codes >= 1, got 0"):
        vae.VQ(0, 2)
    with pytest.raises(ValueError, match=r"FSQ: expected at least 2 levels everywhere, got \(3, 1\)"):
        vae.FSQ((3, 1))
    with pytest.raises(ValueError, match=r"FSQ: x: expected shape \(..., d=2\), got \(3,\)"):
        vae.FSQ((3, 2))({}, torch.ones(3))
    with pytest.raises(TypeError, match=r"VQ: x: expected a floating-point tensor, got torch\.int64"):
        vq({}, vq.init_state(), torch.ones(4, 2, dtype=torch.int64), train=False)
    with pytest.raises(TypeError, match=r"FSQ: x: expected a floating-point tensor, got torch\.int64"):
        vae.FSQ((3, 2))({}, torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"FSQ: codes: expected an int64 or int32 tensor, got torch\.float32"):
        vae.FSQ((3, 2)).look_up(torch.ones(4))
    with pytest.raises(ValueError, match="perplexity: expected num_codes >= 1, got 0"):
        vae.perplexity(torch.tensor([0]), 0)
    with pytest.raises(TypeError, match=r"perplexity: codes: expected an int64 or int32 tensor, got torch\.float32"):
        vae.perplexity(torch.tensor([0.5]), 3)
