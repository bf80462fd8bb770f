"""llama.cpp by its own llama-bench, whose path is in LLAMA_BENCH: `model` is a GGUF file. Every
request loads it again, as llama-bench does; that is not in its times.
"""

import json
import os
import subprocess
from argparse import Namespace

from serve import serve


def load(arguments: Namespace) -> tuple[dict, dict]:
    def bench(prompt: int, tokens: int) -> dict:
        options = ["-p", prompt, "-n", tokens, "-t", arguments.threads, "-r", 1, "-o", "json"]
        command = [os.environ["LLAMA_BENCH"], "-m", arguments.model, *map(str, options)]
        (row,) = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        count = prompt + tokens
        answer = {"seconds": count / row["avg_ts"], "tokens": count, "build": row["build_commit"]}
        return answer | ({"bytes": row["model_size"] * tokens} if tokens else {})

    def decode(prompt: int, tokens: int) -> dict:  # it starts without a prompt
        return bench(0, tokens)

    def prefill(tokens: int) -> dict:
        return bench(tokens, 0)

    build = bench(1, 0)["build"]
    return {"version": f"llama-bench {build}"}, {"decode": decode, "prefill": prefill}


if __name__ == "__main__":
    serve(load)
