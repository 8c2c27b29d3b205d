"""What differs between families of vision-language models: one table, one row a family.

It is the only place that knows where a native transformers class keeps its decoder layers, its
vision encoder and its image tokens. It is not a model zoo: nothing is built, patched or downloaded.

    from firsthand.modeling.families import decoder_layers, image_grids
    decoder_layers(model)[0]; image_grids(model.config, processor(images=..., text=...))

A new family is one row in `FAMILIES` (and, for a new vision encoder or text model, one row in
`VISION_TOWERS` or `STEERED_MODULES`); it counts as supported when `tests/modeling/test_families.py`
passes with it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

Grid = tuple[int, int]  # rows and columns


@dataclass(frozen=True)
class Family:
    """Where one family of models keeps its parts.

    Paths are dotted module names below `model.base_model` (the model without its head).

    Attributes:
        model_type: the `config.model_type` this row serves.
        language_model: path of the text decoder.
        layers: path of the list of decoder layers, or one path for each type of text model.
        vision_tower: path of the vision encoder.
        projector: path of what turns the encoder's outputs into image tokens.
        merge: patches on each side of the square that one image token stands for.
        grids: the image tokens' grids in prepared inputs, where these decide; None where the config
            fixes one grid for all images.
        order: the patches' numbers (r * C + c on the image's grid of R x C patches) as they follow
            each other in the vision encoder; None where they go row by row.
        mixes: whether image tokens mix the outputs of several layers of the vision encoder; then
            relevancy is not carried through it.
        qformer: path of the list of layers of a Q-Former, whose queries are then the image tokens.
        abstractor: the same of a visual abstractor; behind its queries may stand one for their end.
        pack: where one image is shown as a base view and tiles: what packs their features, views x
            patches x D, image sizes and a newline's feature into features of the image's tokens.
        answer_type: what `token_type_ids` say of an answer's tokens. 1 where 0 means a prompt that
            is read in both directions.
        image_token: config field with the id of the image token.
    """

    model_type: str
    language_model: str
    layers: str | Mapping[str, str]
    vision_tower: str
    projector: str
    merge: Callable[[PreTrainedConfig], int]
    grids: Callable[[PreTrainedConfig, Mapping[str, Any]], list[Grid]] | None = None
    order: Callable[[PreTrainedConfig, Grid], torch.Tensor] | None = None
    mixes: Callable[[PreTrainedConfig], bool] = lambda config: False
    qformer: str | None = None
    abstractor: str | None = None
    pack: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    answer_type: int = 0
    image_token: str = "image_token_id"

    @property
    def queries(self) -> str | None:
        """Path of the layers whose queries are the image tokens, if they are queries."""
        return self.qformer or self.abstractor


@dataclass(frozen=True)
class VisionTower:
    """A vision encoder: path of its layers, tokens before its patches (CLS), and whether its layers
    attend; convolutions do not, so no relevancy is carried through them."""

    layers: str
    prefix_tokens: int
    attends: bool = True


def _one_patch(config: PreTrainedConfig) -> int:
    return 1


def _several_layers(config: PreTrainedConfig) -> bool:
    return isinstance(config.vision_feature_layer, list)


def _deepstack(config: PreTrainedConfig) -> bool:
    """Qwen3-VL: early decoder layers add outputs of earlier encoder layers to the image tokens."""
    return bool(config.vision_config.deepstack_visual_indexes)


def _pixel_shuffle(config: PreTrainedConfig) -> int:
    return round(1 / config.downsample_ratio)


def _spatial_merge(config: PreTrainedConfig) -> int:
    return config.vision_config.spatial_merge_size


def _scale_factor(config: PreTrainedConfig) -> int:
    return config.scale_factor


def _pooled(config: PreTrainedConfig) -> int:
    """Gemma 3: the mean of a square of patches is one token."""
    return patch_grid(config)[0] // math.isqrt(config.mm_tokens_per_image)


def _total_pool(config: PreTrainedConfig) -> int:
    """ConvNeXt: each stage but the first halves the map."""
    return 2 ** (config.vision_config.num_stages - 1)


def _thw_grids(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[Grid]:
    """Qwen: every image keeps its shape, and `image_grid_thw` counts its patches."""
    if "image_grid_thw" not in inputs:
        return []
    merge = _spatial_merge(config)
    return [
        (h // merge, w // merge) for _, h, w in torch.as_tensor(inputs["image_grid_thw"]).tolist()
    ]


def _by_blocks(config: PreTrainedConfig, grid: Grid) -> torch.Tensor:
    """Qwen2-VL: the patches that one token merges stand together, the tokens row by row."""
    merge, (height, width) = _spatial_merge(config), grid
    numbers = torch.arange(height * width).view(height // merge, merge, width // merge, merge)
    return numbers.transpose(1, 2).flatten()


def _by_windows(config: PreTrainedConfig, grid: Grid) -> torch.Tensor:
    """Qwen2.5-VL: as `_by_blocks`, but the tokens of one attention window stand together."""
    vision, merge = config.vision_config, _spatial_merge(config)
    side = vision.window_size // vision.patch_size // merge
    tokens = [(r, c) for r in range(grid[0] // merge) for c in range(grid[1] // merge)]
    tokens.sort(key=lambda token: (token[0] // side, token[1] // side, *token))
    chosen = torch.tensor([r * (grid[1] // merge) + c for r, c in tokens])
    return _by_blocks(config, grid).view(-1, merge**2)[chosen].flatten()


def _llava(model_type: str, merge: Callable[[PreTrainedConfig], int], **fields: Any) -> Family:
    return Family(
        model_type=model_type,
        language_model="language_model",
        layers="language_model.layers",
        vision_tower="vision_tower",
        projector="multi_modal_projector",
        merge=merge,
        **fields,
    )


def _pack_next(
    model: Any, views: torch.Tensor, sizes: torch.Tensor, newline: torch.Tensor
) -> torch.Tensor:
    strategy = model.config.vision_feature_select_strategy
    return model.pack_image_features([views], sizes, strategy, image_newline=newline)[0][0]


def _pack_onevision(
    model: Any, views: torch.Tensor, sizes: torch.Tensor, newline: torch.Tensor
) -> torch.Tensor:
    ratio = model.config.vision_aspect_ratio
    packed, _ = model.pack_image_features([views], sizes, newline, vision_aspect_ratio=ratio)
    return packed[0]


def _qwen(model_type: str, order: Callable[[PreTrainedConfig, Grid], torch.Tensor]) -> Family:
    return Family(
        model_type=model_type,
        language_model="language_model",
        layers="language_model.layers",
        vision_tower="visual",
        projector="visual.merger",
        merge=_spatial_merge,
        grids=_thw_grids,
        order=order,
    )


def _idefics3(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        language_model="text_model",
        layers="text_model.layers",
        vision_tower="vision_model",
        projector="connector",
        merge=_scale_factor,
    )


def _blip(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        language_model="language_model",
        layers={
            "llama": "language_model.model.layers",
            "opt": "language_model.model.decoder.layers",
        },
        vision_tower="vision_model",
        projector="language_projection",
        merge=_one_patch,
        qformer="qformer.encoder.layer",
    )


FAMILIES: dict[str, Family] = {
    "llava": _llava("llava", _one_patch, mixes=_several_layers),
    "internvl": _llava("internvl", _pixel_shuffle, mixes=_several_layers),
    "llava_next": _llava("llava_next", _one_patch, mixes=_several_layers, pack=_pack_next),
    "llava_onevision": _llava(
        "llava_onevision", _one_patch, mixes=_several_layers, pack=_pack_onevision
    ),
    "qwen2_vl": _qwen("qwen2_vl", _by_blocks),
    "qwen2_5_vl": _qwen("qwen2_5_vl", _by_windows),
    "qwen3_vl": replace(_qwen("qwen3_vl", _by_blocks), mixes=_deepstack),
    "gemma3": _llava("gemma3", _pooled),
    "paligemma": _llava("paligemma", _one_patch, answer_type=1),
    "idefics3": _idefics3("idefics3"),
    "smolvlm": _idefics3("smolvlm"),
    "blip-2": _blip("blip-2"),
    "instructblip": _blip("instructblip"),
    "conv_llava": _llava("conv_llava", _total_pool),
    "mplug_owl": _llava("mplug_owl", _one_patch, abstractor="multi_modal_projector.layers"),
    "mplug_owl2": _llava("mplug_owl2", _one_patch, abstractor="multi_modal_projector.layers"),
}

QUERIES = (
    "its image tokens are the queries of a Q-Former or an abstractor, which look at the whole "
    "image: none has a place in it, so there is nothing to label, and no grid to draw"
)
TILES = (
    "it shows one image as a base view and as tiles of it, with newline tokens between, so its "
    "image tokens overlap the image twice and lie on no one grid"
)
REFUSED: dict[str, str] = {
    "instructblipvideo": "it reads the frames of a video, and everything here reads one image",
}

FINAL_NORMS: dict[str, str] = {"opt": "final_layer_norm"}  # of text models that do not say "norm"

VISION_TOWERS: dict[str, VisionTower] = {
    "clip_vision_model": VisionTower("encoder.layers", prefix_tokens=1),
    "siglip_vision_model": VisionTower("encoder.layers", prefix_tokens=0),
    "dinov2": VisionTower("encoder.layer", prefix_tokens=1),
    "internvl_vision": VisionTower("encoder.layer", prefix_tokens=1),
    "qwen2_vl_vision": VisionTower("blocks", prefix_tokens=0),
    "qwen2_5_vl_vision": VisionTower("blocks", prefix_tokens=0),
    "qwen3_vl_vision": VisionTower("blocks", prefix_tokens=0),
    "blip_2_vision_model": VisionTower("encoder.layers", prefix_tokens=1),
    "instructblip_vision_model": VisionTower("encoder.layers", prefix_tokens=1),
    "idefics3_vision": VisionTower("encoder.layers", prefix_tokens=0),
    "smolvlm_vision": VisionTower("encoder.layers", prefix_tokens=0),
    "convnext": VisionTower("encoder.stages", prefix_tokens=0, attends=False),
}

STEERED_MODULES: dict[str, str] = {
    "llama": "mlp",
    "mistral": "mlp",
    "qwen2": "mlp",
    "qwen3": "mlp",
    "qwen2_vl_text": "mlp",
    "qwen2_5_vl_text": "mlp",
    "qwen3_vl_text": "mlp",
    "gemma": "mlp",
    "gemma2": "post_feedforward_layernorm",
    "opt": "fc2",
    "gemma3_text": "post_feedforward_layernorm",
}


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside any wrapper (PEFT, DistributedDataParallel, `torch.compile`).

    Raises:
        ValueError: when there is no transformers model inside.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(
        f"{type(model).__name__} holds no transformers model. Pass a PreTrainedModel, or a wrapper "
        "(PEFT, DistributedDataParallel) around one."
    )


def _config(model_or_config: nn.Module | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(model_or_config, PreTrainedConfig):
        return model_or_config
    return unwrap(model_or_config).config


def _row(table: dict, key: str, kind: str, table_name: str):
    if key in table:
        return table[key]
    raise ValueError(
        f"{kind} {key!r} is not supported; supported: {', '.join(sorted(table))}. To add it, put "
        f"one row into {table_name} of modeling/families.py and run its tests."
    )


def family_of(model_or_config: nn.Module | PreTrainedConfig) -> Family:
    """The table row of a model (wrapped or not) or of its config.

    Raises:
        ValueError: for a model type that cannot be served, with the reason, or that has no row; the
            message then says how to add one.
    """
    model_type = _config(model_or_config).model_type
    if model_type in REFUSED:
        raise ValueError(f"model type {model_type!r} is not supported: {REFUSED[model_type]}.")
    return _row(FAMILIES, model_type, "model type", "FAMILIES")


def check_causal(model_or_config: nn.Module | PreTrainedConfig, what: str) -> None:
    """Raise ValueError where a prompt is read in both directions: `what` would look ahead."""
    family = family_of(model_or_config)
    if family.answer_type:
        raise ValueError(
            f"{what} does not cover {family.model_type!r}: it reads its prompt in both directions, "
            "so an answer inside it would be read by the tokens that predict it. explain and "
            "attach_steering do."
        )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the text decoder, first to last."""
    return cast(nn.ModuleList, unwrap(model).base_model.get_submodule(_layers_path(model)))


def _layers_path(model: nn.Module) -> str:
    family = family_of(model)
    if isinstance(family.layers, str):
        return family.layers
    where = f"layers of {family.model_type!r}"
    return _row(dict(family.layers), _text_type(model), "text model", where)


def _text_type(model: nn.Module) -> str:
    return _config(model).text_config.model_type


def final_norm(model: nn.Module) -> nn.Module:
    """What the last decoder layer's output passes before the head reads it."""
    decoder, _, _ = _layers_path(model).rpartition(".")
    name = FINAL_NORMS.get(_text_type(model), "norm")
    return unwrap(model).base_model.get_submodule(f"{decoder}.{name}")


def steered_modules(model: nn.Module) -> list[nn.Module]:
    """One module a decoder layer: the one whose output ([B, T, D] or [N, D]) is steered."""
    name = _row(STEERED_MODULES, _text_type(model), "text model", "STEERED_MODULES")
    return [layer.get_submodule(name) for layer in decoder_layers(model)]


def vision_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the vision encoder, first to last (also those whose output is not used)."""
    tower = unwrap(model).base_model.get_submodule(family_of(model).vision_tower)
    return cast(nn.ModuleList, tower.get_submodule(vision_row(_config(model)).layers))


def query_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the Q-Former or abstractor, first to last; empty where there is none."""
    path = family_of(model).queries
    if path is None:
        return nn.ModuleList()
    return cast(nn.ModuleList, unwrap(model).base_model.get_submodule(path))


def vision_prefix_tokens(config: PreTrainedConfig) -> int:
    """Tokens that the vision encoder puts before its patches (1 for a CLS token, else 0)."""
    return vision_row(config).prefix_tokens


def image_token_id(config: PreTrainedConfig) -> int:
    """The token id that stands at image positions of `input_ids`."""
    return getattr(config, family_of(config).image_token)


def image_mask(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """True at the image positions of `input_ids`: bool, [B, T] like the input."""
    return input_ids == image_token_id(_config(model))


def projector(model: nn.Module) -> nn.Module:
    """What turns the vision encoder's outputs into image tokens."""
    return unwrap(model).base_model.get_submodule(family_of(model).projector)


def patch_grid(config: PreTrainedConfig) -> Grid:
    """Rows and columns of the vision encoder's patches for one image of the configured size."""
    vision = config.vision_config
    height, width = _pair(vision.image_size)
    patch_height, patch_width = _pair(vision.patch_size)
    return height // patch_height, width // patch_width


def image_grid(config: PreTrainedConfig) -> Grid:
    """Rows and columns of the image tokens of one image; token i lies at (i // C, i % C).

    Each token stands for `family.merge(config)` x `family.merge(config)` neighbouring patches.

    Raises:
        ValueError: when the image decides about the grid (ask `image_grids`), or the tokens do not
            lie on one (a CLS token is among them, or the patches cannot be merged evenly).
    """
    family, vision = family_of(config), vision_row(config)
    _check_places(family)
    if family.grids is not None:
        raise ValueError(
            f"{family.model_type!r} gives every image a grid of its own shape: prepare the image "
            "and ask image_grids(config, inputs)."
        )
    strategy = config.to_dict().get("vision_feature_select_strategy")
    dropped = {"default": 1, "full": 0, None: vision.prefix_tokens}[strategy]
    if dropped != vision.prefix_tokens:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} drops "
            f"{dropped} of the encoder's outputs, but {config.vision_config.model_type!r} has "
            f"{vision.prefix_tokens} before its patches, so the image tokens are no grid. "
            f"Use {'default' if vision.prefix_tokens else 'full'!r}."
        )
    merge, grid = family.merge(config), patch_grid(config)
    if grid[0] % merge or grid[1] % merge:
        raise ValueError(
            f"{grid[0]} x {grid[1]} patches cannot be merged by {merge} x {merge}. "
            "Change image_size, patch_size or downsample_ratio."
        )
    return grid[0] // merge, grid[1] // merge


def patch_order(config: PreTrainedConfig, grid: Grid) -> torch.Tensor:
    """Which patch stands where in the vision encoder, behind its CLS token.

    Args:
        config: the model's config.
        grid: rows and columns of the image's tokens, (R, C), as `image_grids` says.

    Returns:
        int64 [P], P = R * C * merge^2: number r * (C * merge) + c of the patch at each place.
    """
    family = family_of(config)
    merge = family.merge(config)
    patches = grid[0] * merge, grid[1] * merge
    if family.order is None:
        return torch.arange(patches[0] * patches[1])
    return family.order(config, patches)


def image_grids(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[Grid]:
    """One grid (see `image_grid`) for each image of a prepared batch, in the order of its tokens.

    Args:
        config: the model's config.
        inputs: what its processor returned: input_ids [B, T] and what belongs to the images. The
            tiles of a split image count as images of their own.

    Raises:
        ValueError: when the image tokens in input_ids are not those of whole grids, or have no
            places at all.
    """
    family = family_of(config)
    _check_places(family)
    tokens = int((torch.as_tensor(inputs["input_ids"]) == image_token_id(config)).sum())
    if family.grids is not None:
        grids = family.grids(config, inputs)
    else:
        rows, columns = image_grid(config)
        grids = [(rows, columns)] * (tokens // (rows * columns))
    if sum(rows * columns for rows, columns in grids) != tokens:
        raise ValueError(
            f"The inputs hold {tokens} image tokens, which are not those of grids "
            f"{sorted(set(grids)) or image_grid(config)}. Use the model's own processor, whose "
            "image size and token count belong to it, and do not truncate."
        )
    return grids


def _check_places(family: Family) -> None:
    if family.queries is not None:
        raise ValueError(f"{family.model_type!r} has no grid of image tokens: {QUERIES}.")
    if family.pack is not None:
        raise ValueError(f"{family.model_type!r} has no grid of image tokens: {TILES}.")


def vision_row(config: PreTrainedConfig) -> VisionTower:
    """The table row of the vision encoder of a model with this config."""
    return _row(VISION_TOWERS, config.vision_config.model_type, "vision encoder", "VISION_TOWERS")


def _pair(size: int | list[int] | tuple[int, ...]) -> Grid:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
