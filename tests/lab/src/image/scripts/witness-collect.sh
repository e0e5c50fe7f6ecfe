#!/bin/sh
# witness-collect: prints what the witness has recorded. Each part begins with a line "@@ PART".
cd /sys/kernel/tracing || exit 1
for instance in devices vcpu_first vcpu_last; do
  echo "@@ $instance"
  cat "instances/$instance/trace"
  echo "@@ $instance.lost"
  for cpu in "instances/$instance"/per_cpu/cpu*; do
    sed "s/^/${cpu##*/cpu} /" "$cpu/stats"
  done
done
echo "@@ missed"
cat kprobe_profile
