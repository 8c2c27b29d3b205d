"""Steering: add a direction to the outputs of the decoder's MLPs, at every position and step.

`SteeringVector` is the artefact (directions, saved as safetensors + JSON + card), `attach_steering`
puts it on any supported native or grounded model with forward hooks. Not a fitting method (see
`steering_fit.py`) and not a weight edit (`steering_weights.py`): detaching restores the model
exactly. The site, the outputs of the MLPs of decoder and vision encoder, is that of VTI (arXiv
2410.15778).

    vector = SteeringVector.from_pretrained("org/vector")
    with attach_steering(model, vector, strength=0.8):
        model.generate(**inputs)

Attach before `torch.compile`: hooks added afterwards are not seen by the compiled graph, while a
changed strength is.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import huggingface_hub
import torch
import transformers
from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn

from .families import decoder_layers, steered_modules, unwrap, vision_layers, vision_row
from .placement import device_of
from .steering_card import steering_card
from .steering_gate import SupportGate

WEIGHTS_NAME, CONFIG_NAME, CARD_NAME = "steering.safetensors", "steering_config.json", "README.md"
TOWERS = {"directions": "language_model.layers.", "vision": "vision_tower.layers."}
SUFFIX = ".direction"
MODES = ("add", "norm", "turn", "vista")
Directions = dict[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """One direction a layer, with where it comes from.

    Attributes:
        directions: decoder layer index -> float32 [D] on the CPU, in units of the steered module's
            output; a fitted direction is as long as the mean difference, so strength 1 moves by it.
        method: how it was fitted (a name of `steering_fit.METHODS`, or free text).
        base_model: hub id or path of the model that it was fitted on.
        strength: the default strength; signed, any finite number, 0 is no steering.
        mode: one of MODES, see `steer`.
        pairs: number of contrast pairs that it was fitted on; 0 if unknown.
        vision: the same for layers of the vision encoder: [D], or [T, D] for each of its tokens.
        gate: steer decoder positions only whose visual support (-1 to 1, see `SupportGate`) lies
            below it; None steers all.
        seed: of whatever was drawn while fitting.
    """

    directions: Directions
    method: str = "mean"
    base_model: str = ""
    strength: float = 1.0
    mode: str = "add"
    pairs: int = 0
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    vision: Directions = field(default_factory=dict)
    gate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.directions and not self.vision:
            raise ValueError("A steering vector needs a direction for at least one layer.")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}.")
        check_strength(self.strength)
        if self.gate is not None and not math.isfinite(self.gate):
            raise ValueError(f"gate is {self.gate}; it must be a cosine, or None for no gate.")
        if self.gate is not None and not self.directions:
            raise ValueError("A gate needs decoder layers; this vector steers the encoder only.")
        for name, dims in (("directions", (1,)), ("vision", (1, 2))):
            given = sorted(getattr(self, name).items())
            clean = {int(layer): _direction(layer, d, dims) for layer, d in given}
            if len({direction.shape for direction in clean.values()}) > 1:
                raise ValueError("The directions have different lengths; give all layers one size.")
            object.__setattr__(self, name, clean)

    @property
    def layers(self) -> list[int]:
        """The layers that have a direction, ascending."""
        return list(self.directions)

    @property
    def hidden_size(self) -> int:
        """D, the length of a decoder layer's direction; 0 where there is none."""
        return len(next(iter(self.directions.values()), ()))

    def __add__(self, other: Self) -> Self:
        sizes = [(_sizes(one.directions), _sizes(one.vision)) for one in (self, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"Cannot add a vector of layers {other.layers} (D {other.hidden_size}) to one of "
                f"layers {self.layers} (D {self.hidden_size}). Fit both on one model and layers, "
                "or put vectors of different layers together with a | b."
            )
        self._check_alike(other)
        return replace(
            self,
            directions={i: d + other.directions[i] for i, d in self.directions.items()},
            vision={i: d + other.vision[i] for i, d in self.vision.items()},
        )

    def _check_alike(self, other: Self) -> None:
        """Raise ValueError unless one strength and one mode can hold for both vectors."""
        alike = ["mode", "strength"]
        if self.directions and other.directions:
            alike.append("gate")
        mine, others = ({name: getattr(one, name) for name in alike} for one in (self, other))
        if mine != others:
            raise ValueError(
                f"Cannot put vectors with {mine} and {others} together. Make these alike with "
                "dataclasses.replace, or attach both vectors."
            )

    def __mul__(self, factor: float) -> Self:
        return replace(
            self,
            directions={i: d * factor for i, d in self.directions.items()},
            vision={i: d * factor for i, d in self.vision.items()},
        )

    def __or__(self, other: Self) -> Self:
        """Both vectors as one, where they steer different layers (a text and a vision side)."""
        shared = {*self.directions} & {*other.directions} or {*self.vision} & {*other.vision}
        if shared:
            raise ValueError(
                f"Cannot put vectors together that share layers {sorted(shared)}. Add them with "
                "a + b, or attach both."
            )
        self._check_alike(other)
        return replace(
            self,
            directions=self.directions | other.directions,
            vision=self.vision | other.vision,
            method=" | ".join(dict.fromkeys((self.method, other.method))),
            gate=self.gate if self.directions else other.gate,
        )

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1

    def __sub__(self, other: Self) -> Self:
        return self + -other

    def save_pretrained(self, folder: str | Path) -> None:
        """Write steering.safetensors, steering_config.json and README.md into `folder`, exactly."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{prefix}{layer}{SUFFIX}": direction
            for name, prefix in TOWERS.items()
            for layer, direction in getattr(self, name).items()
        }
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        settings = {k: v for k, v in vars(self).items() if k not in TOWERS}
        settings |= {"layers": self.layers, "hidden_size": self.hidden_size}
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        (folder / CARD_NAME).write_text(steering_card(self, str(folder)))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Read a vector from a folder or from a Hub model repo.

        Raises:
            FileNotFoundError: when a folder holds no steering vector.
        """
        files = {name: _file(name_or_path, name, revision, token) for name in _FILES}
        settings = json.loads(files[CONFIG_NAME].read_text())
        for name in ("hidden_size", "layers"):
            del settings[name]
        tensors = load_file(files[WEIGHTS_NAME])
        for name, prefix in TOWERS.items():
            settings[name] = {
                int(key.removeprefix(prefix).removesuffix(SUFFIX)): tensor
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }
        return cls(**settings)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None
    ) -> CommitInfo:
        """Create the model repo `repo_id` if need be and upload the three files with their card."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / CARD_NAME).write_text(steering_card(self, repo_id))
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload steering vector"
            )


_FILES = (CONFIG_NAME, WEIGHTS_NAME)


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
    }


def _sizes(directions: Directions) -> dict[int, torch.Size]:
    return {layer: direction.shape for layer, direction in directions.items()}


def _direction(layer: int, direction: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    if direction.ndim not in dims or not bool(torch.isfinite(direction).all()):
        raise ValueError(
            f"The direction of layer {layer} must be a finite vector [D] (in the vision encoder "
            f"also [T, D]); it has shape {tuple(direction.shape)}."
        )
    return direction.detach().to("cpu", torch.float32).contiguous()


def _file(name_or_path: str | Path, name: str, revision: str | None, token: str | None) -> Path:
    folder = Path(name_or_path)
    if not folder.is_dir():
        return Path(hf_hub_download(str(name_or_path), name, revision=revision, token=token))
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {name}. Write a vector there with SteeringVector.save_pretrained."
        )
    return folder / name


def check_strength(strength: float) -> None:
    """Raise ValueError unless `strength` is a finite number."""
    if not math.isfinite(strength):
        raise ValueError(f"strength is {strength}; it must be a finite number (0 is no steering).")


def check_layers(
    model: nn.Module, layers: Iterable[int], vector: SteeringVector | None = None
) -> None:
    """Raise ValueError unless `model` has `layers`, and `vector` directions of its hidden size."""
    count = len(decoder_layers(model))
    unknown = [layer for layer in layers if not 0 <= layer < count]
    if unknown:
        raise ValueError(f"The model has layers 0 to {count - 1}, not {unknown}.")
    if vector is None:
        return
    absent = [layer for layer in layers if layer not in vector.directions]
    if absent:
        raise ValueError(f"The vector has layers {vector.layers}, not {absent}.")
    hidden_size = unwrap(model).config.get_text_config().hidden_size
    if vector.hidden_size != hidden_size:
        raise ValueError(
            f"The vector has directions of length {vector.hidden_size}, the model's hidden size is "
            f"{hidden_size}. It was fitted on {vector.base_model or 'another model'}; fit one here."
        )


def check_vision(model: nn.Module, vector: SteeringVector) -> None:
    """Raise ValueError unless the vision encoder of `model` fits the directions of `vector`."""
    if not vector.vision:
        return
    check_encoder(model)
    layers = vision_layers(model)
    unknown = [layer for layer in vector.vision if not 0 <= layer < len(layers)]
    if unknown:
        raise ValueError(
            f"The vision encoder has layers 0 to {len(layers) - 1}, the vector also {unknown}."
        )
    width = _width(vision_mlp(model, 0))
    given = next(iter(vector.vision.values())).shape[-1]
    if given != width:
        raise ValueError(
            f"The vector has vision directions of length {given}, the encoder's hidden size is "
            f"{width}. It was fitted on {vector.base_model or 'another model'}; fit one here."
        )


def check_encoder(model: nn.Module) -> None:
    """Raise ValueError where the vision encoder is convolutional: it has no tokens to steer."""
    config: Any = unwrap(model).config
    if not vision_row(config).attends:
        raise ValueError(
            f"The vision encoder of {config.model_type!r} is a {config.vision_config.model_type}: "
            "feature maps, no tokens that a direction could move. Steer the decoder's layers."
        )


def vision_mlp(model: nn.Module, layer: int) -> nn.Module:
    """The steered module of a vision encoder's layer; every supported encoder calls it `mlp`."""
    return vision_layers(model)[layer].get_submodule("mlp")


def _width(mlp: nn.Module) -> int:
    return [one for one in mlp.modules() if isinstance(one, nn.Linear)][-1].out_features


def steer(
    hidden: torch.Tensor, direction: torch.Tensor, strength: torch.Tensor, mode: str
) -> torch.Tensor:
    """`hidden` [..., D] moved by `strength` times `direction` [D] or [T, D]; same dtype.

    "add" is x + s d. The others rescale each position to its former length, measured in float32:
    "norm" after x + s d, "turn" after x + s |x| d (VTI's: its 0.1 alpha is s |d|), "vista" after
    x + s |x| (1 + max(0, -cos(x, d))) d (VISTA's). At strength 0 all return `hidden` exactly.

    Args:
        hidden: outputs of the steered module.
        direction: on any device.
        strength: a scalar tensor, or one that broadcasts to [..., 1].
        mode: one of MODES.
    """
    direction = direction.to(hidden.device)
    shift = strength.to(hidden.device) * direction
    if mode in ("turn", "vista"):
        shift = shift * _length(hidden)
    if mode == "vista":
        cosine = nn.functional.cosine_similarity(hidden.float(), direction, dim=-1)
        shift = shift * (1 + (-cosine).clamp_min(0)).unsqueeze(-1)
    moved = hidden + shift.to(hidden.dtype)
    if mode == "add":
        return moved
    return moved * (_length(hidden) / _length(moved)).to(hidden.dtype)


def _length(states: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(torch.float32).tiny
    return states.float().norm(dim=-1, keepdim=True).clamp_min(tiny)


def steer_output(output: Any, direction: torch.Tensor, strength: torch.Tensor, mode: str) -> Any:
    """`steer` for a module's output: a tensor, or a tuple whose first item is the tensor."""
    if isinstance(output, tuple):
        return steer(output[0], direction, strength, mode), *output[1:]
    return steer(output, direction, strength, mode)


class _Shift:
    """The forward hook of one layer."""

    def __init__(self, direction: torch.Tensor, strength: torch.Tensor, mode: str):
        self.direction, self.strength, self.mode = direction, strength, mode

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return steer_output(output, self.direction, self.strength, self.mode)


class _GatedShift(_Shift):
    """The same at positions with little visual support."""

    def __init__(self, gate: SupportGate, layer: int, *shift: Any):
        super().__init__(*shift)
        self.gate, self.layer = gate, layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        strength = self.strength.to(hidden.device) * self.gate.open(self.layer, hidden)
        return steer_output(output, self.direction, strength, self.mode)


class _VisionShift(_Shift):
    """The same in the vision encoder, whose tokens may have a direction each."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        tokens = output.shape[-2]
        if self.direction.ndim == 2 and len(self.direction) != tokens:
            raise ValueError(
                f"The vector has a direction for each of {len(self.direction)} vision tokens, this "
                f"image has {tokens}. Average them (mean(0)), or keep the image size."
            )
        return super().__call__(module, args, output)


class Steering:
    """Handle on attached steering: `.strength` may be set at any time, `.detach()` removes it.

    Also a context manager that detaches at its end. The strength is a tensor, so changing it needs
    no recompilation of a compiled model. `.gate` is the `SupportGate` of a gated vector, else None.
    """

    def __init__(
        self, model: nn.Module, vector: SteeringVector, strength: float, layers: list[int]
    ):
        self.vector, self.layers = vector, layers
        modules = steered_modules(model) if layers else []
        mlps = {layer: vision_mlp(model, layer) for layer in vector.vision}
        first = modules[layers[0]] if layers else next(iter(mlps.values()))
        self._strength = torch.tensor(float(strength), device=device_of(first))
        self.gate = None if vector.gate is None else SupportGate(model, layers, vector.gate)
        self._handles = []
        for layer in layers:
            shift = self._shift(modules[layer], vector.directions[layer])
            hook = _Shift(*shift) if self.gate is None else _GatedShift(self.gate, layer, *shift)
            self._handles.append(modules[layer].register_forward_hook(hook))
        for layer, mlp in mlps.items():
            hook = _VisionShift(*self._shift(mlp, vector.vision[layer]))
            self._handles.append(mlp.register_forward_hook(hook))

    def _shift(self, module: nn.Module, direction: torch.Tensor) -> tuple[Any, ...]:
        return direction.to(device_of(module)), self._strength, self.vector.mode

    @property
    def strength(self) -> float:
        """The factor on the directions; any finite number, 0 is no steering."""
        return self._strength.item()

    @strength.setter
    def strength(self, value: float) -> None:
        check_strength(value)
        self._strength.fill_(value)

    def detach(self) -> None:
        """Remove the hooks; the model computes again exactly what it did before. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.gate is not None:
            self.gate.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def attach_steering(
    model: nn.Module,
    vector: SteeringVector,
    strength: float | None = None,
    layers: Iterable[int] | None = None,
) -> Steering:
    """Steer a supported vision-language model, native or grounded, wrapped (PEFT) or not.

    Args:
        model: the model; its weights and state-dict keys stay as they are.
        vector: the directions.
        strength: factor on them; None takes the vector's default.
        layers: which of the vector's decoder layers to steer; None takes all.

    Returns:
        A `Steering` handle, active until `.detach()` or the end of its `with` block.

    Raises:
        ValueError: when the family is not supported, or vector, layers and model do not fit.
    """
    chosen = vector.layers if layers is None else sorted(set(layers))
    if not chosen and (layers is not None or not vector.vision):
        raise ValueError("layers is empty; name at least one layer, or None for all.")
    if chosen:
        check_layers(model, chosen, vector)
    check_vision(model, vector)
    strength = vector.strength if strength is None else strength
    check_strength(strength)
    return Steering(model, vector, strength, chosen)
