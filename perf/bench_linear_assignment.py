"""linear_assignment: the published loop (costs of a layer to the host, scipy image by image) against ours.

Costs are those of the matcher for predictions that gather around the targets, layer by layer more closely. The
published cost matrix of a layer has the targets of all images side by side, [B, Q, sum T], and is copied whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from perf.gate import Args, Case, Variant, Work
from perf.harness import FORWARD, Options, main
from perf.inputs import LAYERS, MAX_TARGETS, QUERIES, generator, normal, uniform
from samdetr.loss.matcher import focal_cost, matching_cost
from samdetr.structures import Outputs, Targets
from samdetr_kernels.linear_assignment import UNMATCHED, linear_assignment, linear_assignment_reference

CLASSES = 91
# images, queries, the most targets; the first also with every image crowded
PROBLEMS = {
    "gpu": ((16, QUERIES, MAX_TARGETS), (4, QUERIES, MAX_TARGETS)),
    "cpu": ((16, QUERIES, MAX_TARGETS),),
    "small": ((2, 12, 5),),
}


def realistic_costs(
    random: torch.Generator, images: int, queries: int, most: int, crowded: bool
) -> tuple[Tensor, Tensor]:
    """Make costs [L B, Q, T] in fp32 and counts [L B]: about 7 targets an image, at least one image with ``most``."""
    counts = (7 * normal(random, images).mul(0.8).exp()).long().clamp(0, most)
    counts[0] = most
    if crowded:
        counts[:] = most
    targets = Targets(
        labels=torch.randint(0, CLASSES, (images, most), generator=random, device=random.device),
        boxes=torch.cat((uniform(random, images, most, 2), 0.02 + 0.5 * uniform(random, images, most, 2) ** 2), -1),
        counts=counts,
    )
    chosen = (uniform(random, LAYERS, images, queries) * counts.clamp(min=1)[None, :, None]).long()
    near = targets.boxes[None].expand(LAYERS, -1, -1, -1).gather(2, chosen[..., None].expand(-1, -1, -1, 4))
    spread = 0.2 * 0.6 ** torch.arange(LAYERS, device=random.device)[:, None, None, None]
    boxes = (near + spread * normal(random, *near.shape)).clamp(0.005, 1)
    logits = normal(random, LAYERS, images, queries, CLASSES) - 4.6
    label = targets.labels[None].expand(LAYERS, -1, -1).gather(2, chosen)[..., None]
    logits.scatter_add_(-1, label, 3 + normal(random, *label.shape))
    cost = matching_cost(
        Outputs(logits, boxes),
        targets,
        partial(focal_cost, alpha=0.25, gamma=2.0),
        class_cost=2,
        l1_cost=5,
        giou_cost=2,
    )
    return cost.flatten(0, 1), counts.repeat(LAYERS)


def side_by_side(args: Args) -> Args:
    """Bring costs to the published layout: for each layer [B, Q, sum T], and the numbers of targets on the host."""
    cost, counts = args
    images = len(counts) // LAYERS
    sizes = counts[:images].tolist()
    layers = []
    for layer in cost.view(LAYERS, images, *cost.shape[1:]):
        row = torch.cat([layer[image, :, :size] for image, size in enumerate(sizes)], dim=-1)
        layers.append(row.expand(images, -1, -1).contiguous())
    return layers, sizes, cost.shape[2]


def published(layers: list[Tensor], sizes: list[int], padded: int) -> tuple[Tensor, Tensor]:
    """Run the matcher's loop; its index pairs are laid out as the op's and copied back, one copy a layer."""
    found = []
    for layer in layers:
        on_host = layer.cpu()
        indices = torch.full((len(sizes), padded), UNMATCHED, dtype=torch.int64)
        for image, part in enumerate(on_host.split(sizes, -1)):
            query, target = linear_sum_assignment(part[image])
            indices[image, torch.from_numpy(target)] = torch.from_numpy(query)
        found.append(indices.to(layer.device))
    matched = torch.cat(found)
    return matched, torch.zeros(len(matched), dtype=torch.bool, device=matched.device)


def total_costs(args: Args, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return for the gate total costs, as optima may not be unique, queries used once, flag, clean padding."""
    cost, counts = args
    indices, bad = found
    used = torch.arange(cost.shape[2], device=cost.device) < counts[:, None]
    picked = cost.double().gather(1, indices.clamp(min=0)[:, None]).squeeze(1)
    total = torch.where(used & (indices >= 0), picked, 0).sum(-1)
    padding_is_empty = ((indices == UNMATCHED) | used).all(-1)
    hits = torch.nn.functional.one_hot(indices + 1, cost.shape[1] + 1).sum(1)[:, 1:]
    return total, (hits == 1).sum(-1).double(), bad.double(), padding_is_empty.double()


def cases(options: Options) -> Iterator[Case]:
    """Yield six layers of COCO-like batches, and one in which every image has the most targets."""
    problems = [(*problem, False) for problem in PROBLEMS[options.shapes]]
    problems.append((*PROBLEMS[options.shapes][0], True))
    for images, queries, most, crowded in problems:

        def make(
            seed: int, images: int = images, queries: int = queries, most: int = most, crowded: bool = crowded
        ) -> Args:
            return realistic_costs(generator(seed, options.device), images, queries, most, crowded)

        cost, counts = make(0)
        # a target's row is searched at least once
        steps = counts.clamp(max=queries).sum().item()
        yield Case(
            name=f"{len(counts)} problems {queries} x {most}{' crowded' if crowded else ''}",
            dtype=torch.float32,
            make=make,
            variants=(
                Variant("published", published, prepare=side_by_side),
                Variant("one transfer and scipy", linear_assignment_reference),
                Variant("ours", linear_assignment, ours=True),
            ),
            reference=linear_assignment_reference,
            eager=linear_assignment_reference,
            work={FORWARD: Work(4 * steps * queries + 8 * len(counts) * most, 6 * steps * queries, vector=True)},
            images=tuple(range(len(cost))),
            judge=total_costs,
        )


if __name__ == "__main__":
    sys.exit(main("linear_assignment", cases))
