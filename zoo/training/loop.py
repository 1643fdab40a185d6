"""A run from start, or from its newest checkpoint, to its last step.

The order within a step matters. The step is dispatched, then the metrics of the one before are read, so that the device
never waits for a log line. Where a step is evaluated or saved, its own metrics are read first: a state whose loss,
gradient or parameters are not finite is never saved. Evaluation comes before saving, for its loss ranks the checkpoint.

What the next process needs to continue bit by bit is the state, the step (which fixes batch and dropout), and the
losses since the last row; the checkpoint holds them, beside the config and the fingerprints of what it was trained on.

Several processes do the same steps: what decides the next is the same on all, or agreed on. The first one writes.
"""

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import jax

from zoo import config as zoo_config
from zoo import data, files, flops, heads, memory, metrics, processes, sharding
from zoo.checkpoints import Checkpointer, SaveError
from zoo.config import Config
from zoo.errors import RunError
from zoo.training import placement, report
from zoo.training import workdir as workdirs
from zoo.training.progress import ProgressLine
from zoo.training.signals import StopSignal
from zoo.training.start import first_state, teacher
from zoo.training.step import abstract_batch, build

OVERRIDES = "overrides.jsonl"  # one line a change: {"step": 40, "optimizer.learning_rate": [0.003, 0.001]}
_SAME_COMMAND = "Give all processes the same command and packages; --num_processes=1 trains each alone"
PROFILE_SKIP = 2  # steps before the trace begins: the first ones warm caches up


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    init_from: str = "",
    profile_steps: int = 0,
    override: Sequence[str] = (),
) -> dict[str, Any]:
    """Train until `config.train.steps`, continuing what stands in `workdir`.

    Args:
      init_from: workdir of a run whose weights a new run starts from; its optimizer and step are left behind.
      profile_steps: trace that many steps into WORKDIR/profile (jax.profiler); 0: none.
      override: settings, such as optimizer.learning_rate, in which the config may differ from the one that the run in
        `workdir` was trained with so far; noted in WORKDIR/overrides.jsonl.

    Returns:
      What WORKDIR/summary.json then holds, or {"stopped_at": step} after SIGTERM, SIGHUP or Ctrl-C. On all of several
      processes, each of which calls it with the same arguments, in `zoo.processes.joined`.

    Raises:
      UsageError: what is asked for cannot be done; nothing was compiled.
      RunError: a loss, gradient or parameter that is not finite, or a file of the run that could not be written. After
        a checkpoint that could not be (SaveError), threads of Orbax keep the process for minutes: leave by `os._exit`.
    """
    processes.require_joined()
    asked = {"--workdir": str(workdir), "--init_from": init_from, "--override": list(override), "jax": jax.__version__}
    processes.agree("settings", asked | zoo_config.leaves(config), _SAME_COMMAND)
    run = workdirs.prepare(config, workdir, override, init_from)
    with run.lock:
        placement.check(run.config, jax.device_count())
        mesh = sharding.make_mesh(run.config.mesh)
        programs = build(run.config, mesh)
        of_teacher = programs.distillation and programs.distillation.config.model
        memory.check_training(run.config, mesh, of_teacher, programs.optimizer_bytes)
        data.tokenize(run.data_config)
        # Opened once: what happens to the text from here on means nothing to this process.
        dataset = data.training_dataset(run.data_config, programs.rows(run.config.train.batch_size))
        validation = data.validation_batches(run.data_config)
        validation = validation.only(programs.rows(validation.batch_size))
        info = data.corpus_info(run.data_config) if processes.is_first() else {}
        trained_on = {
            "data": dataset.fingerprint,
            "validation_data": validation.fingerprint,
            "tokenizer": data.tokenizer.load(run.data_config.data.tokenizer).fingerprint,
        }
        frozen, trained_on["teacher"] = teacher(run, programs.distillation)
        processes.agree("fingerprints", trained_on, "Give all processes the same text and tokenizer")
        kept = run.config.checkpoint
        with contextlib.ExitStack() as stack:
            checkpointer = Checkpointer(run.workdir / "checkpoints", keep_last=kept.keep_last, keep_best=kept.keep_best)
            stack.callback(checkpointer.close)
            state, progress = first_state(run, programs, checkpointer, trained_on, init_from)
            checkpointer.prune()  # a lower keep_last makes room before the next save needs it
            loop = _Loop(run, mesh, programs, checkpointer, dataset, validation, state, progress, frozen)
            stack.callback(loop.close)
            loop.catch_up()
            if processes.is_first():
                loop.announce(info)
                loop.note({"corpus": info})  # which runs compare, while they still train
            loop.compile()  # a signal until here ends the process at once: there is nothing to save
            with StopSignal() as stop:
                loop.run(stop, profile_steps)
                if not stop.before(run.config.train.steps + 1):
                    return loop.finish(info, init_from)
                checkpointer.wait()
                done = f"saved at step {loop.step}" if loop.step else "stopped before the first step"
                loop.progress.say(f"{stop.name}: {done}; repeat the command to continue")
                return {"stopped_at": loop.step}


class _Loop:
    """The state of a run between steps."""

    def __init__(self, run, mesh, programs, checkpointer, dataset, validation, state, progress, frozen):
        self.config, self.workdir = run.config, run.workdir
        self.mesh, self.programs, self.checkpointer = mesh, programs, checkpointer
        self.dataset, self.validation = dataset, validation
        self.state, self.frozen = state, frozen
        self.step = int(state.step)
        self.step_fn: Any = None
        self.saved_step = self.step
        self.tracing = False
        self.tokens_per_step = self.config.train.batch_size * self.config.train.context_length
        self.seconds: float = progress["seconds"]  # of training, before `clock_start`
        self.losses: list[float] = progress["losses"]  # of the steps since the last row
        self.row_seconds, self.row_step = self.seconds, self.step  # where tokens/s is counted from
        self.clock_start: float | None = None
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.resumes_from = progress
        self.last_rows: dict[str, metrics.Row] = {"loss": {}, "eval_loss": {}}  # of training, and of an evaluation
        writes = processes.is_first()
        self.writer = metrics.Writer(self.workdir, self.config, self.step) if writes else metrics.NoWriter()
        self.progress = ProgressLine(self.step, self.config.train.steps, silent=not writes)
        labels = data.labels(self.config, training=True)
        of_step = self.config.model, self.config.train.context_length, labels
        counted = programs.distillation.flops_per_token if programs.distillation else flops.train_flops_per_token
        self.flops_per_token = counted(*of_step)
        peak = flops.peak_flops(mesh.devices.flat[0])
        self.peak_flops = peak and peak * mesh.size  # of all devices; None: unknown

    def catch_up(self) -> None:
        """Write what the process before could not, and what was changed since it."""
        if not processes.is_first():
            return
        present = metrics.read(self.workdir)
        for row in present:
            self._remember(row)
        for row in self.resumes_from["unwritten"]:
            if row not in present:
                self._write(row)
        lines = [json.dumps(override) + "\n" for override in self.resumes_from["overrides"]]
        if lines:
            files.write(self.workdir / OVERRIDES, "".join(lines))
        else:
            (self.workdir / OVERRIDES).unlink(missing_ok=True)

    def announce(self, info: dict[str, Any]) -> None:
        epochs = self.config.train.steps * self.tokens_per_step / self.dataset.tokens_per_epoch
        overrides = self.resumes_from["overrides"]
        for line in report.beginning(self.config, self.mesh, info, epochs, self.step, overrides):
            self.progress.say(line)

    def compile(self) -> None:
        """The training step, if there is one to do."""
        if self.step >= self.config.train.steps:
            return
        start = time.perf_counter()
        shapes = self.programs.abstract_state, abstract_batch(self.config), *self.programs.abstract_teacher
        self.step_fn = self.programs.train.lower(*shapes).compile()
        self.progress.say(f"compiled    the training step in {time.perf_counter() - start:.1f} s")

    def run(self, stop: StopSignal, profile_steps: int) -> None:
        """Steps until the last one or until `stop`, with what is due after each; leaves the last one saved."""
        if self.step >= self.config.train.steps:
            return
        try:
            self._steps(stop, profile_steps)
        except files.WriteError as error:
            if processes.count() > 1:  # the others know nothing of it, and cannot be made to save
                raise RunError(f"{error}. Mend that, then repeat the command") from error
            raise self._after_failed_write(error) from error

    def _steps(self, stop: StopSignal, profile_steps: int) -> None:
        steps = self.config.train.steps
        batches = self.dataset.iterator(self.step)
        trace_from = self.step + PROFILE_SKIP
        try:
            self._start_clock()
            while self.step < steps and not stop.before(self.step + 1):
                if profile_steps and processes.is_first() and self.step == trace_from:
                    self._start_trace()
                self._dispatch(batches)
                if self.tracing and self.step == trace_from + profile_steps:
                    self._stop_trace()
                last = self.step == steps
                evaluate = last or _due(self.config.eval.every, self.step)
                save = last or _due(self.config.checkpoint.every, self.step)
                if evaluate or save:
                    self._read_pending()
                    self._stop_clock()
                    # What ranks a checkpoint is measured on the same batches each time.
                    loss = self._evaluate(self.config.eval.batches, shown=not last or self._final) if evaluate else None
                    if save:
                        self._save(loss)
                    self._start_clock()
                self.checkpointer.check()
            if self.step != self.saved_step:
                self._read_pending()
                self._save(None)
            self._stop_clock()
        finally:
            batches.close()
            if self.tracing:
                self._stop_trace()

    def _after_failed_write(self, error: files.WriteError) -> RunError:
        """Save the state, rows that could not be written included; what to tell of it."""
        try:
            with contextlib.suppress(files.WriteError):
                self._read_pending()
            self._stop_clock()
            if self.step != self.saved_step:
                self._save_state(None)
            self.checkpointer.wait()
        except SaveError as failed:
            return SaveError(f"{error}; {failed}")
        return RunError(f"{error}; the state of step {self.step} is saved. Mend that, then repeat the command")

    def finish(self, info: dict[str, Any], init_from: str) -> dict[str, Any]:
        """The checkpoint on disk, then loss.png and summary.json."""
        self.checkpointer.wait()
        if processes.broadcast(self.last_rows["eval_loss"].get("step") != self.step):
            self._evaluate(self.config.eval.final_batches)
        return processes.broadcast(self._summary(info, init_from) if processes.is_first() else None)

    def _summary(self, info: dict[str, Any], init_from: str) -> dict[str, Any]:
        last, evaluation = self.last_rows["loss"], self.last_rows["eval_loss"]
        table = data.table_figures(self.dataset, self.validation, self.step)
        summary = {
            "step": self.step,
            "loss": last.get("loss"),
            "eval_loss": evaluation.get("eval_loss"),
            "unit": heads.of(self.config.model).unit,  # of both
            "eval_bits_per_byte": evaluation.get("eval_bits_per_byte"),
            "eval_accuracy": evaluation.get("eval_accuracy"),
            "eval_tokens": evaluation.get("eval_tokens"),
            **{name: value for name, value in evaluation.items() if name in ("eval_mae", "eval_rows")},
            "gzip_bits_per_byte": info["gzip_bits_per_byte"],
            **table,
            "tokens": self.step * self.tokens_per_step,
            "seconds": self.seconds,
            "tokens_per_second": last.get("tokens_per_second"),
            "mfu": last.get("mfu"),
            "parameters": flops.num_parameters(self.config.model),
            "corpus": info,
            "init_from": init_from,
            "device": report.device(self.mesh),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "sequence-zoo")},
        }
        self.note(summary)
        self.writer.plot()
        for line in report.end(summary, self.workdir):
            self.progress.say(line)
        return summary

    def note(self, summary: dict[str, Any]) -> None:
        """Put these into summary.json; of a resumed run, beside what stood there."""
        path, before = self.workdir / "summary.json", {}
        if self.step:
            with contextlib.suppress(OSError, ValueError):
                before = files.read_json(path, metrics.LARGEST_SUMMARY)
        files.write(path, files.to_json((before if isinstance(before, dict) else {}) | summary, indent=2) + "\n")

    def close(self) -> None:
        self.progress.close()
        self.writer.close()

    def _dispatch(self, batches: Iterator[data.rows.Batch]) -> None:
        batch = self.programs.put(next(batches), self.config.train.batch_size)
        with jax.transfer_guard("disallow"):  # nothing goes to or from the device but the batch
            self.state, step_metrics = self.step_fn(self.state, batch, *self.frozen)
        self.step += 1
        before, self.pending = self.pending, (self.step, step_metrics)
        self._read(before)

    def _read_pending(self) -> None:
        before, self.pending = self.pending, None
        self._read(before)

    def _read(self, dispatched: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Wait for the metrics of a step, stop if they are not finite, and write a row where one is due."""
        if dispatched is None:
            return
        step, values = dispatched
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        processes.done()
        bad = [name for name in ("loss", "grad_norm", "parameter_norm") if not math.isfinite(values[name])]
        if bad:
            raise self._not_finite(step, ", ".join(f"{name} = {values[name]}" for name in bad))
        self.losses.append(values["loss"])
        self.progress.step(step)
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            seconds = self._seconds()
            per_step = (seconds - self.row_seconds) / (step - self.row_step)
            speed = self.tokens_per_step / per_step
            row = values | {
                "step": step,
                "loss": math.fsum(self.losses) / len(self.losses),
                "tokens": step * self.tokens_per_step,
                "tokens_per_second": speed,
                "mfu": self.peak_flops and speed * self.flops_per_token / self.peak_flops,
                "seconds": seconds,
            }
            self.losses, self.row_seconds, self.row_step = [], seconds, step
            self._write(row)
            self.progress.row(row, seconds_per_step=per_step)

    def _not_finite(self, step: int, what: str) -> RunError:
        self.checkpointer.wait()
        steps = self.checkpointer.steps()
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint had been written"
        go_on = "Go on from it with a lower optimizer.learning_rate (and --override=optimizer.learning_rate), or in"
        return RunError(
            f"{what} at step {step}; {kept}. {go_on if steps else 'In'} a new --workdir, lower optimizer.learning_rate "
            "or optimizer.clip_norm, or lengthen the warm-up"
        )

    def _write(self, row: metrics.Row) -> None:
        self.writer.write(row)
        self._remember(row)

    def _remember(self, row: metrics.Row) -> None:
        for name in self.last_rows:
            if row.get(name) is not None:
                self.last_rows[name] = row

    @property
    def _final(self) -> bool:
        """Whether the evaluation of the last step is of the batches of all others."""
        return self.config.eval.batches == self.config.eval.final_batches

    def _evaluate(self, max_batches: int, shown: bool = True) -> float:
        """The head's loss on so many validation batches (0: all), `shown` as a row of metrics."""
        totals: list[dict[str, jax.Array]] = []
        for batch in self.validation.at_most(max_batches):
            batch = self.programs.put(batch, self.validation.batch_size)
            totals.append(self.programs.evaluate(self.state.params, batch))
            totals[-2:-1] = jax.device_get(totals[-2:-1])  # one late: the device never waits
            processes.done()
        totals = jax.device_get(totals)
        sums = {name: math.fsum(float(t[name]) for t in totals) for name in totals[0]}
        figures = heads.of(self.config.model).figures(sums)
        loss = figures["eval_loss"]
        if not math.isfinite(loss):
            raise self._not_finite(self.step, f"validation loss = {loss}")
        row = {"step": self.step, **figures, "tokens": self.step * self.tokens_per_step, "seconds": self.seconds}
        if shown:
            self._write(row)
            self.progress.row(row)
            self.writer.plot()
        return loss

    def _save(self, loss: float | None) -> None:
        self.writer.sync()
        self._save_state(loss)

    def _save_state(self, loss: float | None) -> None:
        progress = {"seconds": self.seconds, "losses": self.losses, "unwritten": self.writer.unwritten}
        self.checkpointer.save(self.step, self.state, loss=loss, meta=self.resumes_from | progress)
        processes.done()
        self.saved_step = self.step

    def _start_trace(self) -> None:
        jax.block_until_ready(self.state)
        jax.profiler.start_trace(str(self.workdir / "profile"))
        self.tracing = True

    def _stop_trace(self) -> None:
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()
        self.tracing = False
        self.progress.say(f"profile     {self.workdir / 'profile'}")

    def _start_clock(self) -> None:
        self.clock_start = time.perf_counter()

    def _stop_clock(self) -> None:
        self.seconds, self.clock_start = self._seconds(), None

    def _seconds(self) -> float:
        return self.seconds + (time.perf_counter() - self.clock_start if self.clock_start is not None else 0.0)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
