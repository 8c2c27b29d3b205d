"""What grounded model classes share: the vision head, and steering inside the checkpoint.

A mixin over a stock class, not a model: it adds a head, two buffers and forward hooks, and changes
neither `forward` nor any state-dict key of the stock class. TRL's trainers replace `forward`; hooks
on the decoder's MLPs act there as well, and in `generate`, under PEFT and under `torch.compile`.

    model = GroundedLlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")
    model.set_steering(SteeringVector.from_pretrained("org/vector"), strength=0.5)
"""

from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .configuration_grounded import as_grounded
from .exporting import name_auto_classes
from .families import steered_modules
from .steering import SteeringVector, check_layers, check_strength, steer_output
from .vision_modeling import vision_logits


class GroundedMixin(PreTrainedModel):
    """Put before a stock `...ForConditionalGeneration` in the bases of a grounded class.

    Attributes:
        vision_head: [V, D], only with `config.vision_head == "separate"`.
        steering_direction: [len(config.steering_layers), D], only with steering layers.
        steering_strength: scalar, only with steering layers; change it with `set_steering`.
    """

    _auto_class = "AutoModelForImageTextToText"  # type: ignore[assignment]
    config_class: type[PreTrainedConfig]
    lm_head: nn.Linear
    vision_head: nn.Linear
    steering_direction: torch.Tensor
    steering_strength: torch.Tensor

    def __init__(self, config: PreTrainedConfig):
        super().__init__(as_grounded(config, self.config_class))
        name_auto_classes(self)
        self._steering_hooks: list[Any] = []
        if self.config.vision_head == "separate":
            text = self.config.get_text_config()
            self.vision_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self._add_steering(list(self.config.steering_layers))
        self.register_forward_pre_hook(_refuse_vision_labels, with_kwargs=True)
        self.post_init()

    @classmethod
    def from_stock(cls, model: PreTrainedModel, **config_changes: Any) -> Self:
        """A grounded model around the weights of a loaded stock model (shared, not copied).

        Args:
            model: an instance of the stock class.
            config_changes: grounded config fields, such as `vision_head="separate"`.
        """
        config = as_grounded(model.config, cls.config_class)
        for name, value in config_changes.items():
            setattr(config, name, value)
        with torch.device("meta"):
            grounded = cls(config)
        weight = model.lm_head.weight
        if config.vision_head == "separate":
            grounded.vision_head.to_empty(device=weight.device).to(weight.dtype)
            grounded.vision_head.weight.data.copy_(weight.data)
        grounded.model, grounded.lm_head = model.model, model.lm_head
        grounded.model.config = config
        grounded.generation_config = model.generation_config
        grounded._add_steering(list(config.steering_layers))
        return grounded.train(model.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Start the vision head as the language head, and steering as no steering."""
        if module is self._modules.get("vision_head"):
            tied = self.config.tie_word_embeddings
            source: Any = self.get_input_embeddings() if tied else self.lm_head
            init.copy_(self.vision_head.weight, source.weight)
        elif module is self and "steering_strength" in self._buffers:
            init.zeros_(self.steering_direction)
            init.zeros_(self.steering_strength)
        else:
            super()._init_weights(module)

    def _add_steering(self, layers: list[int]) -> None:
        for handle in self._steering_hooks:
            handle.remove()
        self._steering_hooks = []
        self.config.steering_layers = layers
        if not layers:
            return
        check_layers(self, layers)
        weight = self.lm_head.weight
        direction = weight.new_zeros(len(layers), weight.shape[1])
        self.register_buffer("steering_direction", direction)
        self.register_buffer("steering_strength", weight.new_zeros(()))
        modules = steered_modules(self)
        self._steering_hooks = [
            modules[layer].register_forward_hook(partial(self._steer, row))
            for row, layer in enumerate(layers)
        ]

    def _steer(self, row: int, module: nn.Module, args: Any, output: Any) -> Any:
        direction, strength = self.steering_direction[row], self.steering_strength
        return steer_output(output, direction, strength, self.config.steering_mode)

    @torch.no_grad()
    def set_steering(
        self, vector: SteeringVector | None = None, strength: float | None = None
    ) -> None:
        """Put a steering vector, or a new strength, into the model; saved with the checkpoint.

        Args:
            vector: directions to take over; its layers replace those of the model. None keeps them.
            strength: factor on them, any finite number; 0 is bit-identical to no steering. None
                takes the vector's own strength.

        Raises:
            ValueError: when vector and model do not fit, the vector is gated or steers the vision
                encoder, or there is nothing to set.
        """
        if vector is not None:
            if vector.vision or vector.gate is not None:
                raise ValueError(
                    "A checkpoint holds neither a gate nor directions of the vision encoder. Keep "
                    "the vector apart and use attach_steering(model, vector)."
                )
            strength = vector.strength if strength is None else strength
        elif strength is None or not self.config.steering_layers:
            raise ValueError(
                "Nothing to set: pass a SteeringVector, or a strength for a model that has one."
            )
        check_strength(strength)
        if vector is not None:
            layers = sorted(vector.directions)
            check_layers(self, layers, vector)
            self._add_steering(layers)
            self.config.steering_mode = vector.mode
            rows = torch.stack([vector.directions[layer] for layer in layers])
            self.steering_direction.copy_(rows)
        self.steering_strength.fill_(strength)

    def vision_logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """What each image position predicts, [B, R * C, V]; see `vision_modeling.vision_logits`."""
        return vision_logits(self, **inputs)


def _refuse_vision_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("vision_labels") is not None:
        raise ValueError(
            "forward() got vision_labels, which it would ignore. Call "
            "combined_loss(model, inputs) of vision_modeling.py, for instance in "
            "Trainer.compute_loss (recipes/train_vision_modeling.py does)."
        )


def share_conversion_mapping(grounded: type[GroundedMixin], stock: type[PreTrainedModel]) -> None:
    """Let `grounded` read and write checkpoints as `stock` does (not so by default).

    Without it, `lm_head` of checkpoints with older key names would be lost and drawn at random.
    """
    mapping = get_checkpoint_conversion_mapping(stock.__name__)
    if mapping is None:
        mapping = get_checkpoint_conversion_mapping(grounded.config_class.model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(grounded.__name__, mapping, overwrite=True)
