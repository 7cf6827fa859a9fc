"""Turn a Hugging Face LLaMA checkpoint into one that Megatron-LM's own scripts load.

    python examples/convert_hf_llama.py --model DIR --save CHECKPOINT

One process writes Megatron's distributed format, which any number of tensor-parallel ranks can load. The arguments that
describe the model are saved too, so a script needs ``--load CHECKPOINT --use-checkpoint-args`` and what is printed at
the end: the tokenizer, and the few options that Megatron does not take from a checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from hf_checkpoint import Checkpoint, ModelError, Shape, read_shape
from hf_llama import build, load
from launch import refuse, start, stop, world_size

from flashcomm_megatron import cpu

SEQUENCE = 4096  # models declare contexts of 131072, by which scripts would size what they never use
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Read, check, convert, print how to use the result."""
    args = arguments().parse_args()
    try:
        if world_size() != 1:
            raise ModelError("Start one process: every number of ranks can load what it writes.")
        shape = read_shape(args.model, 1)
        weights = Checkpoint(args.model, shape)
    except (ModelError, OSError) as error:
        refuse(str(error))
    cpu.enable(scripts=True)  # saving waits for the device
    start()
    model = build(shape, 1, DTYPES[args.dtype])
    load(model, weights, shape, 0, 1)
    save(model, args.save, shape, args.seq_length or min(shape.context, SEQUENCE))
    stop()
    print(f"{args.save} holds {args.model}. Megatron-LM's scripts load it with:\n  {options(args, shape)}")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of a LLaMA model.")
    parser.add_argument("--save", type=Path, required=True, help="Directory to write the Megatron checkpoint to.")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Of the weights (default: float32).")
    parser.add_argument(
        "--seq-length", type=int, help=f"What scripts size their buffers by (default: the context, at most {SEQUENCE})."
    )
    return parser


def save(model: Any, folder: Path, shape: Shape, seq_length: int) -> None:
    """Write ``folder/release`` and the file that names it; Megatron loads such a checkpoint as iteration 0."""
    from megatron.core import dist_checkpointing

    release = folder / "release"
    release.mkdir(parents=True)
    state = {"model": model.sharded_state_dict(), "args": megatron_arguments(shape, seq_length)}
    dist_checkpointing.save(state | {"checkpoint_version": 3.0, "iteration": 0}, str(release))
    (folder / "latest_checkpointed_iteration.txt").write_text("release")


def megatron_arguments(shape: Shape, seq_length: int) -> argparse.Namespace:
    """What ``--use-checkpoint-args`` reads, under Megatron's names."""
    return argparse.Namespace(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        seq_length=seq_length,
        max_position_embeddings=shape.context,
        num_attention_heads=shape.heads,
        group_query_attention=shape.kv_heads != shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        position_embedding_type="rope",
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_base=int(shape.rope_theta),
        rotary_percent=1.0,
        rotary_interleaved=False,
        add_bias_linear=False,
        add_qkv_bias=False,
        swiglu=True,
        squared_relu=False,
        untie_embeddings_and_output_weights=not shape.tied,
        normalization="RMSNorm",
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        padded_vocab_size=shape.vocab,
        make_vocab_size_divisible_by=1,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
    )


def options(args: argparse.Namespace, shape: Shape) -> str:
    """The options to add to a script's command line."""
    scaling = f" --use-rope-scaling --rope-scaling-factor {shape.rope_factor}" if shape.rope_factor else ""
    bf16 = " --bf16" if args.dtype == "bfloat16" else ""
    return (
        f"--load {args.save} --use-checkpoint-args --tokenizer-type HuggingFaceTokenizer "
        f"--tokenizer-model {args.model} --make-vocab-size-divisible-by 1 --norm-epsilon {shape.eps} "
        f"--attention-softmax-in-fp32{scaling}{bf16}"
    )


if __name__ == "__main__":
    main()
