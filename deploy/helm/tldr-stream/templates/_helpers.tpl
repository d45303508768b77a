{{/* Names, labels and the parts that all pods share. */}}

{{- define "tldr-stream.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tldr-stream.stream" -}}
{{- default .Values.stream.topic .Values.stream.name -}}
{{- end -}}

{{- define "tldr-stream.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tldr-stream.labels" -}}
{{ include "tldr-stream.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "tldr-stream.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* Of everything that a Job may depend on. */}}
{{- define "tldr-stream.hash" -}}
{{- printf "%s %s %s" .Chart.Version .Chart.AppVersion (toJson .Values) | sha256sum | trunc 8 -}}
{{- end -}}

{{/* What cannot work together, said before anything is installed. */}}
{{- define "tldr-stream.refuse" -}}
{{- $partitions := int .Values.stream.partitions -}}
{{- if and (not .Values.keda.enabled) (gt (int .Values.worker.replicas) $partitions) -}}
{{- fail (printf "worker.replicas is %d and stream.partitions %d: a worker without a partition has nothing to do" (int .Values.worker.replicas) $partitions) -}}
{{- end -}}
{{- if gt (int .Values.keda.maxReplicas) $partitions -}}
{{- fail (printf "keda.maxReplicas is %d and stream.partitions %d: a worker without a partition has nothing to do" (int .Values.keda.maxReplicas) $partitions) -}}
{{- end -}}
{{- if gt (int .Values.keda.minReplicas) (default $partitions (int .Values.keda.maxReplicas)) -}}
{{- fail "keda.minReplicas is above keda.maxReplicas, or above stream.partitions" -}}
{{- end -}}
{{- if gt (int .Values.snapshot.parts) $partitions -}}
{{- fail (printf "snapshot.parts is %d and stream.partitions %d: a part needs a partition" (int .Values.snapshot.parts) $partitions) -}}
{{- end -}}
{{- if and (eq .Values.topics.create "strimzi") (not .Values.topics.strimzi.cluster) -}}
{{- fail "topics.create is strimzi: name the Kafka cluster in topics.strimzi.cluster" -}}
{{- end -}}
{{- if gt (int .Values.topics.minInsyncReplicas) (int .Values.topics.replicationFactor) -}}
{{- fail "topics.minInsyncReplicas is above topics.replicationFactor: no record could be written" -}}
{{- end -}}
{{- if and .Values.stream.rule (or .Values.stream.ratio .Values.stream.gate) -}}
{{- fail "stream.rule has a ratio and a gate of its own: set stream.ratio and stream.gate to \"\"" -}}
{{- end -}}
{{- if and .Values.recluster.enabled .Values.bundle.name -}}
{{- fail "recluster.enabled, and bundle.name holds workers to one bundle: set bundle.name to \"\", so that they follow announcements" -}}
{{- end -}}
{{- if and (eq .Values.security.seccompType "Localhost") (not .Values.security.seccompLocalhostProfile) -}}
{{- fail "security.seccompType is Localhost: name the profile in security.seccompLocalhostProfile" -}}
{{- end -}}
{{- if ge (int .Values.worker.preStopSleepSeconds) (int .Values.worker.terminationGracePeriodSeconds) -}}
{{- fail "worker.preStopSleepSeconds leaves nothing of worker.terminationGracePeriodSeconds to drain in" -}}
{{- end -}}
{{- $transaction := int (default 10 (index .Values.worker.options "transaction-timeout-s")) -}}
{{- if gt (add (int .Values.worker.preStopSleepSeconds) (mul 4 $transaction)) (int .Values.worker.terminationGracePeriodSeconds) -}}
{{- fail (printf "worker.terminationGracePeriodSeconds is %d: two commits of up to twice the transaction time-out (%d s) do not fit in it behind preStopSleepSeconds" (int .Values.worker.terminationGracePeriodSeconds) $transaction) -}}
{{- end -}}
{{- if .Values.networkPolicy.enabled -}}
{{- range splitList "," .Values.kafka.bootstrapServers -}}
{{- if ne (int (last (splitList ":" .))) (int $.Values.kafka.port) -}}
{{- fail (printf "networkPolicy.enabled lets workers reach brokers at kafka.port %d, and kafka.bootstrapServers has %s" (int $.Values.kafka.port) .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tldr-stream.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
runAsGroup: {{ .Values.security.runAsUser }}
fsGroup: {{ .Values.security.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: {{ .Values.security.seccompType }}
  {{- if eq .Values.security.seccompType "Localhost" }}
  localhostProfile: {{ .Values.security.seccompLocalhostProfile }}
  {{- end }}
{{- end -}}

{{- define "tldr-stream.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Pod fields of every workload: no token, no root, no links to other services. */}}
{{- define "tldr-stream.pod" -}}
serviceAccountName: {{ include "tldr-stream.fullname" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "tldr-stream.podSecurity" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The root file system is read-only: what libraries write goes to /tmp. */}}
{{- define "tldr-stream.env" -}}
- name: HOME
  value: /tmp
- name: MPLCONFIGDIR
  value: /tmp/matplotlib
- name: HF_HUB_OFFLINE
  value: "1"
- name: TLDR_CONFIG
  value: /etc/tldr-stream/config/tldr-stream.toml
{{- end -}}

{{- define "tldr-stream.mounts" -}}
- name: config
  mountPath: /etc/tldr-stream/config
  readOnly: true
- name: tmp
  mountPath: /tmp
{{- if .Values.kafka.propertiesSecret.name }}
- name: kafka-properties
  mountPath: /etc/tldr-stream/kafka
  readOnly: true
{{- end }}
{{- if .Values.schemaRegistry.propertiesSecret.name }}
- name: registry-properties
  mountPath: /etc/tldr-stream/registry
  readOnly: true
{{- end }}
{{- end -}}

{{- define "tldr-stream.volumes" -}}
- name: config
  configMap:
    name: {{ include "tldr-stream.fullname" . }}
- name: tmp
  emptyDir: {}
{{- with .Values.kafka.propertiesSecret.name }}
- name: kafka-properties
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with .Values.schemaRegistry.propertiesSecret.name }}
- name: registry-properties
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{/* Where GPU nodes are tainted, their pods tolerate it. */}}
{{- define "tldr-stream.placement" -}}
{{- if and .Values.worker.gpu.enabled .Values.worker.gpu.runtimeClassName }}
runtimeClassName: {{ .Values.worker.gpu.runtimeClassName }}
{{- end }}
{{- with .Values.worker.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or .Values.worker.gpu.enabled .Values.worker.tolerations }}
tolerations:
  {{- if .Values.worker.gpu.enabled }}
  - key: nvidia.com/gpu
    operator: Exists
    effect: NoSchedule
  {{- end }}
  {{- with .Values.worker.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Requests and limits, with one GPU where workers have one. Arguments: root, resources. */}}
{{- define "tldr-stream.gpuResources" -}}
requests:
  {{- toYaml .resources.requests | nindent 2 }}
limits:
  {{- toYaml .resources.limits | nindent 2 }}
  {{- if .root.Values.worker.gpu.enabled }}
  {{ .root.Values.worker.gpu.resourceName }}: 1
  {{- end }}
{{- end -}}

{{/* The topics of a stream and the settings that `tldr-stream topics` gives them (stream/topics.py). */}}
{{- define "tldr-stream.topics" -}}
{{- $stream := include "tldr-stream.stream" . -}}
{{- $kept := add (mul 2 (int64 .Values.topics.rawRecordBytes)) 65536 -}}
{{- $largest := 67108864 -}}
{{- if gt $kept $largest }}{{ $kept = $largest }}{{ end -}}
{{ .Values.stream.topic }}:
  partitions: {{ int .Values.stream.partitions }}
  config:
    cleanup.policy: delete
    max.message.bytes: {{ int64 .Values.topics.rawRecordBytes | quote }}
    retention.ms: {{ int64 .Values.topics.rawRetentionMs | quote }}
{{ $stream }}.kept-pairs:
  partitions: {{ int .Values.stream.partitions }}
  config:
    cleanup.policy: compact
    max.message.bytes: {{ $kept | quote }}
    min.compaction.lag.ms: "86400000"
    delete.retention.ms: "604800000"
{{ $stream }}.reservoir-changelog:
  partitions: {{ int .Values.stream.partitions }}
  config:
    cleanup.policy: compact
    max.message.bytes: {{ $kept | quote }}
    delete.retention.ms: "604800000"
{{ $stream }}.pair-codes:
  partitions: {{ int .Values.stream.partitions }}
  config:
    cleanup.policy: delete
    retention.ms: "-1"
{{ $stream }}.dlq:
  partitions: {{ int .Values.stream.partitions }}
  config:
    cleanup.policy: delete
    retention.ms: "2592000000"
    max.message.bytes: {{ $kept | quote }}
model-bundles:
  partitions: 1
  config:
    cleanup.policy: compact
{{- end -}}
