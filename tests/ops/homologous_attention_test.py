import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.losses.contrastive import supervised_contrast
from mae_jax.ops.attention import attention
from mae_jax.ops.homologous_attention import (
    OracleMask,
    TopKMask,
    kth_largest,
    neighbor_homology,
    purity,
    same_source,
    sources,
)

HARD = np.array([[0.0, -0.0, 1e-42, -1e-42, np.inf, -np.inf, 3.0, 3.0, -3.0, -3.0, 1e38, -1e38]], np.float32)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize("values", [HARD, np.random.default_rng(0).normal(size=(3, 4, 12)).astype(np.float32),
                                    np.random.default_rng(1).integers(-2, 3, (50, 12)).astype(np.float32)],
                         ids=["edges", "normal", "ties"])
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_the_kth_largest_is_that_of_sorting(values, k, platform, monkeypatch):
    choose = jax.lax.platform_dependent
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, **ways: choose(*x, default=ways[platform]))
    found = jax.jit(lambda values: kth_largest(values, k))(values)
    assert found.shape == (*values.shape[:-1], 1)
    np.testing.assert_array_equal(found, np.sort(values, -1)[..., -k, None])


def reference(q, k, v, heads, keep, patches):
    """The rule as published, query by query and head by head, in float64."""
    images, tokens, width = q.shape
    first, deep, out = tokens - patches, width // heads, np.zeros(q.shape)
    for image in range(images):
        for head in range(heads):
            part = slice(head * deep, (head + 1) * deep)
            a, b, c = (x[image][:, part].astype(np.float64) for x in (q, k, v))
            for query in range(tokens):
                scores = b @ a[query] / np.sqrt(deep)
                threshold = np.sort(scores[first:])[-keep]
                kept = [key for key in range(tokens) if key < first or query < first or scores[key] >= threshold]
                weights = np.exp(scores[kept] - scores[kept].max())
                out[image, query, part] = (weights / weights.sum()) @ c[kept]
    return out


def operands(patches=12, first=1, ties=False):
    draws = np.random.default_rng(3)
    values = draws.normal(size=(4, 2, first + patches, 32)).astype(np.float32)
    if ties:  # whole numbers whose products are exact: many scores are equal
        values[:2] = draws.integers(-1, 2, values[:2].shape)
    return values


@pytest.mark.parametrize("first", [0, 1], ids=["no class token", "class token"])
@pytest.mark.parametrize("ties", [False, True], ids=["apart", "ties"])
def test_attention_is_that_of_the_rule_restated(first, ties):
    q, k, v, _ = operands(first=first, ties=ties)
    out = attention(q, k, v, 2, TopKMask(3, 12))
    np.testing.assert_allclose(out, reference(q, k, v, 2, 3, 12), atol=2e-6)
    assert np.abs(out - attention(q, k, v, 2)).max() > 0.1


@pytest.mark.parametrize("ties", [False, True], ids=["apart", "ties"])
def test_gradients_are_those_of_the_same_rule_by_autodiff(ties):
    q, k, v, dout = operands(ties=ties)

    def plain(q, k, v):
        apart = [x.reshape(2, 13, 2, 16) for x in (q, k, v)]
        scores = jnp.einsum("bqhd,bkhd->bhqk", apart[0], apart[1]) / 4
        threshold = jax.lax.stop_gradient(jnp.sort(scores[..., 1:], -1)[..., -3, None])
        free = jnp.arange(13) < 1
        kept = (scores >= threshold) | free | free[:, None]
        weights = jax.nn.softmax(jnp.where(kept, scores, -jnp.inf), -1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, apart[2]).reshape(q.shape)

    out, backward = jax.vjp(lambda *x: attention(*x, 2, TopKMask(3, 12)), q, k, v)
    wanted, exact = jax.vjp(plain, q, k, v)
    for ours, theirs in zip((out, *backward(jnp.asarray(dout))), (wanted, *exact(jnp.asarray(dout))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(backward(jnp.asarray(dout))[0]).max() > 0.1


def test_bfloat16_chooses_by_float32_scores_and_gives_other_keys_no_gradient():
    q, k, v, dout = (jnp.asarray(x, jnp.bfloat16) for x in operands())
    rounded = [np.asarray(x, np.float32) for x in (q, k, v)]
    out, backward = jax.vjp(lambda *x: attention(*x, 2, TopKMask(1, 12)), q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), reference(*rounded, 2, 1, 12), atol=0.03)
    _, dk, dv = (np.asarray(x, np.float32).reshape(2, 13, 2, 16) for x in backward(dout.at[:, 0].set(0)))
    split = [x.reshape(2, 13, 2, 16).astype(np.float64) for x in rounded]
    scores = np.einsum("bqhd,bkhd->bhqk", split[0], split[1])
    kept = scores >= np.sort(scores[..., 1:], -1)[..., -1, None]
    unseen = ~kept[:, :, 1:].any(2).transpose(0, 2, 1)  # by any patch; the class token's query has no part in dout
    unseen[:, 0] = False
    assert unseen.any()
    assert (dk[unseen] == 0).all()
    assert (dv[unseen] == 0).all()
    assert (dv[~unseen] != 0).all(-1).all()


def test_equal_scores_are_all_kept():
    kept = TopKMask(2, 4)(jnp.zeros((1, 1, 5, 5)))
    assert kept.all()
    scores = jnp.asarray([[-0.0, 0.0, 0.0, -1.0]] * 4)
    assert TopKMask(1, 4)(scores)[0].tolist() == [True, True, True, False]


def test_the_oracle_keeps_the_same_picture_and_the_class_token():
    kept = np.asarray(OracleMask(2, 4)(jnp.zeros((5, 5))))
    assert kept.tolist() == [[True] * 5, [True, True, True, False, False], [True, True, True, False, False],
                             [True, False, False, True, True], [True, False, False, True, True]]
    assert sources(4, 2).tolist() == [0, 0, 1, 1]


def test_purity_counts_kept_keys_of_the_same_picture():
    scores = np.where(same_source(8, 2), 1.0, 0.0)[None, None].astype(np.float32)
    assert purity(jnp.asarray(scores), 4, 2, 8) == pytest.approx(1)
    assert purity(jnp.asarray(-scores), 4, 2, 8) == pytest.approx(0)
    assert purity(jnp.asarray(scores), 8, 2, 8) == pytest.approx(0.5)
    wider = np.pad(scores, ((0, 0), (0, 0), (1, 0), (1, 0)), constant_values=9)  # a class token counts for nothing
    assert purity(jnp.asarray(wider), 4, 2, 8) == pytest.approx(1)


def test_the_nearest_neighbor_is_another_token():
    tokens = np.eye(8)[[0, 0, 1, 1, 0, 2, 2, 3]][None]  # of two images; token 4 is like the first two
    tokens = tokens + 0.01 * np.arange(8)[None, :, None] * np.eye(8)[5]
    homology = neighbor_homology(jnp.asarray(tokens, jnp.float32), 2)
    unit = tokens[0] / np.linalg.norm(tokens[0], axis=1, keepdims=True)
    nearest = np.where(np.eye(8, dtype=bool), -2, unit @ unit.T).argmax(1)
    assert homology.tolist() == [pytest.approx((nearest // 4 == np.arange(8) // 4).mean())]
    assert 0 < homology[0] < 1


def test_the_contrast_is_that_of_the_definition():
    features = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    same = same_source(6, 3)
    losses = supervised_contrast(features, same, 0.3)
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    for image in range(2):
        for i in range(6):
            logits = {j: unit[image, i] @ unit[image, j] / 0.3 for j in range(6) if j != i}
            total = np.log(sum(np.exp(value) for value in logits.values()))
            wanted = np.mean([total - logits[j] for j in logits if same[i, j]])
            assert float(losses[image, i]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("group", "temperature"), [(4, 0.25), (4, 0.1), (2, 0.25)])
def test_the_contrast_has_its_known_values(group, temperature):
    patches = 16
    visible, same = patches // group, same_source(patches, group)
    equal = supervised_contrast(jnp.ones((1, patches, 8)), same, temperature)
    np.testing.assert_allclose(equal, np.log(patches - 1), rtol=1e-6)
    simplex = np.eye(group) - 1 / group  # G directions with cosines of -1 / (G - 1)
    ideal = supervised_contrast(jnp.asarray(np.repeat(simplex, visible, 0)[None], jnp.float32), same, temperature)
    floor = np.log(visible - 1 + (patches - visible) * np.exp(-group / (group - 1) / temperature))
    np.testing.assert_allclose(ideal, floor, rtol=1e-5)
    for seed in range(3):
        some = np.random.default_rng(seed).normal(size=(4, patches, 8))
        assert supervised_contrast(jnp.asarray(some, jnp.float32), same, temperature).min() > np.log(visible - 1)
