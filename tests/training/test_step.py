import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import sharding
from zoo.checkpoints import named_leaves
from zoo.training.step import abstract_batch, build


@pytest.fixture
def programs(make_config):
    def make(**settings):
        config = make_config(**{"model.mixer": "mlp"} | settings)  # compiles fast
        config.model.vocab_size = 64
        return build(config, sharding.make_mesh(config.mesh))

    return make


def batch(seed=0):
    """Four sequences; of the first nearly all tokens count, of the second almost none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (4, 33), dtype=np.int32)
    share = np.array([0.95, 0.05, 0.5, 0.3])[:, None]
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((4, 32), np.int32),
        "weights": (rng.random((4, 32)) < share).astype(np.float32),
    }


def test_a_tasks_step_reads_its_labels_alone(make_config):
    """4 rows of 32 tokens with 2 labels; an evaluation says what is right, too."""
    config = make_config(**{"model.mixer": "mlp", "model.d_ff": 48, "data.source": "mqar?vocab_size=64&pairs=2"})
    config.model.vocab_size = 64
    programs, rows = build(config, sharding.make_mesh(config.mesh)), abstract_batch(config)
    traced = str(jax.make_jaxpr(programs.train)(programs.abstract_state, rows))
    assert "f32[8,64]" in traced and "f32[128,64]" not in traced
    found = jax.eval_shape(programs.evaluate, programs.abstract_state.params, rows | {"bytes": rows["weights"]})
    assert found.keys() == {"nats", "tokens", "bytes", "right"}


SMOOTH = {"optimizer.eps": 1.0, "optimizer.clip_norm": 0.0}  # AdamW without its sign-like first step


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulated_step_equals_the_step_on_the_whole_batch(programs, pieces):
    whole, split = programs(**SMOOTH), programs(**SMOOTH, **{"train.accumulate_steps": pieces})
    (state, metrics), (split_state, split_metrics) = (p.train(p.init(), p.put(batch())) for p in (whole, split))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(split_metrics[name], metrics[name], rtol=1e-5)
    expected, start = named_leaves(state.params), named_leaves(whole.init().params)
    for name, p in named_leaves(split_state.params).items():
        moved = np.abs(expected[name] - start[name]).max()
        assert np.abs(p - expected[name]).max() <= 1e-4 * moved + 1e-8, name


def test_a_microbatch_counts_by_its_tokens(programs):
    """The mean over all tokens, not the mean of the microbatches' means (which differs here)."""
    p, rows = programs(**{"train.accumulate_steps": 4}), batch()
    loss = float(p.train(p.init(), p.put(rows))[1]["loss"])
    params = p.init().params
    each = [
        p.evaluate(params, p.put({k: v[[i] * 4] for k, v in rows.items()} | {"bytes": np.ones((4, 32), np.float32)}))
        for i in range(4)
    ]
    nats, tokens = (np.array([float(e[name]) / 4 for e in each]) for name in ("nats", "tokens"))
    assert loss == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
    assert loss != pytest.approx(np.mean(nats / tokens), rel=1e-3)


def test_dropout_depends_on_seed_and_step_alone(programs):
    p = programs(**{"model.dropout": 0.3})

    def loss(step):
        state = p.init()
        return float(p.train(state._replace(step=jnp.full_like(state.step, step)), p.put(batch()))[1]["loss"])

    assert loss(7) == loss(7)
    assert loss(7) != loss(8)


def test_clipping_bounds_the_gradient_and_reports_it_unclipped(programs):
    # With an eps this large AdamW moves by the clipped gradient itself.
    settings = {"optimizer.eps": 1e3, "optimizer.weight_decay": 0.0, "optimizer.b1": 0.0, "optimizer.warmup_steps": 0,
                "optimizer.schedule": "constant", "optimizer.learning_rate": 1e3}  # fmt: skip
    for clip_norm in (0.01, 0.0):
        p = programs(**settings, **{"optimizer.clip_norm": clip_norm})
        state, metrics = p.train(p.init(), p.put(batch()))
        moved = jax.tree.map(lambda a, b: a - b, state.params, p.init().params)
        moved = float(np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(moved))))
        assert metrics["grad_norm"] > 0.1
        assert moved == pytest.approx(clip_norm or float(metrics["grad_norm"]), rel=0.02)


def test_the_state_is_donated_and_lies_where_it_is_told(programs):
    p = programs()
    state = p.init()
    new, _ = p.train(state, p.put(batch()))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert jax.tree.map(lambda x: x.sharding, new) == jax.tree.map(lambda x: x.sharding, p.abstract_state)
    assert int(new.step) == 1
