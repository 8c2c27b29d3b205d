"""A Space that computes AMBER of pasted answers. Run: `python app.py`."""

import json
from pathlib import Path

import evaluate
import gradio as gr

METRIC = evaluate.load(str(Path(__file__).with_name("amber.py")))
EXAMPLE = {
    "predictions": ["A dog and a cat under a tree.", "No."],
    "references": [1, 1005],
    "data": {
        "annotations": [
            {"id": 1, "type": "generative", "truth": ["dog", "tree"], "hallu": ["cat"]},
            {"id": 1005, "type": "discriminative-hallucination", "truth": "no"},
        ],
        "relation": {"dog": [], "tree": ["bush"], "cat": []},
        "safe_words": ["light"],
    },
}


def compute(text: str) -> dict | None:
    """Score the pasted inputs; what is wrong with them is shown as a message."""
    try:
        return METRIC.compute(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error)) from error


with gr.Blocks(title="AMBER") as demo:
    gr.Markdown(Path(__file__).with_name("README.md").read_text("utf-8").split("---", 2)[2])
    inputs = gr.Code(json.dumps(EXAMPLE, indent=2), language="json", label="inputs")
    button = gr.Button("Compute", variant="primary")
    button.click(compute, inputs, gr.JSON(label="result"), api_name="compute")

if __name__ == "__main__":
    demo.launch()
