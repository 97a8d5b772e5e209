"""An engine process without a model: it speaks the wire protocol and repeats each prompt.

Output token n of a request's sample s is prompt token n + s modulo the prompt's length, so a test
knows every answer; so it does every log-probability. Faults are injected by flags; every message
received goes to a journal.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from octavo import wire
from octavo.logprobs import TokenLogprobs

EOS = 3  # the tiny model's <|im_end|>


@dataclass
class Running:
    """One sample of a request."""

    request: wire.AddRequest
    index: int
    output: list[int] = field(default_factory=list)


def logprobs(token: int, count: int) -> TokenLogprobs:
    """Token t has -t / 1000 and rank 1; the next most probable are the ids above it."""
    top = range(token, token + count)
    return TokenLogprobs(token, -token / 1000, 1, list(top), [-t / 1000 for t in top])


class FakeEngine:
    """Steps through its requests, one token each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        context = zmq.Context()
        self.requests = context.socket(zmq.PULL)
        self.requests.connect(f"ipc://{args.socket_dir}/requests.sock")
        self.events = context.socket(zmq.PUSH)
        self.events.setsockopt(zmq.LINGER, 1000)
        self.events.connect(f"ipc://{args.socket_dir}/events.sock")
        self.running: dict[tuple[str, int], Running] = {}
        self.steps = self.generated = self.prompted = 0
        self.load_at = 0.0

    def send(self, message: wire.ToApi) -> None:
        self.events.send(wire.encoder.encode(message))

    def start(self) -> None:
        args = self.args
        self.send(wire.Progress("weights", 0.25, 1.0))
        if args.fail_start:
            reason, retryable = args.fail_start.split(":")
            self.send(wire.Failed(reason, "model.safetensors: truncated", retryable == "retryable"))
            time.sleep(0.2)
            sys.exit(70 if retryable == "retryable" else 78)
        if args.stall_start:
            time.sleep(3600)
        while args.start_when is not None and not args.start_when.exists():
            time.sleep(0.01)
        self.send(
            wire.Ready(
                max_model_len=args.context,
                vocab_size=args.vocab,
                block_size=16,
                num_kv_blocks=64,
                max_num_seqs=args.max_num_seqs,
                device="cpu",
                dtype="float32",
                kv_bytes_per_block=1024,
            )
        )

    def run(self) -> None:
        while True:
            wait_ms = self.args.step_ms if self.running else 50
            deadline = time.monotonic() + wait_ms / 1000
            # Rounded up, because a poll of 0 ms would not wait at all.
            while self.requests.poll(max(0, math.ceil((deadline - time.monotonic()) * 1000))):
                message = wire.to_engine_decoder.decode(self.requests.recv())
                self.note(message)
                if isinstance(message, wire.Stop):
                    return
                if isinstance(message, wire.AbortRequest):
                    for key in list(self.running):
                        if key[0] == message.request_id and message.index in (None, key[1]):
                            del self.running[key]
                else:
                    for index in range(message.params.branches):
                        self.running[message.request_id, index] = Running(message, index)
                    self.prompted += len(message.prompt_token_ids)
            self.step()
            self.report()

    def note(self, message: wire.ToEngine) -> None:
        if self.args.journal:
            line = {"kind": type(message).__name__, "id": getattr(message, "request_id", None)}
            with open(self.args.journal, "a") as journal:
                journal.write(json.dumps(line) + "\n")

    def step(self) -> None:
        outputs = []
        batch = list(self.running.values())[: self.args.max_num_seqs]
        for running in batch:
            outputs.append(self.next_token(running))
        if not outputs:
            return
        self.steps += 1
        self.generated += len(outputs)
        self.send(wire.Outputs(outputs))
        args = self.args
        if args.die_after and self.generated >= args.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if args.lose_device_after and self.generated >= args.lose_device_after:
            self.send(wire.Failed("DeviceFailed", "DeviceFailed on an H100: Xid 79", True))
            time.sleep(0.2)
            os._exit(70)
        if args.hang_after and self.generated >= args.hang_after:
            time.sleep(3600)

    def next_token(self, running: Running) -> wire.TokenOutput:
        request, params = running.request, running.request.params
        prompt, n = request.prompt_token_ids, len(running.output)
        request_id, index = request.request_id, running.index
        token = prompt[(n + index) % len(prompt)]
        if token == self.args.error_token:
            del self.running[request_id, index]
            return wire.TokenOutput(
                request_id, [], "error", error="a fault was injected", index=index
            )
        stops = (token == EOS and not params.ignore_eos) or token in params.stop_token_ids
        if stops and n >= params.min_tokens:
            del self.running[request_id, index]
            return wire.TokenOutput(request_id, [], "stop", stop_token_id=token, index=index)
        running.output.append(token)
        limit = params.max_tokens or self.args.context - len(prompt)
        reason = "length" if n + 1 == limit else None
        if reason:
            del self.running[request_id, index]
        asked, of_prompt = params.logprobs, params.prompt_logprobs
        return wire.TokenOutput(
            request_id,
            [token],
            reason,
            num_cached_tokens=0,
            index=index,
            logprobs=None if asked is None else [logprobs(token, asked)],
            prompt_logprobs=None
            if n or index or of_prompt is None
            else [logprobs(t, of_prompt) for t in prompt[1:]],
        )

    def report(self) -> None:
        now = time.monotonic()
        if now - self.load_at < 0.05:
            return
        self.load_at = now
        running = min(len(self.running), self.args.max_num_seqs)
        self.send(
            wire.Load(
                blocks=wire.Blocks(64, running, 0, 0, 64 - running),
                block_size=16,
                kv_utilization=running / 64,
                demand_blocks={"now": running, "10s": running, "30s": running, "60s": running},
                seconds_to_exhaustion=None,
                running=running,
                waiting=len(self.running) - running,
                waiting_blocks=0,
                prefill_backlog_s=0.0,
                step_budget_used=0.0,
                preemptions=3,
                steps=self.steps,
                prompt_tokens=self.prompted,
                generation_tokens=self.generated,
                prefix_cache_queries=0,
                prefix_cache_hits=0,
                last_activity=time.time(),
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket-dir", required=True)
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--pid-file", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--step-ms", type=float, default=1)
    parser.add_argument("--start-when", type=Path, help="a file that is there")
    parser.add_argument("--fail-start", help="REASON:retryable or REASON:permanent")
    parser.add_argument("--stall-start", action="store_true")
    parser.add_argument("--die-after", type=int, help="SIGKILL after so many tokens")
    parser.add_argument("--hang-after", type=int, help="sleep for good after so many tokens")
    parser.add_argument("--lose-device-after", type=int, help="fail after so many tokens")
    parser.add_argument("--error-token", type=int, help="a request that reaches it fails")
    args = parser.parse_args()
    if args.pid_file:
        args.pid_file.write_text(str(os.getpid()))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive a test
    engine = FakeEngine(args)
    engine.start()
    engine.run()


if __name__ == "__main__":
    main()
