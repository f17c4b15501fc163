SHELL := bash
# Each target makes .venv by itself. With PYTHON=python3 it uses that interpreter from the checkout,
# nothing installed: a GPU machine without network.
ifdef PYTHON
ready :=
else
PYTHON := .venv/bin/python
ready := .venv/ready
endif

RESULTS ?= out
xdist = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo yes)
# On a GPU tests compile their kernels, where pytest-xdist is installed eight at a time. A fault of the
# GPU may end a worker: `load` starts another and the run fails at its end; `loadgroup` waits forever.
TEST_OPTIONS ?= $(if $(xdist),-n 8 --dist load)
parallel = $(if $(xdist),-n auto --dist loadgroup)
GPU_CHECKS := $(addprefix gpu-check-,marked tests core sanitizer bench training)
# What a part of gpu-check takes at most; what it has finished by then stays in RESULTS.
MINUTES ?= 7
export PYTHONPATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test test-compiled test-full test-stacks mutations lint bench machine-code machine-code-matrix tune \
	clean gpu gpu-check $(GPU_CHECKS) gpu-check-models gpu-check-steps rehearse
.NOTPARALLEL:

demo: $(ready)
	$(PYTHON) -m benchmarks demo --out $(RESULTS)

# First with interpreted kernels, then a choice with compiled ones.
test: $(ready)
	@failed=; $(PYTHON) -m pytest $(parallel) || failed="with interpreted kernels"; \
	$(PYTHON) -m pytest --compiled $(parallel) $(COMPILED) -k $(CHOICE) || \
	failed="$$failed$${failed:+, and }with compiled kernels"; \
	echo "make test: $${failed:+TESTS FAILED }$${failed:-all tests passed}"; test -z "$$failed"

# The kernels as Triton compiles them for an H100, executed by the emulator of tests/ptx.
test-compiled: $(ready)
	$(PYTHON) -m pytest --compiled $(parallel) $(COMPILED)

COMPILED := tests/ptx tests/kernels tests/api/test_modules.py tests/torch/test_autograd.py
# One dtype in every test, the one that the interpreter cannot round; all dtypes at random; addresses
# beyond 2^31 elements; and that the emulator notices what it is there for.
CHOICE := "(bfloat16-bfloat16 or test_property or test_launches or test_large or each_device or \
wrong_count and ODD_PLANE) and not same_bits"

# 40 times as many examples of the property tests, and other ones on every run; every kernel
# compiled for every alignment and special size, not only for every set of constants; and all of
# README's first table counted again.
test-full: $(ready)
	$(PYTHON) -m pytest --hypothesis-profile=full

# Networks of other packages, with and without the kernels, in an environment of their own.
test-stacks: .venv-stacks/ready
	.venv-stacks/bin/python -m pytest -rs tests/stacks

# Breaks the kernels in hundreds of places: a survivor without a reason fails. Hours on two cores.
mutations: $(ready)
	$(PYTHON) tests/tools/mutations.py --out $(RESULTS)/mutations.csv $(MUTATION_OPTIONS)

# What the kernels compile to for GPUs that need not be there; the matrix: by four versions of Triton.
machine-code: $(ready)
	$(PYTHON) -m benchmarks machine-code

# Each version lies alone in a folder, before the environment's packages. A failure stops no other.
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
machine-code-matrix: $(ready)
	@failed=0; for version in $(TRITONS); do folder=$(abspath $(RESULTS))/triton-$$version; \
	echo "triton $$version"; \
	{ test -d $$folder/triton-$$version.dist-info || \
	$(PYTHON) -m pip install --quiet --no-deps --target $$folder triton==$$version; } && \
	PYTHONPATH=$$folder:$(PYTHONPATH) $(PYTHON) -m pytest tests/benchmarks/test_machine_code.py || failed=1; \
	done; exit $$failed

lint: $(ready)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c "from importlinter.cli import lint_imports_command as lint; lint(['--no-logo', '--no-cache'])"

bench: $(ready)
	$(PYTHON) -m benchmarks speed --results $(RESULTS)

# All that needs a GPU, in parts of less than 8 minutes each. The tests come first: a speed is never
# reported on wrong results.
gpu-check: $(GPU_CHECKS)

# The same on a machine without a GPU: torch.cuda is stood in for, and the emulator runs the kernels.
rehearse: $(ready)
	$(PYTHON) -m pytest tests/rehearsal/half_hour.py

# The tests that only a GPU can run, one by one: some need all of its memory, others take times.
gpu-check-marked: gpu
	set -o pipefail; timeout -k 10 -s INT $(MINUTES)m $(PYTHON) -m pytest -rs -m gpu \
	2>&1 | tee $(RESULTS)/tests.txt

# All others but those that need no GPU and keep every core busy.
gpu-check-tests: gpu
	set -o pipefail; timeout -k 10 -s INT $(MINUTES)m $(PYTHON) -m pytest -rs -m "not gpu" $(TEST_OPTIONS) \
	$(foreach name,tools/test_census benchmarks/test_machine_code tools/test_mutations tools/test_packaging,--ignore=tests/$(name).py) \
	2>&1 | tee -a $(RESULTS)/tests.txt

gpu-check-core: gpu
	$(call timed,--core)

# What networks use, without waiting for compilers.
gpu-check-models: gpu
	$(call timed,--case model $(addprefix --provider ,prelu_gpu eager copy))

# Without the caching allocator an access beside a tensor is one beside its memory.
gpu-check-sanitizer: gpu
	set -o pipefail; export PYTORCH_NO_CUDA_MEMORY_CACHING=1; \
	for tool in "memcheck --report-api-errors no" racecheck; do \
	timeout -k 10 230 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) tests/tools/sanitize.py \
	|| exit; done 2>&1 | tee $(RESULTS)/sanitizer.txt

gpu-check-bench: gpu
	$(call timed)

# The report is made of what was timed, also where a case was wrong; the status says that it was.
timed = $(PYTHON) -m benchmarks speed $(1) --minutes $(MINUTES) --results $(RESULTS); status=$$?; \
	$(PYTHON) -m benchmarks report $(RESULTS) && exit $$status

# Sweeps the rule table of prelu_gpu/rules.py and proposes another; the library itself never tunes.
tune: gpu
	$(PYTHON) -m benchmarks tune --minutes $(MINUTES) --results $(RESULTS)

gpu-check-training: gpu
	$(PYTHON) -m benchmarks training --minutes $(MINUTES) --results $(RESULTS)

# Fewer of the same training steps, not compiled.
gpu-check-steps: gpu
	$(PYTHON) -m benchmarks training --quick --minutes $(MINUTES) --results $(RESULTS)

# Each target leaves in runs.txt which commit, GPU and versions its results are of.
gpu: $(ready)
	mkdir -p $(RESULTS)
	set -o pipefail; $(PYTHON) -m benchmarks speed --require-gpu | tee -a $(RESULTS)/runs.txt

.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Without what they ask for: facenet-pytorch is held to torch 2.2, and Asteroid's training to packages
# that must be compiled. torchaudio's operators, which no network needs, are CUDA's in PyPI's wheel; its
# import stops at them with a CPU build of torch, unless they are not there.
.venv-stacks/ready: pyproject.toml constraints.txt tests/stacks/constraints.txt
	python3 -m venv .venv-stacks
	.venv-stacks/bin/python -m pip install --quiet --constraint constraints.txt \
	--constraint tests/stacks/constraints.txt --editable . numpy pytest \
	monai spandrel speechbrain timm torch-geometric torchaudio
	.venv-stacks/bin/python -m pip install --quiet --constraint tests/stacks/constraints.txt --no-deps \
	asteroid asteroid-filterbanks facenet-pytorch
	rm -f .venv-stacks/lib/python*/site-packages/torchaudio/lib/*.so
	touch $@

clean:
	rm -rf .venv .venv-stacks out build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
