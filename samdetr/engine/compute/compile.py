"""The parts that are compiled, which of their sizes are static, and why.

| part | sizes | why |
|---|---|---|
| backbone | static: one graph for every padded (H, W) | Inductor lays convolutions out channels-last only then |
| the model's `compiled_parts` (layers, ...) | dynamic: one graph for all maps | no convolution; only tokens vary |
| criterion | static: L, B, Q, K and T never change | one graph holds matching and all losses |

The layers of a stack run the same graph. All parts are compiled with ``fullgraph=True``: a graph break, and so a
number read from the device, would be an error (a number copied to it would not). The loops over layers, box counting,
clipping and the optimizer stay eager. Evaluation sees every image size there is and runs eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.fx.experimental._config

if TYPE_CHECKING:
    from samdetr.loss import Criterion
    from samdetr.models import Detector

SPARE_GRAPHS = 16  # of one part beyond the shapes known: evaluation mode, another precision


def compile_parts(model: Detector, criterion: Criterion, *, shapes: int) -> None:
    """Mark the parts for compilation, which comes with their first call. shapes: padded shapes to expect."""
    # two dynamic sizes that are equal in the first shape must not become one symbol: the next shape would recompile
    torch.fx.experimental._config.use_duck_shape = False
    # the limit is of each part; beyond it fullgraph raises
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, shapes + SPARE_GRAPHS)
    # parts are small, and DDP's gradients travel as each ends its backward: no need to cut graphs at its buckets too
    torch._dynamo.config.optimize_ddp = False
    dynamic = shapes > 1
    model.backbone.compile(fullgraph=True, dynamic=False)
    for part in model.compiled_parts:  # not their calls: what surrounds forward (sharding, recomputation) stays eager
        part.forward = torch.compile(part.forward, fullgraph=True, dynamic=dynamic)
    criterion.compile(fullgraph=True, dynamic=False)


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled parts as they are written, within the context."""
    with torch.compiler.set_stance("force_eager"):
        yield


def graphs_compiled() -> int:
    """Count the graphs that torch.compile has made in this process; a step after the start-up adds none."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
