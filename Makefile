# tldr-stream: `make demo` runs the whole service on this machine, `make test` tests it. Both set up what they need.
# Prerequisites: Python 3.11 or later, a JDK 17 or later, Maven, make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

demo: setup ## the whole service on real images: broker, ingest, two workers, one killed; snapshot, verify, report
	$(BIN)/python -m stream demo --out demo

test: check tests ## lint, types and all tests (under 15 minutes on two cores)

check: setup ## lint and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tests: setup ## the tests only
	$(BIN)/python -m pytest -n 2 --dist loadfile

setup: .build/venv .build/kafka/ready ## virtual environment and local Kafka (network needed the first time)

kafka: .build/kafka/ready ## the jars of the local Kafka

.build/venv: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tldr-stream needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing the dependencies: PyTorch's ordinary wheel brings its CUDA parts, several GB"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@mkdir -p .build && touch $@

.build/kafka/ready: deploy/kafka/pom.xml
	mvn -q -B -f $< dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory=$(CURDIR)/.build/kafka
	@touch $@

corpus: corpus/full/.built ## the full corpora, 7,000+ noisy and 1,000+ clean pairs, from Debian's packages (apt, network)

corpus/full/.built: corpus/build.py | setup
	$(BIN)/python -m corpus.build --out corpus/full
	@touch $@

# Held out of training: the sample, on which figures are measured, and the bootstrap shard, which gives clusters, gate and baselines.
HELD_OUT := --exclude 'corpus/sample/*.tar' --exclude 'corpus/full/bootstrap-*.tar'
train-sample: corpus ## train the sample bundle anew and measure it on the held-out sample (under 40 minutes on two cores)
	rm -rf .build/captioner .build/captioner.training
	$(BIN)/python -m stream train --noisy 'corpus/full/noisy-*.tar' --noisy 'corpus/full/clean-*.tar' \
	  --clean 'corpus/full/clean-*.tar' $(HELD_OUT) --architecture tiny --threads 2 --out .build/captioner
	$(BIN)/python -m stream bootstrap 'corpus/full/bootstrap-*.tar' --held-out 'corpus/full/bootstrap-*.tar' \
	  --captioner .build/captioner --clusters 16 --out bundles/sample
	$(BIN)/python -m corpus.evaluate --bundle bundles/sample --shards corpus/sample/*.tar --out bundles/FIGURES.md

bench: setup .build/quix-venv/ready .build/kafka-streams/ready ## the engine against Quix Streams, Kafka Streams and a plain loop, as it grows, with a model; resumes (BENCH=--fresh: anew)
	PYTHONPATH=. $(BIN)/python benchmarks/engine.py $(BENCH)

.build/quix-venv/ready: # it pins an older confluent-kafka than ours
	$(PYTHON) -m venv .build/quix-venv
	.build/quix-venv/bin/pip install --quiet 'quixstreams==3.28.1' 'fastavro==1.13.1' numpy
	@touch $@

.build/kafka-streams/ready: benchmarks/kafka_streams/pom.xml benchmarks/kafka_streams/ReducePairs.java
	mvn -q -B -f $< dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory=$(CURDIR)/.build/kafka-streams
	javac -cp '.build/kafka-streams/*' -d .build/kafka-streams benchmarks/kafka_streams/ReducePairs.java
	@touch $@

crash: setup ## kill a worker in every window there is; resumes, writes docs/crash-windows.md after each unit
	$(BIN)/python -m tests.end_to_end.crash

SOAK_SECONDS ?= 1200
soak: setup ## a storm of crashes, freezes, rebalances and broker restarts (SOAK_SECONDS=120 shortens it); writes docs/storm.md
	$(BIN)/python -m tests.end_to_end.storm --seconds $(SOAK_SECONDS)

restart: setup ## how soon a killed worker processes again, and how long a restore takes; writes docs/restart.md
	$(BIN)/python benchmarks/restart.py

sample-bundle: train-sample ## the same

stage1: corpus ## measure stage 1's choices on the corpora, three seeds each, into docs/stage1.md; goes on where it was stopped
	$(BIN)/python benchmarks/stage1.py --minutes 8

drift: corpus ## drift's false alarms and delays, and what reclustering is worth, into docs/drift.md; goes on where it was stopped
	PYTHONPATH=. $(BIN)/python benchmarks/drift.py --minutes 8

memory: setup ## a worker's anonymous memory after 10,000 and after 100,000 records
	$(BIN)/python benchmarks/worker_memory.py

.build/grafana-venv/ready: # Grafana's own library for dashboards, to check that it knows every field
	$(PYTHON) -m venv .build/grafana-venv
	.build/grafana-venv/bin/pip install --quiet 'grafana-foundation-sdk==1769699998!10.1.0'
	@touch $@

REHEARSAL_SECONDS ?= 600
rehearsal: setup ## a day in production, in miniature: scale, roll, snapshot, lose a disk, verify; writes docs/rehearsal.md and its picture
	$(BIN)/python -m tests.end_to_end.rehearsal --seconds $(REHEARSAL_SECONDS) $(REHEARSAL)

# Where the sketches of the dashboards go; docs/dashboards is what the pages show.
SKETCHES ?= .build/observe
observe-check: setup .build/grafana-venv/ready ## rules and dashboards on a real Prometheus with two workers and faults (needs prometheus and promtool; 4 minutes)
	TLDR_SKETCHES=$(SKETCHES) $(BIN)/python -m pytest tests/deploy/check_prometheus.py

deploy-check: setup .build/deploy/ready observe-check ## chart, image and compose file, without a cluster or an engine, and observe-check (network and go the first time)
	$(BIN)/python deploy/checks/values_table.py --check
	.build/deploy-venv/bin/python deploy/checks/chart.py
	$(BIN)/python deploy/checks/image.py $(IMAGE_CHECK)

deploy-check-install: ## … and the image's install steps, as its user, at work on a real Kafka (several GB)
	$(MAKE) deploy-check IMAGE_CHECK=--install

chart-table: setup ## the table of values in the chart's README
	$(BIN)/python deploy/checks/values_table.py

# Helm builds in some minutes; the CRDs are those of KEDA, of the Prometheus operator, and what Strimzi's generator makes.
.build/deploy/ready: deploy/checks/tools.sh deploy/checks/strimzi.xml
	deploy/checks/tools.sh
	@touch $@

clean: ## remove what demo and tests left behind; the environment and Kafka's jars stay
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help demo test check tests setup kafka corpus sample-bundle bench memory crash soak restart train-sample stage1 drift observe-check rehearsal clean
.PHONY: deploy-check deploy-check-install chart-table
