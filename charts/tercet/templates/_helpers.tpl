{{/* One release a cluster: what is cluster-scoped has fixed names, so everything has. */}}

{{- define "tercet.labels" -}}
{{ include "tercet.selector" . }}
app.kubernetes.io/part-of: tercet
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "tercet.selector" -}}
app.kubernetes.io/name: tercet
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* An image of ours: (list $ "operator"). */}}
{{- define "tercet.image" -}}
{{- $root := index . 0 -}}
{{- $image := $root.Values.image -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
tercet-{{ index . 1 }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end }}

{{/* An upstream image: (list $ $sidecar). */}}
{{- define "tercet.sidecarImage" -}}
{{- $registry := (index . 0).Values.sidecars.registry -}}
{{- $sidecar := index . 1 -}}
{{- with $registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ $sidecar.image }}:{{ $sidecar.tag }}
{{- end }}

{{/* Metadata of a pod: (list $ "component" $values). */}}
{{- define "tercet.podMetadata" -}}
{{- $root := index . 0 -}}
{{- $values := index . 2 -}}
labels:
  {{- include "tercet.labels" $root | nindent 2 }}
  app.kubernetes.io/component: {{ index . 1 }}
  {{- with $values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What every pod has: (list $ $values). */}}
{{- define "tercet.podSpec" -}}
{{- $root := index . 0 -}}
{{- $values := index . 1 -}}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
nodeSelector:
  kubernetes.io/os: linux
  {{- with $values.nodeSelector }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Replicas on distinct nodes where there are enough: (list $ "component" $values). */}}
{{- define "tercet.affinity" -}}
{{- with (index . 2).affinity }}
{{- toYaml . }}
{{- else }}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "tercet.selector" (index . 0) | nindent 12 }}
            app.kubernetes.io/component: {{ index . 1 }}
{{- end }}
{{- end }}

{{/* A container without any privilege. */}}
{{- define "tercet.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* One that moves blocks: devices, mounts, io_uring. */}}
{{- define "tercet.privileged" -}}
privileged: true
readOnlyRootFilesystem: true
runAsUser: 0
{{- end }}

{{- define "tercet.env" -}}
- name: TERCET_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
{{- end }}

{{- define "tercet.env.node" -}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: HOST_IP
  valueFrom: {fieldRef: {fieldPath: status.hostIP}}
{{- end }}

{{- define "tercet.env.pod" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}

{{/* Probes over HTTP: (dict "port" 9811 "ready" "/readyz"). Starting may take two minutes. */}}
{{- define "tercet.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: {{ .port }}}
  periodSeconds: 1
  timeoutSeconds: 2
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /healthz, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- with .ready }}
readinessProbe:
  httpGet: {path: {{ . }}, port: {{ $.port }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 3
{{- end }}
{{- end }}

{{/* Whole Mi, Gi or Ti as bytes. */}}
{{- define "tercet.bytes" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- $unit := regexFind "[A-Za-z]+$" . -}}
{{- $mi := mul $number 1048576 -}}
{{- if eq $unit "Gi" }}{{ mul $mi 1024 }}{{ else if eq $unit "Ti" }}{{ mul $mi 1048576 }}{{ else }}{{ $mi }}{{ end -}}
{{- end }}

{{/* A word for the shell. */}}
{{- define "tercet.quoted" -}}
'{{ replace "'" "'\\''" . }}'
{{- end }}

{{/* dataDir, or the reason why it cannot be Tercet's own. */}}
{{- define "tercet.checkDataDir" -}}
{{- $data := .Values.dataDir -}}
{{- if ne $data (clean $data) }}
{{- fail (printf "dataDir: write %s as %s" $data (clean $data)) }}
{{- end }}
{{- $kubelet := clean .Values.kubeletDir }}
{{- if or (eq $data $kubelet) (hasPrefix (printf "%s/" $data) $kubelet) (hasPrefix (printf "%s/" $kubelet) $data) }}
{{- fail (printf "dataDir: %s and the kubelet's %s are not apart: take a folder that is Tercet's alone, like /var/lib/tercet" $data $kubelet) }}
{{- end }}
{{- end }}

{{/* Bytes of a device's file, or the reason why an engine could not use it: (list $ "which" $file). */}}
{{- define "tercet.fileBytes" -}}
{{- $data := (index . 0).Values.dataDir -}}
{{- $which := index . 1 -}}
{{- $file := index . 2 -}}
{{- $path := $file.path -}}
{{- if not (hasPrefix (printf "%s/" $data) (clean $path)) }}
{{- fail (printf "%s: %s is not below dataDir %s, the only folder of the node that the engine sees: take %s/devices/NAME" $which $path $data $data) }}
{{- end }}
{{- if ne $path (clean $path) }}
{{- fail (printf "%s: write %s as %s" $which $path (clean $path)) }}
{{- end }}
{{- range list "engine" "attach" "csi" }}
{{- $own := printf "%s/%s" $data . }}
{{- if or (eq $path $own) (hasPrefix (printf "%s/" $own) $path) }}
{{- fail (printf "%s: %s is in %s, where Tercet keeps its own state: take %s/devices/NAME" $which $path $own $data) }}
{{- end }}
{{- end }}
{{- if eq $path (printf "%s/devices" $data) }}
{{- fail (printf "%s: %s is the folder of device files: take %s/NAME" $which $path $path) }}
{{- end }}
{{- $bytes := include "tercet.bytes" $file.capacity | int64 -}}
{{- if lt $bytes 268435456 }}
{{- fail (printf "%s: capacity %s is less than 256Mi, the least that an engine takes" $which $file.capacity) }}
{{- end }}
{{- if mod $bytes 4194304 }}
{{- fail (printf "%s: capacity %s is no multiple of 4Mi, which an engine wants" $which $file.capacity) }}
{{- end }}
{{- $bytes -}}
{{- end }}

{{/* A PodDisruptionBudget: (list $ "component"). */}}
{{- define "tercet.budget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: tercet-{{ index . 1 }}
  namespace: {{ (index . 0).Release.Namespace }}
  labels:
    {{- include "tercet.labels" (index . 0) | nindent 4 }}
    app.kubernetes.io/component: {{ index . 1 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "tercet.selector" (index . 0) | nindent 6 }}
      app.kubernetes.io/component: {{ index . 1 }}
{{- end }}
