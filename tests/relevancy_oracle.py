"""The textbook relevancy of an answer's tokens: full matrices over transformers' own eager maps.

It is what `explain` is compared with; it uses neither modeling/families.py nor our attention. The
rule is that of Chefer et al. (arXiv 2103.15679): R = (I + A_bar_L) ... (I + A_bar_1).

    for row, image_row, patch_map in oracle(model, processor, image, question, answer): ...
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tiny_models import tiny_prompt
from torch import nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

TEXT = ("language_model", "text_model")
VISION = ("vision_tower", "visual", "vision_model")
Maps = dict[str, list[torch.Tensor]]  # of each attention module, by name: one map a call


@contextmanager
def eager_maps(model: nn.Module) -> Iterator[Maps]:
    """Run `model` on transformers' eager attention and keep each module's maps [1, H, n, n]."""
    names = {module: name for name, module in model.named_modules()}
    maps: Maps = {}

    def keeping(original):
        def forward(module, *args, **kwargs):
            output, weights = original(module, *args, **kwargs)
            maps.setdefault(names[module], []).append(weights)
            return output, weights

        return forward

    sources = {sys.modules[type(module).__module__] for module in names}
    sources = [s for s in sources if "eager_attention_forward" in vars(s)]
    originals = [s.eager_attention_forward for s in sources]
    model.set_attn_implementation("eager")
    try:
        for source, original in zip(sources, originals, strict=True):
            source.eager_attention_forward = keeping(original)
        yield maps
    finally:
        for source, original in zip(sources, originals, strict=True):
            source.eager_attention_forward = original


def full_matrix(
    logit: torch.Tensor, maps: Maps, tower: tuple[str, ...], dtype: torch.dtype = torch.float
) -> list[torch.Tensor]:
    """R [n, n] after each layer of one tower, A_bar = mean over heads of clamp(A * dlogit/dA, 0).

    Maps of several calls (windows) or images (views) are blocks on the diagonal.
    """
    totals: list[torch.Tensor] = []
    for name, kept in maps.items():
        if not set(tower) & set(name.split(".")):
            continue
        grads = torch.autograd.grad(logit, kept, retain_graph=True, allow_unused=True)
        if grads[0] is None:  # a layer behind the one whose output is used
            continue
        bars = [
            bar
            for a, g in zip(kept, grads, strict=True)
            for bar in (a * g).clamp(min=0).mean(1)  # [B, n, n]: of each view
        ]
        layer = torch.block_diag(*bars).to(dtype)
        total = totals[-1] if totals else torch.eye(len(layer), dtype=dtype)
        totals.append((total + layer @ total).detach())
    return totals


def places(config, inputs: dict, grid: tuple[int, int]) -> torch.Tensor:
    """The number (row by row) of the patch at each place of the vision encoder."""
    if "image_grid_thw" not in inputs:
        return torch.arange(grid[0] * grid[1])
    vision, thw = config.vision_config, inputs["image_grid_thw"]
    at = get_vision_position_ids(thw, vision.spatial_merge_size)
    numbers = (at[:, 0] * grid[1] + at[:, 1]).view(-1, vision.spatial_merge_size**2)
    if config.model_type == "qwen2_5_vl":
        window, _ = get_vision_window_index(
            thw, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        numbers = numbers[window]
    return numbers.flatten()


def shares(tokens: torch.Tensor, merge: int) -> torch.Tensor:
    """[R * m, C * m]: each image token's relevancy of [R, C] in equal shares on its patches."""
    return torch.kron(tokens, torch.ones(merge, merge)) / merge**2


def chained(
    config, inputs: dict, tokens: torch.Tensor, merge: int, vision: torch.Tensor
) -> torch.Tensor:
    """Image tokens' relevancy [R, C] through R of the vision encoder to its patches [r, c]."""
    first = shares(tokens, merge)
    order = places(config, inputs, first.shape)
    prefix = len(vision) - len(order)
    row = first.flatten()[order] @ vision[prefix:, prefix:]
    patches = torch.zeros(len(order))
    patches[order] = row
    return patches.view(first.shape)


def viewed(values: torch.Tensor) -> torch.Tensor:
    """Values of tokens on the map [6, 8], of 80 x 60 pixels in a base view and 2 x 2 tiles.

    4 x 4 tokens of the base view come first; 6 rows of 8, each with a newline, follow.
    """
    base, fine = values[:16].view(4, 4), values[16:].view(6, 9)[:, :8]
    rows = (base.repeat_interleave(3, 0) / 3).view(6, 2, 4).sum(1)
    return fine + rows.repeat_interleave(2, 1) / 2


def through_views(tokens: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """The same through R of the vision encoder, whose 5 views stand behind one another.

    The tiles show the image with a row of patches above and below it.
    """
    size = len(vision) // 5
    prefix = size - 16
    places = [prefix + i for i in range(16)]
    for r in range(1, 7):
        for c in range(8):
            tile = 1 + r // 4 * 2 + c // 4
            places.append(tile * size + prefix + r % 4 * 4 + c % 4)
        places.append(-1)  # the newline's
    place = torch.tensor(places)
    row = torch.zeros(len(vision))
    row[place[place >= 0]] = tokens[place >= 0]
    row = row @ vision
    return viewed(torch.where(place >= 0, row[place], 0))


def averaged(logit: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    """A_bar of a module that was called once."""
    (weights,) = kept
    (grad,) = torch.autograd.grad(logit, [weights], retain_graph=True)
    return (weights * grad)[0].clamp(min=0).mean(0).detach().double()


def normalised(relevancy: torch.Tensor) -> torch.Tensor:
    """Equations 8 and 9, row by row; a row to which nothing was added stays the identity's."""
    result = torch.eye(len(relevancy), dtype=torch.double)
    for i, row in enumerate(relevancy - result):
        if row.sum() > 0:
            result[i] += row / row.sum()
    return result


def queried(logit: torch.Tensor, maps: Maps, tokens: torch.Tensor) -> torch.Tensor:
    """Queries' relevancy [Q] through the Q-Former and the vision encoder to its 4 x 4 patches.

    In float64, since what was added to the identity is taken out of it again.
    """
    image = full_matrix(logit, maps, VISION, torch.double)[-1]
    bars = {name: averaged(logit, kept) for name, kept in maps.items() if "qformer" in name}
    size = len(bars["qformer.encoder.layer.0.attention.attention"])
    own, seen = torch.eye(size).double(), torch.zeros(size, len(image)).double()
    for index in range(sum(name.endswith(".attention.attention") for name in bars)):
        bar = bars[f"qformer.encoder.layer.{index}.attention.attention"]
        own, seen = own + bar @ own, seen + bar @ seen
        cross = bars.get(f"qformer.encoder.layer.{index}.crossattention.attention")
        if cross is not None:
            whole = torch.zeros_like(seen)  # an instruction's tokens do not look at it
            whole[: len(cross)] = cross
            seen = seen + normalised(own).T @ whole @ normalised(image)
    return (tokens.double() @ seen[: len(tokens)])[1:].view(4, 4).float()


def abstracted(logit: torch.Tensor, maps: Maps, tokens: torch.Tensor) -> torch.Tensor:
    """Queries' relevancy [Q] through an abstractor and the vision encoder to its 4 x 4 patches.

    R over the queries and the encoder's tokens together, of which the latter stay as they are.
    """
    image = full_matrix(logit, maps, VISION, torch.double)[-1]
    total = torch.eye(len(tokens) + len(image)).double()
    for name in sorted(name for name in maps if "multi_modal_projector" in name):
        bar = averaged(logit, maps[name])
        total = total + torch.cat([bar, bar.new_zeros(len(image), len(total))]) @ total
    row = tokens.double() @ total[: len(tokens), len(tokens) :] @ image
    return row[1:].view(4, 4).float()


def oracle(
    model, processor, image, question: str, answer: str, grid: tuple[int, int], merge: int | str
):
    """Per answer token: its rows over the sequence after each layer [L, n], the last over the image
    tokens [R, C], and over the patches.

    `merge` is "queries" where the image tokens are a Q-Former's, "abstractor" where they are an
    abstractor's and their end, "views" where they are those of a base view and tiles, "cells" of a
    convolutional encoder (its last is None).
    """
    inputs = dict(
        processor(images=[[image]], text=[tiny_prompt(processor, question)], return_tensors="pt")
    )
    answer_ids = processor.tokenizer(answer, return_tensors="pt").input_ids
    prompt = inputs["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            ones = torch.ones_like(answer_ids)
            more = {"input_ids": answer_ids, "attention_mask": ones}
            if model.config.model_type == "paligemma":
                more["token_type_ids"] = ones  # read from left to right, unlike the prompt
            more = more.get(name, torch.zeros_like(answer_ids))
            inputs[name] = torch.cat([inputs[name], more], 1)
    inputs.pop("labels", None)
    inputs["pixel_values"] = inputs["pixel_values"].clone().requires_grad_()
    with eager_maps(model) as maps:
        logits = model(**inputs, use_cache=False).logits[0]
    seen = inputs["input_ids"][0] == model.config.image_token_id
    for index, token in enumerate(answer_ids[0]):
        at = prompt - 1 + index
        logit = logits[at, token]
        rows = torch.stack([total[at] for total in full_matrix(logit, maps, TEXT)])
        rows[:, at] -= 1
        tokens = rows[-1, seen]
        if merge == "cells":
            yield rows, tokens.view(grid), None
            continue
        if merge == "queries":
            patches = queried(logit, maps, tokens)
        elif merge == "abstractor":
            tokens = tokens[:-1]
            patches = abstracted(logit, maps, tokens)
        elif merge == "views":
            patches = through_views(tokens, full_matrix(logit, maps, VISION)[-1])
            tokens = viewed(tokens)
        else:
            vision, tokens = full_matrix(logit, maps, VISION)[-1], tokens.view(grid)
            patches = chained(model.config, inputs, tokens, merge, vision)
        yield rows, tokens.view(grid), patches
