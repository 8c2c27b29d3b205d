"""Steering: add a direction to the outputs of the decoder's MLPs, at every position and step.

`SteeringVector` is the artefact (directions, saved as safetensors + JSON + card), `attach_steering`
puts it on any supported native or grounded model with forward hooks. Not a fitting method (see
`steering_fit.py`) and not a weight edit: detaching restores the model exactly. The site, the
outputs of the MLPs, is that of VTI (arXiv 2410.15778).

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
from huggingface_hub import CommitInfo, HfApi, ModelCardData, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn

from .families import decoder_layers, steered_modules, unwrap

WEIGHTS_NAME, CONFIG_NAME, CARD_NAME = "steering.safetensors", "steering_config.json", "README.md"
PREFIX, SUFFIX = "language_model.layers.", ".direction"
MODES = ("add", "norm")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """One direction a decoder layer, with where it comes from.

    Attributes:
        directions: layer index -> float32 [D] on the CPU, in units of the steered module's output;
            a fitted direction is as long as the mean difference, so strength 1 moves by that.
        method: how it was fitted ("mean", "svd", "pca", or free text).
        base_model: hub id or path of the model that it was fitted on.
        strength: the default strength; signed, any finite number, 0 is no steering.
        mode: "add" (x + s d) or "norm" (the same, rescaled to the length of x).
        pairs: number of contrast pairs that it was fitted on; 0 if unknown.
    """

    directions: dict[int, torch.Tensor]
    method: str = "mean"
    base_model: str = ""
    strength: float = 1.0
    mode: str = "add"
    pairs: int = 0
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    def __post_init__(self) -> None:
        if not self.directions:
            raise ValueError("A steering vector needs a direction for at least one layer.")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}.")
        check_strength(self.strength)
        clean = {int(layer): _direction(layer, d) for layer, d in sorted(self.directions.items())}
        if len({len(direction) for direction in clean.values()}) > 1:
            raise ValueError("The directions have different lengths; give every layer the same D.")
        object.__setattr__(self, "directions", clean)

    @property
    def layers(self) -> list[int]:
        """The layers that have a direction, ascending."""
        return list(self.directions)

    @property
    def hidden_size(self) -> int:
        """D, the length of a direction."""
        return len(next(iter(self.directions.values())))

    def __add__(self, other: Self) -> Self:
        if self.layers != other.layers or self.hidden_size != other.hidden_size:
            raise ValueError(
                f"Cannot add a vector of layers {other.layers} (D {other.hidden_size}) to one of "
                f"layers {self.layers} (D {self.hidden_size}). Fit both on one model and layers."
            )
        total = {layer: d + other.directions[layer] for layer, d in self.directions.items()}
        return replace(self, directions=total)

    def __mul__(self, factor: float) -> Self:
        scaled = {layer: d * factor for layer, d in self.directions.items()}
        return replace(self, directions=scaled)

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1

    def __sub__(self, other: Self) -> Self:
        return self + -other

    def save_pretrained(self, folder: str | Path) -> None:
        """Write steering.safetensors, steering_config.json and README.md into `folder`, exactly."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{PREFIX}{layer}{SUFFIX}": d for layer, d in self.directions.items()}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        settings = {k: v for k, v in vars(self).items() if k != "directions"}
        settings |= {"layers": self.layers, "hidden_size": self.hidden_size}
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        (folder / CARD_NAME).write_text(_card(self, str(folder)))

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
        directions = {
            int(key.removeprefix(PREFIX).removesuffix(SUFFIX)): tensor
            for key, tensor in tensors.items()
        }
        return cls(directions=directions, **settings)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None
    ) -> CommitInfo:
        """Create the model repo `repo_id` if need be and upload the three files with their card."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / CARD_NAME).write_text(_card(self, repo_id))
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


def _direction(layer: int, direction: torch.Tensor) -> torch.Tensor:
    if direction.ndim != 1 or not bool(torch.isfinite(direction).all()):
        raise ValueError(
            f"The direction of layer {layer} must be a finite vector [D]; it has shape "
            f"{tuple(direction.shape)}."
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


def _card(vector: SteeringVector, location: str) -> str:
    on_hub = vector.base_model.count("/") == 1 and not Path(vector.base_model).exists()
    data = ModelCardData(
        base_model=vector.base_model if on_hub else None,
        library_name="firsthand",
        tags=["steering", "vision-language"],
    )
    return f"""---
{data.to_yaml()}
---

# Steering vector

Directions for the MLP outputs of {len(vector.layers)} decoder layers of
`{vector.base_model or "a vision-language model"}`, fitted by `{vector.method}` on {vector.pairs}
contrast pairs. Default strength {vector.strength:g}, mode `{vector.mode}`; strength 1 moves by the
mean difference of the pairs, strength 0 leaves the model bit-identical.

```python
from firsthand.modeling import SteeringVector, attach_steering

vector = SteeringVector.from_pretrained("{location}")
with attach_steering(model, vector):
    model.generate(**inputs)
```

Layers: {", ".join(map(str, vector.layers))}. Hidden size: {vector.hidden_size}.
"""


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


def steer(
    hidden: torch.Tensor, direction: torch.Tensor, strength: torch.Tensor, mode: str
) -> torch.Tensor:
    """`hidden` [..., D] moved by `strength` (scalar tensor) times `direction` [D]; same dtype.

    Mode "norm" rescales each position to its former length (VTI), measured in float32. At strength
    0 both modes return the values of `hidden` exactly.
    """
    strength = strength.to(hidden.device)
    shift = (strength * direction.to(hidden.device)).to(hidden.dtype)
    moved = hidden + shift
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


class Steering:
    """Handle on attached steering: `.strength` may be set at any time, `.detach()` removes it.

    Also a context manager that detaches at its end. The strength is a tensor, so changing it needs
    no recompilation of a compiled model.
    """

    def __init__(
        self, model: nn.Module, vector: SteeringVector, strength: float, layers: list[int]
    ):
        self.vector, self.layers = vector, layers
        modules = steered_modules(model)
        device = next(modules[layers[0]].parameters()).device
        self._strength = torch.tensor(float(strength), device=device)
        self._handles = [
            modules[layer].register_forward_hook(self._shift(modules[layer], layer))
            for layer in layers
        ]

    def _shift(self, module: nn.Module, layer: int) -> _Shift:
        device = next(module.parameters()).device
        direction = self.vector.directions[layer].to(device)
        return _Shift(direction, self._strength, self.vector.mode)

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
        layers: which of the vector's layers to steer; None takes all.

    Returns:
        A `Steering` handle, active until `.detach()` or the end of its `with` block.

    Raises:
        ValueError: when the family is not supported, or vector, layers and model do not fit.
    """
    chosen = vector.layers if layers is None else sorted(set(layers))
    if not chosen:
        raise ValueError("layers is empty; name at least one layer, or None for all.")
    check_layers(model, chosen, vector)
    strength = vector.strength if strength is None else strength
    check_strength(strength)
    return Steering(model, vector, strength, chosen)
