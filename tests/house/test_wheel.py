"""The wheel installs into a new environment and every front door opens."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FRONT_DOORS = """
from firsthand.modeling import Explanation, GroundedInternVLForConditionalGeneration
from firsthand.modeling import GroundedLlavaForConditionalGeneration, SteeringVector
from firsthand.modeling import attach_steering, explain, fit_steering
from firsthand.processing import Endpoint, VisionLabelCollator, generate_answers, heatmap
from firsthand.metrics import chair, pope, results, visual_reliance
from firsthand.recipes import demo_data, demo_model
from firsthand.spaces.explainability import app
import firsthand.modeling
assert {root!r} not in firsthand.modeling.__file__, firsthand.modeling.__file__
assert demo_data.load_scenes("test", 2)[0]["objects"]
assert (demo_model.ADAPTER / "adapter_model.safetensors").exists()
"""
FOLDERS = ("modeling", "processing", "recipes", "datasets_scripts", "metrics", "spaces")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.aside")


def test_wheel_opens_every_front_door(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    copy = tmp_path / "source"  # a build in the checkout would pick up what earlier ones left
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=LEFT_OUT)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy / name)
    subprocess.run(
        [*pip, "wheel", str(copy), "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)],
        check=True,
    )
    wheel = next(tmp_path.glob("firsthand-*.whl"))
    files = (p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.is_file())
    files = (p for p in files if p.suffix not in (".pyc", ".aside"))
    wanted = {f"firsthand/{p.relative_to(ROOT)}" for p in files}
    with zipfile.ZipFile(wheel) as content:
        missing = wanted - set(content.namelist())
    assert not missing, f"setup.cfg leaves out {sorted(missing)}"
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    # the libraries come from this environment; an editable firsthand there must not be found
    libraries = Path(sysconfig.get_paths()["purelib"])
    own = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{own}{os.pathsep}{libraries}"}
    code = FRONT_DOORS.format(root=str(ROOT))
    done = subprocess.run(
        [python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    script = [tmp_path / "venv" / "bin" / "firsthand", "--help"]
    assert subprocess.run(script, env=environment, cwd=tmp_path).returncode == 0
