"""Reinforcement learning with a trainer and a sampler that are separate jobs.

    python examples/rl/main.py
    python examples/rl/main.py --steps 200 --picture rl.svg
    python examples/rl/main.py --transport ofi/tcp --sampler-processes 2
    python examples/rl/main.py --kill-sampler-at 20 --kill-trainer-at 30
    python examples/rl/main.py --checkpoints runs/rl

A small transformer with experts learns sums such as 7+5=12. A trainer of two
processes, each with half of the experts, first shows it right answers, until it gives
them with a probability of 0.4 by itself. From there on it learns by reward alone: a
sampler, one process with the model whole or several with a part of the experts each,
answers each prompt several times with the weights that it has; an answer is worth 1 if
it is right, else 0; the trainer makes more likely what was better than the rest of its
group (GRPO).
Batches travel as messages of jf.TransferEngine. After each step the new weights are
pushed by jf.weights, straight from the trainer's shards into the sampler's, which goes
on answering meanwhile; each batch says which version gave it, and the loss corrects for
its age.

With --kill-sampler-at, the sampler is killed (kill -9) when the trainer is at that
step, and started again: it gets the newest weights as soon as it connects, and the
trainer goes on with its answers. With --kill-trainer-at it is the trainer: it goes on
from its last checkpoint, and the sampler with the weights that it has, until new ones
come. With --checkpoints that folder stays: started again with it, all goes on there.

It ends with exit code 1 unless the reward has risen from beginning to end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jobs
import numpy as np
import picture

HERE = pathlib.Path(__file__).resolve().parent
JOBS = ("trainer", "sampler")
RANKS = 2  # of the trainer
FIRST, LAST = 5, 10  # batches whose mean reward is compared
RISE = 0.1
_POLL_S = 0.05
_PASSED_ON = ("transport", "steps", "seed", "checkpoints")
_KILL_S = 5.0  # until whoever was asked to end is killed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=60, help="of reinforcement learning (60)")
    add("--transport", default="shm", help="of weights and batches (shm)")
    add("--sampler-processes", type=int, default=1, metavar="N", help="(1)")
    for name in JOBS:
        again = "kill -9, and start again"
        add(f"--kill-{name}-at", type=int, metavar="STEP", help=again)
    add("--checkpoints", type=pathlib.Path, metavar="FOLDER", help="of the trainer")
    add("--seed", type=int, default=0, help="of parameters and prompts (0)")
    add("--timeout-s", type=float, default=300.0, help="of everything (300)")
    add("--picture", type=pathlib.Path, default="rl.png", help="PNG or SVG (rl.png)")
    add("--json", type=pathlib.Path, help="where to write all numbers")
    return parser.parse_args()


def start(name: str, folder: pathlib.Path, options: argparse.Namespace) -> Any:
    """One of the two jobs, as one would start it on a machine of its own."""
    rest = [f"--folder={folder}"]
    for option in _PASSED_ON:
        if (value := getattr(options, option)) is not None:
            rest.append(f"--{option}={value}")
    ranks = RANKS if name == "trainer" else options.sampler_processes
    launcher = ["-m", "jaxfabric._cli", "run", f"--processes={ranks}"]
    # Each job has its own number of devices, and its own process group.
    python = ["env", "-u", "XLA_FLAGS", sys.executable]
    script = [*(launcher if ranks > 1 else []), str(HERE / f"{name}.py")]
    return subprocess.Popen(
        [*python, *script, *rest], start_new_session=True, preexec_fn=end_with_parent
    )


def end_with_parent() -> None:
    """Asks the kernel to end this process with its parent, however that ends."""
    prctl_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(prctl_set_pdeathsig, signal.SIGTERM)


def end(*_: Any) -> None:
    """SIGTERM ends it as an error does: with its jobs."""
    raise SystemExit("ended by SIGTERM")


def kill(name: str, process: Any, folder: pathlib.Path) -> None:
    """Kills a job; nobody finds it any more."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for address in folder.glob(f"{name}*.address"):
        address.unlink()
    print(f"the {name} was killed, and is started again", flush=True)


def wait(
    processes: dict[str, Any], options: argparse.Namespace, folder: pathlib.Path
) -> None:
    """Until all have ended well; raises SystemExit with the name of one that has not.

    However it ends, none is left.
    """
    until = time.monotonic() + options.timeout_s
    kills = {name: getattr(options, f"kill_{name}_at") for name in JOBS}
    try:
        while any(process.poll() is None for process in processes.values()):
            for name, process in processes.items():
                if process.poll():
                    raise SystemExit(f"the {name} ended with {process.returncode}")
            if time.monotonic() > until:
                raise SystemExit(f"not done after {options.timeout_s} s")
            for name, at in kills.items():
                running = processes[name].poll() is None
                if at is not None and running and jobs.step_of(folder) >= at:
                    kills[name] = None
                    kill(name, processes[name], folder)
                    processes[name] = start(name, folder, options)
            time.sleep(_POLL_S)
        for name, process in processes.items():
            if process.returncode:
                raise SystemExit(f"the {name} ended with {process.returncode}")
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            try:
                process.wait(_KILL_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def summary(report: dict[str, Any]) -> str:
    """What happened, in words."""
    rewards = [batch["reward"] for batch in report["sampler"]["batches"]]
    trainers = [report[f"trainer{rank}"] for rank in range(RANKS)]
    lags = [step["lag"] for step in trainers[0]["steps"]] or [0]
    total = [push["total_s"] for push in trainers[0]["pushes"]]
    total = total[1:] or total  # the first one waits for the sampler
    nbytes = sum(trainer["pushes"][-1]["nbytes"] for trainer in trainers)
    resumed = trainers[0]["resumed"]
    lost = [push["version"] for push in trainers[0]["pushes"] if push["failure"]]
    return (
        f"reward: {np.mean(rewards[:FIRST]):.2f} -> {np.mean(rewards[-LAST:]):.2f}, "
        f"and {rewards[-1]:.2f} with the last version\n"
        f"pushes: {len(trainers[0]['pushes'])} versions of {nbytes / 2**20:.2f} MiB, "
        f"median {np.median(total) * 1e3:.1f} ms, most {max(total) * 1e3:.1f} ms\n"
        f"the trainer learned from batches that were {np.mean(lags):.1f} versions old "
        f"(at most {max(lags)}); the sampler compiled "
        f"{report['sampler']['compiled']} program"
        + (f"\nthe trainer went on from step {resumed}" if resumed else "")
        + (f"\npushes while the sampler was gone: {lost}" if lost else "")
    )


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, end)
    begin = time.monotonic()
    saved = options.checkpoints
    from_begin = saved is None or not saved.is_dir() or not any(saved.iterdir())
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if options.checkpoints is None and options.kill_trainer_at is not None:
            options.checkpoints = folder / "checkpoints"
        (folder / "token").touch(0o600)
        (folder / "token").write_text(secrets.token_hex(16))
        processes = {name: start(name, folder, options) for name in JOBS}
        wait(processes, options, folder)
        report = {
            file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")
        }
        lines = (folder / "batches.jsonl").read_text().splitlines()
        report["sampler"]["batches"] = [json.loads(line) for line in lines]
    print(summary(report))
    picture.draw(report, options.picture)
    print(f"picture: {options.picture}; {time.monotonic() - begin:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps(report))
    rewards = [batch["reward"] for batch in report["sampler"]["batches"]]
    if not from_begin:
        print("it went on from a checkpoint: no rise is asked for")
    elif np.mean(rewards[-LAST:]) < np.mean(rewards[:FIRST]) + RISE:
        raise SystemExit(f"the reward has not risen by {RISE}")


if __name__ == "__main__":
    main()
