"""llama.cpp itself, in a process of its own: what a GGUF file computes where it is served.

    with LlamaCpp(path, lora) as served:   served.write(ids, 8)   served.chat(messages)   served.tokenize(text)

Its cache holds keys and values in fp16: set to float32, which the binding has a name for, it computes the same digits.

The process reads a request and writes an answer, each a line of JSON. In this one a failed assertion of llama.cpp would
end the tests, and its threads would meet their forks.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A GGUF model that llama.cpp serves, on one thread, with `context` positions."""

    def __init__(self, path: Path, lora: Path | None = None, context: int = 256):
        arguments = [str(path), "" if lora is None else str(lora), str(context)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._ask({})  # it has loaded

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None and self.process.stderr is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.process.stderr.read()[-2000:]
        return json.loads(answer)

    def write(self, ids: Sequence[int], count: int, listed: int = 1) -> tuple[list[int], list[dict[int, float]]]:
        """(greedy tokens after `ids`, for each the log probabilities of the `listed` likeliest tokens by id)."""
        rest = {"prompt": list(ids), "max_tokens": count, "temperature": 0, "logprobs": listed, "ignore_eos": True}
        answer = self._ask({"complete": rest})
        steps = answer["choices"][0]["logprobs"]["content"]
        return [step["id"] for step in steps], [
            {top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps
        ]

    def next_logs(self, ids: Sequence[int], vocabulary: int, printable: int) -> list[float]:
        """Log probabilities of the token after `ids`, [vocabulary]. `printable` is a token of whole letters: it is
        forced, as llama.cpp lists nothing for half a letter.
        """
        rest = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "logprobs": vocabulary}
        answer = self._ask({"complete": rest | {"logit_bias": [[printable, 1e4]]}})
        logs = [math.nan] * vocabulary
        for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            logs[top["id"]] = top["logprob"]
        return logs

    def chat(self, messages: list[dict[str, str]], count: int) -> tuple[int, str]:
        """(tokens of the prompt that the file's own chat template makes, greedy answer)."""
        answer = self._ask({"chat": {"messages": messages, "max_tokens": count, "temperature": 0}})
        return answer["usage"]["prompt_tokens"], answer["choices"][0]["message"]["content"]

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with what begins every text."""
        return self._ask({"tokenize": {"content": text, "add_special": True, "parse_special": True}})["tokens"]


def _serve(path: str, lora: str, context: int) -> None:
    """Answer the lines of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp writes where it likes
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, context, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if lora:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = {}
        if "complete" in request:
            answer = server.handle_completions(request["complete"])
        elif "chat" in request:
            answer = server.handle_chat_completions(request["chat"])
        elif "tokenize" in request:
            body = json.dumps(request["tokenize"]).encode()
            place = f"{server.listening_address}/tokenize"
            with urllib.request.urlopen(urllib.request.Request(place, body)) as found:
                answer = json.loads(found.read())
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # its own end takes two seconds


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
