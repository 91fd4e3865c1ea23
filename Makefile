# Every target sets up what it needs: a virtual environment with the locked packages, once, and again when a lock changes.
PYTHON ?= $(shell command -v python3.11 || echo python3)
HOST ?= 127.0.0.1
UV := 0.13.9
REDOCLY := 2.77.0
BIN := .venv/bin
RUN := $(BIN)/python -m

# Of the tests, the benchmarks and BentoML's commands: no library reports to its maker.
export ORT_DISABLE_TELEMETRY := 1
export BENTOML_DO_NOT_TRACK := true
export HF_HUB_DISABLE_TELEMETRY := 1
# Hundreds of processes of the tests would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help serve serve-cluster test test-training test-others test-alone check-fast test-kill test-kill-jobs test-faults test-scale test-image check house bench bench-quality bench-honesty bench-few-shot bench-fit bench-adapt bench-footprint bench-parity bench-far-from-square bench-finetune bench-speed bench-eight-bits bench-neighbours bench-attacks bench-first-start bench-tenants bench-replicas bench-hung-bucket bench-routing bench-proxy bench-ray bench-scale bench-gpu gpu-bundle test-gpu-bundle lint-openapi docs bento lock clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

serve: .venv/serve.stamp  ## Serve on HOST (127.0.0.1) and PORT (3000) until Ctrl-C
	@exec $(BIN)/topwork serve --host $(HOST)

serve-cluster: .venv/dev.stamp  ## Serve on PORT (3000) from two replicas behind HAProxy, until Ctrl-C
	@exec $(RUN) deploy.cluster

# Processes that run tests; 0 runs them one by one.
WORKERS ?= 3
# Where the tests have their folders: in memory, where programs may run and 4 GB are free, so that no test
# waits for a disk to sync. Otherwise, and in test-faults, in the usual place.
TESTS_IN ?= $(shell test "$$(df -m --output=avail /dev/shm 2>/dev/null | tail -1)" -ge 4000 2>/dev/null && \
	! grep -q '^[^ ]* /dev/shm [^ ]* [^ ]*noexec' /proc/mounts && echo /dev/shm)

# pytest exits with 5 where no test is selected, as ARGS may leave one of the three runs.
define tests
$(if $(TESTS_IN),TMPDIR=$(TESTS_IN)) $(RUN) pytest -o tmp_path_retention_policy=failed $(1) $(ARGS) || test $$? -eq 5
endef

test: .venv/dev.stamp  ## Run the tests, in WORKERS processes
	@$(MAKE) --no-print-directory --keep-going test-training test-others test-alone

# Training runs on cores that are otherwise idle, so no other test runs beside it.
test-training:
	$(call tests,-m training -n $(WORKERS) --dist worksteal)

# The tests of a file share services, so a process runs whole files.
test-others:
	$(call tests,-m 'not training and not alone' -n $(WORKERS) --dist loadfile --no-loadscope-reorder)

test-alone:
	$(call tests,-m alone)

check-fast: .venv/dev.stamp  ## Lint, format, types, and the tests that start no service and no database
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(RUN) pytest -m 'not training and not alone' -n 2 --dist loadfile $(UNIT) $(ARGS)

test-kill: .venv/dev.stamp  ## Kill the service 200 times under mixed load, and look for what was lost
	$(RUN) benchmarks.reliability.kill --times 200

test-kill-jobs: .venv/dev.stamp  ## Kill workers and the service during fine-tunes, and look at what became of the jobs
	$(RUN) benchmarks.reliability.kill_jobs --times-worker 50 --times-server 20

# Files of tests that start no service and no database.
UNIT := tests/test_architecture.py $(addprefix tests/models/,batching preprocess runtime test_spec.py) \
	$(addprefix tests/adapters/,examples heads prediction probe) tests/service/payloads

# Two files at a time, the longest first.
LONGEST_FAULTS := tests/faults/storage/test_storage_kills.py
FAULTS := $(LONGEST_FAULTS) $(filter-out $(LONGEST_FAULTS),$(sort $(wildcard tests/faults/*/test_*.py))) \
	tests/service/api/prediction/test_export_program.py

test-faults: .venv/dev.stamp  ## Break things as often as is promised, and look at what becomes of it; an hour
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target $(FAULTS:%=full/%)

test-scale: .venv/dev.stamp  ## A million tenants, and replicas, workers, Ray nodes and stores that end again and again; an hour
	TOPWORK_TEST_SCALE=full $(RUN) pytest tests/scale $(ARGS)

test-image: .venv/dev.stamp  ## Build the image of the bento with buildah, as root, and run it; minutes and 25 GB
	$(RUN) models.export
	$(RUN) tests.image.trial $(ARGS)

gpu-bundle: .venv/dev.stamp  ## Pack what bench-gpu needs on a machine with torch and no network, into .bundle
	$(RUN) models.export
	$(RUN) benchmarks.gpu.bundle $(ARGS)

test-gpu-bundle: .venv/dev.stamp  ## Make that bundle, and run its commands in a bare folder without a GPU; 10 minutes
	$(RUN) models.export
	$(RUN) tests.bundle.trial $(ARGS)

full/%: .venv/dev.stamp
	TOPWORK_TEST_FAULTS=full $(RUN) pytest $* $(ARGS)

house: .venv/dev.stamp  ## How the code is laid out and reads, in numbers
	$(RUN) tests.house $(ARGS)

check: .venv/dev.stamp  ## What CI runs: lint, format, types, documents, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory test

bench: bench-speed bench-neighbours bench-attacks bench-first-start bench-tenants bench-eight-bits bench-footprint bench-parity bench-fit bench-adapt bench-quality bench-honesty bench-few-shot  ## Every benchmark that needs no GPU

bench-speed: .venv/dev.stamp .peers/lit/stamp .peers/infinity/stamp  ## Serving beside a bare loop and other servers
	$(RUN) benchmarks.serving.speed

bench-eight-bits: .venv/dev.stamp  ## What the 8-bit backbones cost in accuracy
	$(RUN) benchmarks.serving.eight_bits

bench-neighbours: .venv/dev.stamp  ## What a tenant far above its quota costs the others
	$(RUN) benchmarks.serving.neighbours

bench-attacks: .venv/dev.stamp  ## What attackers without quotas cost the others
	$(RUN) benchmarks.serving.attacks

bench-first-start: .venv/dev.stamp  ## A first start on a busy machine that turns quiet; on a quiet machine
	$(RUN) benchmarks.serving.first_start

bench-tenants: .venv/dev.stamp  ## Memory, descriptors and threads while a thousand tenants ask for twenty minutes
	$(RUN) benchmarks.serving.tenants

bench-replicas: .venv/dev.stamp  ## Two replicas behind HAProxy: what they see of each other, what an end of one costs
	$(RUN) benchmarks.reliability.replicas

bench-hung-bucket: .venv/dev.stamp  ## What a bucket that hangs costs the requests that do not need it
	$(RUN) benchmarks.reliability.hung_bucket

bench-routing: .venv/dev.stamp  ## Heads that replicas find in memory, by how a proxy routes: a simulation
	$(RUN) benchmarks.scale.routing

bench-proxy: .venv/dev.stamp  ## What HAProxy adds to a request
	$(RUN) models.export minilm-l6-v2
	$(RUN) benchmarks.scale.proxy_overhead

bench-ray: .venv/dev.stamp  ## What Ray costs when two actors embed 20,000 texts
	$(RUN) models.export minilm-l6-v2
	$(RUN) benchmarks.scale.ray_overhead

bench-scale: bench-replicas bench-hung-bucket bench-routing bench-proxy bench-ray  ## Several replicas, and what they share

bench-quality: .venv/dev.stamp  ## Accuracy over HTTP beside scikit-learn and simple baselines
	$(RUN) benchmarks.training.quality; status=$$?; $(RUN) benchmarks.training.backbones && exit $$status

bench-honesty: .venv/dev.stamp  ## What is reported beside what is true
	$(RUN) benchmarks.honesty.__main__

bench-few-shot: .venv/dev.stamp  ## Heads that learn from few examples, ours beside others
	$(RUN) models.export minilm-l6-v2 efficientnet-lite0
	$(RUN) benchmarks.training.few_shot

bench-fit: .venv/dev.stamp  ## Fitting a head beside LogisticRegressionCV
	$(RUN) benchmarks.training.fit

bench-adapt: .venv/dev.stamp  ## Adapting over HTTP beside a bare loop; latency beside adapts
	$(RUN) benchmarks.training.adapt

bench-footprint: .venv/dev.stamp  ## Start-up time and memory
	$(RUN) benchmarks.serving.footprint

bench-parity: .venv/dev.stamp  ## Exported adapters, run by ONNX Runtime alone, beside the service's answers
	$(RUN) benchmarks.serving.onnx_parity

bench-far-from-square: .venv/dev.stamp  ## Long images shown whole in several ways, beside their middle alone
	$(RUN) benchmarks.training.far_from_square

bench-finetune: .venv/dev.stamp  ## Fine-tunes beside the heads that they replace, and random weights; hours
	$(RUN) benchmarks.training.finetune

bench-gpu: .venv/dev.stamp  ## Embedding on an NVIDIA GPU
	$(RUN) benchmarks.gpu

# The tests compare the recorded document with the one that the service sends.
lint-openapi: .venv/dev.stamp  ## Lint the OpenAPI document with Redocly; needs Node
	@mkdir -p build
	@$(BIN)/python -c 'import json; print(json.dumps(json.load(open("tests/recorded.json"))["openapi"], indent=1))' > build/openapi.json
	REDOCLY_TELEMETRY=off npx --yes @redocly/cli@$(REDOCLY) lint build/openapi.json

docs: .docs/stamp  ## Build the documents as a site in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build

bento: .venv/serve.stamp  ## Build the bento, exported backbones included
	$(RUN) models.export
	$(BIN)/bentoml build

lock: .venv/bin/uv  ## Resolve the dependencies again
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command 'make lock' pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command 'make lock' pyproject.toml --group dev -c requirements.lock -o requirements-dev.lock
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command 'make lock' docs/requirements.in -o docs/requirements.lock
	for peer in lit infinity; do $(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command 'make lock' benchmarks/peers/$$peer.in -o benchmarks/peers/$$peer.lock; done

clean:  ## Remove the virtual environment and what tools left; keeps ~/.topwork and the BentoML store
	rm -rf .venv .docs .peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/uv:
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check uv==$(UV)

# Bytecode is compiled now, not at the first start: BentoML, torch and ONNX Runtime are 20,000 files.
define install
	$(BIN)/uv pip install -q --python .venv --compile-bytecode --require-hashes -r $(1)
	$(BIN)/uv pip install -q --python .venv --no-deps -e .
	@touch $@
endef

.venv/serve.stamp: requirements.lock pyproject.toml | .venv/bin/uv
	@echo 'Installing the locked packages into .venv (a minute or two, once)'
	$(call install,requirements.lock)

.venv/dev.stamp: requirements-dev.lock pyproject.toml | .venv/bin/uv
	@echo 'Installing the locked packages into .venv (a minute or two, once)'
	$(call install,requirements-dev.lock)
	@touch .venv/serve.stamp

.docs/stamp: docs/requirements.lock | .venv/bin/uv
	.venv/bin/uv venv -q --clear --python .venv/bin/python .docs
	.venv/bin/uv pip install -q --python .docs --require-hashes -r $<
	@touch $@

# Servers to measure beside, each with the versions that it asks for.
.peers/%/stamp: benchmarks/peers/%.lock | .venv/bin/uv
	.venv/bin/uv venv -q --clear --python .venv/bin/python .peers/$*
	.venv/bin/uv pip install -q --python .peers/$* --require-hashes -r $<
	@touch $@
