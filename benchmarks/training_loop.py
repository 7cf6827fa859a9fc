"""A small GPT trained the way Megatron-LM trains: its model, DDP, mixed precision, optimizer, schedule, pipeline loop.

What examples/train_tiny.py does by hand for a reader is here left to Megatron-Core, so that a measurement or a test
meets the code that real runs meet. Everything is drawn from one seed: weights, batches, nothing else is random.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcomm_megatron import cpu
from flashcomm_megatron.cpu import literals


class Shape(NamedTuple):
    """Model and batch."""

    layers: int = 4
    hidden: int = 128
    ffn: int = 512
    heads: int = 4
    vocab: int = 1024
    context: int = 128
    batch: int = 8  # sequences in a step, cut into microbatches
    microbatches: int = 1


def join(tensor: int, pipeline: int = 1) -> None:
    """Make the ranks of the process group, on CPUs, Megatron's."""
    cpu.enable(force=True)
    literals.enter()  # Megatron's optimizer speaks of "cuda"
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)


class Training:
    """One model on this rank and its optimizer. Megatron's parallel state must exist; its size decides the sharding.

    ``dtype`` other than float32 is Megatron's mixed precision; float16 has its dynamic loss scale. ``options`` go to
    TransformerConfig.
    """

    def __init__(
        self,
        shape: Shape,
        seed: int,
        steps: int,
        *,
        peak_lr: float = 3e-3,
        dtype: torch.dtype = torch.bfloat16,
        distributed_optimizer: bool = False,
        **options: Any,
    ) -> None:
        from megatron.core import tensor_parallel
        from megatron.core.pipeline_parallel import get_forward_backward_func

        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        self.shape = shape
        self.config = transformer_config(shape, dtype, options)
        self.model = wrapped(self.config, shape, distributed_optimizer)
        self.optimizer, self.schedule = optimizer(self.model, self.config, steps, peak_lr, distributed_optimizer)
        self.draw = torch.Generator().manual_seed(seed)
        self.run = get_forward_backward_func()

    def step(self, text: Tensor) -> float:
        """One optimizer step on windows of ``text`` [n] drawn at random; returns their mean loss in nats."""
        starts = torch.randint(len(text) - self.shape.context, (self.shape.batch,), generator=self.draw)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self.losses(text, starts, forward_only=False)
        self.optimizer.step()
        self.schedule.step(increment=1)
        return loss

    def evaluate(self, text: Tensor, windows: int) -> float:
        """Mean loss over ``windows`` windows spread evenly over ``text``."""
        starts = torch.linspace(0, len(text) - self.shape.context - 2, windows).long()
        self.model.eval()
        with torch.no_grad():
            found = [self.losses(text, part, forward_only=True) for part in starts.split(self.shape.batch)]
        self.model.train()
        return sum(found) / len(found)

    def losses(self, text: Tensor, starts: Tensor, forward_only: bool) -> float:
        """Mean loss of the windows at ``starts``; NaN on ranks that hold no last pipeline stage."""
        microbatches = 1 if forward_only else self.shape.microbatches
        windows = text[starts[:, None] + torch.arange(self.shape.context + 1)]
        found = self.run(
            forward_step_func=forward_step,
            data_iterator=iter(windows.chunk(microbatches)),
            model=[self.model],
            num_microbatches=microbatches,
            seq_length=self.shape.context,
            micro_batch_size=len(starts) // microbatches,
            forward_only=forward_only,
        )
        values = [float(each["loss"]) for each in found]
        return sum(values) / len(values) if values else float("nan")

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs; nothing of it is flash-comm's."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "draw": self.draw.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.draw.set_state(state["draw"])


def transformer_config(shape: Shape, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Megatron's description of the model; the process groups' sizes come from its parallel state."""
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": shape.layers,
            "hidden_size": shape.hidden,
            "ffn_hidden_size": shape.ffn,
            "num_attention_heads": shape.heads,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "pipeline_dtype": dtype,
            "params_dtype": dtype,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
        }
        | options
    )


def wrapped(config: Any, shape: Shape, distributed_optimizer: bool) -> Any:
    """The model as Megatron-LM's training loop wraps it: mixed precision, then data parallelism."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    model = GPTModel(
        config,
        cpu.layer_spec(config),
        vocab_size=shape.vocab,
        max_sequence_length=shape.context,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    if config.params_dtype != torch.float32:
        model = Float16Module(config, model)
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    return DistributedDataParallel(config, ddp, model)


def optimizer(model: Any, config: Any, steps: int, peak_lr: float, distributed_optimizer: bool) -> tuple[Any, Any]:
    """Megatron's optimizer and its schedule: a tenth of the steps up, half a cosine down to zero."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    options = OptimizerConfig(
        optimizer="adam",
        lr=peak_lr,
        min_lr=0.0,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=config.params_dtype,
        initial_loss_scale=2.0**16,
        use_distributed_optimizer=distributed_optimizer,
    )
    made = get_megatron_optimizer(options, [model])
    config.grad_scale_func = made.scale_loss
    schedule = OptimizerParamScheduler(
        made, 0.0, peak_lr, 0.0, max(1, steps // 10), steps, "cosine", 0.1, 0.1, steps, "constant"
    )
    return made, schedule


def forward_step(data: Iterator[Tensor], model: Any) -> tuple[Any, Any]:
    """Logits' loss and how it is reduced, as Megatron's pipeline loop asks for them."""
    windows = next(data)
    tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None, labels=labels), partial(_mean)


def _mean(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}
