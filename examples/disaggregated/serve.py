"""Serves a trained model from separate prefill and decode jobs; one command.

    python examples/disaggregated/serve.py

trains a small model with experts (kept for the next time), starts a router, a prefill
job on two ranks and a decode job on one, then one on two; asks 64 questions at once,
compares each answer, token for token, with one-process decoding; measures the time to
first token with pages streamed, sent at the end, and without disaggregation; and draws
where the time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import platform
import shlex
import shutil
import sys

import aiohttp
import corpus
import fleet
import load
import timeline
import ttft
from sizes import SIZES

DECODE = "decode"
PREFILL = "prefill"
_RANKS = f"{PREFILL}.*.spans.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--sizes", choices=SIZES, default="small", help="of the model")
    add("--output", type=pathlib.Path, default="disaggregated", help="folder")
    add("--ranks", default="2-1,2-2", help="of prefill and decode, pairs in turn")
    add("--transport", default="shm", help="of the pages")
    add("--nics", help="for the pages, names or IP addresses")
    add("--host", default="127.0.0.1", help="where the router listens")
    add("--prefill-nics", help="those of prefill jobs, if they are others")
    add(
        "--prefill-command",
        default="",
        help="stands before that of prefill jobs, "
        "to run them elsewhere: 'nsenter --net=/run/netns/other --'",
    )
    add("--requests", type=int, default=64, help="at the same time")
    add("--cancel-every", type=int, default=8, help="so many-th is given up; 0: none")
    add("--made", type=int, default=16, help="tokens of an answer")
    add("--lengths", default="1024,2048", help="of prompts that are timed")
    add("--patience", type=float, default=1.0, help="factor of all time limits")
    add("--runs", type=int, default=40, help="of each way to send; 0 measures nothing")
    return parser.parse_args()


async def picture(
    running: fleet.Fleet, options: argparse.Namespace, tokens: int
) -> None:
    """Traces one prompt each way, and draws both."""
    text = corpus.text()
    folders = {}
    traces = options.output / "trace"
    async with aiohttp.ClientSession() as session:
        for mode, name in (("stream", "streamed by layer"), ("end", "sent at the end")):
            await ttft.first_token_s(
                running, session, text[:tokens].tolist(), mode=mode, trace=True
            )
            await asyncio.sleep(0.5)  # until the files are there
            folder = options.output / f"trace-{mode}"
            shutil.copytree(traces, folder, dirs_exist_ok=True)
            folders[name] = folder
    ranks = sorted(f.name.removesuffix(".spans.json") for f in traces.glob(_RANKS))
    file = options.output / "timeline.png"
    title = f"A prompt of {tokens} tokens, pages over {options.transport}"
    timeline.draw(folders, ranks, DECODE, title, file)
    print(f"picture: {file}")


def machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}), Linux {platform.release()}"


def measure(running: fleet.Fleet, options: argparse.Namespace) -> None:
    lengths = [int(length) for length in options.lengths.split(",")]
    numbers = []
    print(f"time to first token, {machine()}, pages over {options.transport}")
    for tokens in lengths:
        measured = asyncio.run(
            ttft.measure(running, corpus.text(), tokens=tokens, runs=options.runs)
        )
        print(measured, flush=True)
        numbers.append({"tokens": tokens, "seconds": measured.seconds})
    (options.output / "ttft.json").write_text(json.dumps(numbers))
    asyncio.run(picture(running, options, lengths[0]))


def ask(
    running: fleet.Fleet, asked: load.Questions, options: argparse.Namespace
) -> bool:
    """Asks all at once; whether all answers were right."""
    report = asyncio.run(
        load.run(
            running,
            asked,
            requests=options.requests,
            cancel_every=options.cancel_every,
            timeout_s=300 * options.patience,
        )
    )
    print(f"  of {options.requests} requests {report}", flush=True)
    return not report.wrong and not report.failed


def serve(options: argparse.Namespace, file: pathlib.Path) -> bool:
    """Returns whether all answers were right."""
    asked = load.Questions.make(options.sizes, file, count=8, made=options.made)
    trace = options.output / "trace"
    trace.mkdir(exist_ok=True)
    jobs = {"transport": options.transport, "capacity": "8", "trace": str(trace)}
    jobs |= {"nics": options.nics} if options.nics else {}
    jobs |= {"warm": options.lengths} if options.runs else {}
    jobs["timeout_s"] = str(60 * options.patience)
    jobs["peer_timeout_s"] = jobs["heartbeat_s"] = str(5 * options.patience)
    there = {"nics": options.prefill_nics} if options.prefill_nics else {}
    elsewhere = fleet.Place(prefix=shlex.split(options.prefill_command))
    right, before = True, ("", "")
    with fleet.Fleet(
        options.output,
        sizes=options.sizes,
        weights=file,
        router=fleet.Place(host=options.host),
        router_options=[f"--heartbeat-s={5 * options.patience}"],
        **jobs,
    ) as running:
        for number, pair in enumerate(options.ranks.split(",")):
            now = prefill, decode = tuple(pair.split("-"))
            if prefill != before[0]:
                running.stop(PREFILL)
                running.start(
                    *("prefill", PREFILL), ranks=int(prefill), place=elsewhere, **there
                )
            if decode != before[1]:
                running.stop(DECODE)
                running.start("decode", DECODE, ranks=int(decode))
            before = now
            running.wait_for(180 * options.patience, prefill=1, decode=1)
            print(
                f"prefill on {prefill}, decode on {decode}, pages over "
                f"{options.transport}"
            )
            right &= ask(running, asked, options)
            if number == 0 and options.runs:
                measure(running, options)
    return right


def main() -> None:
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{options.sizes}.npz"
    if file.exists():
        print(f"weights: {file}, as trained before", flush=True)
    else:
        import weights  # here, since jobs need not what trains a model

        print(weights.train(options.sizes, file), flush=True)
    if not serve(options, file):
        sys.exit("some answers are not right")


if __name__ == "__main__":
    main()
