"""What devices exchange in a step, counted in the compiled program; the head, whose pieces are each device's own."""

import os
import subprocess
import sys
import textwrap


def test_the_head_exchanges_nothing_that_grows_with_tokens():
    """Its loss goes through tokens in pieces, and they are of each device's own."""
    program = """
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        from zoo import hlo, sharding
        from zoo.config import preset
        from zoo.training import step

        def sent(context_length, **mesh):
            c = preset("tiny")
            c.model.mixer, c.model.num_layers, c.model.d_model, c.model.vocab_size = "mlp", 1, 32, 512
            c.train.batch_size, c.train.context_length, c.optimizer.name = 8, context_length, "adamw"
            c.mesh.data = 1
            for axis, size in mesh.items():
                setattr(c.mesh, axis, size)
            programs = step.build(c, sharding.make_mesh(c.mesh))
            batch = step.abstract_batch(c)
            place = dict(sharding=programs.batch_sharding)
            batch = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, **place) for n, x in batch.items()}
            compiled = programs.train.lower(programs.abstract_state, batch).compile()
            found = hlo.collectives(compiled.as_text())
            return sum(c.count * c.bytes for c in found if "jit(_take)" not in c.source)  # the embedding's rows

        for mesh in ({"fsdp": 8}, {"data": 2, "sequence": 4}):
            few, many = sent(8192, **mesh), sent(32768, **mesh)
            assert 0 < many <= 1.01 * few, (mesh, few, many)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_loss_and_its_gradients_are_those_of_one_device():
    """Several pieces a device, the vocabulary over `tensor`, tokens of weight 0."""
    program = """
        import jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 8)
        from zoo import ops, sharding

        B, T, D, vocab = 8, 64, 16, 32768  # 128 tokens a piece
        rng = np.random.default_rng(0)
        hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((B, T, D), (D, vocab)))
        targets, weights = rng.integers(0, vocab, (B, T)), rng.integers(0, 2, (B, T)).astype(np.float32)

        def loss(hidden, head, mesh):
            with sharding.use_mesh(mesh):
                losses = ops.cross_entropy(hidden, head, targets, weights)
                return losses.sum(), losses

        def run(mesh):
            put = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, sharding.partition_spec(*axes)))
            f = jax.jit(jax.value_and_grad(lambda h, w: loss(h, w, mesh), argnums=(0, 1), has_aux=True))
            return f(put(hidden, "batch", "time", None), put(head, "embed", "vocab"))

        mesh = lambda devices, **sizes: sharding.make_mesh(sharding.MeshConfig(**sizes), jax.devices()[:devices])
        (_, one), gradients = run(mesh(1))
        assert (np.asarray(one)[weights == 0] == 0).all() and np.ptp(one) > 1
        for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 2, "sequence": 4}):
            (_, several), others = run(mesh(8, **sizes))
            np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-6)
            for a, b in zip(others, gradients):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
