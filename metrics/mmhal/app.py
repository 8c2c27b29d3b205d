"""A Space that computes MMHal of pasted answers. Run: `python app.py`."""

import json
from pathlib import Path

import evaluate
import gradio as gr

METRIC = evaluate.load(str(Path(__file__).with_name("mmhal.py")))
EXAMPLE = {
    "predictions": ["The car is red and a dog sits in it."],
    "references": ["The car is red."],
    "questions": ["Which colour is the car?"],
    "replies": ['{"reason": "No dog is known of.", "rating": 2}'],
}


def compute(text: str) -> dict | None:
    """Score the pasted inputs; what is wrong with them is shown as a message."""
    try:
        return METRIC.compute(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error)) from error


with gr.Blocks(title="MMHal") as demo:
    gr.Markdown(Path(__file__).with_name("README.md").read_text("utf-8").split("---", 2)[2])
    inputs = gr.Code(json.dumps(EXAMPLE, indent=2), language="json", label="inputs")
    button = gr.Button("Compute", variant="primary")
    button.click(compute, inputs, gr.JSON(label="result"), api_name="compute")

if __name__ == "__main__":
    demo.launch()
