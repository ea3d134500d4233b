# On the host's root file system, as its first process: makes the soft-RoCE
# devices, runs the command, and leaves its exit status in the share.
#
# /run/bench/settings.sh, written by machine.py, defines modules, version, rails,
# host, cabled, and the function run_command.
. /run/bench/settings.sh
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export TERM=dumb # the serial line looks like a terminal

finish() { # EXIT STATUS
  echo "$1" >/run/bench/status
  sync
  busybox poweroff -f
}

must() {
  "$@" || {
    echo "guest: $* failed"
    finish 125
  }
}

mkdir -p /dev/pts /dev/shm "/lib/modules/$version"
mount -t devpts devpts /dev/pts
mount -t tmpfs -o size=75% tmpfs /dev/shm
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
must mount --bind "$modules" "/lib/modules/$version"
hostname "rxe$host"
[ "$cabled" = 1 ] && own_address=10.78.0.$((host + 1)) || own_address=127.0.0.1
printf '127.0.0.1 localhost\n%s rxe%s\n' $own_address "$host" >/etc/hosts
ulimit -l unlimited # devices pin what is registered
must ip link set lo up
must modprobe -a ib_uverbs rdma_ucm rdma_rxe
# Loopback reaches a rail itself; a cable reaches the other guest's rail.
[ "$cabled" = 1 ] && must modprobe virtio_net || must modprobe dummy numdummies=0

for ((rail = 0; rail < rails; ++rail)); do
  if [ "$cabled" = 1 ]; then
    must ip link set "eth$rail" name "nic$rail"
  else
    must ip link add "nic$rail" type dummy
  fi
  must ip address add "10.77.$rail.$((host + 1))/24" dev "nic$rail"
  must ip link set "nic$rail" mtu 9000 up
  must rdma link add "rxe$rail" type rxe netdev "nic$rail"
done
# The last cable is not a rail: tests give their orders over it.
if [ "$cabled" = 1 ]; then
  must ip address add "10.78.0.$((host + 1))/24" dev "eth$rails"
  must ip link set "eth$rails" up
fi
echo "guest: ready after $(cut -d' ' -f1 /proc/uptime) s"

# The second serial line carries nothing but the command's output.
stty -F /dev/ttyS1 raw
(run_command) </dev/null >/dev/ttyS1 2>&1
finish $?
