"""What a device holds falls with the devices along fsdp, in the compiled program."""

import os
import subprocess
import sys
import textwrap


def test_memory_a_device_falls_as_one_over_fsdp():
    """State and batch as 1/n; with what a step adds to them, of which a layer's gathered weights stay, nearly so."""
    program = """
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        from zoo import sharding
        from zoo.config import preset
        from zoo.training import step

        def sizes(fsdp):
            c = preset("tiny")
            c.model.mixer, c.model.num_layers, c.model.d_model, c.model.vocab_size = "mlp", 8, 128, 512
            c.train.batch_size, c.train.context_length, c.optimizer.name = 64, 256, "adamw"
            c.model.remat, c.mesh.data, c.mesh.fsdp = "full", 1, fsdp
            programs = step.build(c, sharding.make_mesh(c.mesh, jax.devices()[:fsdp]))
            batch = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=programs.batch_sharding)
                for name, x in step.abstract_batch(c).items()
            }
            memory = programs.train.lower(programs.abstract_state, batch).compile().memory_analysis()
            return memory.argument_size_in_bytes, memory.argument_size_in_bytes + memory.temp_size_in_bytes

        (few, all_of_few), (many, all_of_many) = sizes(2), sizes(8)
        print(few, many, all_of_few, all_of_many)
        assert abs(few / many / 4 - 1) < 0.01, (few, many)
        assert all_of_few / all_of_many > 3.5, (all_of_few, all_of_many)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
