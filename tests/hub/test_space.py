"""The Space through the Hub: uploaded, fetched by a stranger, run, and answering a page."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from hub_fresh import run_fresh
from huggingface_hub import HfApi
from tiny_models import tiny_internvl, tiny_processor

SPACE = Path(__file__).parents[2] / "spaces" / "explainability"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.browser
def test_the_space_runs_from_its_snapshot(hub, tmp_path):
    api = HfApi(endpoint=hub.url, token=hub.token)
    repo = api.create_repo("org/explainability", repo_type="space", space_sdk="gradio").repo_id
    api.upload_folder(
        repo_id=repo, folder_path=SPACE, repo_type="space", ignore_patterns=["__pycache__/*"]
    )
    code = f"""
from huggingface_hub import snapshot_download
print(snapshot_download({repo!r}, repo_type="space", local_dir={str(tmp_path / "space")!r}))
"""
    folder = Path(run_fresh(code).splitlines()[-1])
    assert "firsthand" in (folder / "requirements.txt").read_text()
    model = tmp_path / "model"
    tiny_internvl().save_pretrained(model)
    tiny_processor("internvl").save_pretrained(model)
    port = free_port()
    environment = {
        **os.environ,
        "FIRSTHAND_MODEL": str(model),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
    }
    app = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment)
    try:
        page = wait_for(f"http://127.0.0.1:{port}/", app)
    finally:
        app.kill()
        app.wait(20)
    assert "gradio" in page


def wait_for(url, process, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the app ended by itself"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} did not answer in {seconds} s")
