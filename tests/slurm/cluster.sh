#!/usr/bin/env bash
# A throw-away Slurm cluster on this machine, for tests. Needs root, on Debian or Ubuntu.
#   cluster.sh up DIR [NODES]     stdout: the path of its slurm.conf; 77: it cannot be had here, and why
#   cluster.sh down DIR           stop all of it, and remove DIR
#   cluster.sh crash DIR NODE     SIGKILL for everything that runs on a node, as when its power fails
#   cluster.sh revive DIR NODE    start that node again
# Every node has a network, a host name and process ids of its own; files are shared. Each has 2 CPUs and 4
# GPUs that nothing uses. Jobs of the partition `urgent` preempt those of `main`, which have 20 s to end.
# There is no accounting: sacct answers nothing.
set -euo pipefail
command=$1 dir=$2
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
packages="slurmctld slurmd slurm-client munge iproute2"

cannot() { echo "$*" >&2; exit 77; }

runs() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

await() {  # await TENTHS COMMAND...
  local left=$1; shift
  until "$@" >/dev/null 2>&1; do
    left=$((left - 1)); [ "$left" -gt 0 ] || return 1
    sleep 0.1
  done
}

install_packages() {
  local missing
  missing=$(for name in $packages; do dpkg -s "$name" >/dev/null 2>&1 || echo "$name"; done)
  [ -n "$missing" ] || return 0
  [ "$(id -u)" = 0 ] || cannot "Slurm's packages are not installed, and installing them needs root"
  command -v apt-get >/dev/null || cannot "no apt-get to install $(echo $missing) with"
  # RUNLEVEL: the packages must not start daemons of their own.
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  local get="apt-get -qq -o DPkg::Lock::Timeout=300"
  { $get update && $get install -y --no-install-recommends $missing; } >"$dir/apt.log" 2>&1 ||
    cannot "apt-get cannot install $(echo $missing): $(tail -1 "$dir/apt.log")"
}

configure() {  # the bridge lbrN and its subnet 10.N.0.0/24 are the cluster's
  local nodes=$1 n=100 host; host=$(hostname -s)
  mkdir -p "$dir"/{state,spool,log}
  until ip link add "lbr$n" type bridge 2>"$dir/log/ip"; do
    grep -q exists "$dir/log/ip" || cannot "no network bridges here: $(cat "$dir/log/ip")"
    n=$((n + 1))
  done
  echo "$n" >"$dir/subnet"
  echo "$nodes" >"$dir/nodes"
  (umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
  { echo "127.0.0.1 localhost"; echo "10.$n.0.1 $host"
    for i in $(seq "$nodes"); do echo "10.$n.0.$((10 + i)) node$i"; done; } >"$dir/hosts"
  echo "nameserver 127.0.0.1" >"$dir/resolv.conf"  # refuses at once
  for i in 0 1 2 3; do mknod "$dir/gpu$i" c 1 3 || cannot "no device files here"; done  # each a /dev/null
  echo "Name=gpu File=$dir/gpu[0-3]" >"$dir/gres.conf"
  cat >"$dir/slurm.conf" <<END
ClusterName=tests
SlurmctldHost=$host(10.$n.0.1)
SlurmctldPort=$((6800 + n))
SlurmUser=root
AuthType=auth/munge
# cred_expire: so long, rather than two minutes, a requeued job waits before it can start again
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=5
MessageTimeout=5
TCPTimeout=2
SlurmdTimeout=8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-$nodes] NodeAddr=10.$n.0.[11-$((10 + nodes))] CPUs=2 RealMemory=4000 Gres=gpu:4
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE
END
  # The first process of a node: with it, everything on the node ends.
  cat >"$dir/node" <<END
#!/bin/sh
cd /
hostname "\$1"
mount --bind "$dir/hosts" /etc/hosts
mount --bind "$dir/resolv.conf" "\$(readlink -f /etc/resolv.conf)"
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
trap 'kill \$p' TERM
slurmd -D -f "$dir/slurm.conf" -N "\$1" & p=\$!
while kill -0 \$p; do wait \$p; done
END
  chmod +x "$dir/node"
}

start_node() {
  local i=${1#node} n name; n=$(cat "$dir/subnet"); name=l$n-$1
  ip netns add "$name" || cannot "no network namespaces here"
  ip link add "l$n-$i" type veth peer name eth0 netns "$name"
  ip link set "l$n-$i" master "lbr$n" up
  ip -n "$name" link set lo up
  ip -n "$name" addr add "10.$n.0.$((10 + i))/24" dev eth0
  ip -n "$name" link set eth0 up
  ip -n "$name" route add default via "10.$n.0.1"
  rm -f "$dir/slurmd.$1.pid"
  setsid nsenter --net="/run/netns/$name" \
    unshare --mount --uts --pid --fork --kill-child --mount-proc "$dir/node" "$1" \
    </dev/null >>"$dir/log/$1.out" 2>&1 &
  local parent=$!
  await 50 pgrep -P "$parent" node || cannot "no process namespaces here: $(tail -1 "$dir/log/$1.out")"
  ip netns del "$name"  # the name alone: its processes keep it
  pgrep -P "$parent" node >"$dir/$1.pid"
}

up() {
  mkdir -p "$dir"; dir=$(cd "$dir" && pwd)
  install_packages
  [ "$(id -u)" = 0 ] || cannot "starting a Slurm cluster needs root"
  configure "$1"
  local n; n=$(cat "$dir/subnet")
  ip addr add "10.$n.0.1/24" dev "lbr$n"
  ip link set "lbr$n" up
  munged --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" --force
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -f "$SLURM_CONF"
  await 100 scontrol ping
  local node
  for node in $(seq -f node%g "$1"); do start_node "$node"; done
  await 300 all_idle || { echo "nodes do not come up: see $dir/log" >&2; exit 1; }
  echo "$SLURM_CONF"
}

all_idle() { [ "$(sinfo -h -N -p main -t idle | wc -l)" = "$(cat "$dir/nodes")" ]; }

stop() {  # stop FILE: end the process whose number it holds
  runs "$1" || return 0
  local pid; pid=$(cat "$1")
  kill "$pid" 2>/dev/null || true
  await 50 sh -c "! kill -0 $pid" || kill -9 "$pid" 2>/dev/null || true
}

down() {
  [ -e "$dir/slurm.conf" ] || { rm -rf "$dir"; return 0; }
  export SLURM_CONF=$dir/slurm.conf
  local n i; n=$(cat "$dir/subnet")
  stop "$dir/slurmctld.pid"
  for i in $(seq "$(cat "$dir/nodes")"); do
    [ ! -s "$dir/node$i.pid" ] || kill -9 "$(cat "$dir/node$i.pid")" 2>/dev/null || true
    ip link del "l$n-$i" 2>/dev/null || true
  done
  stop "$dir/munged.pid"
  ip link del "lbr$n" 2>/dev/null || true
  rm -rf "$dir"
}

crash() {
  kill -9 "$(cat "$dir/$1.pid")"
  ip link del "l$(cat "$dir/subnet")-${1#node}" 2>/dev/null || true
}

case $command in
  up) up "${3:-3}" ;;
  down) down ;;
  crash) crash "$3" ;;
  revive) start_node "$3" ;;
  *) echo "up, down, crash or revive, not $command" >&2; exit 2 ;;
esac
