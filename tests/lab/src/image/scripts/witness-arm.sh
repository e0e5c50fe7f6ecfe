#!/bin/sh
# witness-arm: (re)starts the node's witness, with nothing recorded. Three buffers:
#   devices     every state change, read, write and reset of every device; nothing may be missing from it
#   vcpu_first  the first entries into the guest and returns from it: when full, it takes no more
#   vcpu_last   the last ones: when full, the oldest go
set -e
cd /sys/kernel/tracing

instance() {
  mkdir -p "instances/$1"
  echo 0 >"instances/$1/tracing_on"
  echo >"instances/$1/trace"
  echo mono >"instances/$1/trace_clock"
  echo "$2" >"instances/$1/options/overwrite"
  echo "$3" >"instances/$1/buffer_size_kb"
}

instance devices 0 1024
instance vcpu_first 0 512
instance vcpu_last 1 4096
# A running VM writes faster than an emulated processor prints: the reader of this buffer must find an end.
echo 1 >instances/vcpu_last/options/pause-on-trace

# A struct vfio_device begins with its struct device, which begins with its kobject, which begins with its
# name; mtty's own structure begins with the struct vfio_device.
if [ ! -d events/witness ]; then
  name='name=+0(+0(+0(%di))):string'
  {
    echo "p:witness/set mtty_set_state $name new=%si:u32"
    echo "p:witness/step vfio_mig_get_next_state $name cur=%si:u32 new=%dx:u32"
    echo 'r:witness/done mtty_set_state ret=%ax:x64'
    echo 'p:witness/read mtty_save_read file=%di:x64 n=%dx:u64'
    echo 'r:witness/readn mtty_save_read ret=%ax:s64'
    echo 'p:witness/write mtty_resume_write file=%di:x64 n=%dx:u64'
    echo "p:witness/reset mtty_reset $name"
    echo 'p:witness/run kvm_arch_vcpu_ioctl_run vcpu=%di:x64'
    echo 'r:witness/ran kvm_arch_vcpu_ioctl_run ret=%ax:s32'
  } >kprobe_events
fi

for event in set step done read readn write reset; do
  echo 1 >"instances/devices/events/witness/$event/enable"
done
for instance in vcpu_first vcpu_last; do
  for event in run ran; do
    echo 1 >"instances/$instance/events/witness/$event/enable"
  done
done
for instance in devices vcpu_first vcpu_last; do
  echo 1 >"instances/$instance/tracing_on"
done
