"""The exponential moving average of a model's weights, which is evaluated in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from samdetr.engine.distributed.parallel import local_shard, reshard, shard_like
from samdetr.errors import CheckpointError

WARM_UP = 10  # the first averages forget fast: after n updates the decay is at most (1 + n) / (WARM_UP + n)


class EMA:
    """Exponential moving average of the parameters that are trained; buffers are the model's own.

    After every step ``average = d * average + (1 - d) * parameter`` with ``d = min(decay, (1 + n) / (10 + n))`` and n
    the updates before. Shared parameters have shared averages. Nothing waits for the device: a step that was skipped
    changes no average, but counts as an update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the parameters. decay: in (0, 1). The model must be on its device, and sharded, already."""
        self.model, self.decay, self.count = model, decay, 0
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.averages = {name: value.detach().clone() for name, value in self.parameters.items()}

    def update(self, skipped: Tensor | None = None) -> None:
        """Average the parameters in after a step, unless ``skipped`` ([], on the device) is given and is not 0."""
        decay = min(self.decay, (1 + self.count) / (WARM_UP + self.count))
        parameters = [local_shard(value.detach()) for value in self.parameters.values()]
        averages = [local_shard(value) for value in self.averages.values()]
        if skipped is not None:  # an average of a value and itself is that value, to the last bit
            parameters = [torch.where(skipped > 0, *pair) for pair in zip(averages, parameters, strict=True)]
        get_ema_multi_avg_fn(decay)(averages, parameters, self.count)  # type: ignore[no-untyped-call]
        self.count += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages into the model's parameters for the length of the context."""
        parameters = [local_shard(value.detach()) for value in self.parameters.values()]
        trained = [value.clone() for value in parameters]
        torch._foreach_copy_(parameters, [local_shard(value) for value in self.averages.values()])
        reshard(self.model)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, trained)
            reshard(self.model)

    def load(self, averages: Mapping[str, Tensor], count: int) -> None:
        """Continue from a checkpoint's averages. Raises CheckpointError where they are of other parameters."""
        if averages.keys() != self.averages.keys():
            raise CheckpointError("the checkpoint has no averages of these weights: was optim.ema_decay 0 before?")
        for name, value in self.averages.items():
            value.copy_(shard_like(averages[name], value))
        self.count = count


def build_ema(model: nn.Module, decay: float) -> EMA | None:
    """Build the average that ``optim.ema_decay`` asks for; None where it is 0."""
    return EMA(model, decay) if decay else None
