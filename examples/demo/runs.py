"""Starts a Ray Train run in the background and follows it by its events."""

import threading
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

import tiered
from examples.demo.events import Event, EventReader, EventWriter
from examples.demo.train import TrainSettings, as_config, train_func

WORKERS = 3
MAX_FAILURES = 3
SLOT_LABEL = "demo-slot"


def slot_labels() -> list[dict[str, str]]:
    """The Ray node labels of the workers' hosts, in order; the spare host has none."""
    return [{SLOT_LABEL: str(slot)} for slot in range(WORKERS)]


class NoteFailure(UserCallback):
    """Notes when Ray Train's controller sees that a worker failed: that is when it acts."""

    def __init__(self, events_folder: str) -> None:
        self._events_folder = events_folder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by the controller, in its own process, before it ends the other workers."""
        with EventWriter(self._events_folder) as events:
            events.write(
                "failed",
                errors={str(rank): repr(error)[:300] for rank, error in worker_exceptions.items()},
            )


class TrainRun:
    """One run of the job on the cluster that this process is connected to.

    Args:
        name: Of the run, and of its folder for Ray Train.
        settings: What to train; its events folder is made if need be.
        storage: Where Ray Train keeps its own few files.
        keeps_hosts: Each rank runs on the host of its own slot, and comes back to it after a
            failure. Otherwise Ray Train chooses anew, the spare host being as good as any other.
    """

    def __init__(
        self, name: str, settings: TrainSettings, storage: Path, *, keeps_hosts: bool = False
    ) -> None:
        self.name = name
        self.settings = settings
        self.events: list[Event] = []
        self.writer_folder = Path(settings.events_folder)
        self.writer_folder.mkdir(parents=True, exist_ok=True)
        self._storage = storage
        self._slots = slot_labels() if keeps_hosts else None
        self._reader = EventReader(self.writer_folder)
        self._error: BaseException | None = None
        # A daemon, so that a Ctrl-C, which only the main thread sees, ends the demo at once.
        self._thread = threading.Thread(target=self._fit, name=f"fit-{name}", daemon=True)

    def start(self) -> None:
        """Submit the run to the cluster; returns at once."""
        self._thread.start()

    def poll(self) -> list[Event]:
        """The events since the last call, which are also appended to `events`."""
        new = self._reader.read_new()
        self.events.extend(new)
        return new

    @property
    def is_running(self) -> bool:
        """Whether Ray Train is still at it."""
        return self._thread.is_alive()

    def raise_if_failed(self) -> None:
        """Raise what `TorchTrainer.fit` raised, if it did; to be called after the run."""
        if self._error is not None:
            raise RuntimeError(f"the {self.name} run failed: {self._error}") from self._error

    def _callbacks(self) -> list[Any]:
        """What watches the run; without checkpoints there is nothing for tiered to do."""
        watch: list[Any] = [NoteFailure(self.settings.events_folder)]
        if self.settings.job:
            # No warm spares: all hosts are one small machine, which would be busy with importing
            # torch for them until the run is over.
            watch.append(tiered.ray_train.Callback(self.settings.job, warm_spares=False))
        return watch

    def _fit(self) -> None:
        trainer = TorchTrainer(
            train_func,
            train_loop_config=as_config(self.settings),
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(
                num_workers=WORKERS,
                resources_per_worker={"CPU": 1},
                placement_strategy="STRICT_SPREAD",
                label_selector=self._slots,  # type: ignore[call-arg] # typed as the older Train
            ),
            run_config=RunConfig(
                name=self.name,
                storage_path=str(self._storage),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                callbacks=self._callbacks(),  # type: ignore[arg-type]
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 -- handed to the main thread
            self._error = error
