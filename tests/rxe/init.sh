#!/bin/busybox sh
# First process of the guest: puts a writable layer over the host's root file
# system and goes on there, with guest.sh.
busybox=/bin/busybox

give_up() {
  echo "init: $*"
  $busybox poweroff -f
}

$busybox mount -t devtmpfs dev /dev
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
for module in /modules/*.ko; do
  $busybox insmod "$module" || give_up "$module cannot be loaded"
done

options=trans=virtio,version=9p2000.L,msize=524288
# The host's files are taken not to change under a running guest.
$busybox mount -t 9p -o ro,cache=loose,$options host /root-lower ||
  give_up "no root file system"
$busybox mount -t tmpfs -o size=75% tmpfs /root-upper
$busybox mkdir /root-upper/changes /root-upper/work
$busybox mount -t overlay -o \
  lowerdir=/root-lower,upperdir=/root-upper/changes,workdir=/root-upper/work \
  root /new || give_up "no overlay on the root file system"
for folder in dev proc sys; do
  $busybox mkdir -p /new/$folder
  $busybox mount --move /$folder /new/$folder
done
$busybox mount -t tmpfs tmpfs /new/run
$busybox mkdir /new/run/bench
$busybox mount -t 9p -o $options bench /new/run/bench || give_up "no share"
exec $busybox switch_root /new /bin/bash /run/bench/guest.sh
