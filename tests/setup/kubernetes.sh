# etcd and kube-apiserver from Debian bookworm: etcd from the binary package, kube-apiserver built from
# Debian's source package with Debian's Go and without a module proxy. Both end up in FOLDER/bin.

# The components to build.
kubernetes_components=(kube-apiserver)

make_kubernetes() {
  local w=${1:?} component source
  private_apt "$w/apt"
  mkdir -p "$w"/{dl,bin,gocache,gotmp,home}
  step "$w/log/lists.log" "kubernetes: fetching Debian's package lists" apt-get "${bookworm[@]}" update
  step "$w/log/download.log" "kubernetes: downloading etcd, Go and the source" download_kubernetes "$w"
  step "$w/log/unpack.log" "kubernetes: unpacking" unpack_kubernetes "$w"
  source=$w/gopath/src/k8s.io/kubernetes
  go_environment "$w"
  if [ ! -e "$source/.generated" ]; then
    step "$w/log/generator.log" "kubernetes: building its API generator" \
      go_in "$source" build -o "$w/openapi-gen" "$kubernetes_path/vendor/k8s.io/kube-openapi/cmd/openapi-gen"
    step "$w/log/generate.log" "kubernetes: generating its API definitions" generate_openapi "$w" "$source"
  fi
  for component in "${kubernetes_components[@]}"; do
    step "$w/log/build-$component.log" "kubernetes: building $component, about 3 to 5 minutes, once" \
      build_component "$w" "$source" "$component"
  done
  rm -rf "$w"/{apt,dl,root,gopath,gocache,gotmp,home,openapi-gen}
}

kubernetes_path=k8s.io/kubernetes

download_kubernetes() {
  local w=${1:?}
  cd "$w/dl"
  apt-get "${bookworm[@]}" download golang-1.19-go golang-1.19-src golang-github-modern-go-reflect2-dev etcd-server
  apt-get "${bookworm[@]}" source --download-only kubernetes
}

unpack_kubernetes() {
  local w=${1:?} deb source=$1/gopath/src/k8s.io/kubernetes reflect2
  # A second try must not mistake a half-unpacked tree for a complete one.
  [ ! -e "$source/.unpacked" ] || return 0
  rm -rf "$w/root" "$source"
  mkdir -p "$w/root" "$source"
  for deb in "$w"/dl/*.deb; do dpkg -x "$deb" "$w/root"; done
  install -m 755 "$w/root/usr/bin/etcd" "$w/bin/etcd"
  tar xf "$w"/dl/kubernetes_*.orig.tar.gz --strip-components=1 -C "$source"
  # The copy of reflect2 in the source crashes with Go 1.18 and newer when it walks maps: Debian's newer one
  # does not.
  reflect2=$source/vendor/github.com/modern-go/reflect2
  rm -rf "$reflect2"
  cp -r "$w/root/usr/share/gocode/src/github.com/modern-go/reflect2" "$reflect2"
  rm -f "$reflect2/go.mod"
  touch "$source/.unpacked"
}

# Go in GOPATH mode, without network access and without the user's own settings.
go_environment() {
  local w=${1:?}
  go_settings=(HOME="$w/home" PATH="$w/root/usr/lib/go-1.19/bin:/usr/bin:/bin" GOROOT="$w/root/usr/lib/go-1.19"
    GOPATH="$w/gopath" GOCACHE="$w/gocache" GOTMPDIR="$w/gotmp" GO111MODULE=off GOPROXY=off
    GOSUMDB=off GOFLAGS= CGO_ENABLED=0)
}

# go_in FOLDER ARGUMENT...
go_in() {
  local folder=$1
  shift
  cd "$folder"
  env -i "${go_settings[@]}" go "$@"
}

# Generates the one file that the source archive leaves out.
generate_openapi() {
  local w=${1:?} source=$2 packages
  cd "$source"
  packages=$(grep -rl --include='*.go' --exclude='zz_generated*' --exclude='*_test.go' '+k8s:openapi-gen=' \
    pkg cmd plugin staging/src/k8s.io |
    grep -vE '/(code-generator|sample-[a-z-]*)/|/_examples/' | xargs -n 1 dirname | LC_ALL=C sort -u |
    sed -e 's,^staging/src/,vendor/,' -e "s,^,$kubernetes_path/," | paste -sd,)
  env -i "${go_settings[@]}" "$w/openapi-gen" --logtostderr -i "$packages" -p "$kubernetes_path/pkg/generated/openapi" \
    -O zz_generated.openapi -h vendor/k8s.io/code-generator/hack/boilerplate.go.txt -r "$w/log/openapi.violations"
  touch "$source/.generated"
}

build_component() {
  local w=${1:?} source=$2 component=$3 version package path flags=
  # "1.20.5+really1.20.2-1.1+deb12u1" is 1.20.2.
  version=$(basename "$w"/dl/kubernetes_*.dsc .dsc)
  version=${version#kubernetes_}
  version=${version##*really}
  version=${version%%-*}
  for package in client-go/pkg component-base; do
    for path in k8s.io "$kubernetes_path/vendor/k8s.io"; do
      path=$path/$package/version
      flags="$flags -X $path.gitVersion=v$version -X $path.gitMajor=$(cut -d. -f1 <<<"$version")"
      flags="$flags -X $path.gitMinor=$(cut -d. -f2 <<<"$version")"
      flags="$flags -X $path.gitTreeState=archive"
    done
  done
  go_in "$source" build -p "$(nproc)" -tags providerless -trimpath -ldflags "-s -w $flags" \
    -o "$w/bin/$component" "$kubernetes_path/cmd/$component"
}
