# SPDX-License-Identifier: Apache-2.0
"""Runs lerobot's own training function, and watches it: each step's loss, each checkpoint, the held-out loss."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from clp_ros.core import processes
from clp_ros.core.errors import ClpError
from clp_ros.policies.patched import patched

if TYPE_CHECKING:
    from torch import nn

_HELD_OUT = re.compile(r"step (\d+): eval_loss=(\S+)")


class TrainingObserver(ABC):
    """Receives what happens in a training. The methods are called in the training's thread; an exception ends it."""

    @abstractmethod
    def policy_made(self, policy: nn.Module) -> None:
        """lerobot has made the policy. The trainable parameters may be changed."""

    @abstractmethod
    def training_begins(self, policy: nn.Module) -> None:
        """The first step of this process is about to be done with this policy, which may have adapters."""

    @abstractmethod
    def step_done(self, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """A step is done."""

    @abstractmethod
    def held_out(self, step: int, loss: float) -> None:
        """The mean loss on the held-out episodes after ``step`` steps."""

    @abstractmethod
    def saving(self, folder: Path, step: int, policy: nn.Module) -> contextlib.AbstractContextManager[Path]:
        """Yields the folder into which the checkpoint for ``folder`` is written."""


def supports_held_out() -> bool:
    """Whether the installed lerobot can hold out episodes."""
    from lerobot.configs.default import DatasetConfig

    return "eval_split" in DatasetConfig.__dataclass_fields__


def supports_exact_resume() -> bool:
    """Whether the installed lerobot resumes the order of the frames, and so comes to the weights of one run."""
    import lerobot.scripts.lerobot_train as script

    return hasattr(script, "compute_sampler_state")


def run_lerobot_train(arguments: Sequence[str], observer: TrainingObserver, log: Path) -> None:
    """Runs ``lerobot-train`` with these arguments in this process.

    One training runs in a process at a time: lerobot reads the arguments from ``sys.argv``.

    Args:
        arguments: The command's arguments.
        observer: Watches the training.
        log: File to which lerobot's log is appended; of the first process only.

    Raises:
        ClpError: lerobot refuses an argument, or the training fails.
    """
    import lerobot.scripts.lerobot_train as script
    from lerobot.utils.import_utils import register_third_party_plugins

    hooks = _Hooks(script, observer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_logging_to(log, hooks.log_record))
        stack.enter_context(patched(sys, argv=["lerobot-train", *arguments]))
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(_open(log))))
        stack.enter_context(patched(script, **hooks.functions()))
        if processes.world_size() > 1:
            stack.enter_context(_keep_process_group())
        try:
            register_third_party_plugins()
            script.train()
        except SystemExit as error:
            raise ClpError(
                "lerobot refuses an option", where="lerobot-train", hint="its message above names the option"
            ) from error
        except Exception as error:  # lerobot, draccus, datasets and torch raise many kinds
            if isinstance(error, ClpError) or hooks.raised is error:
                raise
            text = str(error).strip().split("\n", 1)[0]
            raise ClpError(
                f"lerobot's training failed ({type(error).__name__}: {text})",
                where="lerobot-train",
                hint=f"see {log} and the traceback in it",
            ) from _logged(error)


class _Hooks:
    """The functions of lerobot's script that are wrapped, for the time of a training."""

    def __init__(self, script: Any, observer: TrainingObserver) -> None:
        self._script = script
        self._observer = observer
        self._has_begun = False
        self._random_state: Any = None
        self._is_within_epoch = False
        self.raised: BaseException | None = None

    def functions(self) -> dict[str, Any]:
        make, update = self._script.make_policy, self._script.update_policy
        save, tqdm = self._script.save_checkpoint, self._script.tqdm
        load = self._script.load_training_state
        compute_state = getattr(self._script, "compute_sampler_state", None)

        def make_policy(*args: Any, **kwargs: Any) -> Any:
            policy = make(*args, **kwargs)
            with self._observing():
                self._observer.policy_made(policy)
            return policy

        def update_policy(metrics: Any, policy: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._has_begun:
                self._has_begun = True
                with self._observing():
                    self._observer.training_begins(kwargs["accelerator"].unwrap_model(policy))
                self._restore_random_state()
            result = update(metrics, policy, *args, **kwargs)
            loss = float(metrics.loss.val)
            with self._observing():
                if not math.isfinite(loss):
                    raise ClpError(
                        f"the loss is {loss}", where="fine-tuning", hint="lower the learning rate, or check the dataset"
                    )
                self._observer.step_done(loss, float(metrics.lr.val), float(metrics.grad_norm.val))
            return result

        def save_checkpoint(*, checkpoint_dir: Path, step: int, policy: Any, **kwargs: Any) -> None:
            # Not in self._observing(): an error of lerobot's may pass through.
            with self._observer.saving(Path(checkpoint_dir), step, policy) as folder:
                save(checkpoint_dir=folder, step=step, policy=policy, **kwargs)

        def load_training_state(*args: Any, **kwargs: Any) -> Any:
            from lerobot.utils.random_utils import get_rng_state

            loaded = load(*args, **kwargs)
            self._random_state = get_rng_state()
            return loaded

        def compute_sampler_state(*args: Any, **kwargs: Any) -> Any:
            assert compute_state is not None
            state = compute_state(*args, **kwargs)
            self._is_within_epoch = state["start_index"] > 0
            return state

        return {
            **({} if compute_state is None else {"compute_sampler_state": compute_sampler_state}),
            "load_training_state": load_training_state,
            "make_policy": make_policy,
            "update_policy": update_policy,
            "save_checkpoint": save_checkpoint,
            "init_logging": lambda *args, **kwargs: None,
            "tqdm": lambda *args, **kwargs: tqdm(*args, **{**kwargs, "disable": True}),
        }

    def _restore_random_state(self) -> None:
        """Restores the random state of a resumed run's checkpoint before the first step.

        A new iterator over the frames draws a number. A run that was not interrupted draws it at the beginning of an
        epoch only, so that the noise and times of a resumed one would be others.
        """
        if self._random_state is not None and self._is_within_epoch:
            from lerobot.utils.random_utils import set_rng_state

            set_rng_state(self._random_state)

    def log_record(self, record: logging.LogRecord) -> None:
        """Finds the held-out loss, which lerobot only logs."""
        if isinstance(record.msg, str) and (match := _HELD_OUT.fullmatch(record.msg)):
            with self._observing():
                self._observer.held_out(int(match[1]), float(match[2]))

    @contextlib.contextmanager
    def _observing(self) -> Iterator[None]:
        """Notes an exception of the observer, which may be a caller's way to cancel, and which is passed on."""
        try:
            yield
        except BaseException as error:
            self.raised = error
            raise


class _CallHandler(logging.Handler):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self._call = call

    def handle(self, record: logging.LogRecord) -> bool:
        self._call(record)  # not emit(), around which logging suppresses exceptions
        return True


@contextlib.contextmanager
def _logging_to(log: Path, call: Any) -> Iterator[None]:
    """Sends all log records and warnings to a file and to ``call``, in the place of the handlers that were there."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    handlers: list[logging.Handler] = [_CallHandler(call)]
    if processes.rank() == 0:
        file = logging.FileHandler(log, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    root.handlers[:] = handlers
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
        for handler in handlers:
            handler.close()


@contextlib.contextmanager
def _keep_process_group() -> Iterator[None]:
    """Leaves the process group open when the training ends, because the job's processes still wait for each other."""
    from accelerate import Accelerator

    with patched(Accelerator, end_training=lambda self: None):
        yield


def _open(log: Path) -> TextIO:
    """Opens the file for what lerobot prints."""
    return log.open("a", encoding="utf-8") if processes.rank() == 0 else Path(os.devnull).open("w", encoding="utf-8")


def _logged(error: Exception) -> Exception:
    """Writes the traceback into the log."""
    logging.getLogger(__name__).error("the training failed", exc_info=error)
    return error
