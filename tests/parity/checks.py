"""The values that every system is compared in: the encoded map, predictions, matching, losses, gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from samdetr.loss import SetCriterion
from samdetr.models import EncoderDecoder
from samdetr.models.aligner import AlignedQueries
from samdetr.models.official import official_names
from samdetr.structures import Detections, Losses, Outputs
from tests.parity.reference import Inputs, arrays, first_image, meta

HEADS = 8


class EncodedMap(NamedTuple):
    """The encoded images of a fixture, with steps on the way."""

    features: Tensor  # [B, C, h, w] of the backbone
    source: Tensor  # [B, h, w, width] the encoder's input
    memory: Tensor  # [B, h, w, width]
    position: Tensor  # [B, h, w, width]
    mask: Tensor  # [B, h, w] bool, True within the valid cells


def close(ours: Tensor, reference: NDArray[np.generic], *, most: float, all_within: float, share: float = 0.99) -> None:
    """``share`` of the elements within ``most``, all within ``all_within``."""
    difference = np.abs(ours.detach().numpy().astype(np.float64) - reference)
    assert difference.shape == reference.shape
    assert np.quantile(difference, share) <= most
    assert difference.max() <= all_within


def check_parameter_counts(name: str, model: nn.Module) -> None:
    facts = meta(name)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == facts["n_parameters"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == facts["n_parameters_requires_grad"]


def check_encoded_map(name: str, found: EncodedMap) -> None:
    reference = arrays(name)
    assert np.array_equal(~found.mask.numpy(), reference["mask0"])
    channels = reference["ch_idx"]
    cells = found.mask.shape[1] * found.mask.shape[2]
    step = -(-cells // 64)
    position = found.position.flatten(1, 2)[:, ::step][..., channels].transpose(1, 2)
    valid = found.mask.flatten(1)[:, ::step]
    difference = (position - torch.from_numpy(reference["pos0"])).abs()
    assert difference.transpose(1, 2)[valid].max() <= 2e-6
    features = found.features.flatten(2)
    close(features[:, :: features.shape[1] // 8, ::step], reference["backbone0"], most=5e-5, all_within=5e-5)
    source = found.source.flatten(1, 2)[:, ::step][..., channels].transpose(1, 2)
    close(source, reference["src0"], most=5e-5, all_within=5e-5)
    memory = found.memory.flatten(1, 2)[:, :: -(-cells // 200)][..., channels]
    close(memory, reference["memory"], most=1e-4, all_within=1e-4)


def check_encoded_maps(name: str, model: EncoderDecoder, inputs: Inputs, *, finest: int = 0) -> None:
    """Of several levels; what no valid cell reads is left out, for it is arbitrary. finest: the fixture's number of the
    first one; the last one's source then comes first."""
    reference = arrays(name)
    channels = reference["ch_idx"]
    with torch.no_grad():
        features = model.backbone(inputs.images, inputs.image_sizes)
        seen: list[Tensor] = []
        handle = model.encoder.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        memory, position, pyramid, _ = model.encoder(inputs.images, inputs.image_sizes)
        handle.remove()
    sizes = [height * width for height, width in pyramid.spatial_shapes]
    levels = zip(pyramid.maps, seen[0].split(sizes, dim=1), position.split(sizes, dim=1), strict=True)
    for level, (geometry, source, codes) in enumerate(levels):
        step = -(-sizes[level] // 64)
        source = source[:, ::step][..., channels].transpose(1, 2)
        close(source, reference[f"src{(level + finest) % len(sizes)}"], most=5e-5, all_within=5e-5)
        if level == len(features):
            continue
        assert np.array_equal(~geometry.mask.numpy(), reference[f"mask{level + finest}"])
        ours = features[level].flatten(2)
        seen_of_it = ours[:, :: ours.shape[1] // 8, ::step]
        close(seen_of_it, reference[f"backbone{level + finest}"], most=5e-5, all_within=5e-5)
        code = (codes - model.encoder.embed.level_embed[level]).detach()[:, ::step][..., channels]
        difference = (code - torch.from_numpy(reference[f"pos{level + finest}"]).transpose(1, 2)).abs()
        assert difference[geometry.mask.flatten(1)[:, ::step]].max() <= 2e-6
    step = -(-sum(sizes) // 200)
    valid = pyramid.mask[:, ::step].numpy()
    close(memory[:, ::step][..., channels][valid], reference["memory"][valid], most=1e-4, all_within=1e-4)


def record_aligned_layers(model: EncoderDecoder, inputs: Inputs) -> tuple[Outputs, dict[str, list[Tensor]]]:
    """Predictions of the batch, and what each decoder layer and its aligner took and gave, by the fixtures' names."""
    recorded: dict[str, list[Tensor]] = {key: [] for key in ("ref_boxes", "hs", "content", "qpos", "points")}
    recorded["gauss_scale"] = []
    handles = []
    for layer in model.decoder.layers:
        handles.append(layer.register_forward_hook(lambda _, __, out: recorded["hs"].append(out)))
        handles.append(layer.register_forward_pre_hook(lambda _, args: recorded["ref_boxes"].append(args[1])))

        def keep(_: object, __: object, out: AlignedQueries) -> None:
            recorded["content"].append(out.content)
            recorded["qpos"].append(out.position)
            if out.scales is not None:
                recorded["gauss_scale"].append(out.scales)

        def keep_points(_: object, __: object, numbers: Tensor) -> None:
            recorded["points"].append(numbers.unflatten(-1, (-1, HEADS, 2))[:, :, 0].tanh())

        handles.append(layer.aligner.register_forward_hook(keep))
        handles.append(layer.aligner.point_mlp.register_forward_hook(keep_points))
    with torch.no_grad():
        outputs = model(inputs.images, inputs.image_sizes)
    for handle in handles:
        handle.remove()
    return outputs, recorded


def check_aligned_layers(name: str, recorded: dict[str, list[Tensor]]) -> None:
    """recorded: of `record_aligned_layers`."""
    reference = arrays(name)
    queries, channels = reference["q_idx"], reference["ch_idx"]
    found = {key: torch.stack(values) for key, values in recorded.items() if key in reference}
    close(found["ref_boxes"][:, :, reference["ref_idx"]], reference["ref_boxes"], most=5e-4, all_within=1e-2)
    close(found["points"][:, :, queries], reference["points"], most=3e-3, all_within=2e-2)
    content = found["content"][:, :, queries[::2]][..., channels[::2]]
    close(content, reference["content"], most=3e-3, all_within=2e-2)
    query_position = found["qpos"][:, :, queries[::4]][..., channels[::2]]
    close(query_position, reference["qpos"], most=3e-3, all_within=2e-2)
    assert ("gauss_scale" in reference) == ("smca" in name)
    if "gauss_scale" in reference:
        close(found["gauss_scale"][:, :, queries], reference["gauss_scale"], most=3e-3, all_within=2e-2)
    close(found["hs"][:, :, queries][..., channels], reference["hs"], most=3e-3, all_within=2e-2)


def check_detections(name: str, found: Detections, inputs: Inputs, *, noise: float = 3e-4) -> None:
    """noise: of scores; where two lie closer, their order says nothing (of most systems 1e-5 was measured)."""
    reference = arrays(name)
    order = np.argsort(-reference["post_scores"], axis=1, kind="stable")  # DETR's stand in the order of the queries
    scores, labels = (np.take_along_axis(reference[key], order, axis=1) for key in ("post_scores", "post_labels"))
    boxes = np.take_along_axis(reference["post_boxes"], order[..., None], axis=1)
    close(found.scores, scores, most=3e-3, all_within=3e-3)
    gaps = np.abs(np.diff(scores, axis=1, prepend=np.inf, append=-np.inf))
    clear = np.minimum(gaps[:, :-1], gaps[:, 1:]) > noise
    assert clear.mean() > 0.1
    assert np.array_equal(found.labels.numpy()[clear], labels[clear])
    difference = np.abs(found.boxes_xyxy.numpy() - boxes)[clear]
    assert difference.max() <= 1e-2 * inputs.original_sizes.max()


def check_predictions(name: str, outputs: Outputs) -> None:
    reference = arrays(name)
    close(outputs.boxes, reference["pred_boxes"], most=5e-4, all_within=1e-2)
    close(outputs.logits[:, :, reference["q_idx"]], reference["logits_sub"], most=5e-3, all_within=5e-2)
    close(outputs.logits.mean(-1), reference["logits_qmean"], most=3e-3, all_within=2e-2)


def check_losses(losses: Losses, reference: dict[str, NDArray[np.generic]], prefix: str) -> None:
    names = [str(name) for name in reference[f"{prefix}loss_names"]]
    assert set(losses.terms) == set(names)
    values = np.array([losses.terms[name].item() for name in names])
    np.testing.assert_allclose(values, reference[f"{prefix}loss_values"], rtol=2e-3)
    assert losses.total.item() == pytest.approx(float(reference[f"{prefix}loss_total"]), rel=1e-4)


def check_matching(
    criterion: SetCriterion, outputs: Outputs, inputs: Inputs, reference: dict[str, NDArray[np.generic]], prefix: str
) -> None:
    indices = criterion.match(outputs, inputs.targets)[0].numpy()
    ends = np.cumsum(reference[f"{prefix}match_counts"])
    for image, (start, end) in enumerate(zip(ends - reference[f"{prefix}match_counts"], ends, strict=True)):
        queries = reference[f"{prefix}match_src"][:, start:end]
        targets = reference[f"{prefix}match_tgt"][:, start:end]
        assert np.array_equal(np.take_along_axis(indices[:, image], targets, axis=1), queries)
        assert (indices[:, image, end - start :] == -1).all()


def check_gradients(
    name: str,
    model: nn.Module,
    criterion: SetCriterion,
    inputs: Inputs,
    prefix: str,
    *,
    without_heads: tuple[str, ...] = (),
    norms_within: float = 5e-3,
) -> None:
    """prefix: "solo_" for the clean image alone, "" for the batch. without_heads: parameters whose first elements are
    noise or in another layout. norms_within: relatively."""
    reference, facts = arrays(name), meta(name)
    inputs = first_image(inputs) if prefix else inputs
    model.zero_grad()
    outputs = model(inputs.images, inputs.image_sizes)
    check_matching(criterion, outputs, inputs, reference, prefix)
    losses = criterion(outputs, inputs.targets)
    check_losses(losses, reference, prefix)
    losses.total.backward()
    names = official_names(model)
    grads = {names[own]: p.grad for own, p in model.named_parameters() if p.grad is not None}
    total = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert total == pytest.approx(float(reference[f"{prefix}grad_total_norm"]), rel=norms_within)
    for row, key in enumerate(map(str, reference[f"{prefix}grad_names"])):
        grad, norm = grads[key], float(reference[f"{prefix}grad_norms"][row])
        assert grad.norm().item() == pytest.approx(norm, rel=norms_within), key
        if key.endswith(without_heads):
            continue
        head = reference[f"{prefix}grad_head"][row]
        mine = grad.flatten()[:8].numpy()
        assert np.abs(mine - head[: mine.size]).max() <= 0.1 * norm / grad.numel() ** 0.5, key
    for key in facts["params_without_gradient"]:
        assert grads[key].abs().max() == 0, key
