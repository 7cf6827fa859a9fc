"""Run Megatron-LM's own scripts without a GPU and say which work: the table of docs/scripts.md.

    python examples/try_scripts.py --model DIR --checkpoint CONVERTED CHECKOUT...

``DIR`` is a Hugging Face LLaMA model, ``CONVERTED`` what convert_hf_llama.py made of it, ``CHECKOUT`` folders of
Megatron-LM. Every script runs unmodified at TP2 with 8-bit sums; the verdict is "works" or the last sentence it said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent
PORT = 5123
TRAIN = shlex.split(
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 2 --global-batch-size 2 --train-iters 6 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 255 --log-interval 1 --eval-interval 3 --eval-iters 1"
)
GENERATE = shlex.split("--prompts 'Tim and Sue went to the' --num-tokens-to-generate 40 --top_k 1 --micro-batch-size 1")
SERVE = shlex.split(f"--port {PORT} --micro-batch-size 1")
EIGHT_BITS = ["--flash-comm-bits", "8", "--flash-comm-min-bytes", "0"]


class Script(NamedTuple):
    """A script of Megatron-LM: the places where versions have it, and what it is given."""

    places: tuple[str, ...]
    options: list[str]
    takes_model: bool = True
    serves: bool = False


GPT, NEW = "examples/inference/gpt/", "examples/inference/advanced/"
SCRIPTS = (
    Script(("pretrain_gpt.py",), TRAIN, takes_model=False),
    Script((f"{GPT}gpt_static_inference.py", f"{NEW}gpt_static_inference.py"), GENERATE),
    Script((f"{GPT}gpt_dynamic_inference.py", f"{NEW}gpt_dynamic_inference.py"), GENERATE),
    Script(("examples/inference/offline_inference.py",), GENERATE),
    Script(("tools/run_text_generation_server.py",), SERVE, serves=True),
    Script(("tools/run_dynamic_text_generation_server.py",), SERVE),
)


def model_options(model: Path, checkpoint: Path) -> list[str]:
    """What convert_hf_llama.py prints for a model with an epsilon of 1e-5."""
    return [
        *("--load", str(checkpoint), "--use-checkpoint-args", "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(model), "--make-vocab-size-divisible-by", "1", "--norm-epsilon", "1e-5"),
    ]


def command(script: str, options: list[str], ranks: int = 2) -> list[str]:
    """The command line that runs a script of a checkout, from its folder; scripts in packages run as modules."""
    what = ["-m", script.removesuffix(".py").replace("/", ".")] if script.startswith("examples/") else [script]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "flashcomm_megatron", "--cpu", *what, "--tensor-model-parallel-size", str(ranks), *options]


def environment(checkout: Path) -> dict[str, str]:
    """This package and the checkout can be imported; one thread a rank."""
    path = os.pathsep.join([str(PACKAGE), str(checkout), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def attempt(script: Script, checkout: Path, model: list[str], seconds: float = 300.0) -> str:
    """One cell of the table."""
    place = next((place for place in script.places if (checkout / place).exists()), None)
    if place is None:
        return "not there"
    line = command(place, script.options + model * script.takes_model + EIGHT_BITS)
    if script.serves:
        return ask(line, checkout, seconds)
    ran = subprocess.run(line, cwd=checkout, env=environment(checkout), capture_output=True, text=True, timeout=seconds)
    return verdict(ran.stdout + ran.stderr, ran.returncode == 0)


def verdict(output: str, fine: bool) -> str:
    """ "works", with the compression if it was said, or the sentence or exception that ended the script."""
    closing = re.search(r"flash-comm: compressed .*\((.*)\)", output)
    if fine:
        return f"works ({closing[1]})" if closing else "works"
    said = re.findall(r"flashcomm_megatron: error: (.*)|^(?:\[rank0\]: )?(\w+Error\b.*)", output, re.MULTILINE)
    sentences = ["".join(found) for found in said if "ChildFailed" not in "".join(found)]
    return sentences[-1].split("error: ")[-1] if sentences else "ended without a word"


@contextmanager
def serving(line: list[str], checkout: Path, seconds: float, log: Path) -> Iterator[None]:
    """A server from the moment it answers; interrupted, as by Ctrl-C, at the end."""
    with log.open("w") as output:
        server = subprocess.Popen(line, cwd=checkout, env=environment(checkout), stdout=output, stderr=output)
        try:
            while "Running on" not in log.read_text() and server.poll() is None and seconds > 0:
                time.sleep(1)
                seconds -= 1
            yield
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.terminate()
                server.wait(60)


def ask(line: list[str], checkout: Path, seconds: float) -> str:
    """Start a server and let it continue a prompt."""
    log = Path.cwd() / "server.log"
    body = json.dumps({"prompts": ["Tim and Sue went to the"], "tokens_to_generate": 20, "top_k": 1}).encode()
    request = urllib.request.Request(
        f"http://localhost:{PORT}/api", body, {"Content-Type": "application/json"}, method="PUT"
    )
    text = ""
    with serving(line, checkout, seconds, log):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = json.loads(answer.read())["text"][0]
        except OSError as error:
            text = f"{error}"
    found = verdict(log.read_text(), text.startswith("Tim and Sue"))
    log.unlink()
    return found


def main() -> None:
    """One row for each script, one column for each checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    args = parser.parse_args()
    model = model_options(args.model.resolve(), args.checkpoint.resolve())
    print("| script |" + "".join(f" {checkout.name} |" for checkout in args.checkouts))
    print("|---|" + "---|" * len(args.checkouts))
    for script in SCRIPTS:
        cells = [attempt(script, checkout.resolve(), model) for checkout in args.checkouts]
        print(f"| `{Path(script.places[0]).name}` |" + "".join(f" {cell} |" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
