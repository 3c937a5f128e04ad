# Short names for the commands of the README. VENV=DIR puts the virtual environment elsewhere.
PYTHON ?= python3
VENV ?= .venv

.PHONY: passkey test

# The benchmark on the shipped model, minutes on two cores: a table here, record and picture in outputs/laptop.
passkey: $(VENV)/.installed
	$(VENV)/bin/infini passkey grid=laptop output=outputs/laptop

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt -e '.[test]'
	touch $@
