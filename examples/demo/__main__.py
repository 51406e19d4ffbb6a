"""The command: starts everything, does both runs, stops everything, reports."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from chaos.local_cluster import MIB, LocalCluster
from chaos.s3_server import S3Server
from examples.demo import report
from examples.demo.events import Event, EventWriter, sort_by_time, write_history
from examples.demo.facts import Facts, summarize
from examples.demo.faults import LEAST_STEPS, SETTLE_STEP, FaultKind, is_time, strike
from examples.demo.runs import WORKERS, TrainRun, slot_labels
from examples.demo.screen import Screen, own_terminal
from examples.demo.train import TrainSettings

HOSTS = WORKERS + 1  # one spare
STORE_BYTES = 700 * MIB
BUCKET = "checkpoints"
JOB = "demo"
POLL_S = 0.05
SILENCE_LIMIT_S = 120.0
INTERRUPTED = 130
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often Ray Train looks at its workers; 2 s
    "GLOO_SOCKET_IFNAME": "lo",  # a machine's name need not resolve
    "RAY_USAGE_STATS_ENABLED": "0",
}
UNDISTURBED = "undisturbed"
DISTURBED = "disturbed"


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ends the process with a message when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Train on a local Ray cluster, kill a host, and resume from a buddy's RAM.",
    )
    parser.add_argument(
        "--kill",
        choices=("host", "worker", "all", "none"),
        default="host",
        help="one host, one trainer process, every host that holds a copy, or nothing",
    )
    parser.add_argument("--steps", type=int, default=40, help="of the training (default 40)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, dropout and data")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        help="for the picture, the events, and Ray's log",
    )
    args = parser.parse_args(arguments)
    if args.steps < (1 if args.kill == "none" else LEAST_STEPS):
        parser.error(f"--steps {args.steps}: --kill {args.kill} needs at least {LEAST_STEPS}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0 only when it was bit-exact and resumed."""
    args = parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    log_path = args.out / "ray.log"
    log_path.unlink(missing_ok=True)
    with own_terminal(log_path) as terminal:
        console = Console(file=terminal, highlight=False)
        # Of `make demo` a Ctrl-C reaches us from the terminal, a SIGTERM from a supervisor.
        _on_signals(signal.default_int_handler)
        try:
            with Screen(console) as screen:
                facts, undisturbed, disturbed = demo(args, screen)
            write_history(
                args.out / "history.jsonl", {UNDISTURBED: undisturbed, DISTURBED: disturbed}
            )
            picture = report.draw(undisturbed, disturbed, facts, args.out / "loss.png")
            console.print(report.table(facts))
            console.print(f"picture: {picture}", soft_wrap=True)
            status, line = 0 if facts.is_good else 1, report.json_line(facts, picture)
        except KeyboardInterrupt:
            console.print("interrupted; everything that was started is stopped")
            status, line = INTERRUPTED, json.dumps({"ok": False, "error": "interrupted"})
        except Exception as error:  # noqa: BLE001 -- the last resort, reported in full
            traceback.print_exc()
            console.print(f"[red]the demo failed:[/red] {error}", soft_wrap=True)
            console.print(f"the whole story: {log_path}", soft_wrap=True)
            status, line = 1, json.dumps({"ok": False, "error": str(error)})
        terminal.write(line + "\n")
    return status


def demo(args: argparse.Namespace, screen: Screen) -> tuple[Facts, list[Event], list[Event]]:
    """Start everything, do both runs, stop everything; returns the verdict and both histories."""
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiered-demo-")))
        screen.say("starting an S3 server")
        s3 = stack.enter_context(S3Server())
        s3.create_bucket(BUCKET)
        os.environ.update(ENVIRONMENT)
        os.environ.update(s3.environment())
        screen.say(f"starting a Ray cluster of {HOSTS} hosts, one of them spare")
        cluster = stack.enter_context(
            LocalCluster(
                HOSTS,
                object_store_bytes=STORE_BYTES,
                labels=slot_labels(),
                system_config={"worker_niceness": 15},  # Ray's own: the S3 server shares the cores
            )
        )
        _on_signals(signal.default_int_handler)  # ray.init has put its own in place
        stack.callback(_on_signals, signal.SIG_IGN)  # first at the end: cleaning up is not cut off
        logging.getLogger("ray.train").setLevel(logging.WARNING)

        settings = TrainSettings(str(folder / "undisturbed"), args.steps, args.seed)
        undisturbed = TrainRun(UNDISTURBED, settings, folder / "ray_train")
        screen.say("training undisturbed, without checkpoints, to compare to")
        Follower(undisturbed, screen, cluster, "none").follow()

        settings = TrainSettings(
            str(folder / "disturbed"),
            args.steps,
            args.seed,
            job=JOB,
            s3_uri=f"s3://{BUCKET}/demo",
            settle_step=-1 if args.kill == "none" else SETTLE_STEP,
        )
        disturbed = TrainRun(
            DISTURBED,
            settings,
            folder / "ray_train",
            keeps_hosts=args.kill == "worker",  # no host is lost, so none has to be left
        )
        screen.say(f"training with tiered; to be killed: {args.kill}")
        Follower(disturbed, screen, cluster, args.kill).follow()
    facts = summarize(
        undisturbed.events,
        disturbed.events,
        fault=args.kill,
        steps=args.steps,
        seconds=time.monotonic() - began_s,
    )
    return facts, undisturbed.events, sort_by_time(disturbed.events)


class Follower:
    """Waits for a run, shows what it does, and strikes when it is time."""

    def __init__(
        self, run: TrainRun, screen: Screen, cluster: LocalCluster, fault: FaultKind
    ) -> None:
        self._run = run
        self._screen = screen
        self._cluster = cluster
        self._fault = fault
        self._killed: Event | None = None

    def follow(self) -> None:
        """Return when the run is over.

        Raises:
            RuntimeError: It failed, or nothing happened for too long.
        """
        steps = self._run.settings.steps
        self._screen.begin(self._run.name, steps)
        self._run.start()
        heard_s = time.monotonic()
        while self._run.is_running:
            for event in self._run.poll():
                heard_s = time.monotonic()
                self._show(event, steps)
            if time.monotonic() - heard_s > SILENCE_LIMIT_S:
                raise RuntimeError(
                    f"the {self._run.name} run did nothing for {SILENCE_LIMIT_S:.0f} s"
                )
            if self._fault != "none" and self._killed is None:
                self._strike_if_time()
            time.sleep(POLL_S)
        for event in self._run.poll():
            self._show(event, steps)
        self._run.raise_if_failed()

    def _strike_if_time(self) -> None:
        if not is_time(self._run.events, WORKERS):
            return
        with EventWriter(self._run.settings.events_folder) as log:
            self._killed = strike(self._fault, self._cluster, self._run.events, JOB, log)
        hosts = self._killed.data["hosts"]
        names = ", ".join(host[:6] for host in hosts)
        self._screen.say(
            f"[red]SIGKILL[/red] of {self._killed.data['processes']} processes on host {names}"
        )
        if self._fault == "all":
            self._screen.say(f"starting {len(hosts)} fresh hosts")
            for _ in hosts:
                self._cluster.add_host()

    def _show(self, event: Event, steps: int) -> None:
        match event.kind:
            case "step" if event.rank == 0:
                loss = float.fromhex(event.data["loss"])
                self._screen.show(self._run.name, event.data["step"], steps, f"loss {loss:.3f}")
            case "failed":
                self._screen.say("Ray Train has seen the failure; it restarts the workers")
            case "entered" if self._killed is not None and event.time_s > self._killed.time_s:
                self._screen.say(f"rank {event.rank} runs again, on host {event.node_id[:6]}")
            case "restored" if "step" in event.data:
                self._screen.say(
                    f"rank {event.rank} restored step {event.data['step']} from "
                    f"{event.data['source']} in {event.data['seconds']:.2f} s"
                )


def _on_signals(handler: "signal._HANDLER") -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
