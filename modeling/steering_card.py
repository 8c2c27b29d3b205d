"""The model card of a steering vector: what it moves, what it was fitted on, and how to use it.

text = steering_card(vector, "org/vector")
"""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

if TYPE_CHECKING:
    from .steering import SteeringVector


def steering_card(vector: "SteeringVector", location: str) -> str:
    """The card of `vector`, as `location` (a Hub id or folder) is to show it."""
    on_hub = vector.base_model.count("/") == 1 and not Path(vector.base_model).exists()
    data = ModelCardData(
        base_model=vector.base_model if on_hub else None,
        library_name="firsthand",
        tags=["steering", "vision-language"],
    )
    gate = "every position" if vector.gate is None else f"visual support below {vector.gate:g}"
    return f"""---
{data.to_yaml()}
---

# Steering vector

Directions for the MLP outputs of {len(vector.layers)} decoder and {len(vector.vision)} encoder
layers of `{vector.base_model or "a vision-language model"}`, fitted by `{vector.method}` on
{vector.pairs} contrast pairs (seed {vector.seed}). Default strength {vector.strength:g}, mode
`{vector.mode}`, at {gate}; strength 0 leaves the model bit-identical.

```python
from firsthand.modeling import SteeringVector, attach_steering

vector = SteeringVector.from_pretrained("{location}")
with attach_steering(model, vector):
    model.generate(**inputs)
```

Decoder layers: {", ".join(map(str, vector.layers)) or "none"}. Encoder layers:
{", ".join(map(str, vector.vision)) or "none"}. Hidden size: {vector.hidden_size}.
"""
