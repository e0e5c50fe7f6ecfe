# Installs the host packages that the lab needs: QEMU, busybox, and the build tools for the kernel modules.
# If all of them are installed, it does nothing and fetches no package lists.

# The oldest QEMU that works. The nodes run the same QEMU, and it must report VFIO migration states (the
# VFIO_MIGRATION event).
qemu_needed=9.1

qemu_is_enough() {
  local version
  version=$(qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p')
  [ -n "$version" ] && [ "$(printf '%s\n' "$qemu_needed" "$version" | sort -V | head -n 1)" = "$qemu_needed" ]
}

missing_packages() {
  local package
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
  done
}

install_host_packages() {
  local wanted=(busybox-static qemu-utils make gcc-12 binutils xz-utils bc unzip util-linux libelf1)
  local missing folder=$cache/host-packages
  ! is_debian || wanted+=(debian-archive-keyring)
  command -v npm >/dev/null || wanted+=(npm)
  command -v cc >/dev/null || wanted+=(gcc libc6-dev)
  # Since the 64-bit time_t transition the library has another name.
  ! dpkg-query -W libelf1t64 >/dev/null 2>&1 || wanted=("${wanted[@]/libelf1/libelf1t64}")
  mapfile -t missing < <(missing_packages "${wanted[@]}")
  if [ "${#missing[@]}" -eq 0 ] && qemu_is_enough; then
    say "host packages: already installed"
    return
  fi
  mkdir -p "$folder"
  step "$folder/update.log" "apt: fetching the lists" as_root apt-get -qq update
  if [ "${#missing[@]}" -gt 0 ]; then
    step "$folder/install.log" "apt: installing ${missing[*]}" \
      as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${missing[@]}"
  fi
  qemu_is_enough || install_qemu "$folder"
  qemu_is_enough || die "QEMU $qemu_needed or newer is needed, and the packages of this machine have an older one"
}

install_qemu() {
  local folder=$1 from=()
  if is_debian && grep -qx 'VERSION_CODENAME=bookworm' /etc/os-release; then
    private_apt "$folder/apt"
    step "$folder/backports.log" "apt: fetching the lists of bookworm-backports" as_root apt-get "${bookworm[@]}" update
    from=("${bookworm[@]}" -t bookworm-backports)
  fi
  step "$folder/qemu.log" "apt: installing QEMU" \
    as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get "${from[@]}" -qq -y install --no-install-recommends qemu-system-x86
}
