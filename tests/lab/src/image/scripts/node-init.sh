#!/bin/sh
# The first program of a node. The kernel's command line describes the node (slackwater.*).
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t tracefs trace /sys/kernel/tracing
mount -t cgroup2 cgroup /sys/fs/cgroup

parameter() { tr ' ' '\n' </proc/cmdline | sed -n "s/^slackwater\.$1=//p"; }
name=$(parameter name)
number=$(parameter number)
mtu=$(parameter mtu)

while read -r module; do
  insmod "/modules/$module.ko" || echo "node-init: $module was not loaded"
done </modules/order

hostname "$name"
echo "127.0.0.1 localhost" >/etc/hosts
ip link set lo up
# The lab's machine, by QEMU's user network: its own side is always 10.0.2.2.
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
# The link between the nodes.
ip address add "10.77.0.$number/24" dev eth1
ip link set eth1 mtu "$mtu" up

device=0
for type in $(parameter devices | tr ',' ' '); do
  create=/sys/class/mdev_bus/mtty/mdev_supported_types/$type/create
  printf '5a1ac0de-%04x-4000-8000-%012x\n' "$number" "$device" >"$create" ||
    echo "node-init: no device of type $type"
  device=$((device + 1))
done

witness-arm || echo "node-init: the witness was not armed"

echo "node-init: up after $(cut -d ' ' -f 1 /proc/uptime) s"
slackwater-lab-node serve
echo "node-init: the control service ended with status $?"
poweroff -f
