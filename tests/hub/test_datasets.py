"""The committed scenes through the Hub: by config, and streamed, without a loading script."""

from pathlib import Path

import pytest
from hub_fresh import run_fresh
from huggingface_hub import HfApi

from firsthand.datasets_scripts.scenes import scenes

DATA = Path(scenes.__file__).parent / "data"


@pytest.fixture(scope="module")
def repo(hub):
    api = HfApi(endpoint=hub.url, token=hub.token)
    name = api.create_repo("org/scenes", repo_type="dataset").repo_id
    api.upload_folder(repo_id=name, folder_path=DATA, repo_type="dataset")
    return name


def test_load_by_config_and_streaming(repo):
    code = f"""
from datasets import load_dataset, get_dataset_config_names
names = get_dataset_config_names({repo!r})
assert set(names) == {{"validation", "test", "test_prior", "test_unseen"}}, names
whole = load_dataset({repo!r}, "test", split="test")
first = next(iter(load_dataset({repo!r}, "test", split="test", streaming=True)))
assert first["id"] == whole[0]["id"] and first["image"].size == (224, 224)
assert first["objects"] == whole[0]["objects"]
print(len(whole))
"""
    assert run_fresh(code).splitlines()[-1] == "200"
