"""Where the tokens of one image lie on it: a grid, or a base view and tiles that share one map.

It reads the inputs that a processor prepared; it knows nothing of attention or relevancy.

    layout = layout_of(model, inputs); layout.over_image(tokens)  # [..., N] -> [..., R, C]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .families import (
    Grid,
    family_of,
    image_grids,
    image_mask,
    patch_grid,
    vision_prefix_tokens,
)


@dataclass(frozen=True)
class Layout:
    """The N tokens of one image.

    Attributes:
        grid: (R, C) of the map over the image; queries stand in one row.
        base: the grid of the base view, whose tokens come first, before the R x C tokens of the
            tiles with a newline behind every row; None where there is one view.
        places: int64 [N] the place of each token's patch in the vision encoder, all views behind
            one another, -1 for newlines; None where there is one view.
        encoded: length of the vision encoder's sequence over all views; 0 where there is one view.
    """

    grid: Grid
    base: Grid | None = None
    places: torch.Tensor | None = None
    encoded: int = 0

    def over_image(self, tokens: torch.Tensor) -> torch.Tensor:
        """Values of the tokens, [..., N], on the map, [..., R, C].

        A token of the base view is shared out by area; newlines, and the end of queries, lie
        nowhere.
        """
        if self.base is None:
            return tokens[..., : self.grid[0] * self.grid[1]].unflatten(-1, self.grid)
        (rows, columns), first = self.grid, self.base[0] * self.base[1]
        fine = tokens[..., first:].unflatten(-1, (rows, columns + 1))[..., :-1]
        coarse = tokens[..., :first].unflatten(-1, self.base)
        return fine + shares(self.base[0], rows).T @ coarse @ shares(self.base[1], columns)


def shares(cells: int, fields: int) -> torch.Tensor:
    """[cells, fields]: which share of each cell of a line lies in which field of the same line."""
    cell, field = torch.arange(cells)[:, None] / cells, torch.arange(fields)[None] / fields
    end = torch.minimum(cell + 1 / cells, field + 1 / fields)
    return (end - torch.maximum(cell, field)).clamp(min=0) * cells


def layout_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Layout:
    """The layout of the one image in prepared inputs.

    Raises:
        ValueError: when the image tokens are not those of one image, or cannot be told apart.
    """
    config, family = model.config, family_of(model)
    if family.queries is not None:
        return Layout((1, config.num_query_tokens))
    if family.pack is not None:
        return _views(model, inputs)
    grids = image_grids(config, inputs)
    if len(grids) != 1:
        raise ValueError(
            f"The processor made {len(grids)} images of one. Relevancy needs the whole image as "
            "one: switch tiles off (do_image_splitting or crop_to_patches of its image_processor)."
        )
    return Layout(grids[0])


def _views(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Layout:
    """From what the model itself makes of the patches' numbers, packed as if they were features."""
    config, pack = model.config, family_of(model).pack
    base, prefix, views = (
        patch_grid(config),
        vision_prefix_tokens(config),
        len(inputs["pixel_values"][0]),
    )
    patches = base[0] * base[1]
    numbers = torch.arange(views * patches, dtype=torch.float32).view(views, patches, 1)
    sizes = torch.as_tensor(inputs["image_sizes"]).cpu()
    assert pack is not None
    packed = pack(model.base_model, numbers, sizes, torch.tensor([-1.0]))[:, 0]
    found = int(image_mask(model, inputs["input_ids"]).sum())
    if len(sizes) != 1 or found != len(packed) or not torch.equal(packed, packed.round()):
        raise ValueError(
            f"{len(sizes)} images of {sizes.tolist()} pixels became {found} image tokens, which do "
            "not stand for one patch each. Use the model's own processor, and scale large images "
            "down: LLaVA-OneVision blends the patches of more than 9 tiles."
        )
    number = packed.long()
    places = number // patches * (prefix + patches) + prefix + number % patches
    places = torch.where(number < 0, -1, places)
    columns = int((places[patches:] < 0).nonzero()[0])
    rows = (len(places) - patches) // (columns + 1)
    return Layout((rows, columns), base, places, views * (prefix + patches))
