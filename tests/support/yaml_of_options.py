"""Write the options of a command line as a file for Megatron-LM's ``--yaml-cfg``: OPTIONS... FILE.

Such a file is read in the place of a validated namespace. Megatron's validate_yaml wants the fields of its two
configurations below ``model_parallel`` and ``language_model``, everything else at the top, and nothing in two places.
``account_for_embedding_in_pipeline_split`` it reads at the top, while its own conversion to a configuration of GPT
wants it below: so no file starts pretrain_gpt.py (0.13.1 to 0.19.2 and main), and pretrain_hybrid.py, which converts
the flat namespace, can be started.
"""

import dataclasses
import json
import sys

import yaml
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer import TransformerConfig
from megatron.training.arguments import parse_args, validate_args

AT_TOP = {"account_for_embedding_in_pipeline_split"}
MADE_ANEW = {"rank", "world_size", "data_parallel_size", "transformer_pipeline_model_parallel_size"}
MUST_BE_EMPTY = ("encoder_num_layers", "encoder_seq_length", "start_weight_decay", "end_weight_decay")


def plain(value: object) -> object:
    """What a file can hold of a value: nothing of a dtype or a function."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return None


path = sys.argv.pop()
args = parse_args()
validate_args(args, {})
given = {name: plain(value) for name, value in vars(args).items() if name not in MADE_ANEW}
for optimizers in ("main_", "exp_avg"):  # dtypes whose defaults are right and an empty value is not
    given = {name: value for name, value in given.items() if value is not None or not name.startswith(optimizers)}
below: dict[str, dict[str, object]] = {}
for part, kind in (("model_parallel", ModelParallelConfig), ("language_model", TransformerConfig)):
    names = [each.name for each in dataclasses.fields(kind) if each.name in given and each.name not in AT_TOP]
    below[part] = {name: given.pop(name) for name in names}
below["language_model"]["num_moe_experts"] = given["num_experts"]
with open(path, "w") as file:
    yaml.safe_dump(given | dict.fromkeys(MUST_BE_EMPTY) | below, file)
