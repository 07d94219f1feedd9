PYTHON ?= python3

.PHONY: toy test emoji soak
toy: .venv/ready
	.venv/bin/python train_toy.py

test: .venv/ready
	.venv/bin/python -m pytest -q

soak: .venv/ready
	SOAK=20 .venv/bin/python -m pytest -q tests/test_full.py -k kill

emoji: .venv/ready
	.venv/bin/python -m unimod_mini.data.emoji out/emoji
	.venv/bin/python train_toy.py --images out/emoji --out out/toy-emoji

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@
