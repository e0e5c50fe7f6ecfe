{{- define "slackwater.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "slackwater.operator.serviceAccountName" -}}
{{- default (printf "%s-operator" (include "slackwater.fullname" .)) .Values.operator.serviceAccount.name -}}
{{- end -}}

{{- define "slackwater.labels" -}}
app.kubernetes.io/name: slackwater
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}
