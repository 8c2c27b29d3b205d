"""A made-up second device for tests on machines that have only a CPU: `with far_device(): ...`.

Tensors moved to `FAR` keep their numbers in memory and say that they are elsewhere; an operation
that mixes them with others is an error, as on an accelerator. It is neither fast nor complete
(decoding with a cache does not work). The device is registered with torch for the whole process,
which then believes in an accelerator: use it in a process of its own.

    python tests/second_device.py    # checks explain, steering and head attention across devices
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model
from tiny_models import TINY, tiny_image, tiny_inputs, tiny_processor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from firsthand.modeling.head_attention import head_attention
from firsthand.modeling.relevancy import explain
from firsthand.modeling.steering import SteeringVector, attach_steering
from firsthand.modeling.steering_fit import fit_steering

FAR = "far:0"
MOVES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
FAMILIES = ("llava", "qwen2_5_vl")
TEXT = "model.language_model"
QUESTION, ANSWER = "What is in the image?", "a dog top left, a cup."
FIELDS = ("patches", "image_layers", "answer_relevancy", "log_likelihood_ratio")
FIELDS += ("lens_raw_probability", "lens_normed_probability")


class Far(torch.Tensor):
    """A tensor on the far device; `near` holds its numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor, requires_grad: bool = False) -> "Far":
        near = near.near if isinstance(near, Far) else near
        made = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=FAR, requires_grad=requires_grad,
        )  # fmt: skip
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = [isinstance(one, Far) for one in given]
    near = any(one.ndim for one, there in zip(given, far, strict=True) if not there)
    indexed = name in INDEXING and far[0]  # indices may stay on the CPU
    if any(far) and near and name not in MOVES and not indexed:
        raise RuntimeError(f"{name} got tensors on {FAR} and on the CPU.")
    device = kwargs.get("device")
    there = any(far) if device is None else torch.device(device).type == "far"
    if device is not None and there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(Far, lambda one: one.near, (args, kwargs))
    found = func(*args, **kwargs)
    if name.endswith("_"):  # in place
        return given[0]
    return tree_map_only(torch.Tensor, Far, found) if there else found


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Backend(_DummyBackendModule):
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def get_rng_state(self, device: int) -> torch.Tensor:
        return torch.zeros(1)

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        pass


@contextmanager
def far_device() -> Iterator[None]:
    """Let `tensor.to(FAR)` work; once a process."""
    _setup_privateuseone_for_python_backend("far", _Backend())
    with _Dispatch():
        yield


def spread_out(family: str):
    """A tiny model of four decoder layers: two of them and the norm far, the rest on the CPU."""
    model = TINY[family](layers=4)
    places = {}
    for name, _ in model.named_parameters():
        inside = name.removeprefix(f"{TEXT}.layers.")
        whole = f"{TEXT}.layers.{inside[0]}" if inside != name else name.rpartition(".")[0]
        far = whole in (f"{TEXT}.layers.1", f"{TEXT}.layers.2", f"{TEXT}.norm")
        places[whole] = FAR if far else "cpu"
    return dispatch_model(model, places, main_device="cpu", force_hooks=True)


def measured(model: Any, processor: Any) -> dict[str, Any]:
    """What the package says about one image with this model."""
    image = tiny_image(3)
    row = {"image": image, "question": QUESTION}
    pair = {"positive": {**row, "answer": "a dog"}, "negative": {**row, "answer": "a red cup"}}
    vector = fit_steering(model, processor, [pair], progress=False)
    with attach_steering(model, vector, strength=3.0):
        found = explain(model, processor, image, QUESTION, ANSWER, layers=True, baseline="blank")
    inputs = tiny_inputs(processor)
    given = {name: getattr(found, name) for name in FIELDS}
    given |= {f"direction {i}": d for i, d in vector.directions.items()}
    gated = SteeringVector(vector.directions, strength=3.0, gate=0.5)
    with attach_steering(model, gated):
        given["gated"] = explain(model, processor, image, QUESTION, ANSWER, [2]).probability
    given["heads"] = head_attention(model, inputs, [inputs["input_ids"].shape[1] - 1])
    return given


def main() -> None:
    """Print, as JSON, the largest differences from one device, a line a family."""
    with far_device():
        for family in FAMILIES:
            processor = tiny_processor(family)
            expected = measured(TINY[family](layers=4), processor)
            model = spread_out(family)
            found = measured(model, processor)
            apart = {n: float((found[n] - expected[n]).abs().max()) for n in expected}
            devices = sorted({parameter.device.type for parameter in model.parameters()})
            print(json.dumps({"devices": devices, "apart": apart}))


if __name__ == "__main__":
    main()
