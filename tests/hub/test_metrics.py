"""The metrics through the Hub: `evaluate.load("org/chair")` from a stranger's process."""

from pathlib import Path

import pytest
from hub_fresh import run_fresh
from huggingface_hub import HfApi

METRICS = Path(__file__).parents[2] / "metrics"
USES = {
    "amber": "compute(predictions=['cats'], references=[1], data={'annotations': [{'id': 1, 'type':"
    " 'generative', 'truth': [], 'hallu': ['cat']}], 'relation': {'cat': []}})['amber_cog'] == 1",
    "gavie": "compute(predictions=['a'], questions=['b'], regions=[[{'caption': 'c', 'bbox': [0, 0,"
    """ 9, 9]}]], replies=['{"relevance_reason": "", "relevance": 3, "accuracy_reason": "","""
    """ "accuracy": 2}'])['gavie_accuracy'] == 2""",
    "mementos": "compute(predictions=['dog'], references=['dogs'], keywords={'objects': [['dog']],"
    " 'behaviours': []})['mementos_objects_f1'] == 1",
    "mmhal": "compute(predictions=['a'], references=['b'], questions=['c'], replies="
    """['{"reason": "", "rating": 2}'])['mmhal_score'] == 2""",
    "chair": "compute(predictions=['a dog and a cat'], references=[['dog']])['chair_i'] == 0.5",
    "pope": "compute(predictions=['Yes.', 'no'], references=['yes', 'yes'])['pope_accuracy'] == .5",
    "visual_reliance": None,
}


@pytest.mark.parametrize("name", USES)
def test_evaluate_loads_it(hub, name):
    api = HfApi(endpoint=hub.url, token=hub.token)
    repo = api.create_repo(f"org/{name}", repo_type="space", space_sdk="gradio").repo_id
    api.upload_folder(repo_id=repo, folder_path=METRICS / name, repo_type="space")
    code = f"import evaluate\nmetric = evaluate.load({repo!r})\nprint(metric.name)\n"
    if USES[name]:
        code += f"assert metric.{USES[name]}\n"
    assert run_fresh(code).splitlines()[-1] == name
