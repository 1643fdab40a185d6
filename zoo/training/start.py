"""The state that a run begins with: its newest checkpoint's, another run's weights, or fresh ones."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from zoo import checkpoints, data, files, linearize, processes, sharding
from zoo.checkpoints import Checkpointer
from zoo.config import Config, ModelConfig
from zoo.errors import UsageError, warn
from zoo.model import LanguageModel
from zoo.training import placement
from zoo.training import workdir as workdirs
from zoo.training.step import Programs, TrainState, abstract_model


def first_state(
    run: workdirs.Run, programs: Programs, checkpointer: Checkpointer, trained_on: dict[str, str], init_from: str
) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint's state, else another run's weights, else fresh ones; and what was saved beside it."""
    config = {"config": dataclasses.asdict(run.config)}
    fresh = {"seconds": 0.0, "losses": [], "overrides": [], "unwritten": []} | trained_on | config
    checkpoint = checkpointer.restore(programs.abstract_state)
    if checkpoint is not None:
        _check_data(run, checkpoint.meta, trained_on)
        if checkpoint.state.opt is None:  # imported weights, which nothing was done with yet
            return programs.init_opt(checkpoint.state.params), fresh | checkpoint.meta | trained_on | config
        changed = workdirs.changes(workdirs.trained_config(run.workdir, checkpoint.meta), run.config)
        overrides = list(checkpoint.meta.get("overrides", []))
        if changed:
            overrides.append({"step": checkpoint.step} | changed)
        return checkpoint.state, fresh | checkpoint.meta | trained_on | config | {"overrides": overrides}
    if not init_from:
        return programs.init(), fresh
    return _from_another_run(run, programs, init_from), fresh


def _check_data(run: workdirs.Run, meta: dict[str, Any], trained_on: dict[str, str]) -> None:
    """UsageError if the text is not what the checkpoint was trained on."""
    if trained_on["teacher"] != meta.get("teacher", trained_on["teacher"]):
        raise UsageError(
            f"train.distill.teacher: its newest checkpoint is not the one that {run.workdir} has learnt from; keep a "
            "teacher as it is, or choose another --workdir"
        )
    for name, what in (("data", "text"), ("validation_data", "validation text")):
        now, then = trained_on[name], meta.get(name, trained_on[name])
        if now != then and not (name == "validation_data" and "data.validation_source" in run.override):
            raise UsageError(
                f"data.source: the {what} is not the one that {run.workdir} was trained with (fingerprint "
                f"{now[:16]}, then {then[:16]}); restore it, or choose another --workdir"
            )


def _from_another_run(run: workdirs.Run, programs: Programs, init_from: str) -> TrainState:
    """Its parameters as they are, or, of other mixers, as far as those here take over from them."""
    workdir, config = pathlib.Path(files.expand(init_from)), checkpoints.read_config(init_from)
    where = f"--init_from={init_from}"
    _check_tokenizer(where, workdir, config, run)
    models, anew = (abstract_model(config), abstract_model(run.config)), _of_its_own(config.model, run.config.model)
    as_it_is, transfer = linearize.same_parameters(*models, anew), None
    if not as_it_is:
        placement.check_other(where, run.config, config.model, jax.device_count())
        context = config.train.context_length
        transfer = linearize.Transfer(where, config.model, run.config.model, models, context, anew)
    other = checkpoints.load_run(workdir, _newest_step(workdir), _shardings(models[0], programs, as_it_is, anew))
    step, its_model = other.step, other.config.model
    if processes.is_first():
        _carry_origin(workdir, run.workdir)
        loss = checkpoints.evaluation_loss(init_from, step)
        evaluated = "" if loss is None else f", validation loss {loss:.4f}"
        parts = f"; made anew: {', '.join(anew)}" if anew else ""
        print(f"init_from   {init_from}, step {step}{evaluated}, {its_model.mixer}{parts}", flush=True)
        different = workdirs.model_difference(its_model, run.config.model)
        if transfer is not None:
            print(*(f"            {line}" for line in transfer.lines()), sep="\n", flush=True)
            different = [name for name in different if not name.startswith(("model.mixer:", "model.d_ff:"))]
        if different:
            warn(
                f"{where}: its weights were trained with other settings of the model, which shapes do "
                f"not show: {'; '.join(different)} (there -> here)"
            )
    params = nnx.state(other.model, nnx.Param)
    if transfer is not None:
        return programs.init_opt(_transferred(transfer, params, programs))
    if not anew:
        return programs.init_opt(params)
    fresh = programs.init().params
    named, loaded = checkpoints.named_leaves(fresh), checkpoints.named_leaves(params)
    kept = {name: loaded[name] for name in named if not name.startswith(anew)}
    return programs.init_opt(checkpoints.with_leaves(fresh, named | kept))


def _of_its_own(there: ModelConfig, here: ModelConfig) -> tuple[str, ...]:
    """Beginnings of the parameters that a model does not take from one with another head: the head, and the embedding
    where one reads numbers."""
    if there.head == here.head:
        return ()
    return ("head.",) if not (there.channels or here.channels) else ("embed.", "head.")


def _shardings(
    model: LanguageModel, programs: Programs, as_it_is: bool, anew: tuple[str, ...]
) -> dict[str, NamedSharding]:
    """Where another run's parameters go: where this run's are, or by their own axes."""
    if as_it_is:
        wanted = checkpoints.named_leaves(programs.abstract_state.params)
        return {name: x.sharding for name, x in wanted.items() if not name.startswith(anew)}
    params = nnx.state(model, nnx.Param)
    specs = sharding.parameter_specs(params)
    return {name: NamedSharding(programs.batch_sharding.mesh, spec) for name, spec in specs.items()}


def _transferred(transfer: linearize.Transfer, params: nnx.State, programs: Programs) -> nnx.State:
    mesh, wanted = programs.batch_sharding.mesh, programs.abstract_state.params

    def made(params, fresh):
        with sharding.use_mesh(mesh):
            return transfer(params, fresh)

    shardings = jax.tree.map(lambda x: x.sharding, wanted)
    return jax.jit(made, out_shardings=shardings)(params, programs.init().params)


def teacher(run: workdirs.Run, distillation: linearize.Distillation | None) -> tuple[tuple[nnx.State, ...], str]:
    """The parameters that the steps take beside the state, of the newest checkpoint, and their fingerprint.

    Raises:
      UsageError: its tokenizer is another one, or it has no undamaged checkpoint.
    """
    if distillation is None:
        return (), ""
    workdir = pathlib.Path(files.expand(distillation.settings.teacher))
    where = f"train.distill.teacher={workdir}"
    _check_tokenizer(where, workdir, distillation.config, run)
    placement.check_other(where, run.config, distillation.config.model, jax.device_count())
    shardings = {name: x.sharding for name, x in checkpoints.named_leaves(distillation.loaded).items()}
    found = checkpoints.load_run(workdir, _newest_step(workdir), shardings)
    if processes.is_first():
        print(f"teacher     {workdir}, step {found.step}, {found.config.model.mixer}", flush=True)
    held = jax.jit(distillation.held, donate_argnums=0)
    return (held(nnx.state(found.model, nnx.Param)),), found.fingerprint


def _check_tokenizer(where: str, workdir: pathlib.Path, config: Config, run: workdirs.Run) -> None:
    tokenizers = data.tokenizer.for_run(workdir, config), data.tokenizer.load(run.data_config.data.tokenizer)
    if tokenizers[0].fingerprint != tokenizers[1].fingerprint:
        raise UsageError(f"{where}: its tokenizer is another one; set data.tokenizer to the one it has")


def _carry_origin(source: pathlib.Path, workdir: pathlib.Path) -> None:
    """What imported weights came with: an export of this run hands it on."""
    if (source / checkpoints.ORIGIN).is_dir() and not (workdir / checkpoints.ORIGIN).exists():
        try:
            shutil.copytree(files.inside(source / checkpoints.ORIGIN), workdir / checkpoints.ORIGIN, symlinks=True)
        except OSError as error:  # shutil's own among them
            raise UsageError(f"--init_from={source}: its {checkpoints.ORIGIN} cannot be copied ({error})") from error


def _newest_step(workdir: pathlib.Path) -> int | None:
    """That several processes load; None: `load_run` looks for it."""
    if processes.count() == 1:
        return None
    steps = checkpoints.complete_steps(workdir / "checkpoints")
    return processes.broadcast(steps[-1] if steps else None)
