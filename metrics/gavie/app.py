"""A Space that computes GAVIE of pasted answers. Run: `python app.py`."""

import json
from pathlib import Path

import evaluate
import gradio as gr

METRIC = evaluate.load(str(Path(__file__).with_name("gavie.py")))
EXAMPLE = {
    "predictions": ["A dog sits in a red car."],
    "questions": ["Describe the image."],
    "regions": [[{"caption": "a red car", "bbox": [20, 55, 120, 60]}]],
    "replies": [
        json.dumps(
            {
                "relevance_reason": "It is a description.",
                "relevance": 9,
                "accuracy_reason": "No dog is known of.",
                "accuracy": 5,
            }
        )
    ],
}


def compute(text: str) -> dict | None:
    """Score the pasted inputs; what is wrong with them is shown as a message."""
    try:
        return METRIC.compute(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error)) from error


with gr.Blocks(title="GAVIE") as demo:
    gr.Markdown(Path(__file__).with_name("README.md").read_text("utf-8").split("---", 2)[2])
    inputs = gr.Code(json.dumps(EXAMPLE, indent=2), language="json", label="inputs")
    button = gr.Button("Compute", variant="primary")
    button.click(compute, inputs, gr.JSON(label="result"), api_name="compute")

if __name__ == "__main__":
    demo.launch()
