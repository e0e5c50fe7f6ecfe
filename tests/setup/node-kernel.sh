# The nodes' kernel: Debian's 6.12, unpacked but not installed, and the modules that the lab loads. Debian's
# configuration lacks iommufd and the VFIO character devices, so vfio, its type-1 IOMMU and mdev are rebuilt
# with them out of tree. iommufd is added, and so is mtty, the kernel tree's sample driver with migration
# (STOP_COPY | P2P | PRE_COPY).
#
# Result: FOLDER/vmlinuz, FOLDER/modules/*.ko, and FOLDER/modules/order, the module names in loading order.
# VMs inside the nodes run the same kernel, with the modules in FOLDER/guest-modules.

# The modules that a node loads, in any order: dependencies are resolved.
node_modules=(virtio_pci virtio_net virtio_rng kvm kvm_amd vfio vfio_iommu_type1 iommufd mdev mtty)

# The modules that a VM inside a node loads: the disk driver. The serial driver is built in.
guest_modules=(virtio_blk)

# The functions that the witness probes. A function that the compiler has inlined or split cannot be probed.
declare -A probed=(
  [mtty]="mtty_set_state mtty_save_read mtty_resume_write mtty_reset"
  [vfio]="vfio_mig_get_next_state"
  [kvm]="kvm_arch_vcpu_ioctl_run"
)

make_node_kernel() {
  local w=${1:?} release version common source
  private_apt "$w/apt"
  step "$w/log/lists.log" "node kernel: fetching Debian's package lists" apt-get "${bookworm[@]}" update
  # The newest 6.12 in the archive: a newer version replaces the older one there.
  release=$(apt-cache "${bookworm[@]}" pkgnames linux-headers-6.12. |
    sed -n 's/^linux-headers-\(6\.12\.[0-9]*+deb12\)-amd64$/\1/p' | sort -V | tail -n 1)
  [ -n "$release" ] || die "no 6.12 kernel in Debian bookworm's archive"
  version=$(apt-cache "${bookworm[@]}" show "linux-headers-$release-amd64" |
    sed -n 's/^Version: //p' | sort -V | tail -n 1)
  step "$w/log/download.log" "node kernel: downloading $release ($version)" download_kernel "$w" "$release" "$version"
  step "$w/log/unpack.log" "node kernel: unpacking" unpack_kernel "$w" "$release"
  lay_out_modules "$w" "$release"
  step "$w/log/modules.log" "node kernel: building the modules, about half a minute, once" \
    make -j"$(nproc)" -C "$w/k/usr/src/linux-headers-$release-amd64" M="$w/oot" CONFIG_DEBUG_INFO_BTF_MODULES= modules
  check_probed "$w" "$release"
  collect_modules "$w" "$release" "$w/modules" "${node_modules[@]}"
  collect_modules "$w" "$release" "$w/guest-modules" "${guest_modules[@]}"
  cp "$w/k/boot/vmlinuz-$release-amd64" "$w/vmlinuz"
  echo "$release-amd64" >"$w/release"
  rm -rf "$w"/{apt,debs,k,src,oot}
}

download_kernel() {
  local w=${1:?} release=$2 version=$3
  mkdir -p "$w/debs"
  cd "$w/debs"
  apt-get "${bookworm[@]}" download "linux-image-$release-amd64=$version" "linux-headers-$release-amd64=$version" \
    "linux-headers-$release-common=$version" "linux-kbuild-$release=$version" "linux-source-6.12=$version"
}

unpack_kernel() {
  local w=${1:?} release=$2 deb top=linux-source-6.12
  rm -rf "$w/k" "$w/src"
  mkdir -p "$w/k" "$w/src"
  for deb in "$w"/debs/linux-{image,headers,kbuild}-*.deb; do dpkg -x "$deb" "$w/k"; done
  dpkg --fsys-tarfile "$w"/debs/linux-source-*.deb | tar -xO "./usr/src/$top.tar.xz" |
    tar -xJ -C "$w/src" --strip-components=1 \
    "$top/samples/vfio-mdev" "$top/drivers/vfio" "$top/drivers/iommu" "$top/lib/interval_tree.c"
  # The headers package expects to be under /usr/src.
  sed -i "s#^include /usr/src/#include $w/k/usr/src/#" "$w/k/usr/src/linux-headers-$release-amd64/Makefile"
}

lay_out_modules() {
  local w=${1:?} oot=$1/oot
  rm -rf "$oot"
  mkdir -p "$oot/iommu" "$oot/samples"
  cp -r "$w/src/drivers/iommu/iommufd" "$oot/iommu/"
  cp "$w"/src/drivers/iommu/*.h "$oot/iommu/"
  cp -r "$w/src/drivers/vfio" "$oot/"
  # If the compiler inlined it into its only caller, the witness could not see a reset.
  sed 's/^static int mtty_reset(/static noinline int mtty_reset(/' \
    "$w/src/samples/vfio-mdev/mtty.c" >"$oot/samples/mtty.c"
  grep -q '^static noinline int mtty_reset(' "$oot/samples/mtty.c" || die "mtty.c has changed: it has no mtty_reset"
  rm -f "$oot/iommu/iommufd/Makefile" "$oot/vfio/Makefile" "$oot/vfio/mdev/Makefile"
  # Debian's kernel does not export iommufd's span iterator: link a copy into the module.
  {
    printf '#include <linux/interval_tree.h>\n#include <linux/module.h>\n#include <linux/limits.h>\n#if 1\n'
    sed -n '/^#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER/,$p' "$w/src/lib/interval_tree.c" | sed '1d' | grep -v EXPORT_SYMBOL
  } >"$oot/iommu/iommufd/span_iter.c"
  cat >"$oot/Kbuild" <<'KBUILD'
subdir-ccflags-y += -DCONFIG_IOMMUFD_MODULE=1 -DCONFIG_IOMMUFD_DRIVER=1 -DCONFIG_VFIO_DEVICE_CDEV=1
obj-m += iommu/iommufd/ vfio/ samples/
KBUILD
  cat >"$oot/iommu/iommufd/Kbuild" <<'KBUILD'
iommufd-y := device.o fault.o hw_pagetable.o io_pagetable.o ioas.o main.o pages.o vfio_compat.o iova_bitmap.o span_iter.o
obj-m += iommufd.o
KBUILD
  cat >"$oot/vfio/Kbuild" <<'KBUILD'
vfio-y := vfio_main.o device_cdev.o group.o iommufd.o container.o virqfd.o
obj-m += vfio.o vfio_iommu_type1.o mdev/
KBUILD
  cat >"$oot/vfio/mdev/Kbuild" <<'KBUILD'
mdev-y := mdev_core.o mdev_sysfs.o mdev_driver.o
obj-m += mdev.o
KBUILD
  echo 'obj-m += mtty.o' >"$oot/samples/Kbuild"
}

# module_file W RELEASE NAME: prints the module's file, ours before Debian's; nothing if the module is built
# in.
module_file() {
  local w=${1:?} release=$2 pattern=${3//_/[-_]}
  find "$w/oot" "$w/k/lib/modules/$release-amd64/kernel" \
    \( -name "$pattern.ko" -o -name "$pattern.ko.xz" \) -print -quit
}

# plain_module FILE TO: decompresses and strips a module (stripping drops its signature, which nothing checks
# here).
plain_module() {
  case $1 in
    *.xz) xz -dc "$1" >"$2" ;;
    *) cp "$1" "$2" ;;
  esac
  strip --strip-debug "$2"
}

check_probed() {
  local w=${1:?} release=$2 name symbol symbols
  for name in "${!probed[@]}"; do
    plain_module "$(module_file "$w" "$release" "$name")" "$w/probed.ko"
    symbols=$(nm "$w/probed.ko")
    for symbol in ${probed[$name]}; do
      grep -qE " [tT] $symbol\$" <<<"$symbols" || die "$name.ko has no symbol $symbol: the witness could not see it"
    done
  done
  rm -f "$w/probed.ko"
}

# collect_modules W RELEASE TO NAME...
collect_modules() {
  local w=${1:?} release=$2 to=$3 name
  shift 3
  rm -rf "$to"
  mkdir -p "$to"
  : >"$to/order"
  for name in "$@"; do collect_module "$w" "$release" "$to" "$name"; done
}

collect_module() {
  local w=${1:?} release=$2 to=$3 name=${4//-/_} file needs need
  [ ! -e "$to/$name.ko" ] || return 0
  file=$(module_file "$w" "$release" "$name")
  # Built into the kernel.
  [ -n "$file" ] || return 0
  plain_module "$file" "$to/$name.ko"
  needs=$(objcopy -O binary --only-section=.modinfo "$to/$name.ko" /dev/stdout | tr '\0' '\n' | sed -n 's/^depends=//p')
  for need in ${needs//,/ }; do collect_module "$w" "$release" "$to" "$need"; done
  echo "$name" >>"$to/order"
}
