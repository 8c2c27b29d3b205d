"""From the relevancy of image tokens to that of the image's patches: the way through the encoder.

It knows how a family lays tokens on patches and what stands between them (a merger, queries);
the rules are in relevancy_attention.py, relevancy_qformer.py and relevancy_abstractor.py.

    spread = patch_spread(config, image, layout); recorder = Recorder(model, spread, backend)
    with entering_queries(model) as queries: ...
    patch_relevancy(model, recorder, row[image], layout)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .families import (
    Grid,
    family_of,
    patch_grid,
    patch_order,
    query_layers,
    vision_layers,
    vision_prefix_tokens,
    vision_row,
)
from .relevancy_abstractor import abstractor_relevancy
from .relevancy_attention import Recorder
from .relevancy_layout import Layout
from .relevancy_qformer import query_relevancy


def patch_spread(
    config: PreTrainedConfig, image: torch.Tensor, layout: Layout
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """From a row over the sequence to one over the vision encoder's tokens.

    Args:
        config: the model's config.
        image: bool [n], True at the image tokens.
        layout: where they lie.

    Returns:
        `spread_over_patches` or `spread_over_views` of this image; None where image tokens have no
        patches of their own (queries), mix outputs of several layers, or come from convolutions.
    """
    family = family_of(config)
    if family.queries is not None or family.mixes(config) or not vision_row(config).attends:
        return None
    if layout.places is not None:
        return partial(spread_over_views, image=image, places=layout.places, encoded=layout.encoded)
    grid = layout.grid
    return partial(
        spread_over_patches,
        image=image,
        grid=grid,
        merge=family.merge(config),
        prefix=vision_prefix_tokens(config),
        order=patch_order(config, grid),
    )


def spread_over_patches(
    row: torch.Tensor,
    image: torch.Tensor,
    grid: Grid,
    merge: int,
    prefix: int,
    order: torch.Tensor,
) -> torch.Tensor:
    """Each image token's relevancy in equal shares on its patches, zeros on the CLS token.

    Args:
        row: [n] over the sequence.
        image: bool [n], True at the R * C image tokens.
        grid: (R, C).
        merge: patches on each side of the square that one token stands for.
        prefix: tokens of the vision encoder before its patches.
        order: as `families.patch_order` gives it.

    Returns:
        [prefix + R * C * merge^2].
    """
    tokens = row[image.to(row.device)].view(grid) / merge**2
    patches = tokens.repeat_interleave(merge, 0).repeat_interleave(merge, 1)
    return torch.cat([row.new_zeros(prefix), patches.flatten()[order.to(row.device)]])


def spread_over_views(
    row: torch.Tensor, image: torch.Tensor, places: torch.Tensor, encoded: int
) -> torch.Tensor:
    """Each image token's relevancy on its patch in one of several views, [encoded].

    Args:
        row: [n] over the sequence.
        image: bool [n], True at the image tokens.
        places, encoded: as in `Layout`.
    """
    tokens, places = row[image.to(row.device)], places.to(row.device)
    found = places >= 0
    return row.new_zeros(encoded).index_add_(0, places[found], tokens[found])


@contextmanager
def entering_queries(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """The queries that enter, as a tensor that needs gradients: the image decides nothing of them.

    Without, autograd would leave out the first layer's attention. Empty where there are no queries.
    """
    entered: list[torch.Tensor] = []

    def enter(layer: nn.Module, args: tuple) -> tuple:
        entered.append(args[0].detach().requires_grad_())
        return entered[0], *args[1:]

    handles = [layer.register_forward_pre_hook(enter) for layer in query_layers(model)[:1]]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def patch_relevancy(
    model: PreTrainedModel, recorder: Recorder, image: torch.Tensor, layout: Layout
) -> torch.Tensor | None:
    """The relevancy of the patches [r, c] once the backward pass is done.

    Args:
        model: the model.
        recorder: what saw the backward pass.
        image: relevancy of the image tokens, [N].
        layout: where they lie.

    Returns:
        None where relevancy is not carried through the encoder.
    """
    config = model.config
    shape, order = _patches(config, layout.grid)
    if recorder.keeps:
        row = _below_queries(model, recorder, layout.over_image(image)[0])
    elif recorder.spread is not None:
        row = recorder.rows["vision"][-1].cpu()
    else:
        return None
    if layout.places is not None:
        seen = torch.where(layout.places >= 0, row[layout.places.clamp(min=0)], 0)
        return layout.over_image(seen)
    row = row[vision_prefix_tokens(config) :]
    return torch.empty_like(row).index_copy_(0, order, row).view(shape)


def _below_queries(model: PreTrainedModel, recorder: Recorder, image: torch.Tensor) -> torch.Tensor:
    """Relevancy of the queries, [Q], as that of the vision encoder's tokens, [n]."""
    vision = [bar for (bar,) in recorder.kept(vision_layers(model))]
    layers = recorder.kept(query_layers(model))
    if family_of(model).abstractor is not None:
        return abstractor_relevancy(image, vision, [bar for (bar,) in layers])
    return image @ query_relevancy(vision, layers)


def _patches(config: PreTrainedConfig, grid: Grid) -> tuple[Grid, torch.Tensor]:
    """The grid of the patches behind a grid of image tokens, and their order in the encoder."""
    family = family_of(config)
    if family.queries is not None:
        grid = patch_grid(config)
    merge = family.merge(config)
    return (grid[0] * merge, grid[1] * merge), patch_order(config, grid)
