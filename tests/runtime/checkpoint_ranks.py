"""What the checkpoint tests run on ranks; spawned processes import it by name."""

from __future__ import annotations

import torch
from builders import sequential
from served import CPU, Served

from nanoflow_tune.runtime.checkpoint import load_checkpoint
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.verify_rank import default_resources


def generate(ctx, folder, prompts, num_tokens):
    """Texts, and this rank's part of the logits of each generated token."""
    model, weights = load_checkpoint(
        folder, rank=ctx.rank, tp_degree=ctx.world_size, device=CPU, dtype="float32"
    )
    schedule = sequential(OpGraph.build(model, ctx.world_size), 1, 0)
    resources = default_resources(ctx, (schedule,))
    served = Served(model, weights, prompts, resources=resources)
    served.generate(num_tokens, sequential)
    return served.texts, [torch.stack(logits) for logits in served.logits]
