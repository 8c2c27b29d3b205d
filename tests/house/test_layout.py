"""The house keeps its shape: folders, arrows, laziness, exportable files, documents."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("modeling", "processing", "recipes", "datasets_scripts", "metrics", "spaces")
LOWER = {  # what each folder may import of the house
    "modeling": set(),
    "processing": {"modeling"},
    "metrics": set(),
    "datasets_scripts": set(),
    "recipes": {"modeling", "processing", "metrics", "datasets_scripts"},
    "spaces": {"modeling", "processing", "metrics", "datasets_scripts", "recipes"},
}
EXPORTED = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}
BUILDER = {"datasets", "PIL", "numpy", "pycocotools", "tqdm", "yaml"}
SCORING = {"numpy"}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "firsthand":
                names = [f"firsthand.{alias.name}" for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


def foreign(path: Path) -> set[str]:
    """Top-level names of imported packages that are neither ours nor the standard library's."""
    names = {name.split(".")[0] for level, name in imports(path) if level == 0}
    return names - set(sys.stdlib_module_names) - {"firsthand", "__future__"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_arrows_point_down(folder):
    for path in python_files(folder):
        used = {m.split(".")[1] for _, m in imports(path) if m.startswith("firsthand.")}
        assert used - {folder} <= LOWER[folder], f"{path.relative_to(ROOT)} imports {used}"
        depth = len(path.relative_to(ROOT).parts) - 1  # so many dots stay inside the folder
        assert max([level for level, _ in imports(path)], default=0) <= depth, path


def test_modeling_is_exportable():
    files = python_files("modeling")
    names = {p.stem for p in files}
    for path in files:
        assert path.parent == ROOT / "modeling", f"{path} is not flat"
        if path.name == "__init__.py":
            continue
        assert foreign(path) <= EXPORTED, f"{path.name} imports {foreign(path) - EXPORTED}"
        for level, module in imports(path):
            assert not module.startswith("firsthand"), f"{path.name}: use `from .sibling import`"
            if level:
                assert level == 1 and module in names, f"{path.name}: {'.' * level}{module}"
        for line in re.findall(r"^\s*from \.(\S*) import", path.read_text("utf-8"), re.M):
            assert line in names, f"{path.name}: transformers would look for {line}.py"


def test_exported_names_are_unique_with_processing():
    modeling = {p.name for p in python_files("modeling")} - {"__init__.py"}
    processing = {p.name for p in python_files("processing")} - {"__init__.py"}
    assert not modeling & processing


def test_builders_and_scoring_import_little():
    for path in python_files("datasets_scripts"):
        assert foreign(path) <= BUILDER, f"{path}: {foreign(path) - BUILDER}"
    for path in sorted((ROOT / "metrics").glob("*/scoring.py")):
        assert foreign(path) <= SCORING, f"{path}: {foreign(path) - SCORING}"
        own = [m for level, m in imports(path) if level == 0 and m.startswith("firsthand")]
        assert not own, f"{path} must import siblings only"


def test_setup_cfg_lists_every_folder_with_code():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    folders = {p.parent for f in FOLDERS for p in python_files(f)}
    wanted = {"firsthand." + ".".join(f.relative_to(ROOT).parts) for f in folders}
    assert wanted <= listed, wanted - listed
    for folder in folders:
        assert (folder / "py.typed").exists(), folder


def test_files_are_short():
    for path in [p for f in (*FOLDERS, "tests") for p in python_files(f)]:
        assert len(path.read_text("utf-8").splitlines()) <= 500, path


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["modeling", "processing", "metrics"])
def test_packages_are_lazy(name):
    heavy = ("torch", "transformers", "datasets", "evaluate", "numpy", "PIL")
    code = f"import sys, firsthand.{name}; print([m for m in {heavy!r} if m in sys.modules])"
    assert run(code) == "[]"


def test_scoring_needs_no_torch():
    code = (
        "import sys; from firsthand.metrics import amber, chair, gavie, mementos;"
        "from firsthand.metrics import mmhal, pope, results;"
        "from firsthand.metrics import visual_reliance;"
        "print([m for m in ('torch', 'transformers', 'evaluate', 'datasets') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_every_lazy_name_is_there():
    code = (
        "import firsthand.modeling as m, firsthand.processing as p, firsthand.metrics as s;"
        "print(all(getattr(x, n) is not None for x in (m, p, s) for n in x.__all__))"
    )
    assert run(code) == "True"


def test_import_spaces_finds_no_folder_of_ours():
    """From anywhere but the repository's root, `spaces` is Hugging Face's package or none."""
    code = "import importlib.util as u; s = u.find_spec('spaces'); print(s and s.origin)"
    assert not run(code).startswith(str(ROOT))
