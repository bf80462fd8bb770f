"""A run of training, from its settings to the adapter."""

import fcntl
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllama.checkpoints.files import write_file
from mllama.data.ends import end_ids, missing_end
from mllama.data.labels import summarize
from mllama.lora.saving import save_lora
from mllama.train.figures import plot_curves, plot_samples
from mllama.train.log import NAME as LOG
from mllama.train.log import Log
from mllama.train.loop import Loop, checkpoints_of
from mllama.train.progress import TrainingProgress
from mllama.train.samples import answer_samples
from mllama.train.settings import TrainSettings, read_config
from mllama.train.setup import Setup, make_accelerator, set_up
from mllama.train.stopping import Stopping
from mllama.train.yaml_file import write_yaml

SETTINGS, TRACKERS = "settings.yaml", "trackers"
_LOOKED_AT = 4  # rows, for the end of their answers
# Keys that may change when a run is resumed: what is trained stays the same.
FREE = (
    "cache_features",
    "checkpoint",
    "device",
    "eval_every",
    "gradient_checkpointing",
    "keep",
    "log_every",
    "output",
    "run_name",
    "samples",
    "save_every",
    "trackers",
    "workers",
)


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        output: the run's folder.
        trained: the adapter's folder in PEFT's format, or the model's with method "full"; None if
            the run was stopped.
        step, steps: steps that were made, and all of the run.
        trained_tokens: labels of all steps.
        loss: of the last step.
        best_loss, best_step: of the best evaluation; `trained` is of that step. None without
            evaluations.
        signal: number of the signal that stopped the run, or None.
        bad_rows: what was wrong with each row that was skipped.
        seconds: how long this call took.
    """

    output: Path
    trained: Path | None
    step: int
    steps: int
    trained_tokens: int
    loss: float
    best_loss: float | None
    best_step: int | None
    signal: int | None
    bad_rows: list[str]
    seconds: float


def train(settings: TrainSettings, resume: bool = False) -> TrainResult:
    """Train, and write the adapter (with method "full" the model), the log, curves, samples and
    checkpoints to `settings.output`.

    On SIGINT (Ctrl-C) or SIGTERM the step is finished and a checkpoint written, and the result
    says so; a second signal ends the process. With several processes (torchrun, accelerate launch)
    every one calls this.

    Args:
        settings: as `load_settings` returns them.
        resume: continue the run in `settings.output` from its last checkpoint, or begin it if it
            has none. The result has the same bits as that of a run that was not interrupted.

    Raises:
        ImportError: a package that the settings need is missing.
        FileExistsError: the folder has a run, and resume is False.
        TypeError, ValueError, FileNotFoundError: model, data and settings do not fit each other;
            the run to resume has other settings; a step cannot be made (the error names it).
        OSError: the folder is in use by another process, or cannot be written.
    """
    started = time.perf_counter()
    output = Path(settings.output)
    accelerator, device = make_accelerator(settings)
    first = accelerator.is_main_process
    with _locked(output) if first else nullcontext(), Stopping() as stopping:
        if first:
            _check_output(output, settings, resume)
        accelerator.wait_for_everyone()
        setup = set_up(settings, accelerator, device)
        checkpoints = checkpoints_of(output)
        kept = checkpoints.steps()
        last = kept[-1] if kept else 0
        log = None
        if first:
            checkpoints.sweep()
            write_file(output / SETTINGS, lambda aside: write_yaml(aside, asdict(settings)))
            log = Log(output / LOG, until=last)
        progress = TrainingProgress(last, setup.course.steps, shown=first)
        _describe(setup, progress)
        if first:
            _warn_of_missing_end(setup, progress)
        loop = Loop(setup, checkpoints, log, progress, lambda step: _show(setup, output, step))
        _start_trackers(setup, output)
        try:
            if last:
                loop.load(last)
                progress.say(f"resumed after step {last}")
            loop.run(stopping)
        finally:
            progress.close()
            if log is not None and log.entries:
                plot_curves(log, output / "curves.png")
        state = loop.state
        finished = state.step == setup.course.steps
        trained = _write_result(setup, loop, output) if finished else None
        setup.close()
    return TrainResult(
        output=output,
        trained=trained,
        step=state.step,
        steps=setup.course.steps,
        trained_tokens=state.trained_tokens,
        loss=state.loss,
        best_loss=state.best_loss,
        best_step=state.best_step,
        # it may have reached another process alone
        signal=None if finished else stopping.signal or signal.SIGTERM.value,
        bad_rows=setup.bad_rows,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the folder, until the process ends at the latest.

    Raises:
        OSError: another process holds it, or it cannot be created.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"output {output} cannot be created: {error.strerror}") from error
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"output {output} is in use by another process") from None
        yield


def _check_output(output: Path, settings: TrainSettings, resume: bool) -> None:
    """Raise FileExistsError for a folder in use without `resume`, ValueError for other settings
    than those of the run to resume. One that has no checkpoint yet begins again, with any settings.
    """
    if not resume:
        if others := sorted(path.name for path in output.iterdir() if path.name != ".lock"):
            raise FileExistsError(
                f"output {output} is not empty (it has {others[0]}): resume the run in it "
                "(--resume), or name another folder"
            )
        return
    if not checkpoints_of(output).steps() or not (output / SETTINGS).exists():
        return  # it begins
    before, now = read_config(output / SETTINGS), _plain(asdict(settings))
    changed = [name for name in now if name not in FREE and before.get(name) != now[name]]
    if changed:
        shown = ", ".join(f"{name} (was {before.get(name)!r})" for name in changed)
        raise ValueError(
            f"the run in {output} has other settings, so it cannot be resumed with these: {shown}"
        )


def _plain(value: Any) -> Any:
    """A value as YAML reads it back."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _describe(setup: Setup, progress: TrainingProgress) -> None:
    course = setup.course
    if setup.settings.method == "full" or setup.settings.adapter is not None:  # adapt says its own
        count = sum(one.numel() for one in setup.parameters.values())
        progress.say(f"{count:,} parameters are trained")
    evaluated = f", {len(setup.eval_examples)} evaluated" if setup.eval_examples else ""
    skipped = f", {len(setup.bad_rows)} skipped" if setup.bad_rows else ""
    progress.say(
        f"{course.rows} rows{evaluated}{skipped}; {course.steps} steps of {course.per_step} rows, "
        f"{course.epoch(course.steps):.2f} epochs"
    )


def _warn_of_missing_end(setup: Setup, progress: TrainingProgress) -> None:
    given = setup.model.generation_config.eos_token_id
    ends = end_ids(given, setup.collator.tokenizer)
    summary = summarize(setup.examples, setup.collator, _LOOKED_AT, ends)
    if warning := missing_end(summary, setup.collator, ends):
        progress.say(warning)


def _start_trackers(setup: Setup, output: Path) -> None:
    settings = setup.settings
    if settings.trackers:
        config = {
            name: value if isinstance(value, (int, float, str)) else str(value)
            for name, value in asdict(settings).items()
        }
        name, folder = settings.run_name or output.name, output / TRACKERS
        folder.mkdir(exist_ok=True)
        # accelerate's name is the project's where there are projects: runs get random names
        own = {"wandb": {"name": name, "dir": str(folder)}, "trackio": {"name": name}}
        setup.accelerator.init_trackers(name, config, own)


def _show(setup: Setup, output: Path, step: int) -> None:
    """Write sample answers, after an evaluation."""
    count = setup.settings.samples
    first = setup.accelerator.is_main_process
    if count and (first or setup.settings.shard):  # all of them hold the weights
        rows = range(min(count, len(setup.eval_examples)))
        examples = [setup.eval_examples[row] for row in rows]
        found = answer_samples(setup.model, setup.processor, examples)
        if first:
            plot_samples(found, output / "samples" / f"step-{step:08}.png")
    setup.accelerator.wait_for_everyone()


def _write_result(setup: Setup, loop: Loop, output: Path) -> Path:
    """Write what was trained, of the best evaluation's step if there was one."""
    state = loop.state
    if state.best_step not in (None, state.step):
        loop.load_weights(state.best_step)
    setup.model.eval()
    folder = output / ("model" if setup.settings.method == "full" else "adapter")
    if setup.accelerator.is_main_process or setup.settings.shard:  # then the first one writes
        if setup.settings.method == "full":
            setup.model.save_pretrained(folder)
            if setup.accelerator.is_main_process:
                setup.processor.save_pretrained(folder)
        else:
            save_lora(setup.model, folder, format="peft")
    setup.accelerator.wait_for_everyone()
    return folder
